"""Between what is called and the operators: autocast, checks, dropout's draw, the choice of backend, recording.

Four ways lead through it. :func:`run_plain` is the plain layer's, the shortest, and :func:`run_packed` the same over a
packed weight. :func:`run_branches` takes several branches of one x, and what the plain layer does not have: gains,
activations between A and B. :func:`run_branch` takes one branch and chooses among the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from numbers import Real
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .autograd import LoRALinearFunction, apply_function, forward_only
from .branches import Branch, PackedBranch
from .branches_autograd import BranchesFunction, apply_branches_function
from .branches_autograd import forward_only as branches_forward_only
from .checks import check, fits, kind_refusal, refusal
from .config import plain_number
from .dispatch import COMPUTE_DTYPES, backend, select
from .errors import InvalidArgumentError, InvalidTypeError, UnsupportedTransformError
from .group_autograd import GroupFunction, Made, apply_group_function
from .group_autograd import forward_only as group_forward_only
from .ops import direct_operators, is_watched, operators
from .packed_autograd import apply_packed_function
from .packed_autograd import forward_only as packed_forward_only
from .reference import drop
from .tensors import are_negated, as_dtype, flatten, resolved
from .weights import product
from .weights.packed import Packed

__all__ = [
    "DRAWING",
    "autocast_input",
    "check_dropout_p",
    "chosen",
    "device_type_of",
    "draw_state",
    "group_fault",
    "is_autocast_enabled",
    "may_have_tangents",
    "number",
    "prepare",
    "refuse_tangents",
    "run_branch",
    "run_branches",
    "run_frozen",
    "run_packed",
    "run_plain",
]

# Up to this many tokens on a CPU the host's time decides, of which the plain layer's way takes least: one read of x for
# all branches saves less than it costs there.
_FEW_TOKENS = 16

# Held while states are drawn: who draws ahead puts the generator back, and no other thread's draw may lie between.
DRAWING = RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=DRAWING._at_fork_reinit)  # type: ignore[attr-defined]  # as logging's

# Asked on each call: to look them up takes as long as to call them.
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_transforming = torch._C._are_functorch_transforms_active
_set_grad_enabled = torch._C._set_grad_enabled
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def run_plain(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    backend_name: str | None,
    share: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y (..., N) of one plain branch: ``lora_linear`` for a p that is known to be valid, 0 where dropout does not act.

    It allocates nothing of its own. ``share`` is given dropout's state and returns the one to take: several processes
    may have to agree on it.
    """
    if p == 0.0 and type(scaling) is float and not _anything_acts():
        return _run_alone(x, weight, lora_a, lora_b, bias, scaling, backend_name)
    # One question that most programs answer with no, before those that take longer to answer.
    if _is_any_autocast_enabled() and is_autocast_enabled(device_type := device_type_of(x)):
        x = autocast_input(x, device_type)
        with torch.autocast(device_type, enabled=False):
            # The cast of W is made again in backward rather than saved; so its dtype may differ from x's here.
            return _run_plain(x, weight, lora_a, lora_b, bias, scaling, p, backend_name, True, share)
    return _run_plain(x, weight, lora_a, lora_b, bias, scaling, p, backend_name, False, share)


def _anything_acts() -> bool:
    """Whether a compiler, a tracer, a dispatch mode, autocast, ``torch.func`` or forward-mode derivatives do."""
    return is_watched() or _is_any_autocast_enabled() or _is_transforming() or forward_ad._current_level >= 0


