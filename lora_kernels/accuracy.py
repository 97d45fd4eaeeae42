"""How wrong a result may be: the whole numerics policy, for ``lora-kernels verify`` and for the tests alike.

*Exact* is the reference in float64 on the same rounded inputs (lora_a and lora_b rounded to the compute dtype, as every
backend rounds them). The *yardstick* is the same reference, plain PyTorch, in the compute dtype. A result passes if all
its values are finite and

* its relative Frobenius error is at most 2 x the yardstick's + eps / 4 (eps of the compute dtype),
* its worst row's error, relative to the root mean square of the rows, is at most 3 x the yardstick's + eps,
* its relative Frobenius error is below the ceiling of the compute dtype, which is for one layer: of layers that follow
  one another, each brings its own.

Relative to the yardstick, for at small M and R cancellation makes fixed bounds unfair to correct code. A gradient that
leaves in a coarser dtype than the compute dtype (16-bit adapters over an fp32 base) is judged, and its yardstick
rounded, in that one. In float64 *exact* is no more exact than the result: there the ceiling alone holds, for rows too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference

__all__ = ["OUTPUTS", "Accuracy", "ceiling_of", "judge", "run_reference", "tf32_allowed"]

CEILINGS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TF32_CEILING = 2e-3
TF32_EPS = 2.0**-10
FROBENIUS_FACTOR, ROW_FACTOR = 2.0, 3.0

OUTPUTS = ("y", "dx", "da", "db", "dbias", "dgain")


@dataclass(frozen=True)
class Accuracy:
    """The verdict on one result.

    Attributes:
        name: which result, one of ``OUTPUTS``.
        error, yardstick: relative Frobenius errors against float64 of the result and of the yardstick.
        row_error, row_yardstick: the same of the worst row.
        limit, row_limit: what ``error`` and ``row_error`` may be.
        finite: whether every value is finite.
    """

    name: str
    error: float
    yardstick: float
    row_error: float
    row_yardstick: float
    limit: float
    row_limit: float
    finite: bool

    @property
    def passed(self) -> bool:
        return self.finite and self.error <= self.limit and self.row_error <= self.row_limit

    @property
    def ratio(self) -> float:
        """The error over the yardstick's; 1 where both are zero, inf where only the yardstick's is."""
        if self.yardstick == 0.0:
            return 1.0 if self.error == 0.0 else float("inf")
        return self.error / self.yardstick

    def __str__(self) -> str:
        verdict = "passes" if self.passed else "FAILS"
        finite = "" if self.finite else "; some values are not finite"
        return (
            f"{self.name} {verdict}: error {self.error:.3e} (limit {self.limit:.3e}, yardstick {self.yardstick:.3e}), "
            f"worst row {self.row_error:.3e} (limit {self.row_limit:.3e}, yardstick {self.row_yardstick:.3e}){finite}"
        )


def judge(
    name: str,
    actual: Tensor,
    exact: Tensor,
    yardstick: Tensor,
    dtype: torch.dtype,
    tf32: bool = False,
    depth: int = 1,
) -> Accuracy:
    """Measures ``actual`` against the float64 ``exact`` beside ``yardstick``, for the compute dtype ``dtype``.

    ``tf32``: fp32 products were allowed to round their inputs to TF32. ``depth``: how many layers follow one another in
    what is judged.
    """
    if torch.finfo(actual.dtype).eps > torch.finfo(dtype).eps:
        dtype, yardstick = actual.dtype, yardstick.to(actual.dtype)
    error, row_error = _errors(actual, exact)
    yardstick_error, row_yardstick = _errors(yardstick, exact)
    eps = TF32_EPS if tf32 else torch.finfo(dtype).eps
    ceiling = ceiling_of(dtype, tf32, depth)
    limit = min(FROBENIUS_FACTOR * yardstick_error + eps / 4, ceiling)
    row_limit = ROW_FACTOR * row_yardstick + eps
    if dtype == torch.float64:
        limit = row_limit = ceiling
    return Accuracy(
        name=name,
        error=error,
        yardstick=yardstick_error,
        row_error=row_error,
        row_yardstick=row_yardstick,
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
    """The ``OUTPUTS`` by the reference in ``dtype``, the adapters and bias first rounded to x's dtype.

    With float64 it gives *exact*, with x's own dtype the *yardstick*. x (M, K), weight (N, K), lora_a (R, K), lora_b
    (N, R), bias (N,) or None, dy (M, N), mask (M, K) bool or None, gain (N,) or None: dgain is there only with it.
    """
    x_, weight_, a_, b_ = (t.detach().to(x.dtype).to(dtype) for t in (x, weight, lora_a, lora_b))
    bias = None if bias is None else bias.detach().to(x.dtype).to(dtype)
    gain = None if gain is None else gain.detach().to(dtype)
    y, _ = reference.forward(x_, weight_, a_, b_, bias, scaling, mask, p, gain, activation)
    g = reference.backward(dy.to(dtype), x_, weight_, a_, b_, scaling, mask, p, gain, activation)
    results = {"y": y, "dx": g.dx, "da": g.da, "db": g.db, "dbias": g.dbias}
    return results if gain is None else results | {"dgain": g.dgain}


def _errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative Frobenius error and worst row's error; absolute where ``exact`` is zero, zero where it is empty."""
    if actual.shape != exact.shape:
        raise ValueError(f"a result of shape {tuple(actual.shape)} cannot be {tuple(exact.shape)}")
    if exact.numel() == 0:
        return 0.0, 0.0
    exact = exact.detach().double()
    difference = actual.detach().double() - exact
    if exact.dim() == 1:
        difference, exact = difference.unsqueeze(1), exact.unsqueeze(1)
    norm = float(exact.norm())
    rows = exact.shape[0]
    scale = norm if norm > 0.0 else 1.0
    return float(difference.norm()) / scale, float(difference.norm(dim=1).max()) / (scale / rows**0.5)
