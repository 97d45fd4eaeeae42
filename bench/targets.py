"""Judges a result of preset ``cpu-grid`` by the project's targets: ``python bench/targets.py FILE ...``.

One line a target: what was reached in the worst cell (or on average), what is to be reached, and whether it is. Exits
with 1 where one is missed, and where no cell says anything about one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_kernels.benchmark.results import Result, join, load
from lora_kernels.benchmark.summary import Ratios, over_floor, over_provider
from lora_kernels.benchmark.workloads import Workload
from lora_kernels.errors import InvalidArgumentError

OURS = "auto"
Condition = Callable[[Workload], bool]


@dataclass(frozen=True)
class Target:
    """A bound on a ratio over the cells that meet ``where``.

    Attributes:
        rival: whose time is divided by ours; None: our time is divided by the floor's.
        bound: what every cell (``mean``: their geometric mean) may be at most, or with a rival at least.
    """

    name: str
    where: Condition
    bound: float
    rival: str | None = None
    mean: bool = False

    def ratios(self, result: Result) -> Ratios:
        of_all = over_floor(result, OURS) if self.rival is None else over_provider(result, self.rival, OURS)
        return of_all.where(self.where)

    def line(self, result: Result) -> tuple[bool, str]:
        """Whether it is reached, and a line that says how."""
        ratios = self.ratios(result)
        if not len(ratios):
            return False, f"  ?   {self.name}: no such cell was timed"
        least = self.rival is not None
        worst = ratios.lowest if least else ratios.highest
        reached = ratios.geometric_mean if self.mean else ratios.of_cells[worst]
        passed = reached >= self.bound if least else reached <= self.bound
        missed = sum(r < self.bound if least else r > self.bound for r in ratios.of_cells.values())
        cells = f"{len(ratios)} cells" if self.mean else f"{missed} of {len(ratios)} cells miss it; worst: {worst}"
        sign = ">=" if least else "<="
        return passed, f"{'ok  ' if passed else 'MISS'}  {self.name}: {reached:.3f} ({sign} {self.bound:g}; {cells})"


def _grid(direction: str, dtype: str, rank: int | None = None) -> Condition:
    """The plain grid: no dropout, and without the worked example's layer."""
    return lambda w: (w.direction, w.dtype, w.r) == (direction, dtype, rank or w.r) and not w.p and not w.train_bias


def _large(condition: Condition) -> Condition:
    return lambda w: condition(w) and w.tokens >= 512 and min(w.in_features, w.out_features) >= 2048


def _one_token(condition: Condition, size: int) -> Condition:
    return lambda w: condition(w) and w.tokens == 1 and w.in_features == w.out_features == size


def _targets() -> list[Target]:
    targets = []
    for dtype in ("float32", "bfloat16"):
        forward, step = _grid("forward", dtype, 16), _grid("step", dtype, 16)
        targets += [
            Target(f"{dtype} forward, M >= 512, K, N >= 2048, r=16", _large(forward), 1.05),
            Target(f"{dtype} forward, M = 1, 4096², r=16", _one_token(forward, 4096), 1.02),
            Target(f"{dtype} forward, M = 1, 1024², r=16", _one_token(forward, 1024), 1.08),
            Target(f"{dtype} step, M >= 512, K, N >= 2048, r=16", _large(step), 1.06),
        ]
        for direction, bound in (("forward", 1.15), ("step", 1.1)):
            name, cells = f"{dtype} {direction}: PEFT's time over ours", _grid(direction, dtype)
            targets += [
                Target(f"{name}, every cell", cells, 1.0, "peft"),
                Target(f"{name}, geometric mean", cells, bound, "peft", mean=True),
            ]
    forward = _grid("forward", "bfloat16", 16)
    return [
        *targets,
        Target("bfloat16 forward, M = 1, r=16: below the frozen layer", lambda w: forward(w) and w.tokens == 1, 0.7),
        Target("bfloat16 forward, M >= 512, r=16, likewise", lambda w: forward(w) and w.tokens >= 512, 0.7),
        Target("worked example's layer, step: PEFT's time over ours", _worked_example, 1.5, "peft"),
    ]


def _worked_example(workload: Workload) -> bool:
    return workload.train_bias and workload.dtype == "float32"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each target; returns the exit status."""
    parser = argparse.ArgumentParser(description="judges a cpu-grid result by the project's targets")
    parser.add_argument("files", type=Path, nargs="+", help="what lora-kernels bench --preset cpu-grid --json wrote")
    try:
        result = join([load(file) for file in parser.parse_args(arguments).files])
    except (InvalidArgumentError, OSError) as error:
        print(f"targets: {error}", file=sys.stderr)
        return 2
    lines = [target.line(result) for target in _targets()]
    print("\n".join(text for _, text in lines))
    left_out = [cell for cell in result.cells if cell.left_out]
    print(
        f"{sum(passed for passed, _ in lines)} of {len(lines)} targets are reached; {len(left_out)} cells are left out."
    )
    return 0 if all(passed for passed, _ in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
