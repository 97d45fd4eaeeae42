"""Dropout's states, drawn before the calls that they belong to.

A layer's mask is to be what its own call would draw. A pass that runs at the first layer's call foresees the others'
states and leaves torch's generator as that first call alone would. Each other call then asks whether the generator
stands where its state was foreseen, and moves it on; so whatever restores the generator's state (a checkpoint of either
kind, ``fork_rng``, ``manual_seed``) restores the masks, wherever its borders lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import select
from .gate import DRAWING, device_type_of, draw_state, is_autocast_enabled

__all__ = ["Foreseen", "foresee"]


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A state, and where its draw moves the generator from and to; no generator: the draw itself moved it."""

    state: Tensor
    generator: torch.Generator | None
    before: Tensor | None
    after: Tensor | None

    def comes_true(self) -> bool:
        """Whether a draw would give the state now; the generator is then moved as the draw would have moved it."""
        if self.generator is None or self.before is None or self.after is None:
            return True
        with DRAWING, torch._C._DisableTorchDispatch():  # nobody who watches a layer's operators is to see this
            if not torch.equal(self.generator.get_state(), self.before):
                return False
            self.generator.set_state(self.after)
        return True


def foresee(x: Tensor, ps: Sequence[float]) -> list[Foreseen]:
    """The states of dropout of x (..., K) that calls with these p would draw now, one after the other.

    The first is drawn for good. Empty where the generator's position cannot be told. While a CUDA graph is captured it
    cannot be moved either, nor can a checkpoint restore it: there all are drawn for good.
    """
    device_type, capturing = device_type_of(x), False
    if device_type == "cpu":
        generator = torch.default_generator
    elif device_type == "cuda":
        generator = torch.cuda.default_generators[x.device.index]
        capturing = torch.cuda.is_current_stream_capturing()
    else:
        return []
    name = select(device_type, _compute_dtype(x, device_type))
    if capturing:
        return [Foreseen(draw_state(x, p, name), None, None, None) for p in ps]
    first = before = None
    drawn = []
    with DRAWING:
        for p in ps:
            state = draw_state(x, p, name)
            after = generator.get_state()
            first = after if first is None else first
            drawn.append(Foreseen(state, generator, before, after))
            before = after
        if first is not None:
            generator.set_state(first)
    return drawn


def _compute_dtype(x: Tensor, device_type: str) -> torch.dtype:
    if x.dtype != torch.float64 and is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
