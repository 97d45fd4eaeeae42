"""The executable specification: LoRA's forward and gradients in plain PyTorch, for any floating dtype.

Dimensions: ``M`` tokens, ``K`` in_features, ``N`` out_features, ``R`` rank. With ``D = mask / (1 - p)`` (or 1 without
dropout), ``s = scaling``, ``*`` the element-wise product, an activation ``σ`` between A and B (mostly the identity) and
a ``gain`` g (N,) of y's columns (DoRA's magnitude over norm, mostly 1)::

    z     = (x * D) Aᵀ                    (M, R)
    h     = σ(z)                          (M, R)
    l     = x Wᵀ + s h Bᵀ                 (M, N)
    y     = g * l + bias                  (M, N)

    dl    = g * dy                        (M, N)
    dz    = σ'(z) * (s dl B)              (M, R)
    dx    = dl W + D * (dz A)             (M, K)
    da    = dzᵀ (x * D)                   (R, K)
    db    = s dlᵀ h                       (N, R)
    dw    = dlᵀ x                         (N, K)
    dbias = Σ_m dy                        (N,)
    dgain = Σ_m dy * l                    (N,)

The adapters count in :func:`adapter_dtype`: over bf16 they are rounded to it, over fp16 they are not.

Every fast path is measured against these functions in float64. They are themselves differentiable, so they also serve
double backward. Source of the formula: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), eq. 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .packed_mask import dropout_threshold, packed_keep_words, unpack

__all__ = [
    "Gradients",
    "adapter_dtype",
    "backward",
    "drop",
    "dropout_threshold",
    "forward",
    "gated",
    "gated_backward",
    "philox_keep_mask",
]

_ROOT_HALF, _ROOT_TWO_PI = 0.5**0.5, (2.0 * math.pi) ** 0.5
_ROOT_TWO_OVER_PI, _CUBE = (2.0 / math.pi) ** 0.5, 0.044715
_SIGMA: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": lambda z: z.clamp(min=0.0),
    "gelu": lambda z: 0.5 * z * (1.0 + torch.erf(z * _ROOT_HALF)),
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu_tanh": lambda z: 0.5 * z * (1.0 + torch.tanh(_tanh_argument(z))),
}
_SIGMA_DERIVATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "relu": lambda z: (z > 0.0).to(z.dtype),
    "gelu": lambda z: 0.5 * (1.0 + torch.erf(z * _ROOT_HALF)) + z * torch.exp(-0.5 * z * z) / _ROOT_TWO_PI,
    "silu": lambda z: torch.sigmoid(z) * (1.0 + z * (1.0 - torch.sigmoid(z))),
    "gelu_tanh": lambda z: (
        0.5 * (1.0 + torch.tanh(_tanh_argument(z)))
        + 0.5 * z * (1.0 - torch.tanh(_tanh_argument(z)) ** 2) * _ROOT_TWO_OVER_PI * (1.0 + 3.0 * _CUBE * z * z)
    ),
}


def _tanh_argument(z: Tensor) -> Tensor:
    """Of GELU by tanh: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016)."""
    argument: Tensor = _ROOT_TWO_OVER_PI * (z + _CUBE * z * z * z)
    return argument


class Gradients(NamedTuple):
    """What :func:`backward` returns; the names are the formulas' names."""

    dx: Tensor
    dw: Tensor
    da: Tensor
    db: Tensor
    dbias: Tensor
    dgain: Tensor


def adapter_dtype(compute: torch.dtype) -> torch.dtype:
    """What lora_a and lora_b are rounded to where x and W are in ``compute``: that dtype, but fp32 over fp16.

    fp16 knows no number above 65504 and few below 6e-5, and h, dh and trained adapters go beyond both. So over fp16
    lora_a, lora_b, h and dh keep fp32's range and at least 16 bits (two bf16 parts) of their precision, in every
    backend. y, dx and the scaled base that DoRA multiplies are fp16's, and infinite where they are beyond it.
    """
    return torch.float32 if compute is torch.float16 else compute


def drop(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """``x * mask / (1 - p)`` for a boolean ``mask`` of x's shape (True keeps); ``x`` itself for ``mask=None``."""
    return x if mask is None else x * mask.to(x.dtype) * (1.0 / (1.0 - p))


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    mask: Tensor | None = None,
    p: float = 0.0,
    gain: Tensor | None = None,
    activation: str = "identity",
) -> tuple[Tensor, Tensor]:
    """``(y, h)`` of x (M, K), weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,) or None, bool mask (M, K) or None,
    gain (N,) or None.

    All tensors share one dtype; nothing is rounded beyond what that dtype's products round.
    """
    h = _SIGMA[activation](drop(x, mask, p) @ lora_a.t())
    y = x @ weight.t() + scaling * (h @ lora_b.t())
    y = y if gain is None else gain * y
    return (y if bias is None else y + bias), h


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    mask: Tensor | None = None,
    p: float = 0.0,
    gain: Tensor | None = None,
    activation: str = "identity",
) -> Gradients:
    """All gradients for dy (M, N), by the module's formulas; arguments as in :func:`forward`."""
    dropped = drop(x, mask, p)
    z = dropped @ lora_a.t()
    h = _SIGMA[activation](z)
    dl = dy if gain is None else gain * dy
    dz = scaling * (dl @ lora_b) * _SIGMA_DERIVATIVE[activation](z)
    return Gradients(
        dx=dl @ weight + drop(dz @ lora_a, mask, p),
        dw=dl.t() @ x,
        da=dz.t() @ dropped,
        db=scaling * (dl.t() @ h),
        dbias=dy.sum(0),
        dgain=(dy * (x @ weight.t() + scaling * (h @ lora_b.t()))).sum(0),
    )


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """σ(gate) * up, element by element, of a gated MLP; ``activation`` is one of ``activations.GATES``."""
    return _SIGMA[activation](gate) * up


def gated_backward(da: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``(dgate, dup)``: da * up * σ'(gate) and da * σ(gate)."""
    return da * up * _SIGMA_DERIVATIVE[activation](gate), da * _SIGMA[activation](gate)


def philox_keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The dropout mask that the kernels draw, bit for bit: bool (rows, columns), True where the element is kept.

    ``seed`` is int64 (2,): the key and the stream of Philox4x32 with 7 rounds, as :mod:`.packed_mask` defines the mask.
    """
    return unpack(packed_keep_words(seed, rows, columns, p), columns)
