"""Schemas and registration of the operators; the only file that knows ``torch.library``. Their fakes: ``fakes.py``.

Every backend has the same functional operators, registered as ``lora_kernels::<backend>_<operator>``. They have a fixed
arity, alias nothing, write to nothing they were given, and know nothing of autograd: the two ``autograd.Function``
(``autograd.py``, ``branches_autograd.py``) stay outside of them.

Whole layers of plain LoRA:

========= ======================================================= ======================================================
operator  arguments                                               returns
========= ======================================================= ======================================================
forward   x (M,K), weight (N,K), lora_a (R,K), lora_b (N,R),      y (M,N) in x's dtype; h; words, int32 (M, 4 ceil(K
          bias (N)?, s, p, state?                                 / 128)) of the packed mask, or of shape (0,)
backward  dy (M,N), x (M,K)?, weight (N,K)?, lora_a (R,K),        dx (M,K) = dy W + D * (dh A) in dy's dtype;
          lora_b (N,R), bias (N)?, h (M,R)?, s, p, state?         da (R,K) = dhᵀ (x * D) in lora_a's dtype;
                                                                  db (N,R) = s dyᵀ h in lora_b's dtype;
                                                                  dbias (N) = Σ_m dy in bias's dtype
mask      state, M, K, p                                          bool (M,K), True where kept
========= ======================================================= ======================================================

x and dy may have any number of dimensions, (..., K) and (..., N), where an operator is called through
:class:`Operators`: y and dx then have them too, and M is their rows. So it is with a group's.

Their parts, for several branches that read one x, an activation between A and B, and DoRA (``branches_autograd.py``):

============ ==================================================== ======================================================
operator     arguments                                            returns
============ ==================================================== ======================================================
shrink       x (M,K), lora_a (R,K), p, state?                     z (M,R) = (x * D) Aᵀ
product      x (M,K), weight (N,K), lora_b (N,R), h (M,R),        y (M,N) = g * l + bias, with l = x Wᵀ + s h Bᵀ, in x's
             bias (N)?, gain (N)?, s, with_linear                 dtype, rounded once (g = 1 without gain);
                                                                  l (M,N) in x's dtype where gain is there and
                                                                  with_linear is True, else empty
output_grads dy (M,N), lora_b (N,R), h (M,R)?, bias (N)?, s       dh (M,R) = s dy B; db (N,R) = s dyᵀ h in lora_b's
                                                                  dtype; dbias (N) = Σ_m dy in bias's dtype
input_grad   dys [(M,N_i)], weights [(N_i,K)], dhs [(M,R_i)],     dx (M,K) = Σ_i dy_i W_i + D_i * (dh_i A_i) in dy's
             lora_as [(R_i,K)], p, states []                      dtype; states is empty or as long as the others
a_grad       dh (M,R), x (M,K), p, state?                         da (R,K) = dhᵀ (x * D)
gain_grad    dy (M,N), linear (M,N)?, gain (N), bias (N)?         dl (M,N) = g * dy in dy's dtype; dg (N) = Σ_m dy * l;
                                                                  dbias (N) = Σ_m dy in bias's dtype
row_norms    weight (N,K), lora_a (R,K), lora_b (N,R), s          ‖W + s B A‖ of each row, (N,), without forming B A
gated        gate (M,F), up (M,F), number                         a (M,F) = σ(gate) * up, rounded once
gated_grad   da (M,F), gate (M,F), up (M,F), number, joined       dgate (M,F) = da * up * σ'(gate);
                                                                  dup (M,F) = da * σ(gate); if joined both in one
                                                                  (M,2F), dgate before dup, and dup is empty
============ ==================================================== ======================================================

A gated MLP's ``gated`` takes rows at any distance, such as halves of one matrix; ``number`` is σ's in
``activations.GATES``. σ and σ' are computed in fp32 (fp64 for fp64); ``eager`` rounds each of its steps.

A backend that has kernels for a group, layers of plain LoRA that read one x, has these too; ``kept.group_fault`` tells
which groups they take. Everything is as in ``forward`` and ``backward``, an entry of a list for each layer:

============== ================================================== ======================================================
operator       arguments                                          returns
============== ================================================== ======================================================
group_forward  x (M,K), weights [(N_i,K)], lora_as [(R_i,K)],     ys [(M,N_i)]; hs; words, [] without states
               lora_bs [(N_i,R_i)], biases [(N_i)?], scalings
               [s_i], p, states []
group_backward dys [(M,N_i)], x (M,K)?, weights [], lora_as,      dx (M,K) = Σ_i dy_i W_i + D_i * (dh_i A_i); das; dbs;
               lora_bs, biases [(N_i)?], hs [], scalings, p,      dbiases
               states []
============== ================================================== ======================================================

A mixture's stacked experts have these in ``eager``, in ``triton``, and on CPUs in ``native``. Rows are sorted by
expert, those of expert e end at ``offsets[e]`` (int32), and rows after the last belong to no expert: their results are
zero. Everything is as in ``forward`` and ``backward`` of each expert's rows, without bias; D is drawn for all rows at
once:

================ ================================================ ======================================================
operator         arguments                                        returns
================ ================================================ ======================================================
experts_forward  x (M,K), or (T,K) with tokens, weight (E,N,K),   y (M,N); h (M,R), or empty without an adapter
                 lora_a (E,R,K)?, lora_b (E,N,R)?, offsets (E),
                 tokens (M)?, s, p, state?
experts_backward dy (M,N), x?, weight?, lora_a?, lora_b?,         dx (M,K), a row for each of dy's; da (E,R,K);
                 offsets, tokens?, h?, s, p, state?               db (E,N,R)
================ ================================================ ======================================================

``tokens`` (int64) has the row of x that each sorted row is. ``native`` and ``triton`` take no absent adapter.

On CPUs ``native`` has these too, for both projections and what lies between them. ``slots[i] = t k + j`` is the place
in ``weights`` (T,k) that sorted row i has, int64 (M): it is of token t. ``number`` is of σ in ``activations.GATES``:

==================== ============================================ ======================================================
operator             arguments                                    returns
==================== ============================================ ======================================================
experts_mlp_forward  x (T,H), up_weight (E,2I,H), up_a, up_b,     y (T,H): y[t] = Σ w y_i over the rows i of t, rounded
                     down_weight (E,H,I), down_a, down_b,         once, fp32 (fp64 for fp64) iff ``wide``; joined
                     offsets (E), slots (M), weights (T,k),       (M,2I), of x by ``up``: y_i is by ``down`` of
                     up_s, down_s, up_p, down_p, up_state?,       σ(joined[:,:I]) joined[:,I:]; up_h (M,R),
                     down_state?, number, wide                    down_h (M,R)
experts_mlp_backward dy (T,H), x, joined, up_weight, up_a, up_b,  dx (T,H); d_weights (T,k); d_up_a, d_up_b, d_down_a,
                     down_weight, down_a, down_b, offsets, slots, d_down_b, of (E,R,K) and (E,N,R)
                     weights, up_h, down_h, up_s, down_s, up_p,
                     down_p, up_state?, down_state?, number,
                     need_x, need_weights, need_up, need_down
==================== ============================================ ======================================================

``triton`` has these too; where a backend has none, ``experts/routing.py`` composes them. ``places[t k + j]`` is the
sorted row of token t's j-th expert, int64 (M). Rows that belong to no expert count as zero, whatever they hold:

============ ==================================================== ======================================================
operator     arguments                                            returns
============ ==================================================== ======================================================
combine      rows (M,H), weights (T,k)?, places, offsets (E), k,  y (T,H) in dtype, rounded once: y[t] = Σ_j w[t,j]
             dtype                                                rows[places[t k + j]], w = 1 without weights
combine_grad dy (T,H), rows (M,H)?, weights (T,k), places,        d_rows (M,H) in dtype: row places[t k + j] is w[t,j]
             offsets (E), dtype?                                  dy[t]; d_weights (T,k): entry [t,j] is <dy[t],
                                                                  rows[places[t k + j]]>
============ ==================================================== ======================================================

They are computed in fp32. d_rows is due iff ``dtype`` is there, else it has dy's; d_weights is due iff ``rows`` is.

Of ``group_backward`` dx is due iff there are ``weights``, every da iff ``x``, every db iff there are ``hs``.

``dh`` (M,R) is s dy B, and ``D`` is mask / (1 - p), or 1 where ``state`` is None. ``backward`` gives what it can from
what it was given: dx is due iff ``weight`` is there, da iff ``x``, db iff ``h``, dbias iff ``bias``; likewise
``output_grads``, and ``gain_grad`` for dg iff ``linear``. A gradient that is not due comes back empty, of shape (0,)
and the dtype it would have had (dbias without a bias: dy's).

``state`` is what the backend's ``dropout_state`` drew: a seed, int64 (2,) on x's device, or (eager on CUDA) the bool
mask itself. Where a backend's forward gives the mask's words (``packed_mask.py``), they are a state for its
``backward`` and ``mask`` too. x, dy and weight share one dtype, the compute dtype; lora_a, lora_b and bias may have any
floating dtype and are rounded to it at the product, adapters over fp16 not (``reference.adapter_dtype``): there h, dh
and they keep fp32's range and at least 16 bits. ``h``, ``z``, ``dh`` and what ``a_grad`` gives are (M,R) in the
backend's hidden dtype, and no other backend ever reads them; forward's h may be laid out otherwise (``kept.Kept``).
What is (M,R) may come with rows at any distance (a column slice), each in one piece. Gains, their gradients and norms
are fp32 (fp64 for fp64).

``dequantize`` is no backend's: the values (N,K) of a weight in a quantised form (``weights/``), which alone knows what
the parts are. ``after`` is not read. ``packed_product`` and ``packed_input_grad``, which not every backend has, are
``product`` and ``input_grad`` of such a weight: the backend reads its codes, or makes the values. Without an adapter
lora_b and h, or dh and lora_a, are None.

``native_coded_values``, ``native_coded_product`` and ``native_coded_input_grad`` are what the C++ library has for
weights of codes on CPUs; what they take of a weight is :class:`CodedParts`. They run within the three before them, so
that nothing that watches sees them. ``triton`` has functions for such weights (:class:`CodeKernels`): they run within
the same three, and where nobody watches h is formed with them too.

The overload ``.Tensor`` of an operator takes its numbers as 0-dim fp64 tensors: see ``graph_numbers.py``. What each
operator counts for PyTorch's ``FlopCounterMode`` is in ``flops.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .fakes import fakes
from .flops import enter_formulas, inform_counters
from .graph_numbers import by_numbers, tensor_schema, with_numbers
from .kept import Kept
from .tensors import flatten, unflatten

__all__ = [
    "COMBINE_OPERATOR_NAMES",
    "EXPERTS_OPERATOR_NAMES",
    "GROUP_OPERATOR_NAMES",
    "NAMESPACE",
    "OPERATOR_NAMES",
    "CodeKernels",
    "CodedParts",
    "Operators",
    "code_kernels",
    "coded_input_grad",
    "coded_product",
    "coded_values",
    "codes_of",
    "dequantize",
    "has_coded_kernels",
    "is_watched",
    "operators",
    "product_by_codes",
    "reads_codes",
    "register",
    "register_code_kernels",
    "register_form",
    "register_product",
]

NAMESPACE = "lora_kernels"

_SCHEMAS = {
    "forward": "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, float scaling, float p, "
    "Tensor? state) -> (Tensor y, Tensor h, Tensor words)",
    "backward": "(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? h, "
    "float scaling, float p, Tensor? state) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)",
    "mask": "(Tensor state, SymInt rows, SymInt columns, float p) -> Tensor",
    "shrink": "(Tensor x, Tensor lora_a, float p, Tensor? state) -> Tensor",
    "product": "(Tensor x, Tensor weight, Tensor lora_b, Tensor h, Tensor? bias, Tensor? gain, float scaling, "
    "bool with_linear) -> (Tensor y, Tensor linear)",
    "output_grads": "(Tensor dy, Tensor lora_b, Tensor? h, Tensor? bias, float scaling) -> (Tensor dh, Tensor db, "
    "Tensor dbias)",
    "input_grad": "(Tensor[] dys, Tensor[] weights, Tensor[] dhs, Tensor[] lora_as, float p, Tensor[] states) -> "
    "Tensor",
    "a_grad": "(Tensor dh, Tensor x, float p, Tensor? state) -> Tensor",
    "gain_grad": "(Tensor dy, Tensor? linear, Tensor gain, Tensor? bias) -> (Tensor dlinear, Tensor dgain, "
    "Tensor dbias)",
    "row_norms": "(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling) -> Tensor",
    "gated": "(Tensor gate, Tensor up, int number) -> Tensor",
    "gated_grad": "(Tensor da, Tensor gate, Tensor up, int number, bool joined) -> (Tensor dgate, Tensor dup)",
}
_GROUP_SCHEMAS = {
    "group_forward": "(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, Tensor?[] biases, "
    "float[] scalings, float p, Tensor[] states) -> (Tensor[] ys, Tensor[] hs, Tensor[] words)",
    "group_backward": "(Tensor[] dys, Tensor? x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "Tensor?[] biases, Tensor[] hs, float[] scalings, float p, Tensor[] states) -> (Tensor dx, Tensor[] das, "
    "Tensor[] dbs, Tensor[] dbiases)",
}
_EXPERTS_SCHEMAS = {
    "experts_forward": "(Tensor x, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor offsets, Tensor? tokens, "
    "float scaling, float p, Tensor? state) -> (Tensor y, Tensor h)",
    "experts_backward": "(Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_a, Tensor? lora_b, Tensor offsets, "
    "Tensor? tokens, Tensor? h, float scaling, float p, Tensor? state) -> (Tensor dx, Tensor da, Tensor db)",
}
_BOTH_STACKS = (
    "Tensor up_weight, Tensor up_a, Tensor up_b, Tensor down_weight, Tensor down_a, Tensor down_b, Tensor offsets, "
    "Tensor slots, Tensor weights, "
)
_OF_BOTH_STACKS = (
    "float up_scaling, float down_scaling, float up_p, float down_p, Tensor? up_state, Tensor? down_state, int number, "
)
_EXPERTS_MLP_SCHEMAS = {
    "experts_mlp_forward": f"(Tensor x, {_BOTH_STACKS}{_OF_BOTH_STACKS}bool wide) -> (Tensor y, Tensor joined, "
    "Tensor up_h, Tensor down_h)",
    "experts_mlp_backward": f"(Tensor dy, Tensor x, Tensor joined, {_BOTH_STACKS}Tensor up_h, Tensor down_h, "
    f"{_OF_BOTH_STACKS}bool need_x, bool need_weights, bool need_up, bool need_down) -> (Tensor dx, Tensor d_weights, "
    "Tensor d_up_a, Tensor d_up_b, Tensor d_down_a, Tensor d_down_b)",
}
_COMBINE_SCHEMAS = {
    "combine": "(Tensor rows, Tensor? weights, Tensor places, Tensor offsets, SymInt k, ScalarType dtype) -> Tensor",
    "combine_grad": "(Tensor dy, Tensor? rows, Tensor weights, Tensor places, Tensor offsets, ScalarType? dtype) -> "
    "(Tensor d_rows, Tensor d_weights)",
}
_PACKED_SCHEMAS = {
    "packed_product": "(Tensor x, Tensor[] parts, str form, str spec, SymInt rows, SymInt columns, Tensor? lora_b, "
    "Tensor? h, Tensor? bias, Tensor? gain, float scaling, bool with_linear) -> (Tensor y, Tensor linear)",
    "packed_input_grad": "(Tensor dy, Tensor[] parts, str form, str spec, SymInt rows, SymInt columns, Tensor? dh, "
    "Tensor? lora_a, float p, Tensor? state) -> Tensor",
}
OPERATOR_NAMES = tuple(_SCHEMAS)
COMBINE_OPERATOR_NAMES = tuple(_COMBINE_SCHEMAS)  # of a backend that has kernels for them
EXPERTS_OPERATOR_NAMES = tuple(_EXPERTS_SCHEMAS)  # ``native`` has them on CPUs
EXPERTS_MLP_OPERATOR_NAMES = tuple(_EXPERTS_MLP_SCHEMAS)  # ``native`` alone has them, on CPUs
GROUP_OPERATOR_NAMES = tuple(_GROUP_SCHEMAS)  # of a backend that has kernels for groups

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_registered: dict[str, Operators] = {}  # the operators, behind PyTorch's dispatcher
_traced: dict[str, Operators] = {}  # those, for a compiler: with its symbolic numbers too
_direct: dict[str, Operators] = {}  # the same functions by the way that takes the least host time
_packets: dict[str, dict[str, Any]] = {}  # all overloads of each operator

# Asked on each call: to look them up takes as long as to call them.
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_get_tracing_state = torch._C._get_tracing_state
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def _no_group(*arguments: Any) -> Any:
    raise AssertionError("kept.group_fault says before that this backend has no group operators")


def _no_experts(*arguments: Any) -> Any:
    raise AssertionError("this backend was registered without the operators of stacked experts")


@dataclass(frozen=True)
class Operators:
    """One backend's operators, bound once so that a call looks nothing up."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    mask: Callable[..., Tensor]
    shrink: Callable[..., Tensor]
    product: Callable[..., tuple[Tensor, Tensor]]
    output_grads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    input_grad: Callable[..., Tensor]
    a_grad: Callable[..., Tensor]
    gain_grad: Callable[..., tuple[Tensor, Tensor, Tensor]]
    row_norms: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    gated_grad: Callable[..., tuple[Tensor, Tensor]]
    kept: Kept
    refuses: Literal["", "on the CPU", "everywhere"] = ""
    known_group: Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor]] | None] | None = None
    group_forward: Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor]]] = _no_group
    group_backward: Callable[..., tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]] = _no_group
    experts_forward: Callable[..., tuple[Tensor, Tensor]] = _no_experts
    experts_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = _no_experts
    experts_mlp_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    experts_mlp_backward: Callable[..., tuple[Tensor, ...]] | None = None
    combine: Callable[..., Tensor] | None = None
    combine_grad: Callable[..., tuple[Tensor, Tensor]] | None = None
    packed_product: Callable[..., tuple[Tensor, Tensor]] | None = None
    packed_input_grad: Callable[..., Tensor] | None = None


