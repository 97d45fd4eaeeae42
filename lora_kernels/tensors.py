"""Views and casts of tensors that cost nothing where they change nothing, and which tensors are plain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PLAIN_TENSORS", "are_negated", "as_dtype", "flatten", "is_plain", "multiply", "resolved", "unflatten"]

# The types whose values are their own memory: no subclass that computes or exchanges them.
PLAIN_TENSORS = (nn.Parameter, Tensor)


def is_plain(tensor: object) -> bool:
    """Whether ``tensor`` is one of ``PLAIN_TENSORS`` itself."""
    return type(tensor) in PLAIN_TENSORS


def resolved(tensor: Any) -> Any:
    """``tensor`` with the values in its memory: the imaginary part of a conjugate has them there negated.

    Not asked for first by ``is_neg``, which would be quicker: no graph of a compiler takes that.
    """
    return tensor.resolve_neg() if isinstance(tensor, Tensor) else tensor


def are_negated(*tensors: Tensor | None) -> bool:
    """Whether ``resolved`` would change one; never while compiling, where torch's dispatcher resolves them."""
    if torch.compiler.is_compiling():
        return False
    return True in [tensor.is_neg() for tensor in tensors if tensor is not None]


def flatten(tensor: Tensor) -> Tensor:
    """(..., F) as (M, F), its memory as ``resolved`` has it."""
    tensor = tensor.resolve_neg()
    if tensor.dim() == 2:
        return tensor
    features = tensor.shape[-1]
    rows = -1 if features else tensor.shape[:-1].numel()  # of no features, torch cannot tell how many rows
    return tensor.reshape(rows, features)


def unflatten(matrix: Tensor, shape: torch.Size) -> Tensor:
    """(M, F) with the leading dimensions of ``shape``. ``_unsafe_view``, as in F.linear: autograd does not see a view,
    so the result may be modified in place."""
    if len(shape) == 2:
        return matrix
    unflattened: Tensor = torch.ops.aten._unsafe_view.default(matrix, (*shape[:-1], matrix.shape[-1]))
    return unflattened


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the microseconds of a call that changes nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of a backward pass, in their dtype: a compiler traces it under forward's caller's autocast."""
    if not torch.compiler.is_compiling() or left.is_meta:  # torch knows no autocast of meta
        return left @ right
    with torch.autocast(left.device.type, enabled=False):
        return left @ right
