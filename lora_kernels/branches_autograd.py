"""The ``autograd.Function`` of several branches that read one x, each with its own activation and gain.

The formulas are ``reference.py``'s, for each branch; dx is the sum of the branches'. Saved: the parameters as they are,
x, each branch's z (M, R), with a trainable gain its l (M, N), and with dropout the states that regenerate the masks.

Branches that are ``grouped`` (plain layers that the backend's group operators take, see ``gate.group_fault``) run by
those, not in parts: z is then h as the backend keeps it (``kept.Kept.h``), and a state may be the mask's words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import reference
from .activations import activate, activate_backward
from .errors import UnsupportedTransformError
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
    "forward_only",
    "gradients_of",
    "members_of",
    "needs_of",
    "of_output",
    "reference_output",
    "saved_of",
]

# Every y and h of a group, and every mask's words.
Made: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor]]

PER_BRANCH = 5  # weight, lora_a, lora_b, bias, gain
_SETTINGS = 6  # backend_name, p, scalings, activations, grouped, layouts


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
    grouped: bool | Made,
    with_linears: tuple[bool, ...],
    layouts: tuple[Layout | None, ...],
    *tensors: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Any], list[Any]]:
    """Each branch's y (..., N_i), z (M, R_i) and, where ``with_linears`` says so, l (M, N_i); the states to keep.

    The other arguments are ``BranchesFunction``'s.
    """
    ops, count = operators(backend_name), len(scalings)
    members, (states, parts) = members_of(tensors, count), _split(tensors, count, layouts)
    if grouped:
        ys, zs, words = grouped if isinstance(grouped, tuple) else _run_group(ops, x, members, p, scalings, states)
        return ys, zs, [None] * count, _kept_of_group(ops, members, states, words)
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


def _run_group(
    ops: Any, x: Tensor, members: list[Member], p: float, scalings: Sequence[float], states: list[Any]
) -> Made:
    """Each branch's y and h, and each mask's words, by the group operator."""
    weights = [as_dtype(member.weight, x.dtype) for member in members]
    lora_as, lora_bs = [member.lora_a for member in members], [member.lora_b for member in members]
    made: Made = ops.group_forward(
        x, weights, lora_as, lora_bs, [member.bias for member in members], list(scalings), p, states
    )
    return made


def _kept_of_group(ops: Any, members: list[Member], states: list[Any], words: list[Tensor]) -> list[Any]:
    """Of each mask what a layer by itself keeps: the words, or the seed."""
    if not states or not ops.kept.packs_mask:
        return states
    ns = [member.weight.shape[0] for member in members]
    return [words[i] if ops.kept.prefers_words(n) else states[i] for i, n in enumerate(ns)]


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


def saved_of(
    member: Member, need: Needs, need_x: bool, activation: str, z: Tensor, linear: Any, any_b: bool = False
) -> Saved:
    """What backward will ask of a branch.

    ``need_x``: whether dx, or what stands in its place, is due; ``any_b``: whether z is kept for another branch's db.
    """
    bends = activation != "identity" and (need_x or need.lora_a)
    return Saved(
        weight=member.weight if need_x or need.gain else None,
        lora_a=member.lora_a,
        lora_b=member.lora_b,
        bias=member.bias if need.bias else None,
        gain=member.gain,
        z=z if need.lora_b or any_b or bends else None,
        linear=linear if need.gain else None,
    )


class BranchesFunction(torch.autograd.Function):
    """(y_1, ..., y_n), each (..., N_i), of x (..., K) and the branches.

    ``grouped``: whether the backend's group operators run them, or what these have made already. ``tensors``: for each
    branch weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,) or None, gain (N,) or None; then no dropout state, or
    one for each branch; then the parts of packed weights. ``layouts`` is empty, or has for each branch its packed
    weight's, or None; the weight itself is None where it is packed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        backend_name: str,
        p: float,
        scalings: tuple[float, ...],
        activations: tuple[str, ...],
        grouped: bool | Made,
        layouts: tuple[Layout | None, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(scalings)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # an output that nobody used gives no gradients, not zeros
        needs, members = _needs(ctx, count), members_of(tensors, count)
        with_linears = tuple(need.gain for need in needs)
        ys, zs, linears, states = forward_only(
            x, backend_name, p, scalings, activations, grouped, with_linears, layouts, *tensors
        )
        need_x, any_a = ctx.needs_input_grad[0], any(need.lora_a for need in needs)
        any_b = bool(grouped) and any(need.lora_b for need in needs)  # of a group every db is due, or none
        saved: list[Tensor | None] = [x if any_a or any(need.weight for need in needs) else None]
        for member, need, activation, z, linear in zip(members, needs, activations, zs, linears, strict=True):
            # PyTorch 2.11's dynamo lets a list grow by no named tuple with +=
            saved.extend(saved_of(member, need, need_x, activation, z, linear, any_b))
        of_weights = [part for own in _split(tensors, count, layouts)[1] for part in own]
        ctx.save_for_backward(*saved, *(states if need_x or any_a else ()), *of_weights)
        weight_dtypes = tuple(None if member.weight is None else member.weight.dtype for member in members)
        of = scalings, activations, bool(grouped), layouts
        ctx.settings = x.shape, weight_dtypes, len(tensors), backend_name, p, *of
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        if not torch.compiler.is_compiling():
            ctx.has_run = True  # what was saved may be gone: an output that waits for its layer is worth nothing now
            if is_surrounded(dys):
                return run_outside(BranchesFunction.backward, ctx, dys)
            if torch.is_grad_enabled():
                return _differentiable_backward(ctx, dys)
        x_shape, weight_dtypes, total, backend_name, p, scalings, activations, grouped, layouts = ctx.settings
        count, need_x, ops = len(scalings), ctx.needs_input_grad[0], operators(backend_name)
        x, saved, states, parts = _unpack(ctx.saved_tensors, count, layouts)
        needs = _needs(ctx, count)
        used = [i for i, dy in enumerate(dys) if dy is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        rest = saved, states, needs, need_x, p, scalings
        if grouped:
            dx, grads = _of_group(ops, {i: dys[i] for i in used}, x, *rest, weight_dtypes)
        else:
            x, given = None if x is None else flatten(x), {i: flatten(dys[i]) for i in used}
            dx, grads = gradients_of(ops, given, x, *rest, activations, weight_dtypes, layouts, parts)
            dx = None if dx is None else unflatten(dx, x_shape)
        flat = [gradients.get(name) for gradients in grads for name in Needs._fields]
        return (dx, *[None] * _SETTINGS, *flat, *[None] * (total - len(flat)))


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


def _of_group(
    ops: Any,
    dys: dict[int, Tensor],
    x: Tensor | None,
    saved: Sequence[Saved],
    states: Sequence[Tensor],
    needs: Sequence[Needs],
    need_x: bool,
    p: float,
    scalings: Sequence[float],
    weight_dtypes: Sequence[torch.dtype],
) -> tuple[Tensor | None, list[dict[str, Tensor]]]:
    """As ``gradients_of``, by the group operator; of one output that was used, by that of a layer by itself.

    Every dy is (..., N_i), x (..., K), and so is dx.
    """
    used = list(dys)
    grads: list[dict[str, Tensor]] = [{} for _ in needs]
    need_a, need_b = any(needs[i].lora_a for i in used), any(needs[i].lora_b for i in used)
    own = [saved[i] for i in used]
    weights = [as_dtype(s.weight, dys[i].dtype) for i, s in zip(used, own, strict=True)] if need_x else []
    lora_as, lora_bs, biases = [s.lora_a for s in own], [s.lora_b for s in own], [s.bias for s in own]
    hs, kept = [s.z for s in own] if need_b else [], [states[i] for i in used] if states else []
    flat_dys, due_x = [dys[i] for i in used], x if need_a else None
    if len(used) == 1:
        (i,), (weight, h, state) = used, (each[0] if each else None for each in (weights, hs, kept))
        dx, *found = ops.backward(
            flat_dys[0], due_x, weight, lora_as[0], lora_bs[0], biases[0], h, scalings[i], p, state
        )
        das, dbs, dbiases = ([gradient] for gradient in found)
    else:
        numbers = [scalings[i] for i in used]
        of = flat_dys, due_x, weights, lora_as, lora_bs, biases, hs, numbers, p, kept
        dx, das, dbs, dbiases = ops.group_backward(*of)
    for i, da, db, dbias in zip(used, das, dbs, dbiases, strict=True):
        found = {"lora_a": da, "lora_b": db, "bias": dbias}
        grads[i].update({name: value for name, value in found.items() if getattr(needs[i], name)})
        if needs[i].weight and x is not None:
            grads[i]["weight"] = as_dtype(multiply(flatten(dys[i]).t(), flatten(x)), weight_dtypes[i])
    return dx if need_x else None, grads


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


def _differentiable_backward(ctx: Any, dys: Sequence[Tensor]) -> Any:
    """The gradients of the reference's formulas on the graph's own tensors, for ``create_graph=True``."""
    x_shape, _, total, backend_name, p, scalings, activations, _, layouts = ctx.settings
    given_x, saved, states, parts = _unpack(ctx.saved_tensors, len(scalings), layouts)
    if given_x is None:
        raise UnsupportedTransformError(
            "a double backward (create_graph=True) was asked for where no lora_A needs a gradient: x was not kept, to "
            "save memory, and nothing can be differentiated again without it. Set lora_A.requires_grad_(True), or "
            "differentiate lora_kernels.reference.forward instead."
        )
    inputs: list[Any] = [alias(given_x)]
    x = flatten(inputs[0])
    outputs, needs = [], _needs(ctx, len(scalings))
    for i, (own, scaling, activation) in enumerate(zip(saved, scalings, activations, strict=True)):
        mask = operators(backend_name).mask(states[i], *x.shape, p) if states else None
        if layouts and layouts[i] is not None:
            own = own._replace(weight=_values(i, None, layouts, parts, x.dtype, x.detach()))
        if own.weight is None and needs[i].weight:  # its gradient does not depend on its values
            own = own._replace(weight=x.detach().new_zeros(own.lora_b.shape[0], x.shape[1]).requires_grad_())
        y, aliases = reference_output(x, own, scaling, activation, mask, p)
        inputs += aliases
        outputs.append(unflatten(y, x_shape))
    needed = [ctx.needs_input_grad[0], *(flag for need in needs for flag in need)]
    due = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    # Of a branch that trains nothing y is a constant, though the pass in common has it on its graph.
    used = [i for i, dy in enumerate(dys) if dy is not None and outputs[i].requires_grad]
    if not used:
        return (None,) * len(ctx.needs_input_grad)
    of = [outputs[i] for i in used], due, [dys[i] for i in used]
    found = iter(torch.autograd.grad(*of, create_graph=True, allow_unused=True))
    dx, *rest = [next(found) if need else None for need in needed]
    return (dx, *[None] * _SETTINGS, *rest, *[None] * (total - len(rest)))


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
