"""Weight-decomposed adapters (Liu et al., "DoRA", 2024, eq. 5) with PEFT's semantics, over plain tensors.

Shapes: weight (N, K), lora_a (R, K), lora_b (N, R), magnitude (N,), x (..., K). The norm is a constant to the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .branches import Branch, apply_branches
from .ops import operators

__all__ = ["adapted_rows", "forward", "gain", "row_norms"]


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
    device_type = functional.device_type_of(weight)
    with torch.autocast("cpu" if device_type == "meta" else device_type, enabled=False):
        weight, name = functional.prepare(weight, None)
        return operators(name).row_norms(weight, lora_a, lora_b, float(scaling))


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
    """y = g * (x Wᵀ + s h Bᵀ) + bias, in one pass.

    With dropout, as in PEFT, x Wᵀ + bias keeps the whole x and what the adapter changes sees the dropped one: that is
    y = g * (d Wᵀ + s h Bᵀ) + (x - d) Wᵀ + bias with d = drop(x), two products with W.
    """
    if p == 0.0:
        return apply_branches(x, [Branch(weight, lora_a, lora_b, bias, scaling, gains)], 0.0)[0]
    dropped = F.dropout(x, p)
    (adapted,) = apply_branches(dropped, [Branch(weight, lora_a, lora_b, None, scaling, gains)], 0.0)
    return adapted + F.linear(x - dropped, weight, bias)
