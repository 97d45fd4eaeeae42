"""The plain layer's ``autograd.Function``: what is saved for backward, and which gradients are due.

Saved: the parameters as they are (never a cast of them), x, h, and with dropout the state that regenerates the mask;
what takes memory of its own only where a gradient that is due needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import reference
from .errors import UnsupportedTransformError
from .ops import operators
from .surrounded import is_surrounded, run_outside
from .tensors import as_dtype, flatten, multiply

__all__ = ["LoRALinearFunction", "apply_function", "forward_only"]

_GradInputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None, None, None]


def forward_only(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
    backend_name: str,
) -> Tensor:
    """y (..., N) for x (..., K): the operator without autograd around it, for when no gradient is due."""
    ops = operators(backend_name)
    y, _, _ = ops.forward(x, as_dtype(weight, x.dtype), lora_a, lora_b, bias, scaling, p, state)
    return y


class LoRALinearFunction(torch.autograd.Function):
    """y (..., N) of x (..., K), weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        p: float,
        state: Tensor | None,
        backend_name: str,
    ) -> Tensor:
        ops = operators(backend_name)
        y, h, words = ops.forward(x, as_dtype(weight, x.dtype), lora_a, lora_b, bias, scaling, p, state)
        if state is not None and ops.kept.packs_mask and ops.kept.prefers_words(weight.shape[0]):
            state = words
        need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            weight if need_x else None,
            lora_a,
            lora_b,
            bias if need_bias else None,
            h if need_b else None,
            state if need_x or need_a or need_weight else None,  # where x is kept, a double backward drops it again
        )
        ctx.settings = x.shape, weight.dtype, scaling, p, backend_name
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> _GradInputs:
        (dy,) = grad_outputs
        if not is_compiling():
            if is_surrounded(grad_outputs):
                return run_outside(LoRALinearFunction.backward, ctx, grad_outputs)  # type: ignore[return-value]
            if torch.is_grad_enabled():
                return _differentiable_backward(ctx, dy)
        need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        x, weight, lora_a, lora_b, bias, h, state = ctx.saved_tensors
        _, weight_dtype, scaling, p, backend_name = ctx.settings
        if weight is not None:
            weight = as_dtype(weight, dy.dtype)
        dx, da, db, dbias = operators(backend_name).backward(
            dy, x if need_a else None, weight, lora_a, lora_b, bias, h, scaling, p, state
        )
        return (
            dx if need_x else None,
            multiply(flatten(dy).t(), flatten(x)).to(weight_dtype) if need_weight else None,
            da if need_a else None,
            db if need_b else None,
            dbias if need_bias else None,
            None,
            None,
            None,
            None,
        )


# What ``LoRALinearFunction.apply`` comes to where no functorch transform is active, in a third of its time. A compiler
# knows the method alone.
apply_function: Callable[..., Any] = super(torch.autograd.Function, LoRALinearFunction).apply


def _differentiable_backward(ctx: Any, dy: Tensor) -> _GradInputs:
    """The reference's formulas on the graph's own tensors: what ``create_graph=True`` can differentiate again."""
    need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
    x, weight, lora_a, lora_b, bias, h, state = ctx.saved_tensors
    x_shape, weight_dtype, scaling, p, backend_name = ctx.settings
    if need_b and need_x and not (need_a or need_weight):
        raise UnsupportedTransformError(
            "a double backward (create_graph=True) was asked for where lora_B and x need gradients but lora_A is "
            "frozen: x was not kept, to save memory, and the gradient of lora_B cannot be differentiated without it. "
            "Set lora_A.requires_grad_(True), or differentiate lora_kernels.reference.forward instead."
        )
    compute, wide = dy.dtype, reference.adapter_dtype(dy.dtype)
    dy = flatten(dy)
    wide_dy = dy.to(wide)
    mask = None
    if state is not None:
        ops = operators(backend_name)
        mask = ops.mask(state, dy.shape[0], x_shape[-1], p)
    dx = dw = da = db = dbias = None
    dropped: Any = None
    if x is not None:
        x = flatten(x)
        dropped = reference.drop(x.to(wide), mask, p)
    if need_x or need_a:
        dh: Tensor = scaling * (wide_dy @ lora_b.to(wide))
    if need_x:
        low_rank = reference.drop(dh @ lora_a.to(wide), mask, p)
        dx = (dy @ weight.to(compute) + low_rank).to(compute).reshape(x_shape)
    if need_a:
        da = (dh.t() @ dropped).to(lora_a.dtype)
    if need_b:
        if dropped is None:
            scaled = operators(backend_name).kept.scaled_h(h, lora_a.shape[0], scaling).to(wide)
        else:
            scaled = scaling * (dropped @ lora_a.to(wide).t())
        db = (wide_dy.t() @ scaled).to(lora_b.dtype)
    if need_weight:
        dw = (dy.t() @ x).to(weight_dtype)
    if need_bias:
        dbias = dy.sum(0).to(bias.dtype)
    return dx, dw, da, db, dbias, None, None, None, None
