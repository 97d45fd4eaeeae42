"""The ``autograd.Function`` of several branches that read one x, each with its own activation and gain.

The formulas are ``reference.py``'s, for each branch; dx is the sum of the branches'. Saved: the parameters as they are,
x, each branch's z (M, R), with a trainable gain its l (M, N), and with dropout the states that regenerate the masks.

Plain layers that the backend's group operators take (see ``gate.group_fault``) run by those: ``group_autograd``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .activations import activate, activate_backward
from .errors import LoRAStateError, UnsupportedTransformError
from .ops import is_watched, operators
from .surrounded import is_surrounded, run_outside
from .tensors import as_dtype, flatten, multiply, unflatten
from .weights import by_codes
from .weights.packed import Layout, values_of

__all__ = [
    "PER_BRANCH",
    "BranchesFunction",
    "Member",
    "Needs",
    "Saved",
    "alias",
    "apply_branches_function",
    "differentiable_gradients",
    "forward_only",
    "gradients_of",
    "members_of",
    "needs_of",
    "of_output",
    "reference_output",
    "saved_of",
    "saved_tensors",
]

PER_BRANCH = 5  # weight, lora_a, lora_b, bias, gain
_SETTINGS = 5  # backend_name, p, scalings, activations, layouts


class Member(NamedTuple):
    """One branch's tensors, as they were given."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    gain: Tensor | None


def members_of(tensors: Sequence[Any], count: int) -> list[Member]:
    return [Member(*tensors[PER_BRANCH * i : PER_BRANCH * (i + 1)]) for i in range(count)]


def forward_only(
    x: Tensor,
    backend_name: str,
    p: float,
    scalings: tuple[float, ...],
    activations: tuple[str, ...],
    with_linears: tuple[bool, ...],
    layouts: tuple[Layout | None, ...],
    *tensors: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Any], list[Any]]:
    """Each branch's y (..., N_i), z (M, R_i) and, where ``with_linears`` says so, l (M, N_i); the states to keep.

    The other arguments are ``BranchesFunction``'s.
    """
    ops, count = operators(backend_name), len(scalings)
    members, (states, parts) = members_of(tensors, count), _split(tensors, count, layouts)
    flat = flatten(x)
    read = bool(layouts) and backend_name == "triton" and not is_watched()
    whole = read and _are_plain(members, activations)
    if whole and (made := by_codes.forward(flat, layouts, parts, members, p, scalings, states)) is not None:
        return [unflatten(y, x.shape) for y in made[0]], made[1], [None] * count, states
    zs = _shrink_all(ops, flat, [member.lora_a for member in members], p, states)
    ys, linears = [], []
    for i, (member, z, scaling, activation, with_linear) in enumerate(
        zip(members, zs, scalings, activations, with_linears, strict=True)
    ):
        rest = member.lora_b, activate(activation, z), member.bias, member.gain, scaling, with_linear
        if ops.packed_product is not None and (layout := layouts[i] if layouts else None) is not None:
            y, linear = ops.packed_product(flat, list(parts[i]), *layout[:-1], *rest)
        else:
            weight = _values(i, member.weight, layouts, parts, x.dtype, flat)
            y, linear = ops.product(flat, weight, *rest)
            del weight  # or the next one's values would be made beside these
        ys.append(unflatten(y, x.shape))
        linears.append(linear)
    return ys, zs, linears, states


def _are_plain(members: Sequence[Member], activations: Sequence[str]) -> bool:
    """Whether no branch has a gain or bends its h."""
    return all(member.gain is None for member in members) and all(of == "identity" for of in activations)


def _split(
    tensors: Sequence[Any], count: int, layouts: tuple[Layout | None, ...]
) -> tuple[list[Any], list[tuple[Tensor, ...]]]:
    """Dropout's states, and the tensors of each packed weight, of what follows the branches' own."""
    rest = list(tensors[PER_BRANCH * count :])
    states = len(rest) - sum(layout.tensors for layout in layouts if layout is not None)
    parts, end = [], states
    for layout in layouts:
        start, end = end, end + (0 if layout is None else layout.tensors)
        parts.append(tuple(rest[start:end]))
    return rest[:states], parts


def _values(
    i: int,
    weight: Any,
    layouts: tuple[Layout | None, ...],
    parts: Sequence[tuple[Tensor, ...]],
    dtype: torch.dtype,
    after: Tensor,
) -> Tensor:
    """The i-th branch's W (N, K) in ``dtype``: the weight itself where it is plain."""
    layout = layouts[i] if layouts else None
    return as_dtype(weight, dtype) if layout is None else values_of(layout, parts[i], dtype, after)


