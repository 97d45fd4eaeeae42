"""Judges results of presets ``cpu-goals`` and ``cpu-grid`` by the targets: ``python bench/targets.py [FILE ...]``.

Without files, the committed results of ``cpu-goals`` of every kind of CPU. Each kind (its name and the vector
instructions that PyTorch takes there) is judged apart. One line a target: what was reached in the worst cell (or on
average), what is to be reached, and whether it is. Exits with 1 where one is missed, and where no cell says anything
about one.
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
RIVALS, BEST = ("peft", "addmm"), "best"
RESULTS = Path(__file__).parent / "results"
Condition = Callable[[Workload], bool]


@dataclass(frozen=True)
class Target:
    """A bound on a ratio over the cells that meet ``where``.

    Attributes:
        rival: whose time is divided by ours; "best": the best of RIVALS; None: our time is divided by the floor's.
        bound: what every cell (``mean``: their geometric mean) may be at most, or with a rival at least.
    """

    name: str
    where: Condition
    bound: float
    rival: str | None = None
    mean: bool = False

    def ratios(self, result: Result) -> Ratios:
        if self.rival == BEST:
            return _over_best(result).where(self.where)
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


def _over_best(result: Result) -> Ratios:
    """The quicker rival's time over ours."""
    best: dict[Workload, float] = {}
    for rival in RIVALS:
        for workload, ratio in over_provider(result, rival, OURS).of_cells.items():
            best[workload] = min(ratio, best.get(workload, ratio))
    return Ratios(best)


def _grid(direction: str, dtype: str, rank: int | None = None) -> Condition:
    """The plain grid: no dropout, and without the worked example's layer."""
    return lambda w: (w.direction, w.dtype, w.r) == (direction, dtype, rank or w.r) and not w.p and not w.train_bias


def _large(condition: Condition) -> Condition:
    return lambda w: condition(w) and w.tokens >= 512 and min(w.in_features, w.out_features) >= 2048


def _one_token(condition: Condition, size: int) -> Condition:
    return lambda w: condition(w) and w.tokens == 1 and w.in_features == w.out_features == size


def _grid_targets() -> list[Target]:
    """Of preset cpu-grid."""
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


def _goals() -> list[Target]:
    """Of preset cpu-goals: the same on every kind of CPU."""

    def at_rank_16(direction: str, dtype: str) -> Condition:
        return lambda w: (w.direction, w.dtype, w.r) == (direction, dtype, 16)

    def many(condition: Condition) -> Condition:
        return lambda w: condition(w) and w.tokens >= 384 and min(w.in_features, w.out_features) >= 2048

    targets = []
    for dtype in ("float32", "bfloat16"):
        for direction, bound in (("forward", 1.05), ("step", 1.08)):
            cells = many(at_rank_16(direction, dtype))
            targets.append(Target(f"{dtype} {direction}, M >= 384, K, N >= 2048, r=16", cells, bound))
    for direction in ("forward", "step"):
        few = at_rank_16(direction, "bfloat16")
        targets.append(Target(f"bfloat16 {direction}, M = 1 and 16, r=16", _few(few), 1.0))
    every = Target("every cell: the better of PEFT's and addmm_'s time over ours", lambda w: True, 0.98, BEST)
    return [*targets, every]


def _few(condition: Condition) -> Condition:
    return lambda w: condition(w) and w.tokens in (1, 16)


TARGETS = {"cpu-goals": _goals, "cpu-grid": _grid_targets}


def kind(result: Result) -> str:
    """The kind of CPU: name, PyTorch's vector instructions, and what the native library knows of it."""
    of = result.environment
    features = (of.get("cpu_product") or {}).get("features")
    return f"{of['device']} ({of['cpu_capability']}{f'; {features}' if features else ''})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each target of each kind of CPU; returns the exit status."""
    parser = argparse.ArgumentParser(description="judges results on CPUs by the project's targets")
    parser.add_argument("files", type=Path, nargs="*", help="what lora-kernels bench --json wrote (default: committed)")
    files = parser.parse_args(arguments).files or sorted(RESULTS.glob("*/cpu-goals*.json"))
    try:
        found = [load(file) for file in files]
        if unknown := [r.preset for r in found if r.preset not in TARGETS]:
            raise InvalidArgumentError(
                f"a result of preset {unknown[0]!r} was given: targets are held for {', '.join(TARGETS)}."
            )
    except (InvalidArgumentError, OSError) as error:
        print(f"targets: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"no result of preset cpu-goals lies in {RESULTS}: `lora-kernels bench --preset cpu-goals` makes one.")
        return 1
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in found:
        groups.setdefault((kind(result), result.preset), []).append(result)
    passed = [_judge(name, preset, join(results)) for (name, preset), results in groups.items()]
    return 0 if all(passed) else 1


def _judge(name: str, preset: str, result: Result) -> bool:
    lines = [target.line(result) for target in TARGETS[preset]()]
    print(f"{name}, {preset}, {result.environment['threads']} threads, {result.date[:10]}")
    print("\n".join(text for _, text in lines))
    left_out = [cell for cell in result.cells if cell.left_out]
    reached = sum(passed for passed, _ in lines)
    print(f"{reached} of {len(lines)} targets are reached; {len(left_out)} cells are left out.")
    return reached == len(lines)


if __name__ == "__main__":
    raise SystemExit(main())
