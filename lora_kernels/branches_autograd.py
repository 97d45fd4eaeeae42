"""The ``autograd.Function`` of several branches that read one x, each with its own activation and gain.

The formulas are ``reference.py``'s, for each branch; dx is the sum of the branches'. Saved: the parameters as they are,
x, each branch's z (M, R), with a trainable gain its l (M, N), and with dropout the states that regenerate the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .activations import activate, activate_backward
from .errors import UnsupportedTransformError
from .ops import operators
from .tensors import as_dtype, flatten, unflatten

__all__ = ["BranchesFunction", "apply_branches_function", "forward_only"]

_PER_BRANCH = 5  # weight, lora_a, lora_b, bias, gain


class _Member(NamedTuple):
    """One branch's tensors, as they were given."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    gain: Tensor | None


def _members(tensors: Sequence[Any], count: int) -> list[_Member]:
    return [_Member(*tensors[_PER_BRANCH * i : _PER_BRANCH * (i + 1)]) for i in range(count)]


def forward_only(
    x: Tensor,
    backend_name: str,
    p: float,
    scalings: tuple[float, ...],
    activations: tuple[str, ...],
    with_linears: tuple[bool, ...],
    *tensors: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Each branch's y (..., N_i), z (M, R_i) and, where ``with_linears`` says so, l (M, N_i).

    The other arguments are ``BranchesFunction``'s.
    """
    ops, count = operators(backend_name), len(scalings)
    members, states = _members(tensors, count), tensors[_PER_BRANCH * count :]
    flat = flatten(x)
    zs = _shrink_all(ops, flat, [member.lora_a for member in members], p, states)
    ys, linears = [], []
    for member, z, scaling, activation, with_linear in zip(
        members, zs, scalings, activations, with_linears, strict=True
    ):
        weight, h = as_dtype(member.weight, x.dtype), activate(activation, z)
        y, linear = ops.product(flat, weight, member.lora_b, h, member.bias, member.gain, scaling, with_linear)
        ys.append(unflatten(y, x.shape))
        linears.append(linear)
    return ys, zs, linears


def _shrink_all(ops: Any, x: Tensor, lora_as: list[Tensor], p: float, states: Sequence[Any]) -> list[Tensor]:
    """z of each branch; without dropout in one read of x."""
    if states:
        return [ops.shrink(x, lora_a, p, state) for lora_a, state in zip(lora_as, states, strict=True)]
    if len(lora_as) == 1:
        return [ops.shrink(x, lora_as[0], 0.0, None)]
    dtype = reference.adapter_dtype(x.dtype)
    joined = ops.shrink(x, torch.cat([as_dtype(lora_a, dtype) for lora_a in lora_as]), 0.0, None)
    return list(torch.split_with_sizes(joined, [lora_a.shape[0] for lora_a in lora_as], 1))


class _Saved(NamedTuple):
    """What backward has of one branch; None where no gradient that is due needs it."""

    weight: Any
    lora_a: Tensor
    lora_b: Tensor
    bias: Any
    gain: Any
    z: Any
    linear: Any


class BranchesFunction(torch.autograd.Function):
    """(y_1, ..., y_n), each (..., N_i), of x (..., K) and the branches.

    ``tensors``: for each branch weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,) or None, gain (N,) or None; then
    no dropout state, or one for each branch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        backend_name: str,
        p: float,
        scalings: tuple[float, ...],
        activations: tuple[str, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(scalings)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # an output that nobody used gives no gradients, not zeros
        needs, members = _needs(ctx, count), _members(tensors, count)
        with_linears = tuple(need.gain for need in needs)
        ys, zs, linears = forward_only(x, backend_name, p, scalings, activations, with_linears, *tensors)
        need_x, any_a = ctx.needs_input_grad[0], any(need.lora_a for need in needs)
        saved: list[Tensor | None] = [x if any_a or any(need.weight for need in needs) else None]
        for member, need, activation, z, linear in zip(members, needs, activations, zs, linears, strict=True):
            bends = activation != "identity" and (need_x or need.lora_a)
            own = _Saved(
                weight=member.weight if need_x or need.gain else None,
                lora_a=member.lora_a,
                lora_b=member.lora_b,
                bias=member.bias if need.bias else None,
                gain=member.gain,
                z=z if need.lora_b or bends else None,
                linear=linear if need.gain else None,
            )
            saved.extend(own)  # PyTorch 2.11's dynamo lets a list grow by no named tuple with +=
        states = tensors[_PER_BRANCH * count :]
        ctx.save_for_backward(*saved, *(states if need_x or any_a else ()))
        weight_dtypes = tuple(member.weight.dtype for member in members)
        ctx.settings = x.shape, weight_dtypes, len(states), backend_name, p, scalings, activations
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        if not torch.compiler.is_compiling():
            ctx.has_run = True  # what was saved may be gone: an output that waits for its layer is worth nothing now
            if torch.is_grad_enabled():
                return _differentiable_backward(ctx, dys)
        x_shape, weight_dtypes, state_count, backend_name, p, scalings, activations = ctx.settings
        count, need_x, ops = len(scalings), ctx.needs_input_grad[0], operators(backend_name)
        x, saved, states = _unpack(ctx.saved_tensors, count)
        x = None if x is None else flatten(x)
        needs = _needs(ctx, count)
        used = [i for i, dy in enumerate(dys) if dy is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        dlinears, dzs = {}, {}
        grads: list[dict[str, Tensor]] = [{} for _ in needs]
        for i in used:
            of = flatten(dys[i]), saved[i], needs[i], need_x, scalings[i], activations[i]
            dlinears[i], dzs[i], grads[i] = _of_output(ops, *of)
            if needs[i].weight and x is not None:
                grads[i]["weight"] = as_dtype(dlinears[i].t() @ x, weight_dtypes[i])
        dx = None
        if need_x:
            weights = [as_dtype(saved[i].weight, dlinears[i].dtype) for i in used]
            lora_as, own = [saved[i].lora_a for i in used], [states[i] for i in used] if states else []
            dx = ops.input_grad([dlinears[i] for i in used], weights, [dzs[i] for i in used], lora_as, p, own)
            dx = unflatten(dx, x_shape)
        if x is not None:
            due = [i for i in used if needs[i].lora_a]
            das = _a_grads(ops, [dzs[i] for i in due], x, p, [states[i] for i in due] if states else [])
            for i, da in zip(due, das, strict=True):
                grads[i]["lora_a"] = as_dtype(da, saved[i].lora_a.dtype)
        flat = [gradients.get(name) for gradients in grads for name in _Needs._fields]
        return (dx, None, None, None, None, *flat, *[None] * state_count)


def _of_output(
    ops: Any, dy: Tensor, own: _Saved, need: _Needs, need_x: bool, scaling: float, activation: str
) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """dl, dz (None where nothing asks for it) and the gradients of lora_b, bias and gain that are due."""
    gradients: dict[str, Tensor] = {}
    bias, dlinear, dz = own.bias, dy, None
    if own.gain is not None:
        dlinear, gradients["gain"], gradients["bias"] = ops.gain_grad(dy, own.linear, own.gain, bias)
        bias = None
    need_dz = need_x or need.lora_a
    if need_dz or need.lora_b or bias is not None:
        h = activate(activation, own.z) if need.lora_b else None
        dh, gradients["lora_b"], dbias = ops.output_grads(dlinear, own.lora_b, h, bias, scaling)
        if bias is not None:
            gradients["bias"] = dbias
        dz = activate_backward(activation, dh, own.z) if need_dz else None
    return dlinear, dz, {name: value for name, value in gradients.items() if getattr(need, name)}


def _unpack(tensors: Sequence[Any], count: int) -> tuple[Any, list[_Saved], list[Tensor]]:
    """x, each branch's, and the dropout states, of what was saved."""
    width = len(_Saved._fields)
    end = 1 + width * count
    return tensors[0], [_Saved(*tensors[i : i + width]) for i in range(1, end, width)], list(tensors[end:])


class _Needs(NamedTuple):
    """Which gradients of a branch are due."""

    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool
    gain: bool


def _needs(ctx: Any, count: int) -> list[_Needs]:
    flags = ctx.needs_input_grad[5:]
    return [_Needs(*flags[_PER_BRANCH * i : _PER_BRANCH * (i + 1)]) for i in range(count)]


def _a_grads(ops: Any, dzs: list[Tensor], x: Tensor, p: float, states: Sequence[Tensor]) -> list[Tensor]:
    """da of each branch, in the hidden dtype; without dropout in one read of x."""
    if states:
        return [ops.a_grad(dz, x, p, state) for dz, state in zip(dzs, states, strict=True)]
    if len(dzs) <= 1:
        return [ops.a_grad(dz, x, 0.0, None) for dz in dzs]
    joined = ops.a_grad(torch.cat(dzs, 1), x, 0.0, None)
    return [part.contiguous() for part in torch.split_with_sizes(joined, [dz.shape[1] for dz in dzs])]


# As ``autograd.apply_function``: ``apply`` where no functorch transform is active, in less host time.
apply_branches_function: Callable[..., Any] = super(torch.autograd.Function, BranchesFunction).apply


def _differentiable_backward(ctx: Any, dys: Sequence[Tensor]) -> Any:
    """The gradients of the reference's formulas on the graph's own tensors, for ``create_graph=True``."""
    x_shape, _, state_count, backend_name, p, scalings, activations = ctx.settings
    given_x, saved, states = _unpack(ctx.saved_tensors, len(scalings))
    if given_x is None:
        raise UnsupportedTransformError(
            "a double backward (create_graph=True) was asked for where no lora_A needs a gradient: x was not kept, to "
            "save memory, and nothing can be differentiated again without it. Set lora_A.requires_grad_(True), or "
            "differentiate lora_kernels.reference.forward instead."
        )
    inputs: list[Any] = [_alias(given_x)]
    x = flatten(inputs[0])
    wide, outputs = reference.adapter_dtype(x.dtype), []
    for i, (own, scaling, activation) in enumerate(zip(saved, scalings, activations, strict=True)):
        # Where W is not there no gradient that is due needs it: x Wᵀ is a constant to them.
        weight = x.new_zeros(own.lora_b.shape[0], x.shape[1]) if own.weight is None else own.weight
        aliases: list[Any] = [_alias(tensor) for tensor in (weight, own.lora_a, own.lora_b, own.bias, own.gain)]
        inputs += aliases
        w, a, b = (tensor.to(wide) for tensor in aliases[:3])
        bias = None if aliases[3] is None else aliases[3].to(x.dtype).to(wide)
        mask = operators(backend_name).mask(states[i], *x.shape, p) if states else None
        y, _ = reference.forward(x.to(wide), w, a, b, bias, scaling, mask, p, aliases[4], activation)
        outputs.append(y.to(x.dtype).reshape(*x_shape[:-1], -1))
    needed = [ctx.needs_input_grad[0], *(flag for need in _needs(ctx, len(scalings)) for flag in need)]
    due = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    used = [i for i, dy in enumerate(dys) if dy is not None]
    of = [outputs[i] for i in used], due, [dys[i] for i in used]
    found = iter(torch.autograd.grad(*of, create_graph=True, allow_unused=True))
    dx, *rest = [next(found) if need else None for need in needed]
    return (dx, None, None, None, None, *rest, *[None] * state_count)


def _alias(tensor: Tensor | None) -> Any:
    """A view: a gradient by it stops there, and does not go through what ``tensor`` was made of."""
    return None if tensor is None else tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()