def _shrink_all(ops: Any, x: Tensor, lora_as: list[Tensor], p: float, states: Sequence[Any]) -> list[Tensor]:
    """z of each branch; without dropout in one read of x."""
    if states:
        return [ops.shrink(x, lora_a, p, state) for lora_a, state in zip(lora_as, states, strict=True)]
    if len(lora_as) == 1:
        return [ops.shrink(x, lora_as[0], 0.0, None)]
    dtype = reference.adapter_dtype(x.dtype)
    joined = ops.shrink(x, torch.cat([as_dtype(lora_a, dtype) for lora_a in lora_as]), 0.0, None)
    return list(torch.split_with_sizes(joined, [lora_a.shape[0] for lora_a in lora_as], 1))


class Saved(NamedTuple):
    """What backward has of one branch; None where no gradient that is due needs it."""

    weight: Any
    lora_a: Tensor
    lora_b: Tensor
    bias: Any
    gain: Any
    z: Any
    linear: Any


def saved_of(member: Member, need: Needs, need_x: bool, activation: str, z: Tensor, linear: Any) -> Saved:
    """What backward will ask of a branch; ``need_x``: whether dx, or what stands in its place, is due."""
    bends = activation != "identity" and (need_x or need.lora_a)
    return Saved(
        weight=member.weight if need_x or need.gain else None,
        lora_a=member.lora_a,
        lora_b=member.lora_b,
        bias=member.bias if need.bias else None,
        gain=member.gain,
        z=z if need.lora_b or bends else None,
        linear=linear if need.gain else None,
    )


class BranchesFunction(torch.autograd.Function):
    """(y_1, ..., y_n), each (..., N_i), of x (..., K) and the branches.

    ``tensors``: for each branch weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,) or None, gain (N,) or None; then
    no dropout state, or one for each branch; then the parts of packed weights. ``layouts`` is empty, or has for each
    branch its packed weight's, or None; the weight itself is None where it is packed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        backend_name: str,
        p: float,
        scalings: tuple[float, ...],
        activations: tuple[str, ...],
        layouts: tuple[Layout | None, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(scalings)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # an output that nobody used gives no gradients, not zeros
        needs, members = _needs(ctx, count), members_of(tensors, count)
        with_linears = tuple(need.gain for need in needs)
        ys, zs, linears, states = forward_only(
            x, backend_name, p, scalings, activations, with_linears, layouts, *tensors
        )
        need_x, keep_x = ctx.needs_input_grad[0], any(need.lora_a or need.weight for need in needs)
        saved: list[Tensor | None] = [x if keep_x else None]
        for member, need, activation, z, linear in zip(members, needs, activations, zs, linears, strict=True):
            # PyTorch 2.11's dynamo lets a list grow by no named tuple with +=
            saved.extend(saved_of(member, need, need_x, activation, z, linear))
        of_weights = [part for own in _split(tensors, count, layouts)[1] for part in own]
        ctx.save_for_backward(*saved, *(states if need_x or keep_x else ()), *of_weights)
        weight_dtypes = tuple(None if member.weight is None else member.weight.dtype for member in members)
        ctx.settings = x.shape, weight_dtypes, len(tensors), backend_name, p, scalings, activations, layouts
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        if not torch.compiler.is_compiling():
            ctx.has_run = True  # what was saved may be gone: an output that waits for its layer is worth nothing now
            if is_surrounded(dys):
                return run_outside(BranchesFunction.backward, ctx, dys, saved_tensors(ctx, dys))
            if torch.is_grad_enabled():
                return _differentiable_backward(ctx, dys)
        x_shape, weight_dtypes, total, backend_name, p, scalings, activations, layouts = ctx.settings
        count, need_x, ops = len(scalings), ctx.needs_input_grad[0], operators(backend_name)
        x, saved, states, parts = _unpack(saved_tensors(ctx, dys), count, layouts)
        needs = _needs(ctx, count)
        used = [i for i, dy in enumerate(dys) if dy is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        x, given = None if x is None else flatten(x), {i: flatten(dys[i]) for i in used}
        rest = saved, states, needs, need_x, p, scalings, activations, weight_dtypes, layouts, parts
        dx, grads = gradients_of(ops, given, x, *rest)
        dx = None if dx is None else unflatten(dx, x_shape)
        flat = [gradients.get(name) for gradients in grads for name in Needs._fields]
        return (dx, *[None] * _SETTINGS, *flat, *[None] * (total - len(flat)))


class _Held(NamedTuple):
    """What was saved, and at which versions, for outputs that have not gone backward yet."""

    tensors: Sequence[Any]
    versions: list[int]
    outputs: set[int]


def _versions(tensors: Sequence[Any]) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference()]


def saved_tensors(ctx: Any, dys: Sequence[Any]) -> Sequence[Any]:
    """What was saved. PyTorch frees it at the first output's backward; it is held for the others, which may follow."""
    if torch.compiler.is_compiling():
        return ctx.saved_tensors  # type: ignore[no-any-return]
    held: _Held | None = getattr(ctx, "held", None)
    if held is None and all(dy is not None for dy in dys):
        return ctx.saved_tensors  # type: ignore[no-any-return]
    used = {i for i, dy in enumerate(dys) if dy is not None}
    if held is None or not used <= held.outputs:
        tensors = ctx.saved_tensors
        held = _Held(tensors, _versions(tensors), set(range(len(dys))))
    elif held.versions != _versions(held.tensors):
        raise LoRAStateError(
            "x or a Parameter of layers that run together was written to between the backward passes of two outputs, "
            "so the second one's gradients would be wrong. Call backward once, on the sum of the losses, or change "
            "nothing between the passes."
        )
    ctx.held = held._replace(outputs=held.outputs - used) if used < held.outputs else None
    return held.tensors


