"""What a backend drops when it draws from a seed; torch's random state is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import dispatch
from ..ops import operators

__all__ = ["drawn_mask", "drawn_masks", "seeded"]


def drawn_masks(name: str, x: Tensor, p: float, seed: int, count: int) -> list[Tensor]:
    """The masks that ``count`` draws from ``seed`` drop by: the same draws, told by the backend's ``mask`` operator."""
    with seeded(seed, x.device):
        states = [dispatch.backend(name).dropout_state(x, p) for _ in range(count)]
    return [operators(name).mask(state, x.shape[0], x.shape[1], p) for state in states]


def drawn_mask(name: str, x: Tensor, p: float, seed: int) -> Tensor:
    """The mask of one draw."""
    return drawn_masks(name, x, p, seed, 1)[0]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch draws from ``seed`` within the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