def register(
    backend: str,
    implementations: Mapping[str, Callable[..., Any]],
    kept: Kept,
    library: Collection[str] = (),
    packed: Mapping[str, Callable[..., Any]] | None = None,
    refuses: Literal["", "on the CPU", "everywhere"] = "",
    any_dimensions: bool = False,
    known_group: Callable[..., Any] | None = None,
) -> None:
    """Define, implement and fake the operators of ``backend``; calling it again does nothing.

    An operator that ``implementations`` leaves out is one that a C++ library has registered, or will. One that it has
    for such a backend serves the devices that the library has no kernel for. ``kept`` tells what forward leaves for
    backward, ``library`` which operators the library has beyond those of a layer, ``packed`` those of packed weights,
    ``refuses``: where ``forward``, called directly, refuses itself what does not fit; "on the CPU" of tensors that are
    all there. ``any_dimensions``: ``forward`` and ``backward``, called directly, take x and dy as they come.
    ``known_group``: what ``group_forward`` gives of tensors that it was called with before, or None.
    """
    if backend in _registered:
        return
    overloads: dict[str, Any] = {}
    traced: dict[str, Any] = {}
    direct: dict[str, Any] = {}
    packets = _packets[backend] = {}
    own = _GROUP_SCHEMAS | _EXPERTS_SCHEMAS | _EXPERTS_MLP_SCHEMAS | _COMBINE_SCHEMAS
    schemas = _SCHEMAS | {name: own[name] for name in own if name in implementations or name in library}
    compiled = len(implementations) < len(schemas)
    in_python = packed or {}
    schemas |= {name: _PACKED_SCHEMAS[name] for name in in_python}
    known = fakes(kept)
    for name, schema in schemas.items():
        qualified = f"{backend}_{name}"
        fake = _entering_formulas(known[name], packets)
        _library.define(f"{qualified}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        if (implementation := implementations.get(name)) is None and name in in_python:
            implementation = _with_tensors(in_python[name])
        if implementation is not None:
            _library.impl(qualified, _by_itself(implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=_library)
        packets[name] = getattr(getattr(torch.ops, NAMESPACE), qualified)
        overloads[name] = traced[name] = packets[name].default
        if (by_tensors := tensor_schema(schema)) is not None:
            traced[name] = _with_tensor_overload(qualified, by_tensors, fake, packets[name])
        direct[name] = in_python.get(name) or (overloads[name]._op if compiled else implementations[name])
    for bound in (overloads, traced) if any_dimensions else (overloads, traced, direct):
        bound["forward"] = _of_any_dimensions(bound["forward"])
        bound["backward"] = _backward_of_any_dimensions(bound["backward"])
        if "group_forward" in bound:
            bound["group_forward"] = _group_of_any_dimensions(bound["group_forward"])
            bound["group_backward"] = _group_backward_of_any_dimensions(bound["group_backward"])
    _registered[backend] = Operators(**overloads, kept=kept, refuses=refuses)
    _traced[backend] = Operators(**traced, kept=kept, refuses=refuses)
    _direct[backend] = Operators(**direct, kept=kept, refuses=refuses, known_group=known_group)
    enter_formulas(packets)


def _of_any_dimensions(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` for x (..., K), with y (..., N)."""

    def called(x: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, h, words = forward(flatten(x), *rest, **named)
        return unflatten(y, x.shape), h, words

    return called


def _backward_of_any_dimensions(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` for dy (..., N) and x (..., K), with dx (..., K)."""

    def called(dy: Tensor, x: Tensor | None, weight: Tensor | None, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
        dx, *others = backward(flatten(dy), None if x is None else flatten(x), weight, *rest, **named)
        return dx if weight is None else unflatten(dx, dy.shape), *others

    return called


def _group_of_any_dimensions(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``group_forward`` for x (..., K), with every y (..., N_i)."""

    def called(x: Tensor, *rest: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        ys, hs, words = forward(flatten(x), *rest)
        return [unflatten(y, x.shape) for y in ys], hs, words

    return called


def _group_backward_of_any_dimensions(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``group_backward`` for every dy (..., N_i) and x (..., K), with dx (..., K)."""

    def called(dys: list[Tensor], x: Tensor | None, weights: list[Tensor], *rest: Any) -> tuple[Any, ...]:
        dx, *others = backward([flatten(dy) for dy in dys], None if x is None else flatten(x), weights, *rest)
        return unflatten(dx, dys[0].shape) if weights else dx, *others

    return called


def _with_tensor_overload(qualified: str, schema: str, fake: Callable[..., Any], packet: Any) -> Callable[..., Any]:
    """What compiled code calls, once the overload that takes numbers as tensors is there."""
    named = f"{qualified}.Tensor"
    # A CUDA graph would replay the numbers that it was captured with.
    _library.define(f"{named}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    _library.impl(named, _by_itself(by_numbers(packet.default)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{named}", fake, lib=_library)
    return with_numbers(packet.default, packet.Tensor)


def _entering_formulas(fake: Callable[..., Any], packets: dict[str, Any]) -> Callable[..., Any]:
    """``fake``, which every graph has called: a compiled program runs nothing of ours that could tell a counter."""

    @functools.wraps(fake)
    def called(*arguments: Any) -> Any:
        enter_formulas(packets)
        return fake(*arguments)

    return called


def _by_itself(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for the dispatcher: an exported program calls operators with gradients on, on trainable adapters.

    A compiled backward may be called within autocast, which would cast what the operator multiplies.
    """

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        if _is_any_autocast_enabled():
            with torch._C._DisableAutocast(), torch.no_grad():
                return function(*arguments)
        if not torch.is_grad_enabled():
            return function(*arguments)
        with torch.no_grad():
            return function(*arguments)

    return called


def operators(backend: str) -> Operators:
    """The operators of a backend that ``dispatch.select`` has chosen, and so registered.

    Where somebody watches (a compiler, an exporter, a tracer, fake tensors, any dispatch mode), calls go through the
    dispatcher and are seen as one operator; elsewhere straight to the implementation, which takes less host time.
    """
    if not is_watched():
        return _direct[backend]
    if is_compiling():
        return _traced[backend]
    inform_counters(_packets[backend])
    return _registered[backend]


def is_watched() -> bool:
    """Whether a compiler, a tracer or a dispatch mode sees the operators that are called."""
    return is_compiling() or _count_dispatch_modes() > 0 or _get_tracing_state() is not None


def direct_operators(backend: str) -> Operators:
    """:func:`operators` where nobody watches."""
    return _direct[backend]


# Weights in a quantised form

_DEQUANTIZE = (
    "dequantize(Tensor[] parts, str form, str spec, SymInt rows, SymInt columns, ScalarType dtype, Tensor? after) -> "
    "Tensor"
)
_CODES = "Tensor[] parts, Tensor? table, int high, int wide, int nested, bool low_first"
_CODED = {
    "native_coded_values": f"({_CODES}, int rows, int columns, int row, int column, int height, int width, "
    "ScalarType dtype) -> Tensor",
    "native_coded_product": f"(Tensor x, {_CODES}, int rows, Tensor? lora_b, Tensor? h, Tensor? bias, Tensor? gain, "
    "float scaling, bool with_linear) -> (Tensor y, Tensor linear)",
    "native_coded_input_grad": f"(Tensor dy, {_CODES}, int columns, Tensor? dh, Tensor? lora_a, float p, "
    "Tensor? state) -> Tensor",
}
for _name, _schema in _CODED.items():
    _library.define(f"{_name}{_schema}")


class CodedParts(NamedTuple):
    """What the C++ library reads of a weight of codes.

    Attributes:
        parts: of 4 bits, two a byte (uint8): the codes, and fp32 absmax of each block, or bf16 (K / block, N) beside
            bitsandbytes' order by columns; nested: 8-bit absmax, its own absmax, its table, its offset. Of 8 bits: int8
            numbers, or e4m3 as uint8, fp32 scales of each block, and, if there are, int8 zeros.
        table: the 16 numbers of 4-bit codes; None of 8-bit ones.
        high, wide: rows and columns of a block; of 4-bit codes ``wide`` numbers of W, its rows one after the other.
        nested: how many of absmax make a block, or 0.
        low_first: whether the first of two codes is in the lower half of their byte.
    """

    parts: list[Tensor]
    table: Tensor | None
    high: int
    wide: int
    nested: int
    low_first: bool = False


_forms: dict[str, Callable[..., Tensor]] = {}
_has_coded_kernels = False
_codes: dict[str, Callable[..., CodedParts | None]] = {}
_code_kernels: dict[str, CodeKernels] = {}
_products: dict[str, Callable[..., tuple[Tensor, Tensor | None] | None]] = {}


class CodeKernels(NamedTuple):
    """What a backend has for weights that it reads as they are stored; ``codes.Codes`` tells it how.

    Attributes:
        values: ``values(parts, codes, rows, columns, dtype)`` -> W (N, K). It runs within ``dequantize``.
        few_tokens: ``few_tokens(x, parts, codes, lora_a, lora_b, h, bias, gain, scaling, p, state, with_linear)`` ->
            y, h, l or None; None where it does not take them. Without an adapter ``lora_b`` and ``h`` are None.
    """

    values: Callable[..., Tensor]
    few_tokens: Callable[..., tuple[Tensor, Tensor | None, Tensor | None] | None]


def register_form(
    name: str, values: Callable[..., Tensor], codes: Callable[..., CodedParts | None] | None = None
) -> None:
    """Has ``dequantize`` ask ``values(parts, spec, rows, columns, dtype)`` for weights of the form ``name``.

    ``codes(parts, spec, rows, columns)`` is what the C++ library reads in place of the values, or None.
    """
    if not _forms:
        _library.define(_DEQUANTIZE, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl("dequantize", _by_itself(_dequantize), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::dequantize", _dequantize_fake, lib=_library)
    _forms[name] = values
    if codes is not None:
        _codes[name] = codes


def _dequantize(
    parts: list[Tensor], form: str, spec: str, rows: int, columns: int, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    return _forms[form](_as_tensors(parts), spec, rows, columns, dtype)


def _with_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(x, parts, ...)`` of a packed weight, for the dispatcher."""

    @functools.wraps(function)
    def called(x: Tensor, parts: list[Tensor], *rest: Any) -> Any:
        return function(x, _as_tensors(parts), *rest)

    return called


def _as_tensors(parts: list[Tensor]) -> list[Tensor]:
    """A compiled graph gives a package's own Parameters, whose methods are other ones than a tensor's."""
    if not any(isinstance(part, torch.nn.Parameter) for part in parts):
        return parts
    with torch._C.DisableTorchFunctionSubclass():
        return [part.detach() for part in parts]


def _dequantize_fake(
    parts: list[Tensor], form: str, spec: str, rows: int, columns: int, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    return parts[0].new_empty((rows, columns), dtype=dtype)


def dequantize(
    parts: list[Tensor], form: str, spec: str, rows: int, columns: int, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    """The values (N, K) of a weight in a form that :func:`register_form` was told of."""
    values: Tensor = torch.ops.lora_kernels.dequantize.default(parts, form, spec, rows, columns, dtype, after)
    return values


def codes_of(parts: list[Tensor], form: str, spec: str, rows: int, columns: int) -> CodedParts | None:
    """The codes of a packed weight, where the C++ library for CPUs is loaded and reads such codes."""
    read = _codes.get(form)
    return None if read is None or not has_coded_kernels() else read(parts, spec, rows, columns)


def reads_codes(parts: list[Tensor], form: str, spec: str, rows: int, columns: int) -> bool:
    """Whether the C++ library for CPUs, once it is loaded, reads the codes of a packed weight."""
    return form in _codes and _codes[form](parts, spec, rows, columns) is not None


def has_coded_kernels() -> bool:
    """Whether the C++ library for CPUs is loaded, which has :func:`coded_values` and the products with codes."""
    global _has_coded_kernels  # a library stays loaded: that it is there is asked once
    if not _has_coded_kernels:
        _has_coded_kernels = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::native_coded_values", "CPU")
    return _has_coded_kernels


def coded_values(
    codes: CodedParts,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    part: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """The values (N, K) of codes, by the C++ library, or of a part: row, column, height and width.

    A part's row is a multiple of 32, and its column even.
    """
    of = (0, 0, rows, columns) if part is None else part
    values: Tensor = torch.ops.lora_kernels.native_coded_values.default._op(*codes, rows, columns, *of, dtype)
    return values


def coded_product(x: Tensor, codes: CodedParts, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What ``packed_product`` gives for few tokens, by the C++ library: see the schema."""
    found: tuple[Tensor, Tensor] = torch.ops.lora_kernels.native_coded_product.default._op(x, *codes, *arguments)
    return found


def coded_input_grad(dy: Tensor, codes: CodedParts, *arguments: Any) -> Tensor:
    """What ``packed_input_grad`` gives for few tokens, by the C++ library: see the schema."""
    found: Tensor = torch.ops.lora_kernels.native_coded_input_grad.default._op(dy, *codes, *arguments)
    return found


def register_code_kernels(device_type: str, kernels: CodeKernels) -> None:
    """Has :func:`code_kernels` give ``kernels``."""
    _code_kernels[device_type] = kernels


def register_product(form: str, product: Callable[..., tuple[Tensor, Tensor | None] | None]) -> None:
    """Has :func:`product_by_codes` ask ``product(x, parts, spec, rows, columns, ...)`` for weights of ``form``."""
    _products[form] = product


def product_by_codes(
    x: Tensor, parts: list[Tensor], form: str, spec: str, rows: int, columns: int, *rest: Any
) -> tuple[Tensor, Tensor | None] | None:
    """What ``packed_product`` gives, and None for no l, by :func:`code_kernels`; None: multiply by the values."""
    product = _products.get(form)
    return None if product is None else product(x, parts, spec, rows, columns, *rest)


def code_kernels(device_type: str) -> CodeKernels | None:
    """The kernels of the ``triton`` backend, where they were asked for and it runs."""
    return _code_kernels.get(device_type)
