"""Many cells under one budget: each is on disk as soon as it is done, and what is there is not measured again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from ..backends.triton.choose.blocks import Machine
from ..backends.triton.choose.candidates import candidates
from ..backends.triton.choose.plans import Cell
from ..backends.triton.choose.table import DeviceName, Row, TableError, Timed, merge_into, read, versions_of
from ..backends.triton.choose.why import obstacle
from ..console import Progress
from .search import CANDIDATES, Found, NothingToStoreError, Trial, search

__all__ = ["Bench", "Options", "Outcome", "run", "stored_rows"]

_MICRO = 1e6
_KERNELS = {"forward": "hopper_group", "backward": "dx_hopper_group"}


class Bench(Protocol):
    """A device that cells are set up on."""

    name: DeviceName
    machine: Machine
    versions: dict[str, str]

    def open(self, cell: Cell) -> AbstractContextManager[Trial]:
        """The cell's tensors, for the time of the block; raises NothingToStoreError where there is no room."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        status: "tuned"; "kept", it was in the table; "failed"; "not reached" within the budget; "one way", there is no
            choice, so nothing was measured.
        row: what the table has for it now.
        found: the measurement, where there was one.
        sentence: why it failed, or has no choice.
        seconds: what it took.
    """

    cell: Cell
    status: str
    row: Row | None = None
    found: Found | None = None
    sentence: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        tables: the files that each row goes to; what the first one has is not measured again.
        budget: seconds; a cell that would outlast it, by the average so far, is not begun.
        again: measure also what the table has.
        candidates: how many plans of a cell are tried, about.
    """

    tables: tuple[Path, ...]
    budget: float
    again: bool = False
    candidates: int = CANDIDATES


def run(
    cells: Sequence[Cell],
    bench: Bench,
    options: Options,
    progress: Progress = lambda label, done, total: None,
    keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
    now: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Tunes ``cells`` in their order; ``keep`` is given all outcomes so far after each.

    Raises:
        TableError: a table is another device's or cannot be written; told before anything is measured.
    """
    for path in options.tables:
        merge_into(path, bench.name, ())
    before = {} if options.again else stored_rows(options.tables[0], bench.versions)
    begun = now()
    outcomes: list[Outcome] = []
    for position, cell in enumerate(cells):
        progress("tune", position, len(cells))
        took = [outcome.seconds for outcome in outcomes if outcome.seconds]
        expected = sum(took) / len(took) if took else 0.0
        if sentence := _one_way(bench.machine, cell):
            outcomes.append(Outcome(cell, "one way", sentence=sentence))
        elif cell in before:
            outcomes.append(Outcome(cell, "kept", before[cell]))
        elif now() - begun + expected >= options.budget:
            outcomes.append(Outcome(cell, "not reached"))
        else:
            outcomes.append(_tune(cell, bench, options.candidates, now))
        if (row := outcomes[-1].row) is not None:
            for path in options.tables[outcomes[-1].status == "kept" :]:
                merge_into(path, bench.name, [row])
        keep(outcomes)
    progress("tune", len(cells), len(cells))
    return outcomes


def stored_rows(path: Path, versions: dict[str, str]) -> dict[Cell, Row]:
    """The rows in ``path`` that were measured with just these versions, and their plan's kernels as they are."""
    try:
        return {row.cell: row for row in read(path).rows if row.versions == versions_of(row.plan, versions)}
    except TableError:
        return {}


def _one_way(machine: Machine, cell: Cell) -> str | None:
    """A sentence where the machine has one plan for ``cell``: of layers of one x, each by itself."""
    if not cell.others or len(candidates(machine, cell)) > 1:
        return None
    return f"There is one way to run it here, each layer by itself. {obstacle(machine, cell, _KERNELS[cell.direction])}"


def _tune(cell: Cell, bench: Bench, limit: int, now: Callable[[], float]) -> Outcome:
    begun = now()
    try:
        with bench.open(cell) as trial:
            found = search(bench.machine, cell, trial, limit)
    except NothingToStoreError as error:
        return Outcome(cell, "failed", sentence=str(error), seconds=now() - begun)
    return Outcome(cell, "tuned", _row(found, bench.versions), found, seconds=now() - begun)


def _row(found: Found, versions: dict[str, str]) -> Row:
    timing, front = found.timings[found.plan], found.front
    timed = [
        Timed(
            plan,
            max(found.timings[plan].ratio, timing.ratio),
            {name: seconds * _MICRO for name, seconds in found.host.get(plan, {}).items()},
            versions_of(plan, versions)["kernels"],
        )
        for plan in front
    ]
    return Row(
        cell=found.cell,
        plan=found.plan,
        us=timing.median * _MICRO,
        floor_us=found.floor.median * _MICRO,
        ratio=timing.ratio,
        kinds=found.kinds,
        predicted_us=found.predicted[found.plan] * _MICRO,
        versions=versions_of(found.plan, versions),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        timed=tuple(timed) if len(timed) > 1 else (),
    )
