"""What may stand between A and B, over plain tensors: the names, σ(z) and its gradient; and a gated MLP's gates.

The parallel bottleneck adapter ``s B σ(A x)`` (He et al., "Towards a Unified View of Parameter-Efficient Transfer
Learning", 2022, table 1, after Houlsby et al., 2019) is a LoRA with such a function; ``identity`` is LoRA itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InvalidArgumentError

__all__ = ["ACTIVATIONS", "GATES", "activate", "activate_backward", "check_activation", "check_gate", "gate_of"]

ACTIVATIONS = ("identity", "relu", "gelu", "silu")
# Of a gated MLP's gate (``ops.py``), by their numbers there: SwiGLU, and GeGLU with the error function or with tanh.
GATES = ("silu", "gelu", "gelu_tanh")

_OF_TRANSFORMERS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def check_activation(activation: str) -> None:
    """Raises for a name that is not one of ``ACTIVATIONS``."""
    if activation not in ACTIVATIONS:
        raise InvalidArgumentError(
            f"activation={activation!r} was given: it must be one of {', '.join(map(repr, ACTIVATIONS))}; "
            "'identity' is plain LoRA."
        )


def check_gate(activation: str) -> None:
    """Raises for a name that is not one of ``GATES``."""
    if activation not in GATES:
        raise InvalidArgumentError(
            f"activation={activation!r} was given for a gated MLP: it must be one of {', '.join(map(repr, GATES))}."
        )


def activate(activation: str, z: Tensor) -> Tensor:
    """σ(z), element by element; z itself for the identity. GELU is the exact one, with the error function."""
    return z if activation == "identity" else _FUNCTIONS[activation](z)


def activate_backward(activation: str, dh: Tensor, z: Tensor) -> Tensor:
    """dh * σ'(z), in one pass; ReLU's derivative at 0 is 0."""
    aten = torch.ops.aten
    if activation == "relu":
        dz: Tensor = aten.threshold_backward.default(dh, z, 0)
    elif activation == "gelu":
        dz = aten.gelu_backward.default(dh, z)
    elif activation == "silu":
        dz = aten.silu_backward.default(dh, z)
    else:
        dz = dh
    return dz


def gate_of(act: object) -> str | None:
    """Which of ``GATES`` the module ``act`` computes, and nothing else; None: another."""
    if not isinstance(act, nn.Module) or "forward" in act.__dict__:
        return None
    if act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks:
        return None
    kind = type(act)
    if kind is nn.SiLU:
        return None if act.inplace else "silu"
    if kind is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _OF_TRANSFORMERS.get(kind.__name__) if kind.__module__ == "transformers.activations" else None
