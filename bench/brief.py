"""What README.md shows of the measurements: its first number, and a short table with the losses counted below it.

Nothing here is predicted. The rows are chosen by the marker in README.md; the sentences count every cell.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lora_kernels.benchmark.report import SHORT, legend, software
from lora_kernels.benchmark.results import Cell, Result
from lora_kernels.benchmark.verdict import AUTOMATIC, SLACK, Verdict, verdict_of
from lora_kernels.errors import InvalidArgumentError

__all__ = ["brief", "headline"]

WIDTH = 120  # README's lines, tables aside
PASSES = {"forward": "forward", "step": "forward + backward"}
OVERHEAD = "overhead"
Conditions = dict[str, tuple[str, ...]]


def headline(document: dict[str, Any]) -> str:
    """A whole model beside PEFT's at the largest batch of both; ``document`` is what ``--preset gpu-llama`` wrote."""
    common, sizes = document["reached"]["common"], document["sizes"]
    speed = next(
        cell["numbers"]["tokens_per_second"]
        for cell in document["cells"]
        if (cell["provider"], cell["batch"], cell["again"]) == ("fused", common["batch"], False)
    )
    return _wrapped(
        f"On one {document['environment']['device']}, Llama-3-8B with adapters of rank 16 on all seven projections and "
        f"dropout {document['dropout']:g} trained at {speed:.0f} tokens a second, {common['batch']} x "
        f"{sizes['tokens']} a step. That is {common['over peft']:.2f} times the speed of PEFT with 16-bit adapters, "
        f"and {common['over frozen']:.2f} times the frozen model's, "
        f"in {common['peak over peft']:.2f} times PEFT's memory."
    )


def brief(result: Result, selections: Sequence[tuple[str, Conditions]]) -> str:
    """The cells of each ``(direction, conditions)`` as one table, and the verdict on all cells of ``result``.

    Raises:
        InvalidArgumentError: a direction that has no row here, or a selection without a cell.
    """
    cells = [cell for direction, where in selections for cell in _chosen(result, direction, where)]
    rivals = [name for name in result.titles if name != result.floor and name not in result.ours]
    columns = [name for name in (*rivals, AUTOMATIC) if any(_ratio(cell, name) is not None for cell in cells)]
    header = ["pass", "K→N", "tokens", "dropout", f"{result.titles[result.floor]} ms"]
    header += [*(result.titles[name] for name in columns), "lead"]
    lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    lines += ["| " + " | ".join(_row(result, cell, columns)) + " |" for cell in cells]
    told = [*_summary(result), *(note for note in legend(result) if note.partition(":")[0] in header)]
    return "\n".join([*_caption(result, cells), "", *lines, "", _wrapped(" ".join(told))])


def _chosen(result: Result, direction: str, where: Conditions) -> list[Cell]:
    if direction not in PASSES:
        raise InvalidArgumentError(f"{direction!r} has no row in a brief table, which shows {', '.join(PASSES)}.")
    conditions = {"direction": (direction,), **where}
    found = [c for c in result.cells if all(c.workload.has(name, values) for name, values in conditions.items())]
    if not found:
        raise InvalidArgumentError(f"the newest result has no cell of {direction} with {where}: mend the marker.")
    return [cell for cell in found if not cell.left_out]


def _row(result: Result, cell: Cell, columns: Sequence[str]) -> list[str]:
    w = cell.workload
    ratios = {name: ratio for name in columns if (ratio := _ratio(cell, name)) is not None}
    told = {name: f"{ratio:.2f}" for name, ratio in ratios.items()}
    told |= {name: f"**{told[name]}**" for name, ratio in ratios.items() if ratio == min(ratios.values())}
    floor = f"{cell.providers[result.floor].numbers['us'] / 1e3:.3g}"
    start = [PASSES[w.direction], w.shape, str(w.tokens), f"{w.p:g}", floor]
    return [*start, *(told.get(name, "–") for name in columns), str(verdict_of(result, cell) or "–")]


def _caption(result: Result, cells: Sequence[Cell]) -> list[str]:
    """What the numbers are, and in a line of its own where they come from."""
    dtypes = ", ".join(dict.fromkeys(SHORT[cell.workload.dtype] for cell in cells))
    ranks = ", ".join(dict.fromkeys(str(cell.workload.r) for cell in cells))
    floor = result.titles[result.floor]
    what = f"Time over the frozen {floor}'s, {dtypes}, rank {ranks}; lower is better."
    return [
        f"{what} Lead: over the best rival, ± the spread.",
        f"{result.environment['device']}; {software(result.environment, result.date)}.",
    ]


def _summary(result: Result) -> list[str]:
    """Who is ahead in all cells that have a row in some table of times, then the host's time outside of graphs."""
    found = [v for cell in result.cells if cell.workload.direction in PASSES and (v := _verdict(result, cell))]
    lost = Counter(result.titles[verdict.rival] for verdict in found if verdict.sign < 0)
    who = f" ({', '.join(f'{title} {count}' for title, count in lost.most_common())})" if lost else ""
    signs = [verdict.sign for verdict in found]
    behind = f"in {signs.count(-1)} of all {len(found)} cells that were measured{who}"
    ahead = f"lora_kernels is ahead in {signs.count(1)}, and {signs.count(0)} are level."
    told = [f"A rival is ahead of lora_kernels by more than {100 * SLACK:.0f} % {behind}; {ahead}"]
    for cell in result.cells:
        if cell.workload.direction == OVERHEAD and (verdict := _verdict(result, cell)):
            ours, theirs = (cell.providers[name].numbers["over_floor_us"] for name in (AUTOMATIC, verdict.rival))
            told.append(
                f"Outside a CUDA graph, one call cost the host {ours:.0f} µs more than the frozen layer does; "
                f"{result.titles[verdict.rival]} cost it {theirs:.0f} µs more."
            )
    return told


def _verdict(result: Result, cell: Cell) -> Verdict | None:
    return None if cell.left_out else verdict_of(result, cell)


def _ratio(cell: Cell, name: str) -> float | None:
    entry = cell.providers.get(name)
    return None if entry is None else entry.ratio


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
