"""Interleaved timing: all candidates in turn in every round, and the ratio to the floor within the same round.

Whatever slows the machine for a while slows all candidates of a round alike; a median of such ratios holds where a
ratio of medians does not. Times come from the host clock (CPU; host overhead on any device), from CUDA events, or from
replays of a CUDA graph where launches would dominate: below ``_GRAPH_BELOW_SECONDS`` of the floor. A graph holds all
the calls of a sample, through all input sets in turn: what a replay costs by itself (its start, two fills where torch's
generator draws) is spread over a millisecond of work. Where events are taken, the host is ahead of the device: it
enqueues while a kernel sleeps, and a call takes the device longer than the host.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .capture import capture
from .device import first_line

__all__ = ["Candidate", "Timing", "first_call", "measure", "rounds_in_order"]

_INNER_SECONDS = 1.5e-3
_MAX_INNER = 2000
_MAX_ROUNDS = 300
_GRAPH_BELOW_SECONDS = 500e-6
_MAX_IN_GRAPH = 400  # calls: a rival launches up to ten kernels in each
_HOST_CALLS_UNSYNCHRONISED = 50
_HEAD_START_CYCLES = 400_000  # about 0.2 ms in which the host enqueues ahead, or the first launch would be timed
_HEAD_START_CYCLES_A_CALL = 4_000  # of a graph: launching one may take longer the more nodes it has


@dataclass
class Candidate:
    """Something to time. ``run(i)`` does it once on input set i.

    Attributes:
        context: entered around every timed stretch, outside of the clock.
        prepare: what must have run before ``run`` on the same stream: the forward whose backward is timed.
    """

    name: str
    run: Callable[[int], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds per call, and ratios and differences to the floor's time of the same round; 20th to 80th percentile.

    Attributes:
        rounds, inner: samples, and calls in each.
        clock: "host", "events" or "graph".
        note: a sentence, where the clock is not the one that was wanted.
    """

    median: float
    p20: float
    p80: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    difference: float
    rounds: int
    inner: int
    clock: str
    note: str = ""


