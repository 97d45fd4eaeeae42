"""Which tokens go to which expert: the slots (token, one of its k experts) sorted by expert, and the way back.

``T`` tokens, ``k`` experts a token, ``M = T k`` slots, ``E`` experts. Slots of an index of E or more (sentinels: an
expert that another process has) come last and belong to no expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError, UnsupportedTransformError
from ..gate import chosen
from ..ops import operators
from ..surrounded import is_surrounded, run_outside
from ..tensors import resolved

__all__ = ["Routing", "combine", "spread_grad", "sum_of_slots"]

_CHUNK = 2048  # rows whose products are in memory at a time
_INDICES = (torch.int32, torch.int64)
_COMPUTED_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


class Routing:
    """The slots of ``top_k_index`` (T, k), sorted by expert; equal ones keep their order, so a run can be repeated.

    Nothing here reads values on the host, so a compiled graph holds for every routing.

    Attributes:
        tokens: the token of each sorted slot, int64 (M,).
        slots: the slot ``token * k + j`` of each sorted one, int64 (M,).
        places: where each slot stands in the sorted order, int64 (M,).
        experts: the expert of each sorted slot, (M,); of a sentinel some expert, to be read from and not meant.
        offsets: where the slots of each expert end, int32 (E,).
        present: bool (M, 1), False for sentinels; None on a GPU, where there are none unless ``skips``.
    """

    def __init__(self, top_k_index: Tensor, num_experts: int, skips: bool) -> None:
        index = _indices(top_k_index)
        self.k = top_k_index.shape[1]
        order, self.slots = torch.sort(index, stable=True)
        self.tokens = self.slots.div(self.k, rounding_mode="floor")
        positions = torch.arange(index.numel(), device=index.device)
        self.places = torch.empty_like(self.slots).scatter_(0, self.slots, positions)
        experts = torch.arange(num_experts, dtype=order.dtype, device=order.device)
        self.offsets = torch.searchsorted(order, experts, right=True, out_int32=True)
        self.present = (order < num_experts).unsqueeze(1) if skips or index.is_cpu else None
        self.experts = order.clamp(max=num_experts - 1)


def sum_of_slots(rows: Tensor, places: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """(M, F) in sorted order -> (T, F): each token's k rows, times its weights (T, k), in the order of its slots.

    They are added in fp32 (fp64 for fp64). Weights are taken on a CPU alone, in rows' dtype.
    """
    if rows.is_cpu:  # one pass, where a gather and a sum write (M, F) in between
        found: Tensor = F.embedding_bag(places.view(-1, k), rows, mode="sum", per_sample_weights=weights)
        return found
    return rows.index_select(0, places).view(-1, k, rows.shape[1]).sum(1)


def spread_grad(d_rows: Tensor, places: Tensor, offsets: Tensor, k: int, name: str) -> Tensor:
    """``sum_of_slots`` of the gradients of sorted rows, which the backend ``name`` gave; in one pass where it can."""
    summed = operators(name).combine
    return sum_of_slots(d_rows, places, k) if summed is None else summed(d_rows, None, places, offsets, k, d_rows.dtype)


def combine(rows: Tensor, weights: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """(T, F) in ``dtype``: the rows (M, F) of each token's experts, times its ``weights`` (T, k), added up."""
    rows, weights, name = resolved(rows), resolved(weights), chosen(rows)
    if operators(name).combine is not None and {rows.dtype, weights.dtype, dtype}.issubset(_COMPUTED_IN_FP32):
        in_one_pass: Tensor = _CombineInOnePass.apply(rows, weights, routing.places, routing.offsets, dtype, name)
        return in_one_pass
    combined: Tensor = _Combine.apply(
        rows, weights, routing.slots, routing.tokens, routing.places, routing.present, routing.k
    )
    return combined.to(dtype)


