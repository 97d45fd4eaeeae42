"""How wrong a result may be: the whole numerics policy, for ``lora-kernels verify`` and for the tests alike.

*Exact* is the reference in float64 on the same rounded inputs (lora_a and lora_b rounded to the compute dtype, as every
backend rounds them, and over fp16 not at all: ``reference.adapter_dtype``). The *yardstick* is the same reference,
plain PyTorch, in the compute dtype, on contiguous copies. The *floor* is the error that is to be expected of that plain
composition, whatever the order of its sums. A yardstick of few numbers may be lucky, an expectation is not;
``rounding`` derives it. A result passes if all its values are finite and

* its relative Frobenius error is at most 2 x the larger of the yardstick's and the floor + eps / 4 (eps of the compute
  dtype),
* its worst row's error, relative to the root mean square of the rows, is at most 3 x the larger of the two + eps,
* its relative Frobenius error is below the ceiling of the compute dtype, which is for one layer: of layers that follow
  one another, each brings its own.

Relative to the composition, for at small M and R cancellation makes fixed bounds unfair to correct code. A gradient
that leaves in a coarser dtype than the compute dtype (16-bit adapters over an fp32 base) is judged, and its yardstick
rounded, in that one. In float64 *exact* is no more exact than the result: there the ceiling alone holds, for rows too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .rounding import TF32_EPS, Arithmetic, rounding_square

__all__ = [
    "OUTPUTS",
    "Accuracy",
    "ceiling_of",
    "expected_errors",
    "fp32_products",
    "judge",
    "run_reference",
    "sum_error",
    "tf32_allowed",
]

CEILINGS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TF32_CEILING = 2e-3
FROBENIUS_FACTOR, ROW_FACTOR = 2.0, 3.0

OUTPUTS = ("y", "dx", "da", "db", "dbias", "dgain")


@dataclass(frozen=True)
class Accuracy:
    """The verdict on one result.

    Attributes:
        name: which result, one of ``OUTPUTS``.
        error, yardstick, floor: relative Frobenius errors against float64 of the result and of the yardstick, and what
            is to be expected of it.
        row_error, row_yardstick, row_floor: the same of the worst row.
        limit, row_limit: what ``error`` and ``row_error`` may be.
        finite: whether every value is finite.
    """

    name: str
    error: float
    yardstick: float
    floor: float
    row_error: float
    row_yardstick: float
    row_floor: float
    limit: float
    row_limit: float
    finite: bool

    @property
    def passed(self) -> bool:
        return self.finite and self.error <= self.limit and self.row_error <= self.row_limit

    @property
    def ratio(self) -> float:
        """The error over the larger of yardstick and floor; 1 where all are zero, inf where only those two are."""
        measure = max(self.yardstick, self.floor)
        if measure == 0.0:
            return 1.0 if self.error == 0.0 else float("inf")
        return self.error / measure

    def __str__(self) -> str:
        verdict = "passes" if self.passed else "FAILS"
        finite = "" if self.finite else "; some values are not finite"
        return (
            f"{self.name} {verdict}: error {self.error:.3e} (limit {self.limit:.3e}, yardstick {self.yardstick:.3e}, "
            f"floor {self.floor:.3e}), worst row {self.row_error:.3e} (limit {self.row_limit:.3e}, yardstick "
            f"{self.row_yardstick:.3e}, floor {self.row_floor:.3e}){finite}"
        )


def judge(
    name: str,
    actual: Tensor,
    exact: Tensor,
    yardstick: Tensor,
    dtype: torch.dtype,
    tf32: bool = False,
    depth: int = 1,
    expected: Tensor | None = None,
) -> Accuracy:
    """Measures ``actual`` against the float64 ``exact`` beside ``yardstick``, for the compute dtype ``dtype``.

    Args:
        tf32: fp32 products were allowed to round their inputs to TF32.
        depth: how many layers follow one another in what is judged.
        expected: the error to expect of each element, by :func:`expected_errors` or :func:`sum_error`; None is that
            of one rounding.

    Raises:
        ValueError: shapes differ, or the yardstick has values that are not finite: then it measures nothing.
    """
    if coarser := torch.finfo(actual.dtype).eps > torch.finfo(dtype).eps:
        dtype, yardstick = actual.dtype, yardstick.to(actual.dtype)
    if not bool(torch.isfinite(yardstick).all()):
        raise ValueError(f"the yardstick of {name} has values that are not finite: nothing can be judged by it")
    error, row_error = _errors(actual, exact)
    yardstick_error, row_yardstick = _errors(yardstick, exact)
    square = None if expected is None else expected.double().square()
    if square is None or coarser:
        rounding = rounding_square(exact.detach().double(), dtype)
        square = rounding if square is None else square + rounding
    floor, row_floor = _relative(square, exact)
    eps = TF32_EPS if tf32 else torch.finfo(dtype).eps
    ceiling = ceiling_of(dtype, tf32, depth)
    limit = min(FROBENIUS_FACTOR * max(yardstick_error, floor) + eps / 4, ceiling)
    row_limit = ROW_FACTOR * max(row_yardstick, row_floor) + eps
    if dtype == torch.float64:
        limit = row_limit = ceiling
    return Accuracy(
        name=name,
        error=error,
        yardstick=yardstick_error,
        floor=floor,
        row_error=row_error,
        row_yardstick=row_yardstick,
        row_floor=row_floor,
        limit=limit,
        row_limit=row_limit,
        finite=bool(torch.isfinite(actual).all()),
    )


def tf32_allowed() -> bool:
    """Whether torch may round what enters its fp32 products on CUDA to TF32.

    By the setting that knows of all ways to say so: the older ``allow_tf32`` raises where a program has used this one.
    """
    setting = torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", setting)
    return bool(setting == "tf32")


@contextmanager
def fp32_products(tf32: bool) -> Iterator[None]:
    """Within the block torch may round what enters its fp32 products on CUDA to TF32, or may not."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision  # type: ignore[attr-defined]
    settings.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        settings.fp32_precision = before  # type: ignore[attr-defined]


