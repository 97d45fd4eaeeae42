"""A result as tables: ratios to the floor, the winner of each cell marked, what the automatic choice lost told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .results import Cell, Entry, Result
from .verdict import AUTOMATIC, memory_summary, summary, verdict_of
from .workloads import DIRECTIONS

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["SHORT", "Table", "caption", "legend", "markdown", "reasons", "rich_table", "software", "table"]

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LEGEND = {
    "peft16": "PEFT16: adapters of the base's 16-bit dtype; the others have fp32 adapters.",
    "addmm": "addmm_: the base product, then the low-rank term by addmm_ in place.",
    "lora_first": "LoRA first: the low-rank term, then the base product onto it.",
    "lorafusion": "LoRAFusion: its split into kernels, rebuilt from its description.",
}


@dataclass(frozen=True)
class Table:
    """Text, row by row. ``winners``, ``losses``: (row, column) of a cell's best, and of ours where a rival is ahead."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    winners: frozenset[tuple[int, int]]
    losses: frozenset[tuple[int, int]]
    notes: list[str]


def table(
    result: Result,
    direction: str,
    conditions: dict[str, tuple[str, ...]] | None = None,
    foreseen: bool = True,
) -> Table:
    """All cells of one direction that meet the conditions (see ``Preset.only``), one row each.

    The last column of a table of times is the automatic choice's lead over the best rival, with the rounds' spread.
    ``foreseen``: whether the machine model's ratio has a column too.
    """
    conditions = {"direction": (direction,), **(conditions or {})}
    chosen = [c for c in result.cells if all(c.workload.has(name, values) for name, values in conditions.items())]
    cells = [c for c in chosen if not c.left_out]
    dtypes = {c.workload.dtype for c in cells}
    columns = [n for n in result.titles if n != result.floor and any(_value(c, n) is not None for c in cells)]
    varying = [f for f in ("dtype", "p") if len({getattr(c.workload, f) for c in cells}) > 1]
    predicted = foreseen and any(_predicted(c) for c in cells)
    judged = direction != "memory" and any(verdict_of(result, c) for c in cells)
    header = ["K→N", "M", "r", *varying, f"{result.titles[result.floor]} {_unit(direction)}"]
    first = len(header)
    header += [result.titles[n] for n in columns] + ["predicted"] * predicted + ["we"] * judged
    rows = []
    winners, losses = set(), set()
    for i, cell in enumerate(cells):
        w = cell.workload
        row = [w.shape, str(w.tokens), str(w.r), *(SHORT.get(v, v) for v in (str(getattr(w, f)) for f in varying))]
        row += [_floor_text(cell.providers[result.floor], direction)]
        row += [_text(cell.providers.get(n), direction) for n in columns]
        verdict = verdict_of(result, cell) if judged else None
        rows.append(row + [_predicted(cell) or "–"] * predicted + [str(verdict or "–")] * judged)
        values = {n: v for n in columns if (v := _value(cell, n)) is not None}
        best = min(values.values(), default=0.0)
        winners |= {(i, first + columns.index(n)) for n, v in values.items() if v == best}
        if verdict is not None and verdict.sign < 0:
            losses.add((i, first + columns.index(AUTOMATIC)))
    told = memory_summary if direction == "memory" else summary
    notes = told(result, cells) if any(n in result.ours for n in columns) else []
    if left_out := [c.left_out for c in chosen if c.left_out]:
        slow = all(sentence.startswith("One call") for sentence in left_out)
        why = "one call of the frozen layer takes too long" if slow else "the device broke down"
        notes.append(f"Left out, because {why} there: {len(left_out)} cells.")
    return Table(
        caption(result, direction, dtypes.pop() if len(dtypes) == 1 else None),
        header,
        rows,
        frozenset(winners),
        frozenset(losses),
        notes,
    )


def rich_table(content: Table) -> RichTable:
    """For the terminal: winners green with a star, our losses red."""
    from rich.table import Table as RichTable

    out = RichTable(
        title=content.caption, title_justify="left", caption=" ".join(content.notes), caption_justify="left"
    )
    for i, column in enumerate(content.header):
        out.add_column(column, justify="left" if i == 0 else "right")
    for i, row in enumerate(content.rows):
        out.add_row(*(_colored(v, (i, j) in content.winners, (i, j) in content.losses) for j, v in enumerate(row)))
    return out


