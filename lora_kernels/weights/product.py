"""x Wᵀ + bias for a packed W: what runs where no adapter acts. W's values are made for each pass and not kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from ..tensors import as_dtype, flatten, unflatten
from .packed import Layout, Packed, values_of

__all__ = ["linear"]


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """y (..., N) in x's dtype for x (..., K), multiplied in that dtype."""
    if not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _product(x, bias, weight.layout, weight.parts)
    y: Tensor = _Linear.apply(x, bias, weight.layout, *weight.parts)
    return y


def _product(x: Tensor, bias: Tensor | None, layout: Layout, parts: tuple[Tensor, ...]) -> Tensor:
    flat = flatten(x)
    values = values_of(layout, parts, x.dtype, flat)
    return unflatten(F.linear(flat, values, None if bias is None else as_dtype(bias, x.dtype)), x.shape)


class _Linear(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layout: Layout, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.settings = x.shape, layout, None if bias is None else bias.dtype
        return _product(x, bias, layout, parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (dy,) = grad_outputs
        x_shape, layout, bias_dtype = ctx.settings
        flat, dx, dbias = flatten(dy), None, None
        if ctx.needs_input_grad[0]:
            dx = (flat @ values_of(layout, ctx.saved_tensors, dy.dtype, flat.detach())).reshape(x_shape)
        if ctx.needs_input_grad[1]:
            dbias = flat.sum(0).to(bias_dtype)
        return dx, dbias, *[None] * (1 + layout.tensors)
