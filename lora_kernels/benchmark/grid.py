"""A result as one compact table: a row for each shape and M, the dtypes side by side, all ranks summed up below."""

from __future__ import annotations

from .report import SHORT, Table, caption
from .results import Cell, Result
from .summary import over_floor, over_provider
from .verdict import AUTOMATIC, summary

__all__ = ["grid"]

_PEFT = "peft"


def grid(result: Result, direction: str, conditions: dict[str, tuple[str, ...]] | None = None) -> Table:
    """Ratios to the floor of the cells that meet the conditions, which must leave one cell for a shape, M and dtype.

    The notes sum up every cell of the direction, whatever its rank and dropout: geometric mean of PEFT's time over
    ours, our worst ratio to the floor, and in how many cells a rival is ahead.
    """
    wanted = {"direction": (direction,), **(conditions or {})}
    cells = [c for c in result.cells if all(c.workload.has(name, values) for name, values in wanted.items())]
    dtypes = list(dict.fromkeys(c.workload.dtype for c in cells))
    names = [n for n in result.titles if n != result.floor]
    header = ["K→N", "M"]
    for dtype in dtypes:
        header += [f"{SHORT[dtype]} {result.titles[result.floor]}, ms", *(result.titles[n] for n in names)]
    found = {(c.workload.shape, c.workload.tokens, c.workload.dtype): c for c in cells}
    rows: list[list[str]] = []
    winners: set[tuple[int, int]] = set()
    for shape, tokens in dict.fromkeys((c.workload.shape, c.workload.tokens) for c in cells):
        row = [shape, str(tokens)]
        for dtype in dtypes:
            texts, best = _texts(result, found.get((shape, tokens, dtype)), names)
            winners |= {(len(rows), len(row) + i) for i in best}
            row += texts
        rows.append(row)
    notes = [sentence for dtype in dtypes for sentence in _summary(result, direction, dtype)]
    left_out = [c.workload for c in result.cells if c.left_out and c.workload.direction == direction]
    if left_out:
        notes.append(f"–: left out, {len(left_out)} cells where one call of the frozen layer takes seconds.")
    return Table(caption(result, direction, None), header, rows, frozenset(winners), frozenset(), notes)


def _texts(result: Result, cell: Cell | None, names: list[str]) -> tuple[list[str], list[int]]:
    """The floor's milliseconds and each provider's ratio, and where among them the best ratio stands."""
    if cell is None or cell.left_out:
        return ["–"] * (1 + len(names)), []
    ratios = [entry.ratio if (entry := cell.providers.get(n)) else None for n in names]
    best = min((r for r in ratios if r is not None), default=None)
    texts = [f"{cell.providers[result.floor].numbers['us'] / 1e3:.3g}"]
    texts += ["–" if r is None else f"{r:.2f}" for r in ratios]
    return texts, [i for i, r in enumerate(ratios, start=1) if r is not None and r == best]


def _summary(result: Result, direction: str, dtype: str) -> list[str]:
    faster = over_provider(result, _PEFT, AUTOMATIC).where(lambda w: w.direction == direction and w.dtype == dtype)
    ours = over_floor(result, AUTOMATIC).where(lambda w: w.direction == direction and w.dtype == dtype)
    if not len(faster):
        return [f"{SHORT[dtype]}: PEFT was not timed."]
    lowest, highest = faster.lowest, ours.highest
    run = [c for c in result.cells if not c.left_out and c.workload.direction == direction]
    told = (
        f"{SHORT[dtype]}, all {len(faster)} cells: PEFT takes {faster.geometric_mean:.2f} times as long (geometric "
        f"mean; least {faster.of_cells[lowest]:.2f}, at {lowest}); our worst ratio is {ours.of_cells[highest]:.2f}, at "
        f"{highest}."
    )
    return [told, *summary(result, [c for c in run if c.workload.dtype == dtype])]
