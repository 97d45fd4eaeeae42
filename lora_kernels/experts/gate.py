"""Between the projections: the module's own gate, or σ(gate) * up and its gradients in one pass each.

The one pass is a backend's ``gated`` (``ops.py``). It takes the place of transformers' own default gate, where the
activation is one of ``activations.GATES``. It keeps what the projection gave, and no value between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from ..activations import GATES, gate_of
from ..errors import UnsupportedTransformError
from ..gate import chosen
from ..ops import operators
from ..surrounded import is_surrounded, run_outside
from ..tensors import resolved

__all__ = ["apply_gate", "number_of"]

_DEFAULT = ("transformers.integrations.moe", "_default_apply_gate")


def apply_gate(module: Any, joined: Tensor) -> Tensor:
    """(M, I) of ``joined`` (M, 2 I), what gate_up_proj gave, as ``module._apply_gate`` has it."""
    number = number_of(module)
    if number is not None:
        name = chosen(joined)
        if name != "eager":
            gated: Tensor = _Gated.apply(joined, number, name)
            return gated
    y: Tensor = module._apply_gate(joined)
    return y


def number_of(module: Any) -> int | None:
    """Which of ``GATES`` the module's gate is; None: another."""
    if "_apply_gate" in module.__dict__ or not _has_default(type(module)):
        return None
    if torch_module._has_any_global_hook():  # they act on act_fn, which is to be called
        return None
    activation = gate_of(module.act_fn)
    return None if activation is None else GATES.index(activation)


def _has_default(kind: type) -> bool:
    found = getattr(kind, "_apply_gate", None)
    return (getattr(found, "__module__", None), getattr(found, "__qualname__", None)) == _DEFAULT


_has_default._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see gate._select_constant


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, number: int, name: str) -> Tensor:
        ctx.save_for_backward(joined)
        ctx.settings = number, name
        return operators(name).gated(*joined.chunk(2, dim=1), number)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        if not torch.compiler.is_compiling() and is_surrounded(grad_outputs):
            return run_outside(_Gated.backward, ctx, grad_outputs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UnsupportedTransformError(
                "a double backward (create_graph=True) was asked for through the gate of stacked experts, which has "
                "first derivatives alone. Differentiate once, or call the model within use_backend('eager')."
            )
        (joined,) = ctx.saved_tensors
        number, name = ctx.settings
        gate, up = joined.chunk(2, dim=1)
        d_joined, _ = operators(name).gated_grad(resolved(grad_outputs[0]).contiguous(), gate, up, number, True)
        return d_joined, None, None
