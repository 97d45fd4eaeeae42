"""The ``autograd.Function`` of a gated MLP: gate, up, their product and down, each with its adapter.

::

    g, u = the branches' outputs of x, one read of x for both    (M, F)
    a    = σ(g) * u                                              (M, F)
    y    = down's output of a                                    (M, N)

    da       = down's input gradient of dy                       (M, F)
    dg, du   = da * u * σ'(g), da * σ(g)                         (M, F)
    dx       = the branches' input gradient of dg, du            (M, K)

Saved: x, g and u, the parameters as they are, each branch's z (M, R), down's h, and with dropout the states that
regenerate the masks. a is made again in backward. With ``recompute`` g and u are too: of x, z and the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .activations import GATES, activate
from .branches_autograd import (
    PER_BRANCH,
    Member,
    Needs,
    Saved,
    alias,
    gradients_of,
    members_of,
    needs_of,
    of_output,
    reference_output,
    saved_of,
)
from .branches_autograd import forward_only as branches_forward
from .errors import UnsupportedTransformError
from .ops import operators
from .surrounded import is_surrounded, run_outside
from .tensors import as_dtype, flatten, unflatten

__all__ = ["GatedMLPFunction", "apply_mlp_function", "forward_only"]

_NUMBERS = 8  # arguments of the Function before its tensors


class _Outputs(NamedTuple):
    """What forward has made; ``ys`` are g and u, or the one matrix that holds both."""

    y: Tensor
    ys: list[Tensor]
    zs: list[Tensor]
    linears: list[Tensor]
    h: Tensor  # down's, as its operator keeps it; with an activation or a gain its z
    linear: Tensor  # down's
    words: Tensor | None  # what makes down's mask again


def _halves(ys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """g and u, (M, F)."""
    if len(ys) == 2:
        return ys[0], ys[1]
    half = ys[0].shape[1] // 2
    return ys[0][:, :half], ys[0][:, half:]


def _run(
    x: Tensor,
    backend_name: str,
    ps: tuple[float, float],
    scalings: tuple[float, ...],
    activations: tuple[str, ...],
    gate: int,
    with_linears: tuple[bool, ...],
    tensors: Sequence[Any],
) -> _Outputs:
    """All of forward for x (M, K); the arguments are ``GatedMLPFunction``'s."""
    ops, heads = operators(backend_name), len(scalings) - 1
    states, down_state = _states(tensors, heads, ps)
    own, down = tensors[: PER_BRANCH * heads], members_of(tensors, heads + 1)[heads]
    of_heads = scalings[:heads], activations[:heads], with_linears[:heads], ()
    ys, zs, linears, _ = branches_forward(x, backend_name, ps[0], *of_heads, *own, *states)
    a = ops.gated(*_halves(ys), gate)
    weight, scaling, activation = as_dtype(down.weight, x.dtype), scalings[heads], activations[heads]
    if _is_plain(down, activation):
        y, h, words = ops.forward(a, weight, down.lora_a, down.lora_b, down.bias, scaling, ps[1], down_state)
        if down_state is not None and ops.kept.packs_mask and ops.kept.prefers_words(weight.shape[0]):
            down_state = words
        return _Outputs(y, ys, zs, linears, h, y.new_empty(0), down_state)
    z = ops.shrink(a, down.lora_a, ps[1], down_state)
    given = weight, down.lora_b, activate(activation, z), down.bias, down.gain, scaling, with_linears[heads]
    y, linear = ops.product(a, *given)
    return _Outputs(y, ys, zs, linears, z, linear, down_state)


def _is_plain(down: Member | Saved, activation: str) -> bool:
    return down.gain is None and activation == "identity"


