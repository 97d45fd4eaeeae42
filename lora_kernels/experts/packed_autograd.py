"""One projection of all experts by quantised weights: the formulas of :mod:`.autograd`, an expert after the other.

An expert's values are made for its rows, in forward and again in backward, and freed before the next one's: one matrix
(N, K) is there at a time, and nothing of it is kept. The host reads where each expert's rows end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import backend
from ..errors import LoRAStateError, UnsupportedTransformError
from ..ops import operators
from ..surrounded import is_surrounded, run_outside
from ..tensors import resolved
from ..weights.stacked import PackedExperts
from .problem import Adapter
from .routing import Routing, sum_of_slots

__all__ = ["project_packed"]

_Part = tuple[int, int, int]  # an expert, and where its rows begin and end


@torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]  # reads the routing; compiled code goes on after
def project_packed(
    x: Tensor, weight: PackedExperts, adapter: Adapter | None, routing: Routing, p: float, spread: bool, way: str
) -> Tensor:
    """As :func:`.autograd.project`, by the operators of ``way``.

    Raises:
        LoRAStateError: ``torch.export`` is recording.
    """
    if torch.compiler.is_compiling():
        raise LoRAStateError(
            "torch.export was called on stacked experts whose weights are quantized: the host reads where each "
            "expert's rows end, which no program can hold. Export experts with plain weights, with the adapter loaded "
            "onto them; or compile these by torch.compile, which runs them between its graphs."
        )
    ends: list[int] = routing.offsets.tolist()
    parts = [(e, s, t) for e, (s, t) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if t > s]
    states: list[Tensor] = []
    if p != 0.0 and adapter is not None:  # a mask for each expert
        draw, one = backend(way).dropout_state, x.new_empty(())
        states = [draw(one.expand(t - s, weight.shape[2]), p) for _, s, t in parts]
    a, b, scaling = (None, None, 0.0) if adapter is None else adapter
    tokens, places = (routing.tokens, routing.places) if spread else (None, None)
    settings = parts, scaling, p, routing.k, way, routing.slots.shape[0]
    y: Tensor = _Project.apply(x, a, b, tokens, places, weight, settings, *states)
    return y


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        tokens: Tensor | None,
        places: Tensor | None,
        weight: PackedExperts,
        settings: tuple[list[_Part], float, float, int, str, int],
        *states: Tensor,
    ) -> Tensor:
        parts, scaling, p, _, way, m = settings
        run = operators(way).experts_forward
        y = x.new_zeros((m, weight.shape[1]))  # of sentinels nothing else is written
        lows: list[Tensor] = []
        for i, (e, s, t) in enumerate(parts):
            rows = _rows(x, tokens, s, t)
            values = weight.of(e, x.dtype).unsqueeze(0)
            state = states[i] if states else None
            y[s:t], low = run(rows, values, _one(a, e), _one(b, e), _all(rows), None, scaling, p, state)
            lows.append(low)
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        h = torch.cat(lows) if need_b and lows else None
        kept = states if need_x or need_a else ()
        ctx.save_for_backward(x if need_a else None, a, b, tokens, places, h, *kept)
        ctx.weight, ctx.settings = weight.again or (lambda: weight), settings
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if is_surrounded(grad_outputs):
            return run_outside(_Project.backward, ctx, grad_outputs)
        if torch.is_grad_enabled():
            raise UnsupportedTransformError(
                "a double backward (create_graph=True) was asked for through LoRA on quantized experts, which has "
                "first derivatives alone. Differentiate once."
            )
        dy = resolved(grad_outputs[0]).contiguous()
        x, a, b, tokens, places, h, *states = ctx.saved_tensors
        weight, (parts, scaling, p, k, way, m) = ctx.weight(), ctx.settings
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        run = operators(way).experts_backward
        dx = dy.new_zeros((m, weight.shape[2])) if need_x else None
        da, db = (torch.zeros_like(a) if need_a else None), (torch.zeros_like(b) if need_b else None)
        for i, (e, s, t) in enumerate(parts):
            outer = dy[s:t]
            rows = _rows(x, tokens, s, t) if need_a else None
            values = weight.of(e, dy.dtype).unsqueeze(0) if need_x else None
            low, state = (h[s:t] if need_b else None), (states[i] if states else None)
            found = run(outer, rows, values, _one(a, e), _one(b, e), _all(outer), None, low, scaling, p, state)
            for whole, own, (first, last) in zip((dx, da, db), found, ((s, t), (e, e + 1), (e, e + 1)), strict=True):
                if whole is not None:
                    whole[first:last] = own
        if dx is not None and places is not None:
            dx = sum_of_slots(dx, places, k)
        return dx, da, db, *[None] * (len(ctx.needs_input_grad) - 3)


def _rows(x: Tensor, tokens: Tensor | None, s: int, t: int) -> Tensor:
    return x[s:t] if tokens is None else x.index_select(0, tokens[s:t])


def _one(stack: Tensor | None, e: int) -> Tensor | None:
    return None if stack is None else stack[e : e + 1]


def _all(rows: Tensor) -> Tensor:
    """The offsets of one expert that has all rows."""
    return torch.full((1,), rows.shape[0], dtype=torch.int32, device=rows.device)