def _run_alone(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    backend_name: str | None,
) -> Tensor:
    """The same without dropout, where nothing acts, in the least host time.

    What an operator refuses itself is not looked for before it; afterwards, the sentence is composed of what was given.
    """
    try:
        own = _unwrap_if_dead(x)
        name = select(device_type_of(own), own.dtype, backend_name)
        ops = direct_operators(name)
        if not (
            weight.dtype is own.dtype  # a cast would hide that it is not
            and ops.refuses
            and (
                ops.refuses != "on the CPU"
                or (own.is_cpu and weight.is_cpu and lora_a.is_cpu and lora_b.is_cpu and (bias is None or bias.is_cpu))
            )
        ):
            check(own, weight, lora_a, lora_b, bias, False)
            weight, lora_a, lora_b, bias = _resolved(weight, lora_a, lora_b, bias)
        if _records(own, weight, lora_a, lora_b, bias):
            out: Tensor = apply_function(own, weight, lora_a, lora_b, bias, scaling, 0.0, None, name)
            return out
        y: Tensor = ops.forward(own, weight, lora_a, lora_b, bias, scaling, 0.0, None)[0]
        return y
    except Exception:  # it goes on as it is, or the sentence in its place
        if not fits(x, weight, lora_a, lora_b, bias, False):
            raise refusal(x, weight, lora_a, lora_b, bias) from None
        raise


def _resolved(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Each as :func:`resolved`, with one question where none is negated."""
    if weight.is_neg() or lora_a.is_neg() or lora_b.is_neg() or (bias is not None and bias.is_neg()):
        return resolved(weight), resolved(lora_a), resolved(lora_b), resolved(bias)
    return weight, lora_a, lora_b, bias


def _records(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> bool:
    """Whether a graph is recorded: :func:`_any_requires_grad`, spelt out for the plain layer's host time."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or lora_a.requires_grad
        or lora_b.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    )


