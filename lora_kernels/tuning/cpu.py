"""The CPU library's choice, measured: the kernels' own product beside PyTorch's, the plain composition and the floor.

Whole passes of a layer of rank 16 are timed in turn: forward without a graph, and backward with dx, da and db. Each way
is first held to the package's policy. A way is stored where it wins beyond the noise; where neither does, what the
model holds is stored, so that the choice stays what it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path

from ..backends.native import choice
from ..backends.native.choice_table import (
    CHOICES,
    DIRECTIONS,
    DTYPES,
    ChoiceTableError,
    Machine,
    ProductCell,
    Row,
    merge_into,
    read,
)
from ..benchmark import gate
from ..benchmark.providers import FLOOR, PROVIDERS, make_setups
from ..benchmark.runner import candidate
from ..benchmark.timing import Candidate, Timing, first_call, measure
from ..benchmark.workloads import Workload
from ..console import Progress
from ..errors import InvalidArgumentError
from .search import beats

__all__ = ["COMPOSITION", "PRESETS", "Outcome", "cells_of", "decide", "measure_cell", "preset", "run"]

RANK = 16
COMPOSITION = "addmm"  # the provider that is the plain composition
MAX_CALL = 3.0  # seconds of one call: a product that takes longer is left to the model
MIN_ROUNDS = 9
CELL_SECONDS = 1.5  # of timing, where the budget leaves them
_HOPELESS = 10
_MICRO = 1e6
_SQUARE = (2048, 2048)
_SHAPES = (_SQUARE, (4096, 4096), (2048, 8192), (8192, 2048), (1024, 1024))
_TOKENS = (16, 512, 1, 64, 4, 8, 2048, 128, 32)
_COMMON = ("bfloat16", "float32")


@dataclass(frozen=True)
class Preset:
    """Shapes (K, N), tokens and dtypes, the most valuable first in each list."""

    name: str
    describe: str
    shapes: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    dtypes: Sequence[str]

    def cells(self, directions: Sequence[str] = DIRECTIONS) -> list[ProductCell]:
        return cells_of(self.shapes, self.tokens, self.dtypes, directions)


PRESETS = {
    p.name: p
    for p in (
        Preset("cpu", "the usual sizes in bf16 and fp32: about ten minutes on 2 cores", _SHAPES, _TOKENS, _COMMON),
        Preset("cpu-quick", "2048x2048 at 1, 4, 8, 16, 64 and 512 tokens: a minute", (_SQUARE,), _TOKENS[:6], _COMMON),
        Preset("cpu-grid", "those, fp16 and fp64, and 256x256", (*_SHAPES, (256, 256)), _TOKENS, DTYPES),
    )
}


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        status: "tuned"; "kept", it was in the table; "left out", a call takes too long; "failed", a way computes
            something else; "not reached" within the budget.
        row: what the table has for it now.
        timings: of each way, by name.
        sentence: why there is no row.
    """

    cell: ProductCell
    status: str
    row: Row | None = None
    timings: Mapping[str, Timing] = field(default_factory=dict)
    sentence: str | None = None

    @property
    def composition_wins(self) -> bool:
        """Whether the plain composition is quicker than what was chosen, beyond the noise."""
        if self.row is None or COMPOSITION not in self.timings:
            return False
        return beats(self.timings[COMPOSITION], self.timings[self.row.choice])


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InvalidArgumentError: there is none.
    """
    if name not in PRESETS:
        raise InvalidArgumentError(f"preset {name!r} is not one of the CPU's: name one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def cells_of(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], dtypes: Sequence[str], directions: Sequence[str]
) -> list[ProductCell]:
    """Every combination; what every list names first comes first, then one step from it.

    Raises:
        InvalidArgumentError: a dtype that is not known.
    """
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise InvalidArgumentError(f"dtype {unknown[0]!r} is not known: name some of {', '.join(DTYPES)}.")
    lists: tuple[Sequence[object], ...] = (directions, dtypes, tokens, shapes)
    places = sorted(product(*(range(len(values)) for values in lists)), key=sum)
    found = [(directions[d], tokens[t], *shapes[s], dtypes[e]) for d, e, t, s in places]
    return list(dict.fromkeys(ProductCell(*values) for values in found))


def run(
    cells: Sequence[ProductCell],
    path: Path,
    budget: float = float("inf"),
    again: bool = False,
    progress: Progress = lambda label, done, total: None,
    keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
    measured: Callable[[ProductCell, Machine, float], Outcome] | None = None,
) -> list[Outcome]:
    """Measures ``cells`` in their order, each on disk in ``path`` as soon as it is done.

    Args:
        budget: seconds; a cell that would outlast it, by the average so far, is not begun.
        again: measure also what the table has of this machine.
        keep: is given all outcomes so far after each.
        measured: ``measure_cell``, or what stands in for it.

    Raises:
        ChoiceTableError: the table cannot be written; told before anything is measured.
    """
    machine = choice.machine()
    merge_into(path, ())
    before = {} if again else {row.cell: row for row in _rows(path) if row.machine == machine}
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    left_out: dict[ProductCell, Outcome] = {}
    took = 0.0
    for position, cell in enumerate(cells):
        progress("tune", position, len(cells))
        passed = time.monotonic() - begun
        done = sum(outcome.status != "kept" for outcome in outcomes)
        if cell in before:
            outcomes.append(Outcome(cell, "kept", before[cell]))
        elif passed + took / max(done, 1) >= budget:
            outcomes.append(Outcome(cell, "not reached"))
        elif smaller := next((o for c, o in left_out.items() if _within(c, cell)), None):
            outcomes.append(replace(smaller, cell=cell))
        else:
            outcomes.append(_where_it_fits(measured or measure_cell, cell, machine))
            took += time.monotonic() - begun - passed
            if outcomes[-1].row is not None:
                merge_into(path, [outcomes[-1].row])
            if outcomes[-1].status == "left out":
                left_out[cell] = outcomes[-1]
        keep(outcomes)
    progress("tune", len(cells), len(cells))
    return outcomes


def _where_it_fits(
    measured: Callable[[ProductCell, Machine, float], Outcome], cell: ProductCell, machine: Machine
) -> Outcome:
    try:
        return measured(cell, machine, CELL_SECONDS)
    except RuntimeError as error:  # of a CPU's memory PyTorch has no class of its own
        if not any(word in str(error) for word in ("memory", "overflow")):
            raise
        sentence = f"{cell} does not fit into this machine's memory: the model chooses. Name smaller sizes."
        return Outcome(cell, "left out", sentence=sentence)


def measure_cell(cell: ProductCell, machine: Machine, seconds: float = CELL_SECONDS) -> Outcome:
    """Checks every way of one cell, then times them in turn for about so many seconds."""
    workload = Workload(cell.direction, cell.tokens, cell.k, cell.n, RANK, cell.dtype)
    setups = make_setups(workload, "cpu")
    floor = candidate(FLOOR, [PROVIDERS[FLOOR].build(setups[0])], setups)
    once = first_call(floor, "cpu")
    if MAX_CALL < once < _HOPELESS * MAX_CALL:  # what a first call costs once, or another process, is not the product's
        once = first_call(floor, "cpu")
    if once > MAX_CALL:
        sentence = f"One call of the frozen layer took {once:.1f} s, and {MAX_CALL:g} s are allowed: the model chooses."
        return Outcome(cell, "left out", sentence=sentence)
    ways: list[Candidate] = [floor]
    for name in (*CHOICES, COMPOSITION):
        provider = PROVIDERS["native" if name in CHOICES else name]
        layer = provider.build(setups[0])
        forcing = partial(choice.forced, name) if name in CHOICES else nullcontext
        with forcing():
            if failure := gate.check(provider, layer, setups[0]).failure:
                return Outcome(cell, "failed", sentence=f"{cell}, {name}: {failure}")
        way = candidate(name, [layer], setups)
        ways.append(replace(way, context=partial(_together, way.context, forcing)))
    timings = measure(ways, FLOOR, seconds, MIN_ROUNDS)
    return Outcome(cell, "tuned", _row(cell, machine, timings), timings)


@contextmanager
def _together(*contexts: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


def decide(cell: ProductCell, machine: Machine, timings: Mapping[str, Timing]) -> str:
    """Who wins beyond the noise; where nobody does, whom the model holds to."""
    own, library = (timings[name] for name in CHOICES)
    if beats(own, library):
        return CHOICES[0]
    return CHOICES[1] if beats(library, own) else choice.model(machine.features, cell)


def _row(cell: ProductCell, machine: Machine, timings: Mapping[str, Timing]) -> Row:
    return Row(
        cell=cell,
        choice=decide(cell, machine, timings),
        ratios={name: float(f"{timing.ratio:.4g}") for name, timing in timings.items() if name != FLOOR},
        floor_us=float(f"{timings[FLOOR].median * _MICRO:.5g}"),
        machine=machine,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _rows(path: Path) -> list[Row]:
    try:
        return read(path)
    except ChoiceTableError:
        return []


def _within(smaller: ProductCell, cell: ProductCell) -> bool:
    """Whether ``cell`` is at least as much work of the same kind."""
    kinds = [(c.direction, c.dtype) for c in (smaller, cell)]
    sizes = zip((smaller.tokens, smaller.k, smaller.n), (cell.tokens, cell.k, cell.n), strict=True)
    return kinds[0] == kinds[1] and all(less <= more for less, more in sizes)
