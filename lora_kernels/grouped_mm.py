"""Where ``torch.nn.functional.grouped_mm`` reads the offsets on the device: elsewhere it loops, and the host waits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["runs"]

_ALIGNED = 16  # bytes that rows and first elements must lie apart


def runs(x: Tensor, weight: Tensor) -> bool:
    """Whether ``grouped_mm`` runs on the device alone for x (M, K) and weight (E, N, K)."""
    return (
        x.is_cuda
        and x.dtype is weight.dtype is torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and all(size * x.element_size() % _ALIGNED == 0 for size in weight.shape[1:])
        and weight.data_ptr() % _ALIGNED == 0
    )
