"""The backends, one module each; ``dispatch.ORDER`` names them. What they share is here."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "why_not_capability"]

_MINIMUM_CAPABILITY = (8, 0)  # what the kernels of every backend of ours are compiled for


def draw_seed(x: Tensor) -> Tensor:
    """A fresh 16-byte seed, int64 (2,), on x's device, from torch's generator: ``torch.manual_seed`` governs it."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)


def why_not_capability() -> list[str]:
    """A sentence where the current CUDA device is older than the kernels' oldest."""
    capability = torch.cuda.get_device_capability()
    if capability >= _MINIMUM_CAPABILITY:
        return []
    has, needed = (".".join(map(str, version)) for version in (capability, _MINIMUM_CAPABILITY))
    reason = f"This GPU has compute capability {has} and the kernels need {needed} or above"
    return [f"{reason}: run within use_backend('eager')."]