def gradients_of(
    ops: Any,
    dys: dict[int, Tensor],
    x: Tensor | None,
    saved: Sequence[Saved],
    states: Sequence[Tensor],
    needs: Sequence[Needs],
    need_x: bool,
    p: float,
    scalings: Sequence[float],
    activations: Sequence[str],
    weight_dtypes: Sequence[torch.dtype],
    layouts: tuple[Layout | None, ...] = (),
    parts: Sequence[tuple[Tensor, ...]] = (),
) -> tuple[Tensor | None, list[dict[str, Tensor]]]:
    """dx (M, K), where it is due, and for each branch the gradients that are due, by their names in :class:`Needs`.

    ``dys`` has the dy (M, N_i) of each output that was used, one at least, and x is (M, K).
    """
    used = list(dys)
    dlinears, dzs = {}, {}
    grads: list[dict[str, Tensor]] = [{} for _ in needs]
    for i in used:
        of = dys[i], saved[i], needs[i], need_x, scalings[i], activations[i]
        dlinears[i], dzs[i], grads[i] = of_output(ops, *of)
        if needs[i].weight and x is not None:
            grads[i]["weight"] = as_dtype(multiply(dlinears[i].t(), x), weight_dtypes[i])
    dx: Any = None
    # The values of several packed weights are not to be there at once: their dx are added up.
    for some in ([[i] for i in used] if layouts else [used]) if need_x else ():
        part = _input_grad(ops, some, dlinears, dzs, saved, p, states, layouts, parts)
        dx = part if dx is None else dx.add_(part)
    if x is not None:
        due = [i for i in used if needs[i].lora_a]
        das = _a_grads(ops, [dzs[i] for i in due], x, p, [states[i] for i in due] if states else [])
        for i, da in zip(due, das, strict=True):
            grads[i]["lora_a"] = as_dtype(da, saved[i].lora_a.dtype)
    return dx, grads


def _input_grad(
    ops: Any,
    some: list[int],
    dlinears: dict[int, Tensor],
    dzs: dict[int, Any],
    saved: Sequence[Saved],
    p: float,
    states: Sequence[Tensor],
    layouts: tuple[Layout | None, ...],
    parts: Sequence[tuple[Tensor, ...]],
) -> Any:
    """The part of dx that comes by these branches; of packed weights by one."""
    first = some[0]
    if ops.packed_input_grad is not None and (layout := layouts[first] if layouts else None) is not None:
        state = states[first] if states else None
        of = dlinears[first], list(parts[first]), *layout[:-1]
        return ops.packed_input_grad(*of, dzs[first], saved[first].lora_a, p, state)
    weights = [_values(i, saved[i].weight, layouts, parts, dlinears[i].dtype, dlinears[i]) for i in some]
    lora_as, own = [saved[i].lora_a for i in some], [states[i] for i in some] if states else []
    return ops.input_grad([dlinears[i] for i in some], weights, [dzs[i] for i in some], lora_as, p, own)


