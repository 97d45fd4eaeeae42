"""Made-up tables, rows and timings, of a device that is not here: what the tuner's tests stand on."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_kernels import __version__
from lora_kernels.backends.triton.choose import tuned
from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.plans import Cell, Plan
from lora_kernels.backends.triton.choose.table import DeviceName, Row, Timed, merge_into, versions_of
from lora_kernels.benchmark.timing import Timing
from lora_kernels.tuning import session
from lora_kernels.tuning.search import Refusal
from lora_kernels.tuning.session import Options, Outcome

H200 = Machine(capability=90, sm_count=132, shared_memory=232448, clock=1.98e9, bandwidth=4.8e12)
DEVICE = DeviceName("NVIDIA H200", 90, 132)
VERSIONS = {"torch": "2.11.0+cu130", "triton": "3.6.0", "lora_kernels": __version__}
CELL = Cell("forward", 8192, 4096, 4096, 16, "bfloat16", False)
FEW = replace(CELL, tokens=16)
CELLS = [replace(CELL, r=r) for r in (8, 16, 64, 128)]
KINDS = {"few_tokens": 1.2, "fused": 1.08, "lora_first": 1.1, "base_first": 1.15}


def plan(kind: str, cell: Cell = CELL, place: int = 0) -> Plan:
    """The model's first, second, ... plan of a kind."""
    return [found for found in candidates(H200, cell) if found.kind == kind][place]


def row(cell: Cell = CELL, kind: str = "fused", triton: str = "3.6.0", place: int = 0, **changes: Any) -> Row:
    made = Row(
        cell=cell,
        plan=plan(kind, cell, place),
        us=391.5,
        floor_us=380.25,
        ratio=1.0296,
        kinds={kind: 1.0296, "base_first": 1.11},
        predicted_us=400.0,
        versions=versions_of(plan(kind, cell, place), VERSIONS | {"triton": triton}),
        date="2026-11-24T00:00:00Z",
    )
    return replace(made, **changes)


def row_of(cell: Cell, plan: Plan, us: float = 391.5, timed: tuple[Timed, ...] = ()) -> Row:
    """A row of any plan."""
    return replace(row(), cell=cell, plan=plan, us=us, floor_us=us / 1.0296, timed=timed)


def looked_up(device: torch.device, cell: Cell) -> Plan | None:
    """The plan of the row that counts for ``cell``."""
    found = tuned.lookup(device, cell)
    return None if found is None else found.plan


def write(folder: Path, *rows: Row, device: DeviceName = DEVICE, name: str = "nvidia-h200") -> Path:
    """A table in ``folder``."""
    path = folder / f"{name}.json"
    merge_into(path, device, rows)
    return path


def timing(ratios: Sequence[float], floor: float = 1e-4) -> Timing:
    """What the clock would tell of these rounds."""
    fifths = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 4
    median = statistics.median(ratios)
    seconds = [floor * value for value in (median, fifths[0], fifths[3])]
    return Timing(*seconds, median, fifths[0], fifths[3], seconds[0] - floor, len(ratios), 1, "made up")


@dataclass
class FakeTrial:
    """A cell whose truth is known: ``ratios`` of plans or kinds (1.5 for the others), normal noise in every round.

    Attributes:
        refused: what does not pass.
        lost: plans that fail as soon as they are timed.
        stages: the plans and rounds that were timed.
        hosts: microseconds of the host by kind of plan and way to launch.
    """

    ratios: Mapping[Plan | str, float]
    noise: float = 0.0
    seed: int = 0
    refused: Mapping[Plan, Refusal] = field(default_factory=dict)
    lost: Sequence[Plan] = ()
    stages: list[tuple[list[Plan], int]] = field(default_factory=list)
    hosts: Mapping[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def truth(self, plan: Plan) -> float:
        return self.ratios.get(plan, self.ratios.get(plan.kind, 1.5))

    def admit(self, plans: Sequence[Plan]) -> Mapping[Plan, Refusal]:
        return {plan: self.refused[plan] for plan in plans if plan in self.refused}

    def time(self, plans: Sequence[Plan], rounds: int) -> Mapping[Plan | None, Timing]:
        self.stages.append((list(plans), rounds))
        measured: dict[Plan | None, Timing] = {None: timing([1.0] * rounds)}
        for plan in plans:
            if plan not in self.lost:
                noisy = [self.truth(plan) * self._random.gauss(1.0, self.noise) for _ in range(rounds)]
                measured[plan] = timing(noisy)
        return measured

    def host(self, plans: Sequence[Plan]) -> Mapping[Plan, dict[str, float]]:
        return {plan: {way: us * 1e-6 for way, us in self.hosts.get(plan.kind, {}).items()} for plan in plans}


class FakeBench:
    """A device whose every cell takes ``seconds``; ``at`` may do something when a cell is opened."""

    name, machine, versions = DEVICE, H200, VERSIONS

    def __init__(self, seconds: float = 10.0, at: Callable[[int], object] = lambda count: None, **trial: Any) -> None:
        self.clock, self.opened, self._seconds, self._at = 0.0, [], seconds, at
        self._trial = {"ratios": KINDS, **trial}

    @contextmanager
    def open(self, cell: Cell) -> Iterator[FakeTrial]:
        self._at(len(self.opened))
        self.opened.append(cell)
        yield FakeTrial(**self._trial)
        self.clock += self._seconds

    def run(self, wanted: list[Cell], *tables: Path, budget: float = 1e9, again: bool = False) -> list[Outcome]:
        return session.run(wanted, self, Options(tables, budget, again), now=lambda: self.clock)
