"""Small pieces of a pass beside a large one: on a stream of their own, joined before anything else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["SideStream", "Together", "in_turn", "together_on"]

Large: TypeAlias = Callable[[int | None], Tensor]  # large(raw stream) -> its result
Small: TypeAlias = Callable[[int | None], tuple[Tensor | None, ...]]  # small(raw stream) -> its results
Together: TypeAlias = Callable[[int | None, Large, Small], tuple[Tensor, Any]]


def together_on(device: torch.device, beside: bool) -> Together:
    """``together(stream, large, small)`` -> both results; neither may need the other's."""
    return SideStream(device) if beside and device.type == "cuda" else in_turn


def in_turn(stream: int | None, large: Large, small: Small) -> tuple[Tensor, Any]:
    """Both on the stream that is there."""
    return large(stream), small(stream)


class SideStream:
    """``small`` on the current stream's side stream, between two events: it begins after what was launched before, and
    what is launched next waits for it. A CUDA graph that is captured takes both branches; nothing outlives the call, so
    the memory of either piece may go back to the allocator as if there had been one stream."""

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index

    def __call__(self, stream: int | None, large: Large, small: Small) -> tuple[Tensor, Any]:
        main = torch.cuda.current_stream(self._index)
        side = self._side_of(main)
        side.wait_stream(main)
        with torch.cuda.stream(side):  # launched first: they take their places before the large one takes all
            right = small(side.cuda_stream)
        left = large(stream)
        main.wait_stream(side)
        for result in right:
            if result is not None:
                result.record_stream(main)  # it was allocated on the side stream, and lives on
        return left, right

    def _side_of(self, main: torch.cuda.Stream) -> torch.cuda.Stream:
        """One for each stream, so that a graph that one thread captures takes no other thread's launches."""
        key = self._index, main.cuda_stream
        with _lock:
            found = _streams.get(key)
            if found is None:
                found = _streams[key] = torch.cuda.Stream(self._index)
            return found


_streams: dict[tuple[int, int], torch.cuda.Stream] = {}
_lock = threading.Lock()