def _run_plain(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    backend_name: str | None,
    autocast: bool,
    share: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    check(x, weight, lora_a, lora_b, bias, autocast)
    if not is_compiling():
        weight, lora_a, lora_b, bias = _resolved(weight, lora_a, lora_b, bias)
    if type(scaling) is not float:  # a layer's may have been set to anything
        scaling = number(scaling)
    if p != 0.0 and type(p) is not float:
        p = plain_number(p)
    if forward_ad._current_level >= 0:
        refuse_tangents(x, weight, lora_a, lora_b, bias)
    x, name = prepare(x, backend_name)
    state = draw_state(x, p, name) if p != 0.0 else None
    if share is not None and state is not None:
        state = share(state)
    if _records(x, weight, lora_a, lora_b, bias):
        record = LoRALinearFunction.apply if is_compiling() else apply_function
        out: Tensor = record(x, weight, lora_a, lora_b, bias, scaling, p, state, name)
        return out
    return forward_only(x, weight, lora_a, lora_b, bias, scaling, p, state, name)


def run_packed(
    x: Tensor, weight: Packed, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, scaling: float, p: float
) -> Tensor:
    """y (..., N) in x's dtype of one plain branch over a packed weight, where nobody compiles; see :func:`run_plain`.

    It runs in the weight's compute dtype, else autocast's, else x's, as the packages' own layers.
    """
    device_type = device_type_of(x)
    dtype = packed_dtype(x, weight, device_type)
    if _is_any_autocast_enabled() and is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _run_packed_in(dtype, x, weight, lora_a, lora_b, bias, scaling, p)
    return _run_packed_in(dtype, x, weight, lora_a, lora_b, bias, scaling, p)


def _run_packed_in(
    dtype: torch.dtype,
    given_x: Tensor,
    weight: Packed,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
) -> Tensor:
    x = as_dtype(given_x, dtype)
    stands: Any = weight if weight.dtype is dtype else Packed(weight.layout, weight.parts, dtype)
    check(x, stands, lora_a, lora_b, bias, False)
    if are_negated(lora_a, lora_b, bias):
        lora_a, lora_b, bias = resolved(lora_a), resolved(lora_b), resolved(bias)
    if p != 0.0 and type(p) is not float:
        p = plain_number(p)
    if forward_ad._current_level >= 0:
        refuse_tangents(x, lora_a, lora_b, bias)
    x, name = prepare(x, None)
    state = draw_state(x, p, name) if p != 0.0 else None
    of = x, lora_a, lora_b, bias, float(number(scaling)), p, state, name, weight.layout
    y: Tensor
    if torch.is_grad_enabled() and _any_requires_grad(x, lora_a, lora_b, bias):
        y = apply_packed_function(*of, *weight.parts)
    else:
        y = packed_forward_only(*of, weight.parts)[0]
    return y if dtype is given_x.dtype else y.to(given_x.dtype)


def run_branches(x: Tensor, branches: Sequence[Branch], p: float, backend_name: str | None = None) -> list[Tensor]:
    """Each branch's y (..., N_i) for x (..., K), and in backward one dx.

    A p above 0 draws a mask for each branch, in their order, but where its state is there. Dtypes, autocast, backends
    and errors are ``lora_linear``'s; p is known to be valid, 0 where dropout does not act.
    """
    if not _anything_acts() and (found := _run_known_group(x, branches, p, backend_name)) is not None:
        return found
    device_type = device_type_of(x)
    if type(branches[0]) is PackedBranch:
        return _run_packed_branches(x, branches, p, backend_name, device_type)
    if _is_any_autocast_enabled() and is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _run_branches(autocast_input(x, device_type), branches, p, backend_name, autocast=True)
    return _run_branches(x, branches, p, backend_name, autocast=False)


def _run_known_group(x: Tensor, branches: Sequence[Branch], p: float, backend_name: str | None) -> list[Tensor] | None:
    """The same where nothing acts, of a group whose pass the backend knows by its tensors, which were checked when it
    came to know it. None where it knows none."""
    if not isinstance(x, Tensor) or x.dtype not in COMPUTE_DTYPES:
        return None
    x = _unwrap_if_dead(x)
    name = select(device_type_of(x), x.dtype, backend_name)
    if (known := direct_operators(name).known_group) is None:
        return None
    if not all(type(b) is Branch and b.is_plain and type(b.scaling) is float for b in branches):
        return None
    states: list[Any] = [b.state for b in branches] if p != 0.0 else []
    if any(state is None for state in states):
        return None
    tensors, scalings = _by_kind(branches), tuple([b.scaling for b in branches])
    records = torch.is_grad_enabled()
    _set_grad_enabled(False)  # as torch.no_grad(), in less host time
    try:
        made = known(x, *tensors, scalings, float(p), states)
    finally:
        _set_grad_enabled(records)
    return None if made is None else _run_group(x, name, p, scalings, made, tensors, states)


def _run_group(
    x: Tensor,
    name: str,
    p: float,
    scalings: tuple[float, ...],
    made: Made | None,
    tensors: tuple[tuple[Tensor | None, ...], ...],
    states: Sequence[Tensor],
) -> list[Tensor]:
    """The same by the group operators; the arguments are ``GroupFunction``'s, ``tensors`` by their kind."""
    weights, lora_as, lora_bs, biases = tensors
    flat = (*weights, *lora_as, *lora_bs, *biases)
    if torch.is_grad_enabled() and _any_requires_grad(x, *flat):
        record = GroupFunction.apply if is_compiling() else apply_group_function
        return list(record(x, name, p, scalings, made, *flat, *states))
    return group_forward_only(x, name, p, scalings, made, *flat, *states)[0]


def _by_kind(branches: Sequence[Branch]) -> tuple[tuple[Any, ...], ...]:
    """Every weight, lora_a, lora_b and bias."""
    return tuple(zip(*[(b.weight, b.lora_a, b.lora_b, b.bias) for b in branches], strict=True))


def _run_packed_branches(
    x: Tensor, branches: Sequence[Any], p: float, backend_name: str | None, device_type: str
) -> list[Tensor]:
    """The same beside packed weights: in their compute dtype, and y in x's dtype, as the packages' own layers."""
    dtype = packed_dtype(x, branches[0].weight, device_type)
    computing = [branch.computing(dtype) for branch in branches]
    with torch.autocast(device_type, enabled=False) if is_autocast_enabled(device_type) else nullcontext():
        ys = _run_branches(as_dtype(x, dtype), computing, p, backend_name, autocast=False)
        return ys if dtype is x.dtype else [y.to(x.dtype) for y in ys]


def packed_dtype(x: Tensor, weight: Packed, device_type: str) -> torch.dtype:
    """The dtype that x and a packed weight are multiplied in: the weight's, else autocast's, else x's.

    x that no layer takes keeps its own, and is refused; fp64 does too where the weight names none, as in autocast.
    """
    if x.dtype not in COMPUTE_DTYPES:
        return x.dtype
    if weight.dtype is not None:
        return weight.dtype
    return autocast_dtype(x, device_type) if is_autocast_enabled(device_type) else x.dtype


def run_frozen(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias (..., N) of a packed weight, in x's dtype: a layer whose adapter is off."""
    device_type = device_type_of(x)
    dtype = packed_dtype(x, weight, device_type)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device or dtype not in COMPUTE_DTYPES:
        raise InvalidArgumentError(
            f"x {tuple(x.shape)} {x.dtype} on {x.device} was given to a layer with a quantised weight "
            f"{tuple(weight.shape)} on {weight.device}: x must be floating, (..., K), and on that device."
        )
    with torch.autocast(device_type, enabled=False) if is_autocast_enabled(device_type) else nullcontext():
        x_own = as_dtype(x, dtype)
        return product.linear(x_own, weight, bias, None if _is_transformed() else chosen(x_own)).to(x.dtype)


def _is_transformed() -> bool:
    """Whether ``torch.func``, ``vmap`` or forward-mode derivatives may act: they know PyTorch's operators alone."""
    return forward_ad._current_level >= 0 or _is_transforming()


def _run_branches(
    x: Tensor, branches: Sequence[Branch], p: float, backend_name: str | None, autocast: bool
) -> list[Tensor]:
    for branch in branches:
        check(x, branch.weight, branch.lora_a, branch.lora_b, branch.bias, autocast)
        branch.check(x)
    branches = [branch.resolved() for branch in branches]
    if p != 0.0 and type(p) is not float:
        p = plain_number(p)
    if forward_ad._current_level >= 0:
        refuse_tangents(x, *(tensor for branch in branches for tensor in branch.tensors))
    x, name = prepare(x, backend_name)
    states = [draw_state(x, p, name) if b.state is None else b.state for b in branches] if p != 0.0 else []
    if not is_compiling() and _are_apart(x, branches):
        return [_run_apart(x, b, p, states[i] if states else None, name) for i, b in enumerate(branches)]
    scalings = tuple(float(number(branch.scaling)) for branch in branches)
    if _group_fault(x, branches, len(states) > 0, name) is None:  # p may be symbolic
        return _run_group(x, name, p, scalings, None, _by_kind(branches), states)
    tensors = [tensor for branch in branches for tensor in branch.tensors]
    activations = tuple(branch.activation for branch in branches)
    layouts, parts = _packed_parts(branches)
    if torch.is_grad_enabled() and _any_requires_grad(x, *tensors):
        record = BranchesFunction.apply if is_compiling() else apply_branches_function
        return list(record(x, name, p, scalings, activations, layouts, *tensors, *states, *parts))
    linears = (False,) * len(branches)
    of = scalings, activations, linears, layouts
    return branches_forward_only(x, name, p, *of, *tensors, *states, *parts)[0]


def group_fault(x: Tensor, branches: Sequence[Branch], p: float) -> str | None:
    """Why these branches of x run in parts and not by the group operators; None where they run by those.

    The end of a sentence "The group kernels do not run: ...". The backend is the one that would run them now.
    """
    x, name = prepare(x, None)
    return _group_fault(x, branches, p != 0.0, name)


def _group_fault(x: Tensor, branches: Sequence[Branch], dropout: bool, name: str) -> str | None:
    """By static facts alone, so that a compiled graph holds the way for all numbers of tokens."""
    if len(branches) < 2:
        return "there is one layer"
    for branch in branches:
        if type(branch) is PackedBranch:
            return "a W is quantised"
        if not branch.is_plain:
            return "a layer has a gain (DoRA) or an activation"
        if branch.weight.stride(1) != 1:
            return "a W is stored (K, N)"
        if not (branch.lora_a.is_contiguous() and branch.lora_b.is_contiguous()):
            return "an A or a B is not contiguous"
    first = branches[0]
    if any(b.lora_a.dtype is not first.lora_a.dtype or b.lora_b.dtype is not first.lora_b.dtype for b in branches):
        return "the layers' A or B have several dtypes"
    sizes = tuple((branch.weight.shape[0], branch.lora_a.shape[0]) for branch in branches)
    return _kept_group_fault(name, x.device, x.dtype, first.weight.shape[1], sizes, dropout)


def _kept_group_fault(name: str, *facts: Any) -> str | None:
    return operators(name).kept.group_fault(*facts)


_kept_group_fault._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a graph holds it, as the backend


def _packed_parts(branches: Sequence[Branch]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The layouts and the tensors of packed weights, of which a pass has all or none."""
    if type(branches[0]) is not PackedBranch:
        return (), []
    weights: list[Any] = [branch.weight for branch in branches]
    return tuple(weight.layout for weight in weights), [part for weight in weights for part in weight.parts]


def _are_apart(x: Tensor, branches: Sequence[Branch]) -> bool:
    """Whether each branch runs as the plain layer that it is."""
    few = x.is_cpu and x.numel() <= _FEW_TOKENS * x.shape[-1]
    return (few or len(branches) == 1) and all(branch.is_plain for branch in branches)


def _run_apart(x: Tensor, branch: Branch, p: float, state: Tensor | None, name: str) -> Tensor:
    b = branch
    record = torch.is_grad_enabled() and _any_requires_grad(x, *b.tensors)
    act = apply_function if record else forward_only
    return act(x, b.weight, b.lora_a, b.lora_b, b.bias, float(number(b.scaling)), p, state, name)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def run_branch(x: Tensor, branch: Branch, p: float, share: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """y (..., N) of one branch, whatever it has: the one place that says by which way it runs.

    With a gain (DoRA) and dropout, as in PEFT, x Wᵀ + bias keeps the whole x and what the adapter changes sees the
    dropped one: y = g * (d Wᵀ + s h Bᵀ) + (x - d) Wᵀ + bias with d = drop(x), two products with W.
    ``share`` as for :func:`run_plain`; with an activation between A and B there is none.
    """
    b = branch
    if b.is_plain:
        return run_plain(x, b.weight, b.lora_a, b.lora_b, b.bias, b.scaling, p, None, share)
    if type(b) is PackedBranch and b.is_bare and not is_compiling():
        return run_packed(x, b.weight, b.lora_a, b.lora_b, b.bias, b.scaling, p)
    if b.gain is None or p == 0.0:
        return run_branches(x, [b], p)[0]
    dropped = F.dropout(x, p) if share is None else _dropped(x, p, share)
    without_bias = type(b)(b.weight, b.lora_a, b.lora_b, None, b.scaling, b.gain, b.activation)
    (adapted,) = run_branches(dropped, [without_bias], 0.0)
    weight: Any = b.weight
    if type(b) is PackedBranch:
        return adapted + run_frozen(x - dropped, weight, b.bias)
    return adapted + F.linear(x - dropped, weight, b.bias)


def _dropped(x: Tensor, p: float, share: Callable[[Tensor], Tensor]) -> Tensor:
    """x, dropped by a state that several processes agree on."""
    x, name = prepare(x, None)
    flat = flatten(x)
    state = share(draw_state(x, p, name))
    return drop(flat, operators(name).mask(state, *flat.shape, p), p).view_as(x)


def prepare(x: Tensor, backend_name: str | None) -> tuple[Tensor, str]:
    """x as the operators may see it, and the backend that runs it.

    Raises:
        UnsupportedTransformError: x is within ``torch.func`` or ``vmap``.
    """
    if _is_transforming():  # a compiler answers it too, with a constant
        raise UnsupportedTransformError(
            "lora_linear was called under torch.func or vmap, which are not supported: its kernels have no "
            "batching rules. Call it on the whole batch (it takes any number of leading dimensions), or use "
            "lora_kernels.reference.forward, which is plain PyTorch."
        )
    if not is_compiling():
        x = _unwrap_if_dead(x)  # one that leaked out of a transform that is over
    return x, chosen(x, backend_name)


def chosen(x: Tensor, backend_name: str | None = None) -> str:
    """The backend that runs problems of x's device and dtype, as :func:`.dispatch.select` has it."""
    choose = _select_constant if is_compiling() else select
    return choose(device_type_of(x), x.dtype, backend_name)


def _select_constant(device_type: str, dtype: torch.dtype, backend_name: str | None) -> str:
    """``select`` as a compiled graph sees it: it holds the choice that was made when it was captured."""
    return select(device_type, dtype, backend_name)


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which would import Triton.
_select_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_type_of(x: Tensor) -> str:
    """``x.device.type``."""
    try:
        # The device and its string take PyTorch a microsecond.
        return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    except AttributeError as error:
        raise kind_refusal({"x": x}) from error


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast acts on such a device now."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch knows no autocast of meta


def may_have_tangents(*tensors: Tensor | None) -> bool:
    """Whether one has a forward-mode derivative. A compiler's tensors do not tell: there, whether a level is on."""
    if forward_ad._current_level < 0:
        return False
    if is_compiling():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises where one of them has a forward-mode derivative (``torch.autograd.forward_ad``): it would be lost."""
    if may_have_tangents(*tensors):
        raise UnsupportedTransformError(
            "lora_linear was given a dual tensor (torch.autograd.forward_ad, torch.func.jvp), and it has no "
            "forward-mode derivative. Differentiate backward, or use lora_kernels.reference.forward, which is plain "
            "PyTorch."
        )


def draw_state(x: Tensor, p: float, backend_name: str) -> Tensor:
    """What regenerates dropout's mask of x (..., K): see ``ops.py``. A layer's p may have been set to anything."""
    check_dropout_p(p)
    if is_compiling():  # a graph holds no lock
        return backend(backend_name).dropout_state(flatten(x), p)
    with DRAWING:
        return backend(backend_name).dropout_state(flatten(x), p)


def autocast_input(x: Tensor, device_type: str) -> Tensor:
    """x in autocast's dtype; as it is where autocast leaves it alone: fp64, and what is not floating (and refused)."""
    return as_dtype(x, autocast_dtype(x, device_type))


def autocast_dtype(x: Tensor, device_type: str) -> torch.dtype:
    """The dtype that autocast gives x."""
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def check_dropout_p(p: float) -> None:
    """Raises unless 0 <= p < 1."""
    try:
        allowed = 0.0 <= p < 1.0
    except TypeError:
        allowed = False
    if not allowed:
        raise InvalidArgumentError(
            f"dropout probability {p!r} was given: it must lie in [0, 1). Use 0.0 to switch dropout off."
        )


def number(scaling: Any) -> float:
    """``scaling``, as a plain number."""
    if isinstance(scaling, (int, float)):
        return scaling
    if isinstance(scaling, Real) or (isinstance(scaling, Tensor) and scaling.dim() == 0 and not scaling.requires_grad):
        return float(scaling)
    raise InvalidTypeError(
        f"scaling={scaling!r} was given: it must be a number, such as lora_alpha / r, and gets no gradient. To learn "
        "it, give 1.0 and multiply lora_b by it."
    )
