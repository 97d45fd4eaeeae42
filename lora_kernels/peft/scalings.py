"""The scalings of several adapters that act at once, as the one that an operator takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_one"]


def as_one(bs: Sequence[Tensor], scalings: Sequence[Any]) -> tuple[list[Tensor], float]:
    """Each adapter's B, and one s for all; scalings that differ, or are tensors, go into B.

    B is multiplied in fp32 or better, so that neither it nor its gradient is rounded, or overflows, before s acts.
    """
    first = scalings[0]
    if not any(isinstance(s, Tensor) or s != first for s in scalings):
        return list(bs), first
    wide = [b.to(torch.promote_types(b.dtype, torch.float32)) for b in bs]
    return [b * s for b, s in zip(wide, scalings, strict=True)], 1.0
