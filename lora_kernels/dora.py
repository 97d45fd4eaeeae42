"""Weight-decomposed adapters (Liu et al., "DoRA", 2024, eq. 5) with PEFT's semantics, over plain tensors.

Shapes: weight (N, K), lora_a (R, K), lora_b (N, R), magnitude (N,), x (..., K). The norm is a constant to the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import apply

__all__ = ["adapted_rows", "forward", "gain", "row_norms"]

_NORM_ROWS = 1024  # rows of W that are held in fp32 at once while the norms are computed


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
    """‖W + s B A‖ of each row, (N,), in fp32 or better, holding no more than ``_NORM_ROWS`` rows at once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.cat(
        [
            torch.linalg.vector_norm(adapted_rows(weight, lora_a, lora_b, scaling, rows, dtype), dim=1)
            for rows in torch.arange(weight.shape[0], device=weight.device).split(_NORM_ROWS)
        ]
    )


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """magnitude / ‖W + s B A‖ with 1 for a norm of 0: a row of zeros has no direction to scale, and stays zero."""
    norms = norms.to(magnitude.dtype)
    return magnitude / norms.masked_fill(norms == 0, 1.0)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    gains: Tensor,
    p: float,
) -> Tensor:
    """y = g * (x Wᵀ + s h Bᵀ) + bias.

    With dropout, as in PEFT: x Wᵀ + bias keeps the whole x, and what the adapter changes sees the dropped one.
    """
    dropped = F.dropout(x, p) if p > 0.0 else x
    adapted = apply(dropped, weight, lora_a, lora_b, None, scaling, 0.0, None)
    y = adapted * gains
    if p > 0.0:
        y = y + F.linear(x - dropped, weight, bias)
    elif bias is not None:
        y = y + bias
    return y.to(adapted.dtype)
