"""What is timed and checked in a cell of layers that read one x: q, k, v; gate, up. Each member is judged as a layer.

The floor is what the frozen layers take one after the other: every x Wᵀ; or every dy W, summed. The policy is asked of
each member's own results, and of dx, which is the sum of theirs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backends.triton.choose.plans import Cell, Plan
from .passes import BackwardPass, ForwardPass, Inputs, Pass, Results

__all__ = ["group_pass_of"]


def group_pass_of(cell: Cell, sets: list[list[Inputs]], scaling: float) -> Pass:
    """``sets``: of each member one of inputs for each turn; x is the first member's."""
    kind = GroupBackwardPass if cell.direction == "backward" else GroupForwardPass
    first, *others = sets
    shared = [first, *([replace(own, x=one.x) for own, one in zip(s, first, strict=True)] for s in others)]
    return kind(cell, shared, scaling)


class GroupForwardPass:
    """Every y, then every h."""

    def __init__(self, cell: Cell, sets: list[list[Inputs]], scaling: float) -> None:
        from ..backends.triton.group_operators import run_group_forward

        members = zip(cell.members, sets, strict=True)
        self._members = [ForwardPass(own, inputs, scaling, i) for i, (own, inputs) in enumerate(members)]
        self._run_forward, self._count, self._scaling = run_group_forward, len(sets), scaling
        self._given = [_columns(sets, turn) for turn in range(len(sets[0]))]

    def floor(self, i: int) -> list[Tensor]:
        return [member.floor(i) for member in self._members]

    def run(self, plan: Plan, i: int) -> Results:
        x, weights, lora_as, lora_bs, _ = self._given[i]
        states = [member.state for member in self._members if member.state is not None]
        scalings, nothing = [self._scaling] * self._count, [None] * self._count
        given = (x, weights, lora_as, lora_bs, nothing, scalings, self._members[0].p, states)
        ys, hs, _ = self._run_forward(plan, *given)  # type: ignore[arg-type]
        return *ys, *hs

    def wrong(self, results: Results) -> str | None:
        count = self._count
        verdicts = (member.wrong((results[i], results[count + i])) for i, member in enumerate(self._members))
        return _of_member(verdicts)


class GroupBackwardPass:
    """dx, every da, every db."""

    def __init__(self, cell: Cell, sets: list[list[Inputs]], scaling: float) -> None:
        from ..backends.triton.group_operators import run_group_backward

        members = zip(cell.members, sets, strict=True)
        self._members = [BackwardPass(own, inputs, scaling, i) for i, (own, inputs) in enumerate(members)]
        self._run_backward, self._count, self._scaling = run_group_backward, len(sets), scaling
        self._given = [_columns(sets, turn) for turn in range(len(sets[0]))]

    def floor(self, i: int) -> Tensor:
        first, *others = self._members
        dx = first.floor(i)
        for member in others:
            dx += member.floor(i)
        return dx

    def run(self, plan: Plan, i: int) -> Results:
        x, weights, lora_as, lora_bs, dys = self._given[i]
        hs, kept = ([getattr(m, name) for m in self._members] for name in ("hs", "kept"))
        scalings, nothing = [self._scaling] * self._count, [None] * self._count
        states = [state for state in kept if state is not None]
        given = (dys, x, weights, lora_as, lora_bs, nothing, [h[i] for h in hs], scalings, self._members[0].p, states)
        dx, das, dbs, _ = self._run_backward(plan, *given)  # type: ignore[arg-type]
        return dx, *das, *dbs

    def wrong(self, results: Results) -> str | None:
        dx, das, dbs = results[0], results[1 : 1 + self._count], results[1 + self._count :]
        if not bool(torch.isfinite(dx).all()):
            return "dx has values that are not finite."
        first = self._members[0]
        exact, yardstick = self._dx
        if found := first.judge("dx", dx[first.rows], exact, yardstick, None):
            return found
        return _of_member(m.wrong_of_adapters(das[i], dbs[i]) for i, m in enumerate(self._members))

    @cached_property
    def _dx(self) -> tuple[Tensor, Tensor]:
        """The sum of the members', exact, and as it is taken one after the other in the compute dtype."""
        exact, yardstick = zip(*(member.expected[0][:2] for member in self._members), strict=True)
        summed = yardstick[0].clone()
        for own in yardstick[1:]:
            summed += own
        return torch.stack(exact).sum(0), summed


def _columns(sets: list[list[Inputs]], turn: int) -> tuple[Any, ...]:
    """x, and every W, A, B and dy of one turn."""
    own = [inputs[turn] for inputs in sets]
    return own[0].x, *([getattr(s, name) for s in own] for name in ("weight", "lora_a", "lora_b", "dy"))


def _of_member(verdicts: Any) -> str | None:
    """The first that is a sentence, and whose it is."""
    return next((f"Of layer {i + 1}: {found}" for i, found in enumerate(verdicts) if found), None)
