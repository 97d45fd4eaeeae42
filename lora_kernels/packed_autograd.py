"""The ``autograd.Function`` of a plain layer over a packed weight, as it runs without a compiler.

It is what ``BranchesFunction`` does with one such branch, in less host time. Saved: the parameters as they are, x, h,
the weight's own tensors, dropout's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .branches_autograd import Member, Saved, alias, reference_output
from .errors import UnsupportedTransformError
from .ops import is_watched, operators
from .surrounded import is_surrounded, run_outside
from .tensors import as_dtype, flatten, unflatten
from .weights import by_codes
from .weights.packed import Layout, values_of

__all__ = ["PackedLinearFunction", "apply_packed_function", "forward_only"]


def forward_only(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
    backend_name: str,
    layout: Layout,
    parts: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """y (..., N) and h (M, R) for x (..., K)."""
    ops, flat = operators(backend_name), flatten(x)
    if backend_name == "triton" and not is_watched():
        of = (layout,), (parts,), (Member(None, lora_a, lora_b, bias, None),)  # type: ignore[arg-type]
        made = by_codes.forward(flat, *of, p, (scaling,), () if state is None else (state,))  # type: ignore[arg-type]
        if made is not None:
            return unflatten(made[0][0], x.shape), made[1][0]
    h = ops.shrink(flat, lora_a, p, state)
    if ops.packed_product is not None:
        y, _ = ops.packed_product(flat, list(parts), *layout[:-1], lora_b, h, bias, None, scaling, False)
    else:
        y, _ = ops.product(flat, values_of(layout, parts, x.dtype, flat), lora_b, h, bias, None, scaling, False)
    return unflatten(y, x.shape), h


class PackedLinearFunction(torch.autograd.Function):
    """y (..., N) of x (..., K), lora_a (R, K), lora_b (N, R), bias (N,) or None and a packed weight's tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        p: float,
        state: Tensor | None,
        backend_name: str,
        layout: Layout,
        *parts: Tensor,
    ) -> Tensor:
        y, h = forward_only(x, lora_a, lora_b, bias, scaling, p, state, backend_name, layout, parts)
        need_x, need_a, need_b, need_bias = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x if need_a else None,
            lora_a,
            lora_b,
            bias if need_bias else None,
            h if need_b else None,
            state if need_x or need_a else None,
            *(parts if need_x else ()),
        )
        ctx.settings = x.shape, scaling, p, backend_name, layout, 9 + len(parts)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        if is_surrounded(grad_outputs):
            return run_outside(PackedLinearFunction.backward, ctx, grad_outputs)
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, dy)
        need_x, need_a, need_b, need_bias = ctx.needs_input_grad[:4]
        x, lora_a, lora_b, bias, h, state, *parts = ctx.saved_tensors
        x_shape, scaling, p, backend_name, layout, count = ctx.settings
        ops, dy = operators(backend_name), flatten(dy)
        dx = da = None
        dh, db, dbias = ops.output_grads(dy, lora_b, h, bias, scaling)
        if need_x:
            dx = unflatten(_input_grad(ops, dy, dh, lora_a, p, state, layout, parts), x_shape)
        if need_a:
            da = as_dtype(ops.a_grad(dh, flatten(x), p, state), lora_a.dtype)
        return dx, da, db if need_b else None, dbias if need_bias else None, *(None,) * (count - 4)


def _input_grad(
    ops: Any,
    dy: Tensor,
    dh: Tensor,
    lora_a: Tensor,
    p: float,
    state: Tensor | None,
    layout: Layout,
    parts: list[Tensor],
) -> Tensor:
    """dx (M, K)."""
    if ops.packed_input_grad is not None:
        dx: Tensor = ops.packed_input_grad(dy, parts, *layout[:-1], dh, lora_a, p, state)
        return dx
    weight = values_of(layout, parts, dy.dtype, dy)
    dx = ops.input_grad([dy], [weight], [dh], [lora_a], p, [] if state is None else [state])
    return dx


# As ``autograd.apply_function``: ``apply`` where no functorch transform is active, in less host time.
apply_packed_function: Callable[..., Any] = super(torch.autograd.Function, PackedLinearFunction).apply


def _differentiable_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the reference's formulas on the graph's own tensors, for ``create_graph=True``."""
    given_x, lora_a, lora_b, bias, _, state, *parts = ctx.saved_tensors
    x_shape, scaling, p, backend_name, layout, count = ctx.settings
    if given_x is None:
        raise UnsupportedTransformError(
            "a double backward (create_graph=True) was asked for where no lora_A needs a gradient: x was not kept, to "
            "save memory, and nothing can be differentiated again without it. Set lora_A.requires_grad_(True), or "
            "differentiate lora_kernels.reference.forward instead."
        )
    own_x: Any = alias(given_x)
    x = flatten(own_x)
    mask = None if state is None else operators(backend_name).mask(state, *x.shape, p)
    weight = values_of(layout, parts, x.dtype, x.detach()) if parts else None
    y, aliases = reference_output(
        x, Saved(weight, lora_a, lora_b, bias, None, None, None), scaling, "identity", mask, p
    )
    needed = list(zip((own_x, *aliases[1:4]), ctx.needs_input_grad[:4], strict=True))
    due = [tensor for tensor, need in needed if need]
    found = iter(torch.autograd.grad(unflatten(y, x_shape), due, dy, create_graph=True))
    return *(next(found) if need else None for _, need in needed), *(None,) * (count - 4)
