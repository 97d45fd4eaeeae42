"""Schemas, fakes and registration of the operators; the only file that knows ``torch.library``.

Every backend implements the same three functional operators, registered as ``lora_kernels::<backend>_<operator>``. They
have a fixed arity, alias nothing, write to nothing they were given, and know nothing of autograd: the one
``autograd.Function`` (``autograd.py``) stays outside of them.

========= ======================================================= ======================================================
operator  arguments                                               returns
========= ======================================================= ======================================================
forward   x (M,K), weight (N,K), lora_a (R,K), lora_b (N,R),      y (M,N) in x's dtype; h (M,R)
          bias (N)?, s, p, state?
backward  dy (M,N), x (M,K)?, weight (N,K)?, lora_a (R,K),        dx (M,K) = dy W + D * (dh A) in dy's dtype;
          lora_b (N,R), bias (N)?, h (M,R)?, s, p, state?         da (R,K) = dhᵀ (x * D) in lora_a's dtype;
                                                                  db (N,R) = s dyᵀ h in lora_b's dtype;
                                                                  dbias (N) = Σ_m dy in bias's dtype
mask      state, M, K, p                                          bool (M,K), True where kept
========= ======================================================= ======================================================

``dh`` (M,R) is s dy B, and ``D`` is mask / (1 - p), or 1 where ``state`` is None. ``backward`` gives what it can from
what it was given: dx is due iff ``weight`` is there, da iff ``x``, db iff ``h``, dbias iff ``bias``. A gradient that is
not due comes back empty, of shape (0,) and the dtype it would have had (dbias without a bias: dy's).

``state`` is what the backend's ``dropout_state`` drew: a seed, int64 (2,) on x's device, or (eager on CUDA) the bool
mask itself. x, dy and weight share one dtype, the compute dtype; lora_a, lora_b and bias may have any floating dtype
and are rounded to it at the product. ``h`` is in the backend's hidden dtype (``Operators.hidden_dtype``), and no other
backend ever reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "OPERATOR_NAMES", "Operators", "operators", "register"]

NAMESPACE = "lora_kernels"

_SCHEMAS = {
    "forward": "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, float scaling, float p, "
    "Tensor? state) -> (Tensor y, Tensor h)",
    "backward": "(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? h, "
    "float scaling, float p, Tensor? state) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)",
    "mask": "(Tensor state, SymInt rows, SymInt columns, float p) -> Tensor",
}
OPERATOR_NAMES = tuple(_SCHEMAS)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_registered: dict[str, Operators] = {}  # the operators, behind PyTorch's dispatcher
_direct: dict[str, Operators] = {}  # the same functions by the way that takes the least host time


@dataclass(frozen=True)
class Operators:
    """One backend's operators, bound once so that a call looks nothing up."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    mask: Callable[..., Tensor]
    hidden_dtype: Callable[[torch.dtype], torch.dtype]


def register(
    backend: str,
    implementations: Mapping[str, Callable[..., Any]] | None,
    hidden_dtype: Callable[[torch.dtype], torch.dtype],
) -> None:
    """Define, implement and fake the operators of ``backend``; calling it again does nothing.

    ``implementations`` is None where a C++ library has registered the kernels, or will. ``hidden_dtype`` maps the
    compute dtype to the dtype of h.
    """
    if backend in _registered:
        return
    overloads: dict[str, Any] = {}
    for name, fake in _fakes(hidden_dtype).items():
        qualified = f"{backend}_{name}"
        _library.define(f"{qualified}{_SCHEMAS[name]}", tags=(torch.Tag.pt2_compliant_tag,))
        if implementations is not None:
            _library.impl(qualified, implementations[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=_library)
        overloads[name] = getattr(getattr(torch.ops, NAMESPACE), qualified).default
    if implementations is None:
        implementations = {name: overload._op for name, overload in overloads.items()}
    _registered[backend] = Operators(**overloads, hidden_dtype=hidden_dtype)
    _direct[backend] = Operators(**{name: implementations[name] for name in overloads}, hidden_dtype=hidden_dtype)


def operators(backend: str) -> Operators:
    """The operators of a backend that ``dispatch.select`` has chosen, and so registered.

    Where somebody watches (a compiler, an exporter, a tracer, fake tensors, any dispatch mode), calls go through the
    dispatcher and are seen as one operator; elsewhere straight to the implementation, which takes less host time.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return _registered[backend]
    return _direct[backend]


def _fakes(hidden_dtype: Callable[[torch.dtype], torch.dtype]) -> dict[str, Callable[..., Any]]:
    """Shape functions of the operators; every result is a fresh contiguous tensor."""

    def forward(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        p: float,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y = x.new_empty((x.shape[0], weight.shape[0]))
        return y, x.new_empty((x.shape[0], lora_a.shape[0]), dtype=hidden_dtype(x.dtype))

    def backward(
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        h: Tensor | None,
        scaling: float,
        p: float,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            dy.new_empty(0 if weight is None else (dy.shape[0], weight.shape[1])),
            lora_a.new_empty(0 if x is None else lora_a.shape),
            lora_b.new_empty(0 if h is None else lora_b.shape),
            dy.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        )

    def mask(state: Tensor, rows: int, columns: int, p: float) -> Tensor:
        return state.new_empty((rows, columns), dtype=torch.bool)

    return {"forward": forward, "backward": backward, "mask": mask}