def _states(tensors: Sequence[Any], heads: int, ps: tuple[float, float]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Dropout's states: one for each branch of x, or none; and down's."""
    states = tuple(tensors[PER_BRANCH * (heads + 1) :])
    return (states[:-1], states[-1]) if ps[1] != 0.0 else (states, None)


def forward_only(
    x: Tensor,
    backend_name: str,
    ps: tuple[float, float],
    scalings: tuple[float, ...],
    activations: tuple[str, ...],
    gate: int,
    *tensors: Tensor | None,
) -> Tensor:
    """y (..., N) for x (..., K), where no gradient is due."""
    no_linears = (False,) * len(scalings)
    return unflatten(_run(flatten(x), backend_name, ps, scalings, activations, gate, no_linears, tensors).y, x.shape)


class GatedMLPFunction(torch.autograd.Function):
    """y (..., N) of x (..., K), whose last branch, down, reads the product of the others' outputs.

    ``scalings`` and ``activations`` (between A and B) have one entry for gate, up and down, or for gate and up in one
    matrix and down. ``p`` is of the branches of x, ``down_p`` of down, ``gate`` the number of σ in ``GATES``.
    ``tensors``: for each branch weight, lora_a, lora_b, bias or None, gain or None; then the states of those that drop.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        backend_name: str,
        p: float,
        down_p: float,
        scalings: tuple[float, ...],
        activations: tuple[str, ...],
        gate: int,
        recompute: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        ps, heads = (p, down_p), len(scalings) - 1
        needs, members = needs_of(ctx.needs_input_grad[_NUMBERS:], heads + 1), members_of(tensors, heads + 1)
        with_linears = tuple(need.gain for need in needs)
        out = _run(flatten(x), backend_name, ps, scalings, activations, gate, with_linears, tensors)
        need_x, any_a = ctx.needs_input_grad[0], any(need.lora_a for need in needs[:heads])
        need_da = need_x or any(any(need) for need in needs[:heads])
        need_a = needs[heads].lora_a
        again = recompute and (need_da or need_a)
        saved: list[Tensor | None] = [x if any_a or again else None]
        for i in range(heads):
            own = saved_of(members[i], needs[i], need_x, activations[i], out.zs[i], out.linears[i])
            weight, z = (members[i].weight, out.zs[i]) if again else (own.weight, own.z)
            saved.extend((weight, own.lora_a, own.lora_b, members[i].bias, own.gain, z, own.linear))
        saved.extend(saved_of(members[heads], needs[heads], need_da, activations[heads], out.h, out.linear))
        saved.extend(out.ys if (need_da or need_a) and not recompute else [None] * heads)
        states, _ = _states(tensors, heads, ps)
        saved.append(out.words if need_da or need_a else None)
        ctx.save_for_backward(*saved, *(states if need_x or any_a else ()))
        ctx.settings = x.shape, len(tensors), backend_name, ps, scalings, activations, gate
        return unflatten(out.y, x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (dy,) = grad_outputs
        if not torch.compiler.is_compiling():
            if is_surrounded(grad_outputs):
                return run_outside(GatedMLPFunction.backward, ctx, grad_outputs)
            if torch.is_grad_enabled():
                return _differentiable_backward(ctx, dy)
        x_shape, count, backend_name, ps, scalings, activations, gate = ctx.settings
        ops, heads = operators(backend_name), len(scalings) - 1
        kept = _unpack(ctx.saved_tensors, heads)
        needs = needs_of(ctx.needs_input_grad[_NUMBERS:], heads + 1)
        need_x = ctx.needs_input_grad[0]
        need_da = need_x or any(any(need) for need in needs[:heads])
        x, dy = None if kept.x is None else flatten(kept.x), flatten(dy)
        ys: Any = kept.ys
        if ys[0] is None and (need_da or needs[heads].lora_a):
            ys = _again(ops, x, kept.saved[:heads], scalings, activations)
        a = ops.gated(*_halves(ys), gate) if needs[heads].lora_a else None
        of_down = scalings[heads], activations[heads], ps[1], kept.down_state
        da, down_grads = _of_down(ops, dy, a, kept.saved[heads], needs[heads], need_da, *of_down)
        dx: Tensor | None = None
        grads: list[dict[str, Tensor]] = [{} for _ in range(heads)]
        if need_da:
            dgate, dup = ops.gated_grad(da, *_halves(ys), gate, heads == 1)
            dys = {0: dgate} if heads == 1 else {0: dgate, 1: dup}
            heads_saved = [
                own if need.bias else own._replace(bias=None)
                for own, need in zip(kept.saved[:heads], needs[:heads], strict=True)
            ]
            own = heads_saved, kept.states, needs[:heads], need_x, ps[0], scalings, activations, ()
            used = x if any(need.lora_a for need in needs[:heads]) else None
            dx, grads = gradients_of(ops, dys, used, *own)
        flat = [gradients.get(name) for gradients in [*grads, down_grads] for name in Needs._fields]
        dx = None if dx is None else unflatten(dx, x_shape)
        return (dx, *[None] * (_NUMBERS - 1), *flat, *[None] * (count - len(flat)))


class _Kept(NamedTuple):
    """What was saved: x, each branch's and down's, g and u, down's dropout state, the others'."""

    x: Any
    saved: list[Saved]
    ys: list[Any]
    down_state: Any
    states: list[Tensor]


def _unpack(tensors: Sequence[Any], heads: int) -> _Kept:
    width, end = len(Saved._fields), 1 + len(Saved._fields) * (heads + 1)
    saved = [Saved(*tensors[i : i + width]) for i in range(1, end, width)]
    states = list(tensors[end + heads + 1 :])
    return _Kept(tensors[0], saved, list(tensors[end : end + heads]), tensors[end + heads], states)


def _again(
    ops: Any, x: Any, saved: Sequence[Saved], scalings: Sequence[float], activations: Sequence[str]
) -> list[Tensor]:
    """g and u once more, of x and z."""
    found = []
    for own, scaling, activation in zip(saved, scalings, activations, strict=False):
        weight, h = as_dtype(own.weight, x.dtype), activate(activation, own.z)
        found.append(ops.product(x, weight, own.lora_b, h, own.bias, own.gain, scaling, False)[0])
    return found


def _of_down(
    ops: Any,
    dy: Tensor,
    a: Tensor | None,
    own: Saved,
    need: Needs,
    need_da: bool,
    scaling: float,
    activation: str,
    p: float,
    state: Tensor | None,
) -> tuple[Any, dict[str, Tensor]]:
    """da where it is due, and down's gradients; ``a`` is there where lora_a's is."""
    weight = as_dtype(own.weight, dy.dtype) if need_da else None
    bias = own.bias if need.bias else None
    if _is_plain(own, activation):
        h = own.z if need.lora_b else None
        da, *found = ops.backward(dy, a, weight, own.lora_a, own.lora_b, bias, h, scaling, p, state)
        named = zip(("lora_a", "lora_b", "bias"), found, strict=True)
        return da, {name: value for name, value in named if getattr(need, name)}
    dlinear, dz, grads = of_output(ops, dy, own, need, need_da, scaling, activation)
    states = [] if state is None else [state]
    da = ops.input_grad([dlinear], [weight], [dz], [own.lora_a], p, states) if need_da else None
    if a is not None:
        grads["lora_a"] = as_dtype(ops.a_grad(dz, a, p, state), own.lora_a.dtype)
    return da, grads


# As ``autograd.apply_function``: ``apply`` where no functorch transform is active, in less host time.
apply_mlp_function: Callable[..., Any] = super(torch.autograd.Function, GatedMLPFunction).apply


def _differentiable_backward(ctx: Any, dy: Tensor) -> Any:
    """The gradients of the reference's formulas on the graph's own tensors, for ``create_graph=True``."""
    x_shape, count, backend_name, ps, scalings, activations, gate = ctx.settings
    heads, ops = len(scalings) - 1, operators(backend_name)
    kept = _unpack(ctx.saved_tensors, heads)
    masked = ps[0] == 0.0 or kept.states
    if kept.x is None or not masked or any(own.weight is None for own in kept.saved):
        raise UnsupportedTransformError(
            "a double backward (create_graph=True) was asked for through a gated MLP whose x needs no gradient, or "
            "none of whose lora_A does: what it takes was not kept, to save memory. Have x and lora_A require "
            "gradients, or call lora_kernels.unshare_inputs(model), which has the layers run one by one."
        )
    inputs: list[Any] = [alias(kept.x)]
    x, outputs = flatten(inputs[0]), []
    for i, own in enumerate(kept.saved[:heads]):
        mask = ops.mask(kept.states[i], *x.shape, ps[0]) if kept.states else None
        y, aliases = reference_output(x, own, scalings[i], activations[i], mask, ps[0])
        inputs += aliases
        outputs.append(y)
    wide = reference.adapter_dtype(x.dtype)
    g, u = _halves(outputs)
    a = reference.gated(g.to(wide), u.to(wide), GATES[gate]).to(x.dtype)
    mask = None if kept.down_state is None else ops.mask(kept.down_state, *a.shape, ps[1])
    y, aliases = reference_output(a, kept.saved[heads], scalings[heads], activations[heads], mask, ps[1])
    inputs += aliases
    flags = ctx.needs_input_grad
    needed = [flags[0], *flags[_NUMBERS : _NUMBERS + PER_BRANCH * (heads + 1)]]
    due = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad([unflatten(y, x_shape)], due, [dy], create_graph=True, allow_unused=True))
    dx, *rest = [next(found) if need else None for need in needed]
    return (dx, *[None] * (_NUMBERS - 1), *rest, *[None] * (count - len(rest)))
