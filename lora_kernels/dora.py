"""Weight-decomposed adapters (Liu et al., "DoRA", 2024, eq. 5) with PEFT's semantics, over plain tensors.

Shapes: weight (N, K), lora_a (R, K), lora_b (N, R), magnitude (N,), x (..., K). The norm is a constant to the gradient.
The forward pass is in :func:`lora_kernels.gate.run_branch`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .gate import device_type_of, prepare
from .ops import operators
from .tensors import resolved

__all__ = ["adapted_rows", "gain", "merged", "row_norms"]


def adapted_rows(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, rows: Tensor | slice, dtype: torch.dtype
) -> Tensor:
    """Rows of W + s B A in ``dtype``, under autocast too."""
    device = weight.device.type
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):  # meta knows no autocast
        low_rank = lora_b[rows].to(dtype) @ lora_a.to(dtype)
    return torch.add(weight[rows].to(dtype), low_rank, alpha=scaling)


@torch.no_grad()
def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, (N,), in fp32 or better, A and B rounded to W's dtype; neither sum nor B A is formed.

    W is read at each call: a norm that was kept would be wrong, unseen, after a write to ``weight.data``.
    """
    device_type = device_type_of(weight)
    acts = torch._C._is_any_autocast_enabled() and device_type != "meta"  # which has no autocast
    with torch.autocast(device_type, enabled=False) if acts else nullcontext():
        weight, name = prepare(weight, None)
        return operators(name).row_norms(resolved(weight), resolved(lora_a), resolved(lora_b), float(scaling))


def merged(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None, norms: Tensor | None
) -> Tensor:
    """W + s B A, its rows rescaled to ``magnitude`` where there is one, computed in fp32 or wider and rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    whole = adapted_rows(weight, lora_a, lora_b, scaling, slice(None), dtype)
    if magnitude is not None and norms is not None:
        whole *= gain(magnitude.to(dtype), norms).unsqueeze(1)
    return whole.to(weight.dtype)


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """magnitude / ‖W + s B A‖ with 1 for a norm of 0: a row of zeros has no direction to scale, and stays zero."""
    norms = norms.to(magnitude.dtype)
    return magnitude / norms.masked_fill(norms == 0, 1.0)
