"""Backward by the Gluon plans: what runs in which order, and what runs beside dx.

============ ======================================== ===================================== ======================
plan         first                                    dx, and beside it                     last
============ ======================================== ===================================== ======================
DxHopper     pack; dh with db's parts                 dx; da's parts, the sums of da and db
DxInside     pack                                     dx with dh; db's parts                da's parts, the sums
============ ======================================== ===================================== ======================

With ``beside`` dx is on a stream of high priority (``streams.PriorityStream``), else all is on one, in this order.
Nothing is launched for what is not due: dh comes alone where db is not, and db where neither dx nor da is. dbias is
the library's sum. h is forward's operand and dh one too: see ``choose.hidden_operand``; both have s folded in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..choose.hopper_blocks import HopperDhDb, HopperOuter, dh_db_configs, outer_configs, shrink_configs
from ..choose.plans import DxHopper, DxInside
from .backward import BackwardRun
from .call import Call
from .hopper import (
    Step,
    da_step,
    db_step,
    dh_db_step,
    dh_step,
    dx_h_step,
    dx_step,
    halves,
    product_h_counters,
    reduce_grads_step,
    shrink_counters,
)
from .hopper_call import HopperCall, hopper_call
from .hopper_forward import packing
from .streams import ahead_on

__all__ = ["ready_hopper_backward"]


def ready_hopper_backward(
    plan: DxHopper | DxInside, call: Call, need_x: bool, need_a: bool, need_b: bool
) -> BackwardRun:
    """The run of ``plan`` for what is due; nothing is compiled before its first use.

    Raises:
        InvalidArgumentError: the plan does not take the call.
    """
    c = hopper_call(plan, call)
    da = replace(plan.da, masked=c.masked)
    if isinstance(plan, DxInside):
        if need_x:
            return _inside(plan, call, c, _Rest.of(call, c, da, need_a, need_b))
        joint = dh_db_configs(c.operand.rank, c.wide)[0]
    else:
        joint = plan.dh_db
    first, rest = _First.of(call, c, joint, need_x or need_a, need_b), _Rest.of(call, c, da, need_a, need_b)
    return _in_turn(plan, c, first, rest) if need_x and isinstance(plan, DxHopper) else _without_dx(c, first, rest)


def _in_turn(plan: DxHopper, c: HopperCall, first: _First, rest: _Rest) -> BackwardRun:
    dx, together = dx_step(replace(plan.dx, masked=c.masked), c), ahead_on(c.device, plan.beside and rest.any)

    def run(
        stream: int | None,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        h: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        words = words if c.masked else None
        found = first(stream, dy, lora_a, lora_b, h, scaling)
        grad_x, others = together(
            stream,
            lambda own: dx(own, dy, weight, found.dh, found.a, words),
            lambda own: rest(own, dy, x, found.dh, found.db_parts, words),
        )
        return grad_x, *others

    return run


def _without_dx(c: HopperCall, first: _First, rest: _Rest) -> BackwardRun:
    def run(
        stream: int | None,
        dy: Tensor,
        x: Tensor | None,
        weight: None,
        lora_a: Tensor,
        lora_b: Tensor,
        h: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        found = first(stream, dy, lora_a, lora_b, h, scaling)
        return None, *rest(stream, dy, x, found.dh, found.db_parts, words if c.masked else None)

    return run


def _inside(plan: DxInside, call: Call, c: HopperCall, rest: _Rest) -> BackwardRun:
    """Only da waits for dx, which makes dh: so db, which does not, is what runs beside it."""
    pack = packing(call, c, product_h_counters(plan.dx, c))
    dx, db = dx_h_step(plan.dx, c), db_step(replace(plan.db, masked=False), c) if rest.need_b else None
    together = ahead_on(c.device, plan.beside and db is not None)

    def run(
        stream: int | None,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        h: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        a, b, flags = pack(stream, lora_a, lora_b)
        half = halves(plan.dx, c)
        (grad_x, dh), db_parts = together(
            stream,
            lambda own: dx(own, dy, weight, b, a, flags, scaling * c.keep_scale, half),
            lambda own: None if db is None else db(own, dy, h),
        )
        return grad_x, *rest(stream, dy, x, dh, db_parts, None)

    return run


@dataclass(frozen=True, slots=True)
class _Found:
    """What ``_First`` has found, and A's operand, for dx; None for what nobody waits for."""

    a: Tensor | None = None
    dh: Tensor | None = None
    db_parts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _First:
    """What dx and da wait for: the operands, and dh; with it db's parts, where one read of dy gives both."""

    pack: Step | None
    joint: Step | None
    dh: Step | None
    db: Step | None
    keep_scale: float

    @staticmethod
    def of(call: Call, c: HopperCall, joint: HopperDhDb, need_dh: bool, need_b: bool) -> _First:
        rank, alone = c.operand.rank, need_dh and not need_b
        shrink = shrink_configs(rank, c.wide)[0]
        return _First(
            pack=packing(call, c, shrink_counters(shrink, c, c.n) if alone else 0) if need_dh else None,
            joint=dh_db_step(joint, c) if need_dh and need_b else None,
            dh=dh_step(shrink, c) if alone else None,
            db=db_step(outer_configs(rank, False, c.wide)[0], c) if need_b and not need_dh else None,
            keep_scale=c.keep_scale,
        )

    def __call__(
        self, stream: int | None, dy: Tensor, lora_a: Tensor, lora_b: Tensor, h: Tensor | None, scaling: float
    ) -> _Found:
        if self.pack is None:
            return _Found(db_parts=None if self.db is None else self.db(stream, dy, h))
        a, b, zeros = self.pack(stream, lora_a, lora_b)
        if self.joint is not None:
            return _Found(a, *self.joint(stream, dy, b, h, scaling * self.keep_scale))
        assert self.dh is not None
        return _Found(a, self.dh(stream, dy, b, zeros, scaling * self.keep_scale))


@dataclass(frozen=True, slots=True)
class _Rest:
    """What waits for nobody: da's parts, the sums of da's and db's parts, dbias."""

    da: Step | None
    sums: Step | None
    need_b: bool
    bias_dtype: torch.dtype | None

    @staticmethod
    def of(call: Call, c: HopperCall, da: HopperOuter, need_a: bool, need_b: bool) -> _Rest:
        dtypes = call.a_dtype if need_a else None, call.b_dtype if need_b else None
        return _Rest(
            da=da_step(da, c) if need_a else None,
            sums=reduce_grads_step(c, *dtypes) if need_a or need_b else None,
            need_b=need_b,
            bias_dtype=call.bias_dtype,
        )

    @property
    def any(self) -> bool:
        return self.sums is not None or self.bias_dtype is not None

    def __call__(
        self,
        stream: int | None,
        dy: Tensor,
        x: Tensor | None,
        dh: Tensor | None,
        db_parts: Tensor | None,
        words: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        da_parts = None if self.da is None else self.da(stream, x, dh, words)
        da, db = (None, None) if self.sums is None else self.sums(stream, da_parts, db_parts)
        return da, db, None if self.bias_dtype is None else dy.sum(0, dtype=self.bias_dtype)
