"""Judges results of the GPU's grids by the project's targets: ``python bench/gpu_targets.py [--pass step] FILE ...``.

FILES are what ``lora-kernels bench`` wrote for ``gpu-forward``, ``gpu-compile`` and ``gpu-quick``, or with ``--pass
step`` for ``gpu-step`` and ``gpu-step-compile``, on one device, in any number; of a provider that several of them timed
in a cell the latest counts. A prediction is judged like a measurement, and is told as one. One line a target; exits
with 1 where one is missed, and where no cell says anything about one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_kernels.benchmark.results import Cell, Result, load
from lora_kernels.benchmark.workloads import Workload
from lora_kernels.errors import InvalidArgumentError

OURS = "auto"
RIVALS = ("peft", "addmm", "compile")
SLOWER = 1.02  # than the best rival, anywhere
HOST = 0.5  # of PEFT's host time over the floor, at one token

_SQUARE = (4096, 4096)
BOUNDS = {
    _SQUARE: 1.05,
    (8192, 8192): 1.03,
    (4096, 14336): 1.04,
    (14336, 4096): 1.04,
    (4096, 1024): 1.12,
}
FEW_TOKENS = 1.10

# Forward and backward together, over the frozen layer's forward and dx: without dropout, and with p = 0.1.
STEP_BOUNDS = {
    _SQUARE: (1.08, 1.10),
    (8192, 8192): (1.05, 1.06),
    (4096, 14336): (1.06, 1.08),
    (14336, 4096): (1.06, 1.08),
    (4096, 1024): (1.25, 1.27),
}
# The least speed-up of a step of the square layer over a rival: without dropout, and with.
STEP_SPEED_UPS = {"peft": (1.25, 1.35), "addmm": (1.05, 1.05), "compile": (1.10, 1.10), "lorafusion": (1.0, 1.0)}
STEP_RIVALS = (*RIVALS, "lorafusion")


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
        told = f"{found[worst]:.3f} (<= {self.bound:g}; {missed} of {len(found)} cells miss it; worst: {worst})"
        return missed == 0, f"{'MISS' if missed else 'ok  '}  {self.name}: {told}"


def targets() -> list[Target]:
    shaped = [
        Target(f"{k}→{n}, M = 8192, r = 16, p = 0 and 0.1", bound, _to_floor(k, n, (8192,)))
        for (k, n), bound in BOUNDS.items()
    ]
    few = Target("4096→4096, M = 1 to 16, r = 16, in a graph", FEW_TOKENS, _to_floor(*_SQUARE, (1, 2, 4, 8, 16)))
    best = Target(f"every cell: over the best of {', '.join(RIVALS)}", SLOWER, _to_best_rival("forward", RIVALS))
    return [*shaped, few, best, Target("host time of the layer at M = 1, over PEFT's", HOST, _to_peft_s_host)]


def step_targets() -> list[Target]:
    """Of forward and backward together."""
    shaped = [
        Target(f"{k}→{n}, M = 8192, r = 16, p = {p:g}", bound, _to_floor(k, n, (8192,), "step", p))
        for (k, n), bounds in STEP_BOUNDS.items()
        for p, bound in zip((0.0, 0.1), bounds, strict=True)
    ]
    speed_ups = [
        Target(f"4096→4096, M = 8192, r = 16, p = {p:g}: time over {rival}'s", 1.0 / least, _to_rival(rival, p))
        for rival, leasts in STEP_SPEED_UPS.items()
        for p, least in zip((0.0, 0.1), leasts, strict=True)
    ]
    told = f"every cell: over the best of {', '.join(STEP_RIVALS)}"
    return [*shaped, *speed_ups, Target(told, SLOWER, _to_best_rival("step", STEP_RIVALS))]


def _is_at(cell: Cell, direction: str, k: int, n: int, tokens: tuple[int, ...]) -> bool:
    w = cell.workload
    return w.direction == direction and (w.in_features, w.out_features, w.r) == (k, n, 16) and w.tokens in tokens


def _to_rival(name: str, p: float) -> Callable[[Cell], float | None]:
    def ratio(cell: Cell) -> float | None:
        ours, theirs = _time(cell, OURS), _time(cell, name)
        asked = _is_at(cell, "step", *_SQUARE, (8192,)) and cell.workload.p == p
        return ours / theirs if asked and ours is not None and theirs else None

    return ratio


def _to_floor(
    k: int, n: int, tokens: tuple[int, ...], direction: str = "forward", p: float | None = None
) -> Callable[[Cell], float | None]:
    def ratio(cell: Cell) -> float | None:
        w = cell.workload
        asked = _is_at(cell, direction, k, n, tokens) and p in (None, w.p) and (w.tokens > 16 or w.p == 0)
        return _time(cell, OURS) if asked else None

    return ratio


def _to_best_rival(direction: str, rivals: tuple[str, ...]) -> Callable[[Cell], float | None]:
    def ratio(cell: Cell) -> float | None:
        times = [time for name in rivals if (time := _time(cell, name)) is not None]
        ours = _time(cell, OURS)
        return ours / min(times) if ours is not None and times and cell.workload.direction == direction else None

    return ratio


def _to_peft_s_host(cell: Cell) -> float | None:
    w = cell.workload
    if not w.direction.startswith("overhead") or w.tokens != 1:
        return None
    ours, theirs = (
        cell.providers[n].numbers.get("over_floor_us") if n in cell.providers else None for n in (OURS, "peft")
    )
    return None if ours is None or not theirs else float(ours / theirs)


def _time(cell: Cell, name: str) -> float | None:
    """The ratio to the floor: measured, or where nothing was run predicted."""
    entry = cell.providers.get(name)
    if entry is None:
        return None
    return entry.ratio if entry.numbers else entry.predicted.get("ratio")


def united(results: Sequence[Result]) -> list[Cell]:
    """One cell for each workload, with all providers that any of the results holds."""
    cells: dict[Workload, Cell] = {}
    for result in sorted(results, key=lambda result: result.date):
        for cell in result.cells:
            there = cells.get(cell.workload, cell)
            cells[cell.workload] = replace(cell, providers={**there.providers, **cell.providers})
    return list(cells.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each target; returns the exit status."""
    parser = argparse.ArgumentParser(description="judges results of the GPU's grids by the project's targets")
    parser.add_argument("files", type=Path, nargs="+", help="what lora-kernels bench --json wrote")
    parser.add_argument("--pass", dest="which", choices=("forward", "step"), default="forward", help="whose targets")
    options = parser.parse_args(arguments)
    try:
        results = [load(file) for file in options.files]
    except (InvalidArgumentError, OSError) as error:
        print(f"gpu_targets: {error}", file=sys.stderr)
        return 2
    if len({(r.environment["device"], r.predicted) for r in results}) > 1:
        print("gpu_targets: the files are of different devices, or predicted and measured: judge them apart.")
        return 2
    lines = [target.line(united(results)) for target in (targets() if options.which == "forward" else step_targets())]
    print(f"{'PREDICTED, not measured: ' if results[0].predicted else ''}{results[0].environment['device']}")
    print("\n".join(text for _, text in lines))
    print(f"{sum(passed for passed, _ in lines)} of {len(lines)} targets are reached.")
    return 0 if all(passed for passed, _ in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
