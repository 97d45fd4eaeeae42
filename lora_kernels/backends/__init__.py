"""The backends, one module each; ``dispatch.ORDER`` names them. What they share is here."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed"]


def draw_seed(x: Tensor) -> Tensor:
    """A fresh 16-byte seed, int64 (2,), on x's device, from torch's generator: ``torch.manual_seed`` governs it."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
