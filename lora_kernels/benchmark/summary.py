"""Sums over the cells of a result: geometric means, and the cell where a ratio is the worst."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from .results import Cell, Result
from .workloads import Workload

__all__ = ["Ratios", "over_floor", "over_provider"]


class Ratios:
    """A ratio of each cell in which both of its sides were timed.

    Example:
        >>> from lora_kernels.benchmark.summary import Ratios
        >>> from lora_kernels.benchmark.workloads import Workload
        >>> cells = {Workload("forward", m, 8, 8, 2): float(m) for m in (1, 4)}
        >>> Ratios(cells).geometric_mean, str(Ratios(cells).lowest)
        (2.0, 'forward M=1 8→8 r=2 float32')
    """

    def __init__(self, of_cells: dict[Workload, float]) -> None:
        self.of_cells = of_cells

    def __len__(self) -> int:
        return len(self.of_cells)

    def where(self, condition: Callable[[Workload], bool]) -> Ratios:
        return Ratios({w: ratio for w, ratio in self.of_cells.items() if condition(w)})

    @property
    def geometric_mean(self) -> float:
        return statistics.geometric_mean(self.of_cells.values())

    @property
    def lowest(self) -> Workload:
        return min(self.of_cells, key=self.of_cells.__getitem__)

    @property
    def highest(self) -> Workload:
        return max(self.of_cells, key=self.of_cells.__getitem__)


def over_floor(result: Result, provider: str) -> Ratios:
    """The provider's time over the floor's."""
    return _ratios(result.cells, lambda cell: _ratio(cell, provider))


def over_provider(result: Result, rival: str, provider: str) -> Ratios:
    """The rival's time over the provider's: above 1 the provider is quicker. Both as ratios to the floor's."""

    def quotient(cell: Cell) -> float | None:
        theirs, own = _ratio(cell, rival), _ratio(cell, provider)
        return None if theirs is None or own is None else theirs / own

    return _ratios(result.cells, quotient)


def _ratios(cells: Iterable[Cell], ratio_of: Callable[[Cell], float | None]) -> Ratios:
    return Ratios({cell.workload: ratio for cell in cells if (ratio := ratio_of(cell)) is not None})


def _ratio(cell: Cell, provider: str) -> float | None:
    entry = cell.providers.get(provider)
    return None if entry is None else entry.ratio