class _CombineInOnePass(torch.autograd.Function):
    """By a backend's ``combine`` and ``combine_grad``: no product of rows and weights is ever in memory."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, places: Tensor, offsets: Tensor, dtype: torch.dtype, name: str
    ) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, places, offsets)
        ctx.settings = rows.dtype, name
        own: Any = operators(name)
        y: Tensor = own.combine(rows, weights, places, offsets, weights.shape[1], dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and is_surrounded(grad_outputs):
            return run_outside(_CombineInOnePass.backward, ctx, grad_outputs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UnsupportedTransformError(
                "a double backward (create_graph=True) was asked for through the sum over a token's experts, which has "
                "first derivatives alone. Differentiate once, or call the model within use_backend('eager')."
            )
        rows, weights, places, offsets = ctx.saved_tensors
        dtype, name = ctx.settings
        need_rows, need_weights = ctx.needs_input_grad[:2]
        own: Any = operators(name)
        due = dtype if need_rows else None
        d_rows, d_weights = own.combine_grad(resolved(grad_outputs[0]), rows, weights, places, offsets, due)
        return d_rows if need_rows else None, d_weights if need_weights else None, None, None, None, None


class _Combine(torch.autograd.Function):
    """By gathers and sums alone: autograd's own gradient of an indexed read adds by atomics on a GPU."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        slots: Tensor,
        tokens: Tensor,
        places: Tensor,
        present: Tensor | None,
        k: int,
    ) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, slots, tokens, places, present)
        ctx.dtype = rows.dtype
        sorted_weights = _sorted(weights, slots, present)
        if rows.is_cpu and rows.dtype is weights.dtype:
            return sum_of_slots(rows, places, k, sorted_weights.reshape(-1).index_select(0, places).view(-1, k))
        return sum_of_slots(rows * sorted_weights, places, k)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        rows, weights, slots, tokens, places, present = ctx.saved_tensors
        d_rows = dy.index_select(0, tokens)
        d_weights = None
        if ctx.needs_input_grad[1]:
            d_weights = _row_products(d_rows, rows)
            if present is not None:
                d_weights = d_weights.masked_fill(~present, 0.0)
            d_weights = d_weights.index_select(0, places).view_as(weights).to(weights.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weights, None, None, None, None, None
        factors = _sorted(weights, slots, present)
        d_rows = d_rows.mul_(factors) if d_rows.dtype is factors.dtype else (d_rows * factors).to(ctx.dtype)
        return d_rows.to(ctx.dtype), d_weights, None, None, None, None, None


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """(M, 1): the inner product of each row with the other's."""
    if not left.is_cpu or torch.compiler.is_compiling():
        return (left * right).sum(1, keepdim=True)
    pairs = zip(left.split(_CHUNK), right.split(_CHUNK), strict=True)  # products stay in the cache
    return torch.cat([(one * other).sum(1, keepdim=True) for one, other in pairs])


def _sorted(weights: Tensor, slots: Tensor, present: Tensor | None) -> Tensor:
    """(M, 1): zero for sentinels, whatever their weight."""
    found = weights.reshape(-1).index_select(0, slots).unsqueeze(1)
    return found if present is None else found.masked_fill(~present, 0.0)


def _indices(top_k_index: Tensor) -> Tensor:
    """The experts of all slots, (M,), in a dtype that holds ``num_experts`` too, which uint8 does not of 256."""
    if top_k_index.dim() != 2 or top_k_index.shape[1] < 1:
        raise InvalidArgumentError(
            f"top_k_index of shape {tuple(top_k_index.shape)} was given: it must be (tokens, experts per token), with "
            "at least one expert per token."
        )
    if top_k_index.is_floating_point() or top_k_index.is_complex() or top_k_index.dtype is torch.bool:
        raise InvalidTypeError(f"top_k_index of {top_k_index.dtype} was given: it must hold integers, such as int64.")
    index = top_k_index.detach().reshape(-1)
    if index.dtype not in _INDICES:
        index = index.to(torch.int64)
    if torch.compiler.is_compiling():
        torch._assert_async((index >= 0).all(), "top_k_index holds a negative index: experts count from 0.")
    elif index.is_cpu and index.numel() and int(index.min()) < 0:
        raise InvalidArgumentError(
            f"top_k_index holds {int(index.min())}: experts are counted from 0. Give num_experts for a slot that "
            "no expert here serves."
        )
    return index
