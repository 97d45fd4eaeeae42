"""Small pieces of a pass beside a large one: on a stream of their own, joined before anything else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from .recording import current

__all__ = ["PriorityStream", "SideStream", "Together", "ahead_on", "in_turn", "make_pools", "together_on"]

Large: TypeAlias = Callable[[int | None], Any]  # large(raw stream) -> its result
Small: TypeAlias = Callable[[int | None], Any]  # small(raw stream) -> its results
Together: TypeAlias = Callable[[int | None, Large, Small], tuple[Any, Any]]

_HIGH = -1


def together_on(device: torch.device, beside: bool) -> Together:
    """``together(stream, large, small)`` -> both results; neither may need the other's. ``small`` is launched first."""
    return SideStream(device) if beside and device.type == "cuda" else in_turn


def ahead_on(device: torch.device, beside: bool) -> Together:
    """``together(stream, large, small)`` as above, but ``large`` is launched first and goes before ``small``."""
    return PriorityStream(device) if beside and device.type == "cuda" else in_turn


def in_turn(stream: int | None, large: Large, small: Small) -> tuple[Any, Any]:
    """Both on the stream that is there."""
    return large(stream), small(stream)


class SideStream:
    """``small`` on the current stream's side stream, between two events: it begins after what was launched before, and
    what is launched next waits for it. A CUDA graph that is captured takes both branches; nothing outlives the call, so
    the memory of either piece may go back to the allocator as if there had been one stream."""

    def __init__(self, device: torch.device) -> None:
        self._index = _index_of(device)

    def __call__(self, stream: int | None, large: Large, small: Small) -> tuple[Any, Any]:
        main = torch.cuda.current_stream(self._index)
        side = _stream_beside(self._index, main, 0)
        recorder = current()
        if recorder is not None:
            recorder.note_fork()
        side.wait_stream(main)
        try:
            with torch.cuda.stream(side):  # launched first: they take their places before the large one takes all
                right = small(side.cuda_stream)
            left = large(stream)
        finally:  # what has been launched still reads memory of the current stream
            main.wait_stream(side)
        if recorder is not None:
            recorder.note_join()
        for result in right:
            if result is not None:
                result.record_stream(main)  # it was allocated on the side stream, and lives on
        return left, right


class PriorityStream:
    """``large`` on a stream of high priority, between two events, and launched first; ``small`` on the current stream:
    its programs take the places that the large one leaves, in its last wave above all.

    The current stream stays the current one: all memory is its own, and goes back to it after the join. So ``large``
    launches by the raw stream, and may free nothing: what it frees, ``small`` would be given while it is still read.
    """

    def __init__(self, device: torch.device) -> None:
        self._index = _index_of(device)

    def __call__(self, stream: int | None, large: Large, small: Small) -> tuple[Any, Any]:
        main = torch.cuda.current_stream(self._index)
        high = _stream_beside(self._index, main, _HIGH)
        recorder = current()
        if recorder is not None:
            recorder.note_fork(high=True)
        high.wait_stream(main)
        try:
            left = large(high.cuda_stream)
            right = small(stream)
        finally:  # what has been launched still reads and writes memory of the current stream
            main.wait_stream(high)
        if recorder is not None:
            recorder.note_join()
        return left, right


def make_pools(index: int) -> None:
    """PyTorch's pools of streams, which the first stream of a priority makes: a capture is no time for that."""
    for priority in (0, _HIGH):
        torch.cuda.Stream(index, priority=priority)


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream_beside(index: int, main: torch.cuda.Stream, priority: int) -> torch.cuda.Stream:
    """One for each stream, so that a graph that one thread captures takes no other thread's launches."""
    key = index, main.cuda_stream, priority
    with _lock:
        found = _streams.get(key)
        if found is None:
            found = _streams[key] = torch.cuda.Stream(index, priority=priority)
        return found


_streams: dict[tuple[int, int, int], torch.cuda.Stream] = {}
_lock = threading.Lock()
