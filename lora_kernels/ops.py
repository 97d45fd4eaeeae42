"""Schemas, fakes and registration of the operators; the only file that knows ``torch.library``.

Every backend implements the same six functional operators, registered as ``lora_kernels::<backend>_<operator>``. They
have a fixed arity, alias nothing, write to nothing they were given, and know nothing of autograd: the one
``autograd.Function`` (``autograd.py``) stays outside of them.

========= =================================================================== =========================================
operator  arguments                                                           returns
========= =================================================================== =========================================
forward   x (M,K), weight (N,K), lora_a (R,K), lora_b (N,R), bias (N)?, s, p, y (M,N) in x's dtype, h (M,R)
          state?
dh        dy (M,N), lora_b (N,R), s                                           dh (M,R) = s dy B
dh_db     dy (M,N), lora_b (N,R), h (M,R), s                                  dh as above; db (N,R) = s dyᵀ h in
                                                                              lora_b's dtype
dx        dy (M,N), weight (N,K), dh (M,R), lora_a (R,K), p, state?           dx (M,K) = dy W + D * (dh A) in dy's dtype
da        dh (M,R), x (M,K), lora_a (R,K), p, state?                          da (R,K) = dhᵀ (x * D) in lora_a's dtype
mask      state, M, K, p                                                      bool (M,K), True where kept
========= =================================================================== =========================================

``D`` is mask / (1 - p), or 1 where ``state`` is None. ``state`` is what the backend's ``dropout_state`` drew: a seed,
int64 (2,) on x's device, or (eager on CUDA) the bool mask itself. x, dy and weight share one dtype, the compute dtype;
lora_a, lora_b and bias may have any floating dtype and are rounded to it at the product. ``h`` and ``dh`` are in the
backend's hidden dtype (``Operators.hidden_dtype``), and no other backend ever reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "OPERATOR_NAMES", "Operators", "operators", "register"]

NAMESPACE = "lora_kernels"

_SCHEMAS = {
    "forward": "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, float scaling, float p, "
    "Tensor? state) -> (Tensor, Tensor)",
    "dh": "(Tensor dy, Tensor lora_b, float scaling) -> Tensor",
    "dh_db": "(Tensor dy, Tensor lora_b, Tensor h, float scaling) -> (Tensor, Tensor)",
    "dx": "(Tensor dy, Tensor weight, Tensor dh, Tensor lora_a, float p, Tensor? state) -> Tensor",
    "da": "(Tensor dh, Tensor x, Tensor lora_a, float p, Tensor? state) -> Tensor",
    "mask": "(Tensor state, SymInt rows, SymInt columns, float p) -> Tensor",
}
OPERATOR_NAMES = tuple(_SCHEMAS)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_registered: dict[str, Operators] = {}  # the operators, behind PyTorch's dispatcher
_direct: dict[str, Operators] = {}  # the same functions, without it


@dataclass(frozen=True)
class Operators:
    """One backend's operators, bound once so that a call looks nothing up."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    dh: Callable[..., Tensor]
    dh_db: Callable[..., tuple[Tensor, Tensor]]
    dx: Callable[..., Tensor]
    da: Callable[..., Tensor]
    mask: Callable[..., Tensor]
    hidden_dtype: Callable[[torch.dtype], torch.dtype]


def register(
    backend: str, implementations: dict[str, Callable[..., Any]], hidden_dtype: Callable[[torch.dtype], torch.dtype]
) -> None:
    """Define, implement and fake the operators of ``backend``; calling it again does nothing.

    ``hidden_dtype`` maps the compute dtype to the dtype of h and dh.
    """
    if backend in _registered:
        return
    overloads: dict[str, Any] = {}
    for name, fake in _fakes(hidden_dtype).items():
        qualified = f"{backend}_{name}"
        _library.define(f"{qualified}{_SCHEMAS[name]}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(qualified, implementations[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=_library)
        overloads[name] = getattr(getattr(torch.ops, NAMESPACE), qualified).default
    _registered[backend] = Operators(**overloads, hidden_dtype=hidden_dtype)
    _direct[backend] = Operators(**implementations, hidden_dtype=hidden_dtype)


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
    """Shape functions of the six operators; every result is a fresh contiguous tensor."""

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

    def dh(dy: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        return dy.new_empty((dy.shape[0], lora_b.shape[1]), dtype=hidden_dtype(dy.dtype))

    def dh_db(dy: Tensor, lora_b: Tensor, h: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        return dh(dy, lora_b, scaling), lora_b.new_empty(lora_b.shape)

    def dx(dy: Tensor, weight: Tensor, dh: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
        return dy.new_empty((dy.shape[0], weight.shape[1]))

    def da(dh: Tensor, x: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
        return lora_a.new_empty(lora_a.shape)

    def mask(state: Tensor, rows: int, columns: int, p: float) -> Tensor:
        return state.new_empty((rows, columns), dtype=torch.bool)

    return {"forward": forward, "dh": dh, "dh_db": dh_db, "dx": dx, "da": da, "mask": mask}
