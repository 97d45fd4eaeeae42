"""A training step of a whole model on the clock: its time, the most memory it held, what it launched."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

from .device import first_line

__all__ = ["kernels", "measured_steps"]

_WARM_UP, _STEPS = 2, 6
_COPIES = ("Memcpy", "Memset")
_ANNOTATIONS = ("Optimizer.", "ProfilerStep")  # the profiler's own marks on the device's time line


def measured_steps(step: Callable[[], Any], tokens: int, device: str) -> dict[str, Any]:
    """Of some warm steps, one after the other: the median, and each; then of one more, what the GPU ran."""
    for _ in range(_WARM_UP):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = _clocked(step, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    median = statistics.median(seconds)
    numbers = {"tokens_per_second": tokens / median, "step_ms": 1e3 * median, "all_ms": [1e3 * s for s in seconds]}
    return {**numbers, "peak_bytes": peak, **launched(step, device, median)}


def _clocked(step: Callable[[], Any], device: str) -> list[float]:
    """Seconds of each of some steps; on a GPU between events, so the host may run ahead."""
    if device != "cuda":
        times = [time.perf_counter()]
        for _ in range(_STEPS):
            step()
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def launched(step: Callable[[], Any], device: str, seconds: float) -> dict[str, Any]:
    """Kernels that a step launches, and the part of ``seconds``, a step's on the clock, in which the GPU ran any.

    Off a GPU, and where the profiler does not work, the numbers are None, and ``not_profiled`` says why.
    """
    if device != "cuda":
        return {"launches": None, "busy": None, "not_profiled": "There is no GPU."}
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        count, busy = kernels(profile.profiler.kineto_results.events())  # type: ignore[union-attr]
    except Exception as error:  # noqa: BLE001 (CUPTI may be missing or in use: the time of the steps stands without it)
        torch.cuda.synchronize()  # raises where it was the device that failed
        return {"launches": None, "busy": None, "not_profiled": f"The profiler failed: {first_line(error)}."}
    if not count:
        return {"launches": None, "busy": None, "not_profiled": "The profiler saw no kernel."}
    return {"launches": count, "busy": busy / seconds, "not_profiled": None}


def kernels(events: Iterable[Any]) -> tuple[int, float]:
    """Of a profile's events: kernels, and the seconds in which one or more of them, or a copy, ran."""
    on_device = [
        event
        for event in events
        if event.device_type().name == "CUDA"
        and not event.is_user_annotation()
        and not event.name().startswith(_ANNOTATIONS)
    ]
    count = sum(not event.name().startswith(_COPIES) for event in on_device)
    busy, until = 0, 0
    for begin, length in sorted((event.start_ns(), event.duration_ns()) for event in on_device):
        busy += max(begin + length - max(begin, until), 0)
        until = max(until, begin + length)
    return count, busy * 1e-9