def markdown(content: Table) -> str:
    """For README: winners in bold."""
    lines = [content.caption, "", "| " + " | ".join(content.header) + " |"]
    lines.append("| --- |" + " ---: |" * (len(content.header) - 1))
    for i, row in enumerate(content.rows):
        marked = (f"**{v}**" if (i, j) in content.winners else v for j, v in enumerate(row))
        lines.append("| " + " | ".join(marked) + " |")
    return "\n".join([*lines, *(["", " ".join(content.notes)] if content.notes else [])])


def legend(result: Result) -> list[str]:
    """What the columns' short names mean."""
    return [_LEGEND[n] for n in result.titles if n in _LEGEND]


def reasons(result: Result) -> list[str]:
    """One sentence for each provider and reason that kept it out of some cells, failures first."""
    found: dict[tuple[bool, str, str], int] = {}
    for cell in result.cells:
        for name, entry in cell.providers.items():
            if entry.reason:
                key = (entry.status != "failed", name, entry.reason)
                found[key] = found.get(key, 0) + 1
    left_out = [f"{cell.workload}: {cell.left_out}" for cell in result.cells if cell.left_out]
    return left_out + [
        f"{result.titles[name]}, {count} of {len(result.cells)} cells: {'' if fine else 'FAILED, not timed. '}{reason}"
        for (fine, name, reason), count in sorted(found.items())
    ]


def _value(cell: Cell, name: str) -> float | None:
    """What cells are compared by: the ratio to the floor, or the bytes kept."""
    entry = cell.providers.get(name)
    if entry is None or not entry.numbers:
        return None
    return float(entry.numbers["rest" if cell.workload.direction == "memory" else "ratio"])


def _predicted(cell: Cell) -> str | None:
    """The ratio that the machine model gives the automatic choice."""
    entry = cell.providers.get("auto")
    ratio = None if entry is None else entry.predicted.get("ratio")
    return None if ratio is None else f"{ratio:.2f}"


def _text(entry: Entry | None, direction: str) -> str:
    if entry is None or not entry.numbers:
        return "FAILED" if entry is not None and entry.status == "failed" else "–"
    numbers = entry.numbers
    if direction == "memory":
        return f"{numbers['rest'] / 1024:.1f} / {numbers['peak'] / 1024**2:.1f}"
    if direction.startswith("overhead"):
        return f"{numbers['over_floor_us']:+.1f}"
    return f"{numbers['ratio']:.2f}"


def _floor_text(entry: Entry, direction: str) -> str:
    if direction == "memory":
        return _text(entry, direction)
    us = entry.numbers["us"]
    return f"{us:.1f}" if direction.startswith("overhead") else f"{us / 1e3:.3g}"


def _unit(direction: str) -> str:
    return "" if direction == "memory" else "µs" if direction.startswith("overhead") else "ms"


def _colored(value: str, winner: bool, loss: bool) -> str:
    return f"[bold green]{value} *[/]" if winner else f"[red]{value}[/]" if loss else value


def caption(result: Result, direction: str, dtype: str | None) -> str:
    what = f"ratio to the frozen {result.titles[result.floor]} of the same round, median"
    if direction == "memory":
        what = "KiB kept for backward beyond x and the parameters / peak MiB of a step"
    elif direction.startswith("overhead"):
        what = f"µs over the frozen {result.titles[result.floor]}, median"
    env = result.environment
    where = env["device"] + (f", {env['threads']} threads" if env["device_type"] == "cpu" else "")
    name = direction if dtype is None else f"{direction}, {SHORT[dtype]}"
    described = "" if direction == "memory" else f" ({DIRECTIONS[direction]})"
    return f"{name}{described}: {what}. {where}; {software(env, result.date)}."


def software(environment: Mapping[str, Any], date: str) -> str:
    """The versions that a result was measured with, the commit of this package, and the day."""
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v and k != "lora-kernels")
    commit = f"; lora_kernels at commit {environment['git']}" if environment.get("git") else ""
    return f"{versions}{commit}; {date[:10]}"
