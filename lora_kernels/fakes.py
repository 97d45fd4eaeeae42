"""Shapes and dtypes of what the operators give, for tracing: see ``ops.py``, whose tables they follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kept import Kept, row_words

__all__ = ["fakes"]


def fakes(kept: Kept) -> dict[str, Callable[..., Any]]:
    """One function for each operator; every result is a fresh contiguous tensor."""

    def forward(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        p: float,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns, dtype = kept.h(x, weight.shape[0], lora_a.shape[0])
        with_words, rows = kept.packs_mask and state is not None, math.prod(x.shape[:-1])
        words = (rows, row_words(x.shape[-1])) if with_words else (0,)
        return (
            x.new_empty((*x.shape[:-1], weight.shape[0])),
            x.new_empty((rows, columns), dtype=dtype),
            x.new_empty(words, dtype=torch.int32),
        )

    def backward(
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        h: Tensor | None,
        scaling: float,
        p: float,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            dy.new_empty(0 if weight is None else (*dy.shape[:-1], weight.shape[1])),
            lora_a.new_empty(0 if x is None else lora_a.shape),
            lora_b.new_empty(0 if h is None else lora_b.shape),
            _like_bias(dy, bias),
        )

    def mask(state: Tensor, rows: int, columns: int, p: float) -> Tensor:
        return state.new_empty((rows, columns), dtype=torch.bool)

    def shrink(x: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
        return x.new_empty((x.shape[0], lora_a.shape[0]), dtype=kept.hidden_dtype(x.dtype))

    def product(
        x: Tensor,
        weight: Tensor,
        lora_b: Tensor,
        h: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        scaling: float,
        with_linear: bool,
    ) -> tuple[Tensor, Tensor]:
        size = (x.shape[0], weight.shape[0])
        return x.new_empty(size), x.new_empty(0 if gain is None or not with_linear else size)

    def output_grads(
        dy: Tensor, lora_b: Tensor, h: Tensor | None, bias: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dh = dy.new_empty((dy.shape[0], lora_b.shape[1]), dtype=kept.hidden_dtype(dy.dtype))
        return dh, lora_b.new_empty(0 if h is None else lora_b.shape), _like_bias(dy, bias)

    def input_grad(
        dys: list[Tensor],
        weights: list[Tensor],
        dhs: list[Tensor],
        lora_as: list[Tensor],
        p: float,
        states: list[Tensor],
    ) -> Tensor:
        return dys[0].new_empty((dys[0].shape[0], weights[0].shape[1]))

    def a_grad(dh: Tensor, x: Tensor, p: float, state: Tensor | None) -> Tensor:
        return x.new_empty((dh.shape[1], x.shape[1]), dtype=kept.hidden_dtype(x.dtype))

    def gain_grad(
        dy: Tensor, linear: Tensor | None, gain: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return dy.new_empty(dy.shape), gain.new_empty(0 if linear is None else gain.shape), _like_bias(dy, bias)

    def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))

    def group_forward(
        x: Tensor,
        weights: list[Tensor],
        lora_as: list[Tensor],
        lora_bs: list[Tensor],
        biases: list[Tensor | None],
        scalings: list[float],
        p: float,
        states: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        of_members = [
            forward(x, *own, p, states[i] if states else None)
            for i, own in enumerate(zip(weights, lora_as, lora_bs, biases, scalings, strict=True))
        ]
        ys, hs, words = ([found[place] for found in of_members] for place in range(3))
        return ys, hs, words if states else []

    def group_backward(
        dys: list[Tensor],
        x: Tensor | None,
        weights: list[Tensor],
        lora_as: list[Tensor],
        lora_bs: list[Tensor],
        biases: list[Tensor | None],
        hs: list[Tensor],
        scalings: list[float],
        p: float,
        states: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        return (
            dys[0].new_empty(0 if not weights else (dys[0].shape[0], weights[0].shape[1])),
            [a.new_empty(0 if x is None else a.shape) for a in lora_as],
            [b.new_empty(0 if not hs else b.shape) for b in lora_bs],
            [_like_bias(dy, bias) for dy, bias in zip(dys, biases, strict=True)],
        )

    def gated(gate: Tensor, up: Tensor, number: int) -> Tensor:
        return gate.new_empty(gate.shape)

    def gated_grad(da: Tensor, gate: Tensor, up: Tensor, number: int, joined: bool) -> tuple[Tensor, Tensor]:
        m, f = gate.shape
        return gate.new_empty((m, 2 * f if joined else f)), gate.new_empty(0 if joined else (m, f))

    def experts_forward(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        offsets: Tensor,
        tokens: Tensor | None,
        scaling: float,
        p: float,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        m = (x if tokens is None else tokens).shape[0]
        h = (0,) if lora_a is None else (m, lora_a.shape[1])
        return x.new_empty((m, weight.shape[1])), x.new_empty(h, dtype=kept.hidden_dtype(x.dtype))

    def experts_backward(
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        offsets: Tensor,
        tokens: Tensor | None,
        h: Tensor | None,
        scaling: float,
        p: float,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (dy if own is None else own for own in (lora_a, lora_b))
        return (
            dy.new_empty(0 if weight is None else (dy.shape[0], weight.shape[2])),
            a.new_empty(0 if x is None or lora_a is None else a.shape),
            b.new_empty(0 if h is None or lora_b is None else b.shape),
        )

    def experts_mlp_forward(
        x: Tensor,
        up_weight: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_weight: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        offsets: Tensor,
        slots: Tensor,
        weights: Tensor,
        up_scaling: float,
        down_scaling: float,
        up_p: float,
        down_p: float,
        up_state: Tensor | None,
        down_state: Tensor | None,
        number: int,
        wide: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m, hidden = slots.shape[0], kept.hidden_dtype(x.dtype)
        return (
            x.new_empty((x.shape[0], down_weight.shape[1]), dtype=hidden if wide else x.dtype),
            x.new_empty((m, up_weight.shape[1])),
            x.new_empty((m, up_a.shape[1]), dtype=hidden),
            x.new_empty((m, down_a.shape[1]), dtype=hidden),
        )

    def experts_mlp_backward(
        dy: Tensor,
        x: Tensor,
        joined: Tensor,
        up_weight: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_weight: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        offsets: Tensor,
        slots: Tensor,
        weights: Tensor,
        up_h: Tensor,
        down_h: Tensor,
        up_scaling: float,
        down_scaling: float,
        up_p: float,
        down_p: float,
        up_state: Tensor | None,
        down_state: Tensor | None,
        number: int,
        need_x: bool,
        need_weights: bool,
        need_up: bool,
        need_down: bool,
    ) -> tuple[Tensor, ...]:
        due = [(x, need_x), (weights, need_weights)]
        due += [(factor, need_up) for factor in (up_a, up_b)] + [(factor, need_down) for factor in (down_a, down_b)]
        return tuple(of.new_empty(of.shape if needed else 0) for of, needed in due)

    def combine(
        rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor, k: int, dtype: torch.dtype
    ) -> Tensor:
        tokens = places.shape[0] // k if weights is None else weights.shape[0]
        return rows.new_empty((tokens, rows.shape[1]), dtype=dtype)

    def combine_grad(
        dy: Tensor, rows: Tensor | None, weights: Tensor, places: Tensor, offsets: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        return (
            dy.new_empty(0 if dtype is None else (places.shape[0], dy.shape[1]), dtype=dtype),
            weights.new_empty(0 if rows is None else weights.shape),
        )

    def packed_product(
        x: Tensor,
        parts: list[Tensor],
        form: str,
        spec: str,
        rows: int,
        columns: int,
        lora_b: Tensor | None,
        h: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        scaling: float,
        with_linear: bool,
    ) -> tuple[Tensor, Tensor]:
        size = (x.shape[0], rows)
        return x.new_empty(size), x.new_empty(0 if gain is None or not with_linear else size)

    def packed_input_grad(
        dy: Tensor,
        parts: list[Tensor],
        form: str,
        spec: str,
        rows: int,
        columns: int,
        dh: Tensor | None,
        lora_a: Tensor | None,
        p: float,
        state: Tensor | None,
    ) -> Tensor:
        return dy.new_empty((dy.shape[0], columns))

    functions = (
        forward, backward, mask, shrink, product, output_grads, input_grad, a_grad, gain_grad, row_norms,
        gated, gated_grad, group_forward, group_backward, experts_forward, experts_backward,
        experts_mlp_forward, experts_mlp_backward, combine, combine_grad, packed_product, packed_input_grad,
    )  # fmt: skip
    return {function.__name__: function for function in functions}


def _like_bias(dy: Tensor, bias: Tensor | None) -> Tensor:
    return dy.new_empty(0) if bias is None else bias.new_empty(bias.shape)
