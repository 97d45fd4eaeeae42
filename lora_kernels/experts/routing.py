"""Which tokens go to which expert: the slots (token, one of its k experts) sorted by expert, and the way back.

``T`` tokens, ``k`` experts a token, ``M = T k`` slots, ``E`` experts. Slots of an index of E or more (sentinels: an
expert that another process has) come last and belong to no expert.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError

__all__ = ["Routing", "combine"]


class Routing:
    """The slots of ``top_k_index`` (T, k), sorted by expert; equal ones keep their order, so a run can be repeated.

    Attributes:
        tokens: the token of each sorted slot, int64 (M,).
        slots: the slot ``token * k + j`` of each sorted one, int64 (M,).
        places: where each slot stands in the sorted order, int64 (M,).
        experts: the expert of each sorted slot, (M,); of a sentinel some expert, to be read from and not meant.
        offsets: where the slots of each expert end, int32 (E,).
        skips: whether there may be sentinels.
    """

    def __init__(self, top_k_index: Tensor, num_experts: int, skips: bool) -> None:
        _check(top_k_index)
        self.k = top_k_index.shape[1]
        index = top_k_index.detach().reshape(-1)
        order, self.slots = torch.sort(index, stable=True)
        self.tokens = self.slots.div(max(self.k, 1), rounding_mode="floor")
        self.places = torch.empty_like(self.slots)
        self.places[self.slots] = torch.arange(index.numel(), device=index.device)
        experts = torch.arange(num_experts, dtype=order.dtype, device=order.device)
        self.offsets = torch.searchsorted(order, experts, right=True, out_int32=True)
        self.skips = skips or (index.is_cpu and self.ends[-1] < index.numel())
        self.present = (order < num_experts).unsqueeze(1) if self.skips else None  # (M, 1)
        self.experts = order.clamp(max=num_experts - 1)

    @cached_property
    def ends(self) -> list[int]:
        """``offsets`` on the host: on a GPU reading them waits for it."""
        ends: list[int] = self.offsets.tolist()
        return ends

    def parts(self) -> list[tuple[int, slice]]:
        """``(expert, its rows)`` of each expert that has any."""
        starts = [0, *self.ends[:-1]]
        return [(e, slice(s, t)) for e, (s, t) in enumerate(zip(starts, self.ends, strict=True)) if t > s]

    def sum_of_slots(self, rows: Tensor) -> Tensor:
        """(M, F) in sorted order -> (T, F): each token's rows, added in fp32 in the order of its slots."""
        by_slot = rows.index_select(0, self.places)
        return by_slot.view(-1, self.k, rows.shape[1]).sum(1)


def combine(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """(T, F): the rows (M, F) of each token's experts, times its ``weights`` (T, k), added up."""
    combined: Tensor = _Combine.apply(rows, weights, routing)
    return combined


class _Combine(torch.autograd.Function):
    """By gathers and sums alone: autograd's own gradient of an indexed read adds by atomics on a GPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        ctx.routing, ctx.dtype = routing, rows.dtype
        return routing.sum_of_slots(rows * _sorted(weights, routing))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,) = grad_outputs
        routing: Routing = ctx.routing
        rows, weights = ctx.saved_tensors
        d_rows = dy.index_select(0, routing.tokens)
        d_weights = None
        if ctx.needs_input_grad[1]:
            products = (d_rows * rows).sum(1, keepdim=True)
            if routing.present is not None:
                products = products.masked_fill(~routing.present, 0.0)
            d_weights = products.index_select(0, routing.places).view_as(weights).to(weights.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weights, None
        return (d_rows * _sorted(weights, routing)).to(ctx.dtype), d_weights, None


def _sorted(weights: Tensor, routing: Routing) -> Tensor:
    """(M, 1): zero for sentinels, whatever their weight."""
    found = weights.reshape(-1).index_select(0, routing.slots).unsqueeze(1)
    return found if routing.present is None else found.masked_fill(~routing.present, 0.0)


def _check(top_k_index: Tensor) -> None:
    if top_k_index.dim() != 2 or top_k_index.shape[1] < 1:
        raise InvalidArgumentError(
            f"top_k_index of shape {tuple(top_k_index.shape)} was given: it must be (tokens, experts per token), with "
            "at least one expert per token."
        )
    if top_k_index.is_floating_point() or top_k_index.dtype is torch.bool:
        raise InvalidTypeError(f"top_k_index of {top_k_index.dtype} was given: it must hold integers, such as int64.")
    if top_k_index.is_cpu and top_k_index.numel() and int(top_k_index.min()) < 0:
        raise InvalidArgumentError(
            f"top_k_index holds {int(top_k_index.min())}: experts are counted from 0. Give num_experts for a slot that "
            "no expert here serves."
        )
