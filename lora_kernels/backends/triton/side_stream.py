"""Two pieces of a pass beside each other: the second one on a stream of its own, joined before anything else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Beside", "in_turn"]

Piece: TypeAlias = Callable[[int | None], Tensor] | None  # piece(raw stream) -> its result; None: it is not due

_streams: dict[int, torch.cuda.Stream] = {}
_lock = threading.Lock()


def in_turn(stream: int | None, first: Piece, second: Piece) -> tuple[Tensor | None, Tensor | None]:
    """Both on the stream that is there."""
    return None if first is None else first(stream), None if second is None else second(stream)


class Beside:
    """``second`` on the device's side stream, between two events: it begins after what was launched before, and what
    is launched next waits for it. A CUDA graph that is captured takes both branches; nothing outlives the call, so the
    memory of either piece may go back to the allocator as if there had been one stream."""

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index

    def __call__(self, stream: int | None, first: Piece, second: Piece) -> tuple[Tensor | None, Tensor | None]:
        if first is None or second is None:
            return in_turn(stream, first, second)
        main, side = torch.cuda.current_stream(self._index), self._side()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            right = second(side.cuda_stream)
        left = first(stream)
        main.wait_stream(side)
        right.record_stream(main)  # it was allocated on the side stream, and lives on
        return left, right

    def _side(self) -> torch.cuda.Stream:
        with _lock:
            found = _streams.get(self._index)
            if found is None:
                found = _streams[self._index] = torch.cuda.Stream(self._index)
            return found