def of_output(
    ops: Any, dy: Tensor, own: Saved, need: Needs, need_x: bool, scaling: float, activation: str
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


def _unpack(
    tensors: Sequence[Any], count: int, layouts: tuple[Layout | None, ...]
) -> tuple[Any, list[Saved], list[Tensor], list[tuple[Tensor, ...]]]:
    """x, each branch's, the dropout states and the packed weights' parts, of what was saved."""
    width = len(Saved._fields)
    end = 1 + width * count
    states, parts = _split((*[None] * (PER_BRANCH * count), *tensors[end:]), count, layouts)
    return tensors[0], [Saved(*tensors[i : i + width]) for i in range(1, end, width)], states, parts


class Needs(NamedTuple):
    """Which gradients of a branch are due."""

    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool
    gain: bool


def _needs(ctx: Any, count: int) -> list[Needs]:
    return needs_of(ctx.needs_input_grad[1 + _SETTINGS :], count)


def needs_of(flags: Sequence[bool], count: int) -> list[Needs]:
    return [Needs(*flags[PER_BRANCH * i : PER_BRANCH * (i + 1)]) for i in range(count)]


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


def _differentiable_backward(ctx: Any, dys: Sequence[Any]) -> Any:
    _, _, total, backend_name, p, scalings, activations, layouts = ctx.settings
    x, saved, states, parts = _unpack(saved_tensors(ctx, dys), len(scalings), layouts)
    needs = _needs(ctx, len(scalings))

    def of(i: int, x: Tensor) -> tuple[Saved, Tensor | None]:
        mask = operators(backend_name).mask(states[i], *x.shape, p) if states else None
        if layouts and layouts[i] is not None:
            return saved[i]._replace(weight=_values(i, None, layouts, parts, x.dtype, x.detach())), mask
        return saved[i], mask

    dx, grads = differentiable_gradients(x, dys, of, needs, ctx.needs_input_grad[0], p, scalings, activations)
    flat = [gradient for gradients in grads for gradient in gradients]
    return (dx, *[None] * _SETTINGS, *flat, *[None] * (total - len(flat)))


def differentiable_gradients(
    given_x: Tensor | None,
    dys: Sequence[Any],
    of: Callable[[int, Tensor], tuple[Saved, Tensor | None]],
    needs: Sequence[Needs],
    need_x: bool,
    p: float,
    scalings: Sequence[float],
    activations: Sequence[str],
) -> tuple[Any, list[tuple[Any, ...]]]:
    """dx and each branch's gradients, None for what is not due: of the reference's formulas on the graph's own tensors,
    for ``create_graph=True``.

    ``of(i, x)``: what was saved of the i-th branch, and its mask, for x (M, K).
    """
    if given_x is None:
        raise UnsupportedTransformError(
            "a double backward (create_graph=True) was asked for where no lora_A needs a gradient: x was not kept, to "
            "save memory, and nothing can be differentiated again without it. Set lora_A.requires_grad_(True), or "
            "differentiate lora_kernels.reference.forward instead."
        )
    inputs: list[Any] = [alias(given_x)]
    x, outputs = flatten(inputs[0]), []
    for i, (scaling, activation) in enumerate(zip(scalings, activations, strict=True)):
        own, mask = of(i, x)
        if own.weight is None and needs[i].weight:  # its gradient does not depend on its values
            own = own._replace(weight=x.detach().new_zeros(own.lora_b.shape[0], x.shape[1]).requires_grad_())
        y, aliases = reference_output(x, own, scaling, activation, mask, p)
        inputs += aliases
        outputs.append(unflatten(y, given_x.shape))
    needed = [need_x, *(flag for need in needs for flag in need)]
    due = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    # Of a branch that trains nothing y is a constant, though the pass in common has it on its graph.
    used = [i for i, dy in enumerate(dys) if dy is not None and outputs[i].requires_grad]
    if not used:
        return None, [(None,) * PER_BRANCH] * len(needs)
    given = [outputs[i] for i in used], due, [dys[i] for i in used]
    found = iter(torch.autograd.grad(*given, create_graph=True, allow_unused=True))
    dx, *rest = [next(found) if need else None for need in needed]
    return dx, [tuple(rest[i : i + PER_BRANCH]) for i in range(0, len(rest), PER_BRANCH)]


def reference_output(
    x: Tensor, own: Saved, scaling: float, activation: str, mask: Tensor | None, p: float
) -> tuple[Tensor, list[Any]]:
    """y (M, N) by the reference's formulas, differentiable, for x (M, K); and what it is made of, as aliases."""
    wide = reference.adapter_dtype(x.dtype)
    # Where W is not there no gradient that is due needs it: x Wᵀ is a constant to them.
    weight = x.new_zeros(own.lora_b.shape[0], x.shape[1]) if own.weight is None else own.weight
    aliases: list[Any] = [alias(tensor) for tensor in (weight, own.lora_a, own.lora_b, own.bias, own.gain)]
    w, a, b = (tensor.to(wide) for tensor in aliases[:3])
    bias = None if aliases[3] is None else aliases[3].to(x.dtype).to(wide)
    y, _ = reference.forward(x.to(wide), w, a, b, bias, scaling, mask, p, aliases[4], activation)
    return y.to(x.dtype), aliases


def alias(tensor: Tensor | None) -> Any:
    """A view: a gradient by it stops there, and does not go through what ``tensor`` was made of."""
    return None if tensor is None else tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()