def ceiling_of(dtype: torch.dtype, tf32: bool = False, depth: int = 1) -> float:
    """What a relative Frobenius error may be at most, whatever the yardstick's; arguments as for :func:`judge`."""
    return depth * (TF32_CEILING if tf32 else CEILINGS[dtype])


def run_reference(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    scaling: float,
    mask: Tensor | None,
    p: float,
    gain: Tensor | None = None,
    activation: str = "identity",
) -> dict[str, Tensor]:
    """The ``OUTPUTS`` by the reference in ``dtype``, the adapters first rounded as backends do, bias to x's dtype.

    With float64 it gives *exact*, with x's own dtype the *yardstick*. x (M, K), weight (N, K), lora_a (R, K), lora_b
    (N, R), bias (N,) or None, dy (M, N), mask (M, K) bool or None, gain (N,) or None: dgain is there only with it. All
    are read as contiguous copies: some CPUs' own 16-bit products read past the rows of others.
    """
    x_, weight_ = (_copy(t.detach().to(x.dtype), dtype) for t in (x, weight))
    a_, b_ = (_copy(t.detach().to(reference.adapter_dtype(x.dtype)), dtype) for t in (lora_a, lora_b))
    bias_ = None if bias is None else _copy(bias.detach().to(x.dtype), dtype)
    gain_ = None if gain is None else _copy(gain.detach(), dtype)
    y, _ = reference.forward(x_, weight_, a_, b_, bias_, scaling, mask, p, gain_, activation)
    g = reference.backward(_copy(dy.detach(), dtype), x_, weight_, a_, b_, scaling, mask, p, gain_, activation)
    results = {"y": y, "dx": g.dx, "da": g.da, "db": g.db, "dbias": g.dbias}
    return results if gain is None else results | {"dgain": g.dgain}


def expected_errors(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    scaling: float,
    mask: Tensor | None,
    p: float,
    gain: Tensor | None = None,
    activation: str = "identity",
    *,
    tf32: bool = False,
) -> dict[str, Tensor]:
    """The root mean square error to expect of each element of the ``OUTPUTS`` by the plain composition in ``dtype``.

    The reference's own formulas, run on numbers that carry it (``rounding``). Arguments as for :func:`run_reference`;
    ``tf32`` as for :func:`judge`.
    """
    of = Arithmetic(dtype, tf32).of
    adapters = (t.detach().to(reference.adapter_dtype(x.dtype)) for t in (lora_a, lora_b))
    x_, w, a, b, dy_ = (of(t.contiguous()) for t in (x, weight, *adapters, dy))
    bias_ = None if bias is None else of(bias.detach().to(x.dtype))
    gain_ = None if gain is None else of(gain)
    y, _ = reference.forward(x_, w, a, b, bias_, scaling, mask, p, gain_, activation)  # type: ignore[arg-type]
    g = reference.backward(dy_, x_, w, a, b, scaling, mask, p, gain_, activation)  # type: ignore[arg-type]
    found = {"y": y, "dx": g.dx, "da": g.da, "db": g.db, "dbias": g.dbias}
    found = found if gain is None else found | {"dgain": g.dgain}
    return {name: noisy.error for name, noisy in found.items()}  # type: ignore[attr-defined]


def sum_error(left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The root mean square error to expect of each element of ``left @ right`` in ``dtype``.

    left (I, n), right (n, J), the result (I, J): sums of n products, added one by one in an order drawn at random.
    """
    of = Arithmetic(dtype).of
    return (of(left) @ of(right)).error


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative Frobenius error and worst row's error; absolute where ``exact`` is zero, zero where it is empty."""
    if actual.shape != exact.shape:
        raise ValueError(f"a result of shape {tuple(actual.shape)} cannot be {tuple(exact.shape)}")
    exact = exact.detach().double()
    return _relative((actual.detach().double() - exact).square(), exact)


def _relative(square: Tensor, exact: Tensor) -> tuple[float, float]:
    """The same of errors whose squares are given."""
    if exact.numel() == 0:
        return 0.0, 0.0
    exact = exact.detach().double()
    if exact.dim() == 1:
        square, exact = square.unsqueeze(1), exact.unsqueeze(1)
    norm = float(exact.norm())
    scale = norm if norm > 0.0 else 1.0
    worst = float(square.sum(dim=1).max()) ** 0.5
    return float(square.sum()) ** 0.5 / scale, worst / (scale / exact.shape[0] ** 0.5)
