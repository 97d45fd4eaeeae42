"""What is timed and checked in a cell: one direction's inputs, its floor, its results and what the policy asks of them.

Forward: y on up to 256 rows, all columns, and h. Backward: dx on as many rows, and da and db, which are sums over all
rows. The floor is the frozen layer's product: x Wᵀ, or dy W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .. import accuracy, reference
from ..backends.triton import kept
from ..backends.triton.choose.blocks import machine_of
from ..backends.triton.choose.hidden_operand import operand_on
from ..backends.triton.choose.plans import Cell, Plan
from ..benchmark.providers import Setup
from ..benchmark.workloads import Workload
from ..rounding import Arithmetic

__all__ = ["DROPOUT", "BackwardPass", "ForwardPass", "Inputs", "Pass", "pass_of", "workload_of"]

DROPOUT = 0.1
_ROWS = 256
_FEW = 64
_SEED = (0x5EED, 7)

Results: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Inputs:
    """x (M, K), weight (N, K), lora_a (R, K) and lora_b (N, R), of the package's default dtype for adapters; dy (M, N)
    for backward, else empty."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor

    @staticmethod
    def of(setup: Setup) -> Inputs:
        lora_a, lora_b = (t.detach().to(setup.adapter_dtype) for t in (setup.lora_a, setup.lora_b))
        return Inputs(setup.x.detach(), setup.linear.weight.detach(), lora_a, lora_b, setup.dy)


class Pass(Protocol):
    """One direction of a cell, with its sets of inputs."""

    def floor(self, i: int) -> Any:
        """The frozen layer's product on set ``i``."""

    def run(self, plan: Plan, i: int) -> Results:
        """All results by ``plan`` on set ``i``."""

    def wrong(self, results: Results) -> str | None:
        """What the policy has against the results of set 0, or None."""


def workload_of(cell: Cell) -> Workload:
    dtype = "float32" if cell.tf32 else cell.dtype
    return Workload(cell.direction, cell.tokens, cell.k, cell.n, cell.r, dtype, p=DROPOUT if cell.dropout else 0.0)


def pass_of(cell: Cell, sets: list[Inputs], scaling: float) -> Pass:
    return (BackwardPass if cell.direction == "backward" else ForwardPass)(cell, sets, scaling)


