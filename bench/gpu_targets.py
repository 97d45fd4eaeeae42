"""Judges results of the GPU's grids by the project's targets: ``python bench/gpu_targets.py [--pass step] FILE ...``.

FILES are what ``lora-kernels bench`` wrote for ``gpu-forward``, ``gpu-compile`` and ``gpu-quick``, with ``--pass step``
for ``gpu-step`` and ``gpu-step-compile``, with ``--pass goals`` for ``gpu-goals``, ``gpu-goals-group`` and
``gpu-block``, on one device, in any number; of a provider that several of them timed in a cell the latest counts. Ours
is the automatic choice (of q, k and v the group), a rival whatever is not this package. A cell in which ours failed is
a miss. A prediction is judged like a measurement, and is told as one. One line a target, with the spread of the worst
cell's rounds; exits with 1 where one is missed, and where no cell says anything about one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_kernels.benchmark.block import BLOCK
from lora_kernels.benchmark.prediction import PREDICTED
from lora_kernels.benchmark.providers import FLOOR, PROVIDERS
from lora_kernels.benchmark.results import Cell, Result, load
from lora_kernels.benchmark.verdict import AUTOMATIC, SLACK
from lora_kernels.benchmark.workloads import LAYER, Workload
from lora_kernels.errors import InvalidArgumentError

GROUP, GROUPED = "group", "three-layers"
SLOWER = 1.0 + SLACK  # than the best rival, anywhere
HOST = 0.5  # of PEFT's host time over the floor, at one token

_SQUARE = (4096, 4096)
# Over the frozen layer's time, at M = 8192 and r = 16: without dropout, and with p = 0.1.
BOUNDS = {
    _SQUARE: (1.04, 1.05),
    (8192, 8192): (0.99, 1.03),
    (4096, 14336): (1.02, 1.04),
    (14336, 4096): (1.01, 1.04),
    (4096, 1024): (1.15, 1.15),
}
FEW_TOKENS = 1.10

# Forward and backward together, over the frozen layer's forward and dx.
STEP_BOUNDS = {
    _SQUARE: (1.07, 1.11),
    (8192, 8192): (1.005, 1.015),
    (4096, 14336): (1.04, 1.05),
    (14336, 4096): (1.04, 1.06),
    (4096, 1024): (1.30, 1.40),
}
FEWER_BOUNDS = {2048: (1.14, 1.22), 512: (1.35, 1.45)}  # a step of the square layer, by tokens
GROUP_BOUNDS = {("forward", 0.0): 1.05, ("step", 0.0): 1.09, ("step", 0.1): 1.13}  # q, k, v: 4096 + 1024 + 1024
# A decoder block of 4096 tokens over the frozen block, by dropout; and its tokens a second over PEFT's.
BLOCK_TOKENS, BLOCK_BOUNDS, BLOCK_SPEED_UP = 4096, {0.0: 1.08, 0.05: 1.12}, 1.5
# The least speed-up of a step of the square layer over a rival: without dropout, and with.
STEP_SPEED_UPS = {"peft": (1.25, 1.35), "addmm": (1.05, 1.05), "compile": (1.10, 1.10), "lorafusion": (1.0, 1.0)}


@dataclass(frozen=True)
class Target:
    """What ``ratio`` gives may be at most ``bound`` in every cell for which it gives anything."""

    name: str
    bound: float
    ratio: Callable[[Cell], float | None]

    def line(self, cells: Sequence[Cell]) -> tuple[bool, str]:
        """Whether it is reached, and a line that says how."""
        found = {cell.workload: ratio for cell in cells if (ratio := self.ratio(cell)) is not None}
        if not found:
            return False, f"  ?   {self.name}: no such cell was timed"
        worst = max(found, key=found.__getitem__)
        missed = sum(ratio > self.bound for ratio in found.values())
        noise = _noise(next(cell for cell in cells if cell.workload == worst))
        told = f"{found[worst]:.3f}{noise} (<= {self.bound:g}; {missed} of {len(found)} cells miss it; worst: {worst})"
        return missed == 0, f"{'MISS' if missed else 'ok  '}  {self.name}: {told}"


def targets() -> list[Target]:
    """Of forward."""
    few = Target("4096→4096, M = 1 to 16, r = 16, in a graph", FEW_TOKENS, _to_floor(*_SQUARE, (1, 2, 4, 8, 16)))
    host = Target("host time of the layer at M = 1, over PEFT's", HOST, _to_peft_s_host)
    return [*_shaped("forward", BOUNDS), few, _best("forward"), host]


def step_targets() -> list[Target]:
    """Of forward and backward together."""
    speed_ups = [
        Target(f"4096→4096, M = 8192, r = 16, p = {p:g}: time over {rival}'s", 1.0 / least, _to_rival(rival, p))
        for rival, leasts in STEP_SPEED_UPS.items()
        for p, least in zip((0.0, 0.1), leasts, strict=True)
    ]
    return [*_shaped("step", STEP_BOUNDS), *speed_ups, _best("step")]


def goals() -> list[Target]:
    """What ``make gpu-bench`` measures first, but for the block."""
    forward = [t for t, (_, p) in zip(_shaped("forward", BOUNDS), _places(BOUNDS), strict=True) if p == 0.0]
    fewer = [
        Target(f"step, 4096→4096, M = {m}, r = 16, p = {p:g}", bound, _to_floor(*_SQUARE, (m,), "step", p))
        for m, bounds in FEWER_BOUNDS.items()
        for p, bound in zip((0.0, 0.1), bounds, strict=True)
    ]
    groups = [
        Target(f"{direction}, q, k, v of 4096, M = 8192, r = 16, p = {p:g}", bound, _group_to_floor(direction, p))
        for (direction, p), bound in GROUP_BOUNDS.items()
    ]
    return [*forward, *_shaped("step", STEP_BOUNDS), *fewer, *groups, _best("forward"), _best("step")]


def block_lines(document: dict[str, Any]) -> list[tuple[bool, str]]:
    """Of the decoder block: like ``Target.line``."""
    there = {cell["p"]: cell for cell in document["cells"] if cell["tokens"] == BLOCK_TOKENS}
    lines = []
    for p, bound in BLOCK_BOUNDS.items():
        name = f"decoder block, {BLOCK_TOKENS} tokens, p = {p:g}"
        cell = there.get(p)
        if cell is None or cell["failed"]:
            lines.append((False, f"  ?   {name}: {cell['failed'] if cell else 'no such cell was timed'}"))
            continue
        ours, theirs = (cell["providers"][provider] for provider in (AUTOMATIC, "peft"))
        half = (ours["ratio_p80"] - ours["ratio_p20"]) / 2
        fine = ours["ratio"] <= bound
        lines.append((fine, f"{_word(fine)}  {name}: {ours['ratio']:.3f} ±{half:.3f} (<= {bound:g})"))
        speed_up = ours["tokens_per_second"] / theirs["tokens_per_second"]
        fine = speed_up >= BLOCK_SPEED_UP
        lines.append((fine, f"{_word(fine)}  {name}: tokens/s over PEFT's {speed_up:.3f} (>= {BLOCK_SPEED_UP:g})"))
    return lines


def _word(fine: bool) -> str:
    return "ok  " if fine else "MISS"


def _places(bounds: dict[tuple[int, int], tuple[float, float]]) -> list[tuple[tuple[int, int], float]]:
    return [(shape, p) for shape in bounds for p in (0.0, 0.1)]


def _shaped(direction: str, bounds: dict[tuple[int, int], tuple[float, float]]) -> list[Target]:
    """Many tokens of every shape, without and with dropout."""

    def one(shape: tuple[int, int], p: float) -> Target:
        name = f"{direction}, {shape[0]}→{shape[1]}, M = 8192, r = 16, p = {p:g}"
        return Target(name, bounds[shape][p > 0.0], _to_floor(*shape, (8192,), direction, p))

    return [one(shape, p) for shape, p in _places(bounds)]


def _best(direction: str) -> Target:
    return Target(f"every {direction}: over the best rival", SLOWER, _to_best_rival(direction))


def _is_at(cell: Cell, direction: str, k: int, n: int, tokens: tuple[int, ...], subject: str = LAYER) -> bool:
    w = cell.workload
    place = (w.direction, w.subject, w.in_features, w.out_features, w.r)
    return place == (direction, subject, k, n, 16) and w.tokens in tokens and not cell.left_out


def _to_rival(name: str, p: float) -> Callable[[Cell], float | None]:
    def ratio(cell: Cell) -> float | None:
        theirs = _time(cell, name)
        asked = _is_at(cell, "step", *_SQUARE, (8192,)) and cell.workload.p == p
        return _ours(cell) / theirs if asked and theirs else None

    return ratio


def _to_floor(
    k: int, n: int, tokens: tuple[int, ...], direction: str = "forward", p: float | None = None
) -> Callable[[Cell], float | None]:
    def ratio(cell: Cell) -> float | None:
        w = cell.workload
        asked = _is_at(cell, direction, k, n, tokens) and p in (None, w.p) and (w.tokens > 16 or w.p == 0)
        return _ours(cell) if asked else None

    return ratio


def _group_to_floor(direction: str, p: float) -> Callable[[Cell], float | None]:
    def ratio(cell: Cell) -> float | None:
        asked = _is_at(cell, direction, *_SQUARE, (8192,), GROUPED) and cell.workload.p == p
        return _ours(cell, GROUP) if asked else None

    return ratio


def _to_best_rival(direction: str) -> Callable[[Cell], float | None]:
    def ratio(cell: Cell) -> float | None:
        rivals = [name for name in cell.providers if name != FLOOR and not PROVIDERS[name].ours]
        times = [time for name in rivals if (time := _time(cell, name)) is not None]
        asked = cell.workload.direction == direction and cell.workload.subject == LAYER
        return _ours(cell) / min(times) if asked and times else None

    return ratio


def _to_peft_s_host(cell: Cell) -> float | None:
    w = cell.workload
    if not w.direction.startswith("overhead") or w.tokens != 1:
        return None
    ours, theirs = (
        cell.providers[n].numbers.get("over_floor_us") if n in cell.providers else None for n in (AUTOMATIC, "peft")
    )
    if not theirs:
        return None
    return math.inf if ours is None else float(ours / theirs)


def _ours(cell: Cell, name: str = AUTOMATIC) -> float:
    """Infinite where ours did not run: a failure reaches no target."""
    time = _time(cell, name)
    return math.inf if time is None else time


def _time(cell: Cell, name: str) -> float | None:
    """The ratio to the floor: measured, or of a prediction predicted."""
    entry = cell.providers.get(name)
    if entry is None:
        return None
    return entry.predicted.get("ratio") if entry.status == PREDICTED else entry.ratio


def _noise(cell: Cell) -> str:
    """Half the range of the rounds, 20th to 80th percentile, of ours."""
    entry = cell.providers.get(GROUP if cell.workload.subject == GROUPED else AUTOMATIC)
    if entry is None or "ratio_p80" not in entry.numbers:
        return ""
    return f" ±{(entry.numbers['ratio_p80'] - entry.numbers['ratio_p20']) / 2:.3f}"


def united(results: Sequence[Result]) -> list[Cell]:
    """One cell for each workload, with all providers that any of the results holds."""
    cells: dict[Workload, Cell] = {}
    for result in sorted(results, key=lambda result: result.date):
        for cell in result.cells:
            there = cells.get(cell.workload, cell)
            cells[cell.workload] = replace(cell, providers={**there.providers, **cell.providers})
    return list(cells.values())


def _loaded(files: Sequence[Path]) -> tuple[list[Result], list[dict[str, Any]]]:
    """Results, and the documents of the decoder block."""
    results, blocks = [], []
    for file in files:
        document = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("preset") == BLOCK:
            blocks.append(document)
        else:
            results.append(load(file))
    return results, blocks


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each target; returns the exit status."""
    parser = argparse.ArgumentParser(description="judges results of the GPU's grids by the project's targets")
    parser.add_argument("files", type=Path, nargs="+", help="what lora-kernels bench --json wrote")
    passes = {"forward": targets, "step": step_targets, "goals": goals}
    parser.add_argument("--pass", dest="which", choices=tuple(passes), default="forward", help="whose targets")
    options = parser.parse_args(arguments)
    try:
        results, blocks = _loaded(options.files)
    except (InvalidArgumentError, OSError, ValueError) as error:
        print(f"gpu_targets: {error}", file=sys.stderr)
        return 2
    devices = {(r.environment["device"], r.predicted) for r in results}
    devices |= {(document["environment"]["device"], False) for document in blocks}
    if len(devices) > 1:
        print("gpu_targets: the files are of different devices, or predicted and measured: judge them apart.")
        return 2
    ((device, predicted),) = devices
    cells = united(results)
    lines = [target.line(cells) for target in passes[options.which]()]
    if options.which == "goals":
        lines += block_lines(max(blocks, key=lambda d: d["date"]) if blocks else {"cells": []})
    print(f"{'PREDICTED, not measured: ' if predicted else ''}{device}")
    print("\n".join(text for _, text in lines))
    print(f"{sum(passed for passed, _ in lines)} of {len(lines)} targets are reached.")
    return 0 if all(passed for passed, _ in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
