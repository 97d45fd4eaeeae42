"""Both passes of a group by the Gluon plans: what runs in which order, and what runs beside dx.

Forward: pack, every h (and the masks' words), every y. Backward: pack, every dh with db's parts, the sums of dh; dx;
every da's parts, the sums of da and db. With ``beside`` dx is on a stream of high priority, and what is behind it here
beside it. dbias is the library's sum. h and dh are operands with s folded in, a tensor a member: see
``choose.hidden_operand``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ....errors import InvalidArgumentError
from ..choose.group_candidates import group_fits
from ..choose.group_plans import DxHopperGroup, HopperGroup
from .group_call import GroupCall
from .hopper_forward import as_products_take
from .hopper_groups import (
    group_da_step,
    group_dh_db_step,
    group_dx_step,
    group_pack_step,
    group_product_step,
    group_reduce_grads_step,
    group_shrink_counters,
    group_shrink_step,
)
from .launcher import KnownPasses
from .prepared import Cache
from .steps import draw_step, seeded
from .streams import ahead_on

__all__ = [
    "GroupBackwardRun",
    "GroupForwardRun",
    "backward_runs",
    "flat_backward",
    "flat_forward",
    "forget",
    "forward_runs",
    "group_plan_fault",
    "known_backward",
    "known_forward",
    "ready_group_backward",
    "ready_group_forward",
]

# run(stream, x, weights, lora_as, lora_bs, biases, scalings, states) -> every y, every h, every mask's words
GroupForwardRun: TypeAlias = Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor]]]
# run(stream, dys, x, weights, lora_as, lora_bs, hs, scalings, states) -> dx, every da, every db, every dbias
GroupBackwardRun: TypeAlias = Callable[
    ..., tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None, list[Tensor | None]]
]

forward_runs: Cache[Any] = Cache()  # of ``group_operators``, by its keys
backward_runs: Cache[Any] = Cache()
known_forward, known_backward = KnownPasses(), KnownPasses()


def forget() -> None:
    """Forget what was made ready."""
    forward_runs.clear()
    backward_runs.clear()
    known_forward.clear()
    known_backward.clear()


def group_plan_fault(plan: HopperGroup | DxHopperGroup, call: GroupCall) -> str | None:
    """The end of a sentence "the plan ... does not run: ..." where it does not take the call."""
    if fault := call.fault:
        return fault
    direction = "forward" if isinstance(plan, HopperGroup) else "backward"
    if not group_fits(call.machine, call.cell(direction), plan):
        return "it is for other ranks, or for another dtype, or for other masks"
    return None


def _taken(plan: HopperGroup | DxHopperGroup, call: GroupCall) -> None:
    if fault := group_plan_fault(plan, call):
        raise InvalidArgumentError(f"the plan {plan} does not run: {fault}.")


def ready_group_forward(plan: HopperGroup, call: GroupCall) -> GroupForwardRun:
    """The run of ``plan``; each of the ``states`` is a seed. Nothing is compiled before its first use.

    Raises:
        InvalidArgumentError: the plan does not take the call.
    """
    _taken(plan, call)
    group = call.group
    c = group[0]
    pack = group_pack_step(group, group_shrink_counters(plan.shrink, group))
    shrink, product = group_shrink_step(plan.shrink, group), group_product_step(plan.product, group)
    draw = draw_step(c.m, c.k, c.p) if c.dropout and not c.masked else None  # a p that rounds to 0: all are kept

    def run(
        stream: int | None,
        x: Tensor,
        weights: Sequence[Tensor],
        lora_as: Sequence[Tensor],
        lora_bs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        scalings: Sequence[float],
        states: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        a, b, zeros = pack(stream, lora_as, lora_bs)
        scales = [scaling * c.keep_scale for scaling in scalings]
        hs, words = shrink(stream, x, a, zeros, states or None, scales)
        ys = product(stream, x, weights, hs, b, [as_products_take(bias, c.dtype) for bias in biases])
        if words is None:
            words = [] if draw is None else [draw(stream, state) for state in states]
        return ys, hs, words

    return run


def ready_group_backward(
    plan: DxHopperGroup, call: GroupCall, need_x: bool, need_a: bool, states: Sequence[Tensor]
) -> GroupBackwardRun:
    """The run of ``plan``, with db due, and dx or da; ``states``: such as the run will be given, seeds or words.

    Raises:
        InvalidArgumentError: the plan does not take the call, or words are of another mask.
    """
    _taken(plan, call)
    group = call.group
    c = group[0]
    pack, joint = group_pack_step(group), group_dh_db_step(plan.dh_db, group)
    dx = group_dx_step(replace(plan.dx, product=replace(plan.dx.product, masked=c.masked)), group) if need_x else None
    da = group_da_step(replace(plan.da, masked=c.masked), group) if need_a else None
    sums = group_reduce_grads_step(group, call.a_dtype if need_a else None, call.b_dtype)
    words_of = [seeded(_itself, state, c.m, c.k, c.p) for state in states] if c.masked else []
    together = ahead_on(c.device, plan.beside and need_x)

    def run(
        stream: int | None,
        dys: Sequence[Tensor],
        x: Tensor | None,
        weights: Sequence[Tensor],
        lora_as: Sequence[Tensor],
        lora_bs: Sequence[Tensor],
        hs: Sequence[Tensor],
        scalings: Sequence[float],
        states: Sequence[Tensor],
    ) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None, list[Tensor | None]]:
        words = [words(stream, state) for words, state in zip(words_of, states, strict=True)] if words_of else None
        a, b, _ = pack(stream, lora_as, lora_bs)
        dhs, db_parts = joint(stream, dys, b, hs, [scaling * c.keep_scale for scaling in scalings])

        def large(own: int | None) -> Tensor | None:
            return None if dx is None else dx(own, dys, weights, dhs, a, words)

        def rest(own: int | None) -> tuple[list[Tensor] | None, list[Tensor], list[Tensor | None]]:
            das, dbs = sums(own, None if da is None else da(own, x, dhs, words), db_parts)
            return das, dbs, _sums_of_rows(dys, call.bias_dtypes)

        grad_x, others = together(stream, large, rest)
        return grad_x, *others

    return run


def flat_forward(run: GroupForwardRun) -> Callable[..., tuple[Tensor, ...]]:
    """Every y, then every h, then every mask's words, as a prepared pass returns them."""

    def flat(stream: int | None, *arguments: Any) -> tuple[Tensor, ...]:
        ys, hs, words = run(stream, *arguments)
        return *ys, *hs, *words

    return flat


def flat_backward(run: GroupBackwardRun, count: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """dx, then ``count`` of da, of db and of dbias, likewise; None where one is not due."""
    absent = (None,) * count

    def flat(stream: int | None, *arguments: Any) -> tuple[Tensor | None, ...]:
        dx, das, dbs, dbiases = run(stream, *arguments)
        return dx, *(das or absent), *(dbs or absent), *dbiases

    return flat


def _itself(stream: int | None, words: Tensor) -> Tensor:
    return words


def _sums_of_rows(dys: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Each dbias, by the library; None where it is not due."""
    return [None if dtype is None else dy.sum(0, dtype=dtype) for dy, dtype in zip(dys, dtypes, strict=True)]