class _Common:
    def __init__(self, cell: Cell, sets: list[Inputs], scaling: float, member: int = 0) -> None:
        """``member``: of layers of one x; each draws a mask of its own."""
        from ..backends.triton.operators import mask

        x = sets[0].x
        capability = machine_of(x.device).capability
        self._operand = operand_on(capability, x.dtype, cell.k, cell.n, cell.r)
        self._cell, self._sets, self._scaling = cell, sets, scaling
        self.p = DROPOUT if cell.dropout else 0.0
        seed = (_SEED[0] + member, _SEED[1])
        self.state = torch.tensor(seed, device=x.device) if cell.dropout else None
        self._mask = None if self.state is None else mask(self.state, cell.tokens, cell.k, self.p)
        self.rows = torch.linspace(0, cell.tokens - 1, min(cell.tokens, _ROWS), device=x.device).long()

    def judge(self, name: str, found: Tensor, exact: Tensor, yardstick: Tensor, error: Tensor | None) -> str | None:
        dtype = self._sets[0].x.dtype
        verdict = accuracy.judge(name, found, exact, yardstick, dtype, self._cell.tf32, expected=error)
        return None if verdict.passed else str(verdict)

    def _unscaled(self, h: Tensor) -> Tensor:
        """h, fp32 (M, R), of what forward keeps."""
        return h if self._operand is None else self._operand.unpack(h, self._cell.r) / self._scaling

    def _three_ways(self, run: Callable[[Callable[[Tensor], Any]], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """``run`` in float64, in the compute dtype, and the errors to expect of few tokens: of more, none is lucky."""
        dtype = self._sets[0].x.dtype
        exact, yardstick = (run(partial(Tensor.to, dtype=number)) for number in (torch.float64, dtype))
        errors: tuple[Any, ...] = (None,) * len(exact)
        if self._cell.tokens <= _FEW:
            errors = tuple(noisy.error for noisy in run(Arithmetic(dtype, self._cell.tf32).of))
        return [exact, yardstick, errors]


class ForwardPass(_Common):
    """y and h."""

    def __init__(self, cell: Cell, sets: list[Inputs], scaling: float, member: int = 0) -> None:
        from ..backends.triton.operators import run_plan

        super().__init__(cell, sets, scaling, member)
        self._run_plan = run_plan

    def floor(self, i: int) -> Tensor:
        return torch.nn.functional.linear(self._sets[i].x, self._sets[i].weight)

    def run(self, plan: Plan, i: int) -> Results:
        s = self._sets[i]
        given = (s.x, s.weight, s.lora_a, s.lora_b, None, self._scaling, self.p, self.state)
        return self._run_plan(plan, *given)  # type: ignore[arg-type]

    def wrong(self, results: Results) -> str | None:
        y, h = results
        h = self._unscaled(h)
        of_y, of_h = zip(*self._expected, strict=True)
        dtype, tf32 = self._sets[0].x.dtype, self._cell.tf32
        hidden = accuracy.judge("h", h[self.rows], of_h[0], of_h[1], dtype, tf32)
        ceiling = accuracy.TF32_CEILING if tf32 else accuracy.CEILINGS[dtype]
        if found := self.judge("y", y[self.rows], *of_y):
            return found
        if not bool(torch.isfinite(y).all()):
            return "y has values that are not finite."
        if not hidden.finite or hidden.error > ceiling:
            return f"h is off by {hidden.error:.3e}, more than {ceiling:g}."
        return None

    @cached_property
    def _expected(self) -> list[tuple[Any, ...]]:
        """(y, h) of the chosen rows: exact, the yardstick, the errors to expect."""
        s = self._sets[0]
        kept = None if self._mask is None else self._mask[self.rows]

        def run(number: Callable[[Tensor], Any]) -> tuple[Any, ...]:
            x, weight, a, b = (number(t) for t in (s.x[self.rows], s.weight, s.lora_a, s.lora_b))
            return reference.forward(x, weight, a, b, None, self._scaling, kept, self.p)

        return self._three_ways(run)


class BackwardPass(_Common):
    """dx, da and db, from the h and, of dropout, the words or the seed that forward has left."""

    def __init__(self, cell: Cell, sets: list[Inputs], scaling: float, member: int = 0) -> None:
        from ..backends.triton.operators import run_backward

        super().__init__(cell, sets, scaling, member)
        self._run_backward = run_backward
        self.kept = self.state
        if self.state is not None and kept().prefers_words(cell.n):
            self.kept = self._words(self.state)
        hs = [self._hidden(s, s.x.dtype).float() for s in sets]
        self.hs = hs if self._operand is None else [self._operand.pack(scaling * h) for h in hs]

    def floor(self, i: int) -> Tensor:
        return torch.mm(self._sets[i].dy, self._sets[i].weight)

    def run(self, plan: Plan, i: int) -> Results:
        s = self._sets[i]
        given = (s.dy, s.x, s.weight, s.lora_a, s.lora_b, None, self.hs[i], self._scaling, self.p, self.kept)
        dx, da, db, _ = self._run_backward(plan, *given)  # type: ignore[arg-type]
        assert dx is not None
        assert da is not None
        assert db is not None
        return dx, da, db

    def wrong(self, results: Results) -> str | None:
        if not all(bool(torch.isfinite(result).all()) for result in results):
            return "a gradient has values that are not finite."
        found = (results[0][self.rows], *results[1:])
        verdicts = map(self.judge, ("dx", "da", "db"), found, *zip(*self.expected, strict=True))
        return next(filter(None, verdicts), None)

    def wrong_of_adapters(self, da: Tensor, db: Tensor) -> str | None:
        """What the policy has against them, where dx is that of several layers."""
        if not all(bool(torch.isfinite(result).all()) for result in (da, db)):
            return "a gradient has values that are not finite."
        verdicts = map(self.judge, ("da", "db"), (da, db), *zip(*self.expected[1:], strict=True))
        return next(filter(None, verdicts), None)

    def _words(self, state: Tensor) -> Tensor:
        from ..backends.triton.run.launcher import index_of, launched
        from ..backends.triton.run.steps import draw_step

        drawn: Tensor = launched(draw_step(self._cell.tokens, self._cell.k, self.p), index_of(state.device), state)
        return drawn

    def _hidden(self, s: Inputs, dtype: torch.dtype) -> Tensor:
        x, a = (t.to(s.x.dtype).to(dtype) for t in (s.x, s.lora_a))
        return reference.drop(x, self._mask, self.p) @ a.t()

    @cached_property
    def expected(self) -> list[tuple[Any, ...]]:
        """Of dx of the chosen rows, da and db each: exact, the yardstick, the errors to expect."""
        s, rows = self._sets[0], self.rows
        kept = None if self._mask is None else self._mask[rows]

        def run(number: Callable[[Tensor], Any]) -> tuple[Any, ...]:
            dy, x, weight, a, b, h = map(number, (s.dy, s.x, s.weight, s.lora_a, s.lora_b, self._unscaled(self.hs[0])))
            dh = self._scaling * (dy @ b)
            dx = dy[rows] @ weight + reference.drop(dh[rows] @ a, kept, self.p)
            return dx, dh.t() @ reference.drop(x, self._mask, self.p), self._scaling * (dy.t() @ h)

        return list(zip(*self._three_ways(run), strict=True))
