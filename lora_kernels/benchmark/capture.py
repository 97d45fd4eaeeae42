"""A CUDA graph of several calls, taken so that a capture that fails leaves nothing behind.

``torch.cuda.graph`` would do, but for three things: it empties the allocator's cache before each capture, which costs
more than the capture; after a capture that failed it leaves its own stream current; and torch's generator then still
believes that it is being captured, and refuses every draw.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

__all__ = ["capture"]


def capture(work: Callable[[], None], pool: Any = None) -> Any:
    """The graph of what ``work`` launches on the current stream.

    Everything in ``work`` must have run before, on these very tensors: a capture may not compile, nor load a kernel.

    Args:
        work: runs under the capture, on a stream of its own.
        pool: another graph's ``pool()``, whose memory this one reads.

    Raises:
        RuntimeError: something in ``work`` cannot be captured, or raised; calls that are not captured work as before.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with _collector_off(), torch.cuda.stream(_stream()):
        try:
            # thread_local: autograd's thread and a library's may do what the capturing thread may not.
            pools: Any = {} if pool is None else {"pool": pool}
            graph.capture_begin(**pools, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        except BaseException:
            _restore_generator()
            raise
    return graph


@cache
def _stream() -> Any:
    """One for all: cuBLAS keeps a workspace for each stream that it has seen, and gets it here, outside of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ones = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        torch.mm(ones, ones)
    stream.synchronize()
    return stream


@contextmanager
def _collector_off() -> Iterator[None]:
    """Nothing that somebody else dropped is to be freed in the midst of a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _restore_generator() -> None:
    """Gives the default generator a fresh state; the one that the failed capture took part in is stuck in it."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    fresh = torch.Generator("cuda").manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