def measure(
    candidates: Sequence[Candidate],
    floor: str,
    budget: float,
    min_rounds: int = 7,
    device: str = "cpu",
    sets: int = 1,
    host: bool = False,
) -> dict[str, Timing]:
    """Times all candidates in turn until ``budget`` seconds are spent, but for at least ``min_rounds`` rounds.

    Args:
        candidates: in the order of the first round; the order turns round by round.
        floor: the name of the candidate that the ratios refer to.
        device: "cpu" or "cuda".
        sets: how many input sets ``run`` may be given, in rotation.
        host: take the host's time of the call, not the device's.
    """
    timers = {c.name: _Timer(c, device, sets, host) for c in candidates}
    once = {name: timer.calibrate() for name, timer in timers.items()}
    inner = _inner(once[floor], sets, host and device == "cuda")
    if device == "cuda" and not host:
        if once[floor] < _GRAPH_BELOW_SECONDS:
            inner = min(inner, max(_MAX_IN_GRAPH // sets, 1) * sets)
            once |= _captured(timers, floor, inner)
        for timer in timers.values():  # the clock has come down meanwhile: an untimed round brings it up
            timer.sample(inner)
    estimate = max(sum(once.values()) * inner, 1e-9)
    count = max(min_rounds, min(_MAX_ROUNDS, int(budget / estimate)))
    samples: dict[str, list[float]] = {name: [] for name in timers}
    deadline = time.perf_counter() + budget
    for done, order in enumerate(rounds_in_order(list(timers), count)):
        if done >= min_rounds and time.perf_counter() > deadline:
            break
        for name in order:
            samples[name].append(timers[name].sample(inner))
    return {name: _summary(samples[name], samples[floor], inner, t.clock, t.note) for name, t in timers.items()}


def _captured(timers: dict[str, _Timer], floor: str, inner: int) -> dict[str, float]:
    """Seconds per call of the candidates that run as graphs from now on; none, if the floor does not."""
    order = [floor, *(name for name in timers if name != floor)]
    once: dict[str, float] = {}
    for name in order:
        seconds = timers[name].capture(inner)
        if seconds is not None:
            once[name] = seconds
        elif name == floor:
            break
    return once


def first_call(candidate: Candidate, device: str) -> float:
    """Seconds of one call without any before it, by the host's clock."""
    with candidate.context():
        if candidate.prepare is not None:
            candidate.prepare()
    return _Timer(candidate, device, 1, host=True).sample(1)


def rounds_in_order(names: list[str], count: int) -> list[list[str]]:
    """The order of each round: forwards and backwards in turn, each time starting one further on."""
    turns = [names[i % len(names) :] + names[: i % len(names)] for i in range(count)]
    return [turn[::-1] if i % 2 else turn for i, turn in enumerate(turns)]


def _inner(once: float, sets: int, unsynchronised: bool) -> int:
    """Calls per sample, the same for all candidates: long enough for the clock, and whole turns of the input sets."""
    if unsynchronised:
        return _HOST_CALLS_UNSYNCHRONISED
    calls = min(_MAX_INNER, max(1, math.ceil(_INNER_SECONDS / max(once, 1e-9))))
    return math.ceil(calls / sets) * sets if once * sets < 0.1 else calls


class _Timer:
    """One candidate and the clock that suits it."""

    def __init__(self, candidate: Candidate, device: str, sets: int, host: bool) -> None:
        self._candidate, self._sets = candidate, sets
        self._cuda, self._host = device == "cuda", host
        self._graph: Any = None
        self._prepared: Any = None
        self.clock, self.note = "host" if host or not self._cuda else "events", ""
        self._next = 0

    def calibrate(self) -> float:
        """Prepares, runs every input set once, and returns a first estimate of the seconds per call."""
        if self._candidate.prepare is not None:
            with self._candidate.context():
                self._candidate.prepare()
        self.sample(self._sets)  # compiles, loads, warms up
        first = self.sample(1)
        return first if first > 0.05 else min(first, self.sample(3))

    def capture(self, inner: int) -> float | None:
        """Puts ``inner`` calls into a CUDA graph; None, and events remain, where that fails."""
        prepare, prepared = self._candidate.prepare, None
        try:
            with self._candidate.context():
                if prepare is not None:
                    prepared = capture(prepare)
                    prepared.replay()
                graph = capture(partial(self._calls, inner), None if prepared is None else prepared.pool())
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.note = (
                f"Timed by events, with what launching costs, because no CUDA graph could be taken: {first_line(error)}"
            )
            self.calibrate()
            return None
        self._prepared = prepared  # its memory holds what the timed graph reads
        self._graph, self.clock = graph, "graph"
        self.sample(inner)  # the first replay uploads the graph
        return self.sample(inner)

    def sample(self, inner: int) -> float:
        """Seconds per call over ``inner`` calls in a row."""
        with self._candidate.context():
            if not self._cuda:
                start = time.perf_counter()
                self._calls(inner)
                return (time.perf_counter() - start) / inner
            torch.cuda.synchronize()
            if self._host:
                start = time.perf_counter()
                self._calls(inner)
                elapsed = time.perf_counter() - start
                torch.cuda.synchronize()
                return elapsed / inner
            return self._device_sample(inner)

    def _device_sample(self, inner: int) -> float:
        event: Callable[..., Any] = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        sleep: Callable[[int], None] = torch.cuda._sleep
        sleep(_HEAD_START_CYCLES + (0 if self._graph is None else inner * _HEAD_START_CYCLES_A_CALL))
        begin.record()
        if self._graph is None:
            self._calls(inner)
        else:
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / inner

    def _calls(self, count: int) -> None:
        run, sets, position = self._candidate.run, self._sets, self._next
        for _ in range(count):
            run(position)
            position = position + 1 if position + 1 < sets else 0
        self._next = position


def _summary(samples: list[float], floor: list[float], inner: int, clock: str, note: str = "") -> Timing:
    ratios = [own / base for own, base in zip(samples, floor, strict=True)]
    p20, median, p80 = _quantiles(samples)
    ratio_p20, ratio, ratio_p80 = _quantiles(ratios)
    difference = statistics.median(own - base for own, base in zip(samples, floor, strict=True))
    return Timing(median, p20, p80, ratio, ratio_p20, ratio_p80, difference, len(samples), inner, clock, note)


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]
