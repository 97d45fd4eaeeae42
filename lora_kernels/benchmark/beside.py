"""Predicted beside measured: what the model of the machine says of each cell, and how far ahead or behind we are."""

from __future__ import annotations

from .report import SHORT, SLOWER, Table
from .results import Cell, Result
from .workloads import DIRECTIONS

__all__ = ["beside"]


def beside(result: Result, direction: str, conditions: dict[str, tuple[str, ...]] | None = None) -> Table:
    """Ratios to the floor, "measured (predicted)"; of a result that is only predicted, the predicted ones alone.

    The last column compares us with the best rival: "+8 %" is a win by 8 %, "−3 %" a loss, "=" within what timers can
    be trusted for.
    """
    wanted = {"direction": (direction,), **(conditions or {})}
    chosen = [c for c in result.cells if not c.left_out]
    cells = [c for c in chosen if all(c.workload.has(name, values) for name, values in wanted.items())]
    columns = [n for n in result.titles if n != result.floor and any(_value(result, c, n) for c in cells)]
    varying = [f for f in ("dtype", "p") if len({getattr(c.workload, f) for c in cells}) > 1]
    header = ["K→N", "M", "r", *varying, f"{result.titles[result.floor]} ms", *(result.titles[n] for n in columns)]
    first = len(header) - len(columns)
    rows, winners, losses, verdicts = [], set(), set(), []
    for i, cell in enumerate(cells):
        w = cell.workload
        values = {n: v for n in columns if (v := _value(result, cell, n)) is not None}
        ahead = _ahead(result, values)
        verdicts.append(ahead)
        row = [w.shape, str(w.tokens), str(w.r), *(SHORT.get(v, v) for v in (str(getattr(w, f)) for f in varying))]
        rows.append([*row, _floor(result, cell), *(_text(result, cell, n) for n in columns), _verdict(ahead)])
        winners |= {(i, first + columns.index(n)) for n, v in values.items() if v == min(values.values())}
        if ahead is not None and ahead < 1 / SLOWER:
            losses |= {(i, first + columns.index(n)) for n in values if n in result.ours}
    return Table(
        _caption(result, direction, cells),
        [*header, "we"],
        rows,
        frozenset(winners),
        frozenset(losses),
        _notes(verdicts),
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


def _ahead(result: Result, values: dict[str, float]) -> float | None:
    """The best rival's time over our best."""
    ours = [v for n, v in values.items() if n in result.ours]
    rivals = [v for n, v in values.items() if n not in result.ours]
    return min(rivals) / min(ours) if ours and rivals else None


def _verdict(ahead: float | None) -> str:
    if ahead is None:
        return "–"
    if ahead >= SLOWER:
        return f"+{100 * (ahead - 1):.0f} %"
    return f"−{100 * (1 / ahead - 1):.0f} %" if ahead < 1 / SLOWER else "="


def _notes(verdicts: list[float | None]) -> list[str]:
    known = [v for v in verdicts if v is not None]
    wins, losses = sum(v >= SLOWER for v in known), sum(v < 1 / SLOWER for v in known)
    return [f"Against the best rival: {wins} wins, {losses} losses, {len(known) - wins - losses} within 2 %."]


def _caption(result: Result, direction: str, cells: list[Cell]) -> str:
    dtypes = {c.workload.dtype for c in cells}
    name = f"{direction}, {SHORT[dtypes.pop()]}" if len(dtypes) == 1 else direction
    what = f"{name} ({DIRECTIONS[direction]}): ratio to the frozen {result.titles[result.floor]}"
    env = result.environment
    if result.predicted:
        return f"**Predicted, not yet measured.** {what}, by the model of {env['device']}; {result.date[:10]}."
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v and k != "lora-kernels")
    return f"{what}, measured (predicted). {env['device']}; {versions}; {result.date[:10]}."
