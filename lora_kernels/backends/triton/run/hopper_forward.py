"""Forward by the Gluon plans: pack, h (and dropout's words), y; or pack, and y with h.

h leaves as ``choose.hidden_operand`` has it, with s and 1 / (1 - p) folded in. What a launch reads stays referenced
until the last one is made, and all of them are on one stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..choose.hopper_blocks import HopperPlainShrink
from ..choose.plans import Hopper, HopperInside
from .call import Call
from .hopper import (
    Step,
    pack_step,
    plain_shrink_step,
    product_h_counters,
    product_h_step,
    product_step,
    shrink_counters,
    shrink_step,
)
from .hopper_call import HopperCall, hopper_call

__all__ = ["HopperRun", "as_products_take", "packing", "ready_hopper"]

# run(stream, x, weight, lora_a, lora_b, bias, scaling, state) -> y, h's operand, the words that it drew or None
HopperRun: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def ready_hopper(plan: Hopper | HopperInside, call: Call) -> HopperRun:
    """The run of ``plan`` for ``call``, whose ``state`` is a seed; nothing is compiled before its first use.

    Raises:
        InvalidArgumentError: the plan does not take the call.
    """
    c = hopper_call(plan, call)
    return _inside(plan, call, c) if isinstance(plan, HopperInside) else _in_turn(plan, call, c)


def packing(call: Call, c: HopperCall, counters: int) -> Step:
    """``step(stream, lora_a, lora_b)`` -> their operands, and as many counters."""
    strides = call.stride_a, call.stride_b
    return pack_step(c, None if strides == ((c.k, 1), (c.r, 1)) else strides, counters)


def _in_turn(plan: Hopper, call: Call, c: HopperCall) -> HopperRun:
    shrink, counters = _shrink(plan, call, c)
    pack, product = packing(call, c, counters), product_step(plan.product, c)

    def run(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        a, b, zeros = pack(stream, lora_a, lora_b)
        h, words = shrink(stream, x, a, zeros, state, scaling * c.keep_scale)
        y = product(stream, x, weight, h, b, None, as_products_take(bias, c.dtype))
        return y, h, words

    return run


def _shrink(plan: Hopper, call: Call, c: HopperCall) -> tuple[Step, int]:
    """``step(stream, x, a_operand, counters, state, scale)`` -> h's operand, words or None; how many counters."""
    if isinstance(plan.shrink, HopperPlainShrink):
        plain = plain_shrink_step(plan.shrink, c, call.stride_x[0])
        return (lambda stream, x, a, counters, state, scale: (plain(stream, x, a, scale), None)), 0
    return shrink_step(plan.shrink, c), shrink_counters(plan.shrink, c, c.k)


def _inside(plan: HopperInside, call: Call, c: HopperCall) -> HopperRun:
    pack, product = packing(call, c, product_h_counters(plan.product, c)), product_h_step(plan.product, c)

    def run(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        a, b, flags = pack(stream, lora_a, lora_b)
        y, h = product(stream, x, weight, a, b, flags, scaling * c.keep_scale, None, as_products_take(bias, c.dtype))
        return y, h, None

    return run


def as_products_take(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Rounded to ``dtype`` and in one piece, as it nearly always is."""
    if bias is None or (bias.dtype is dtype and bias.is_contiguous()):
        return bias
    return bias.to(dtype).contiguous()
