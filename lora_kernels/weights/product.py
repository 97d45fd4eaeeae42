"""x Wᵀ + bias for a packed W: what runs where no adapter acts. W's values are made for each pass and not kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd

from ..ops import operators
from ..surrounded import is_surrounded, run_outside
from ..tensors import as_dtype, flatten, multiply, unflatten
from .packed import Layout, Packed, values_of

__all__ = ["linear"]


def linear(x: Tensor, weight: Packed, bias: Tensor | None, backend_name: str | None) -> Tensor:
    """y (..., N) in x's dtype for x (..., K), multiplied in that dtype.

    ``backend_name`` None: by PyTorch's own operators, which transforms and forward-mode derivatives see through; then
    autograd keeps W's values.
    """
    if backend_name is None:
        values = values_of(weight.layout, weight.parts, x.dtype, None)
        return F.linear(x, values, None if bias is None else as_dtype(bias, x.dtype))
    if not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _product(x, bias, backend_name, weight.layout, weight.parts)
    y: Tensor = _Linear.apply(x, bias, backend_name, weight.layout, *weight.parts)
    return y


def _product(x: Tensor, bias: Tensor | None, backend_name: str, layout: Layout, parts: tuple[Tensor, ...]) -> Tensor:
    flat = flatten(x)
    if (product := operators(backend_name).packed_product) is not None:
        y, _ = product(flat, list(parts), *layout[:-1], None, None, bias, None, 1.0, False)
        return unflatten(y, x.shape)
    values = values_of(layout, parts, x.dtype, flat)
    return unflatten(F.linear(flat, values, None if bias is None else as_dtype(bias, x.dtype)), x.shape)


class _Linear(autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, backend_name: str, layout: Layout, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.settings = x.shape, backend_name, layout, None if bias is None else bias.dtype
        return _product(x, bias, backend_name, layout, parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (dy,) = grad_outputs
        if not torch.compiler.is_compiling() and is_surrounded(grad_outputs):
            return run_outside(_Linear.backward, ctx, grad_outputs)
        x_shape, backend_name, layout, bias_dtype = ctx.settings
        flat, dx, dbias = flatten(dy), None, None
        if ctx.needs_input_grad[0]:
            dx = _input_grad(flat, backend_name, layout, ctx.saved_tensors).reshape(x_shape)
        if ctx.needs_input_grad[1]:
            dbias = flat.sum(0).to(bias_dtype)
        return dx, dbias, *[None] * (2 + layout.tensors)


def _input_grad(dy: Tensor, backend_name: str, layout: Layout, parts: tuple[Tensor, ...]) -> Tensor:
    if torch.is_grad_enabled():  # second derivatives
        return dy @ values_of(layout, parts, dy.dtype, dy.detach())
    if (input_grad := operators(backend_name).packed_input_grad) is not None:
        dx: Tensor = input_grad(dy, list(parts), *layout[:-1], None, None, 0.0, None)
        return dx
    return multiply(dy, values_of(layout, parts, dy.dtype, dy))
