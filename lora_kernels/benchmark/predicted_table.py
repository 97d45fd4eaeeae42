"""Predicted beside measured: what the model of the machine says of each cell, and how far ahead or behind we are."""

from __future__ import annotations

from .report import SHORT, Table, software
from .results import Cell, Result
from .verdict import AUTOMATIC, summary, verdict_of
from .workloads import DIRECTIONS

__all__ = ["beside"]


def beside(result: Result, direction: str, conditions: dict[str, tuple[str, ...]] | None = None) -> Table:
    """Ratios to the floor, "measured (predicted)"; of a result that is only predicted, the predicted ones alone.

    The last column compares the automatic choice with the best rival: "+8 %" is a win by 8 %, "−3 %" a loss, "=" within
    the slack of ``verdict``; behind it stands the spread of the rounds.
    """
    wanted = {"direction": (direction,), **(conditions or {})}
    chosen = [c for c in result.cells if not c.left_out]
    cells = [c for c in chosen if all(c.workload.has(name, values) for name, values in wanted.items())]
    columns = [n for n in result.titles if n != result.floor and any(_value(result, c, n) for c in cells)]
    varying = [f for f in ("dtype", "p") if len({getattr(c.workload, f) for c in cells}) > 1]
    header = ["K→N", "M", "r", *varying, f"{result.titles[result.floor]} ms", *(result.titles[n] for n in columns)]
    first = len(header) - len(columns)
    rows, winners, losses = [], set(), set()
    for i, cell in enumerate(cells):
        w = cell.workload
        values = {n: v for n in columns if (v := _value(result, cell, n)) is not None}
        verdict = verdict_of(result, cell)
        row = [w.shape, str(w.tokens), str(w.r), *(SHORT.get(v, v) for v in (str(getattr(w, f)) for f in varying))]
        rows.append([*row, _floor(result, cell), *(_text(result, cell, n) for n in columns), str(verdict or "–")])
        winners |= {(i, first + columns.index(n)) for n, v in values.items() if v == min(values.values())}
        if verdict is not None and verdict.sign < 0:
            losses.add((i, first + columns.index(AUTOMATIC)))
    return Table(
        _caption(result, direction, cells),
        [*header, "we"],
        rows,
        frozenset(winners),
        frozenset(losses),
        summary(result, cells),
    )


def _value(result: Result, cell: Cell, name: str) -> float | None:
    """What is compared: the measured ratio, or where nothing was run the predicted one."""
    entry = cell.providers.get(name)
    if entry is None:
        return None
    return entry.predicted.get("ratio") if result.predicted else entry.ratio


def _text(result: Result, cell: Cell, name: str) -> str:
    entry = cell.providers.get(name)
    predicted = None if entry is None else entry.predicted.get("ratio")
    foreseen = "–" if predicted is None else f"{predicted:.2f}"
    if result.predicted:
        return foreseen
    measured = None if entry is None else entry.ratio
    if measured is None:
        return "FAILED" if entry is not None and entry.status == "failed" else "–"
    return f"{measured:.2f} ({foreseen})"


def _floor(result: Result, cell: Cell) -> str:
    entry = cell.providers.get(result.floor)
    predicted = None if entry is None else entry.predicted.get("us")
    foreseen = "–" if predicted is None else f"{predicted / 1e3:.3g}"
    if result.predicted:
        return foreseen
    return "–" if entry is None or not entry.numbers else f"{entry.numbers['us'] / 1e3:.3g} ({foreseen})"


def _caption(result: Result, direction: str, cells: list[Cell]) -> str:
    dtypes = {c.workload.dtype for c in cells}
    name = f"{direction}, {SHORT[dtypes.pop()]}" if len(dtypes) == 1 else direction
    what = f"{name} ({DIRECTIONS[direction]}): ratio to the frozen {result.titles[result.floor]}"
    env = result.environment
    if result.predicted:
        return f"**Predicted, not measured.** {what}, by the model of {env['device']}; {result.date[:10]}."
    return f"{what}, measured (predicted). {env['device']}; {software(env, result.date)}."
