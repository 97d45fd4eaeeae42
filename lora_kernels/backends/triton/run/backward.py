"""Backward by each plan: what runs in which order, and what runs beside the large product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..choose.plans import BackwardPlan
from .call import Call
from .steps import Step, da_step, db_step, dh_db_step, dh_step, dx_step
from .streams import together_on

__all__ = ["BackwardRun", "ready_backward"]

# run(stream, dy, x, weight, lora_a, lora_b, h, scaling, words) -> dx, da, db, dbias; None where not due, or no mask
BackwardRun: TypeAlias = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]


def ready_backward(plan: BackwardPlan, c: Call, need_x: bool, need_a: bool, need_b: bool) -> BackwardRun:
    """The run of ``plan`` for what is due; nothing is compiled before its first use."""
    small = _Small.of(plan, c, need_x, need_a, need_b)
    if not need_x:
        return lambda stream, dy, x, weight, lora_a, lora_b, h, scaling, words: (
            None,
            *small.rest(stream, dy, x, h, small.first(stream, dy, lora_b, h, scaling), scaling, words),
        )
    dx, together = dx_step(plan, c), together_on(c.device, plan.beside and small.any_rest)

    def run(
        stream: int | None,
        dy: Tensor,
        x: Any,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        h: Any,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        found = small.first(stream, dy, lora_b, h, scaling)
        grad_x, others = together(
            stream,
            lambda own: dx(own, dy, weight, found[0], lora_a, words),
            lambda own: small.rest(own, dy, x, h, found, scaling, words),
        )
        return grad_x, *others

    return run


@dataclass(frozen=True, slots=True)
class _Small:
    """All of backward but dx: what dx waits for, and what waits for nobody but it."""

    joint: Step | None
    dh: Step | None
    db: Step | None
    da: Step | None
    bias_dtype: torch.dtype | None

    @staticmethod
    def of(plan: BackwardPlan, c: Call, need_x: bool, need_a: bool, need_b: bool) -> _Small:
        way, joint = plan.hidden, need_b and plan.hidden.joint
        return _Small(
            joint=dh_db_step(way.dh_db, c) if joint else None,
            dh=dh_step(way.shrink, c) if not joint and (need_x or need_a) else None,
            db=db_step(way.db, c) if not joint and need_b else None,
            da=da_step(plan.da, c) if need_a else None,
            bias_dtype=c.bias_dtype,
        )

    @property
    def any_rest(self) -> bool:
        return self.da is not None or self.db is not None or (self.joint is None and self.bias_dtype is not None)

    def first(
        self, stream: int | None, dy: Tensor, lora_b: Tensor, h: Any, scaling: float
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dh, and with it db and dbias where one read of dy gives all three."""
        if self.joint is not None:
            found: tuple[Tensor, Tensor, Tensor | None] = self.joint(stream, dy, lora_b, h, scaling)
            return found
        return None if self.dh is None else self.dh(stream, dy, lora_b, scaling), None, None

    def rest(
        self,
        stream: int | None,
        dy: Tensor,
        x: Any,
        h: Any,
        found: tuple[Tensor | None, Tensor | None, Tensor | None],
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """da, db, dbias: what ``first`` has not found, as far as it is due."""
        dh, db, dbias = found
        if self.db is not None:
            db = self.db(stream, dy, h, scaling)
        if dbias is None and self.bias_dtype is not None:
            dbias = dy.sum(0, dtype=self.bias_dtype)
        da = None if self.da is None else self.da(stream, dh, x, words)
        return da, db, dbias
