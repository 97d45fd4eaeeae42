"""Benchmark results that were never run, for the tests of what is made of them."""

from __future__ import annotations

from lora_kernels.benchmark import results
from lora_kernels.benchmark.providers import FLOOR, PROVIDERS
from lora_kernels.benchmark.workloads import Workload

STEP = Workload("step", tokens=70, in_features=48, out_features=40, r=4)


def result_of(*cells: results.Cell, preset: str = "smoke", date: str = "2026-01-02T00:00:00Z") -> results.Result:
    names = list(dict.fromkeys(n for c in cells for n in c.providers))
    return results.Result(
        preset=preset,
        date=date,
        seed=0,
        floor=FLOOR,
        titles={n: PROVIDERS[n].title for n in names},
        ours=[n for n in names if PROVIDERS[n].ours],
        environment=results.environment("cpu"),
        machine={},
        cells=list(cells),
    )


def made_cell(workload: Workload = STEP, **ratios: float) -> results.Cell:
    numbers = {n: {"ratio": r, "us": 1000.0 * r, "over_floor_us": 0.0} for n, r in {FLOOR: 1.0, **ratios}.items()}
    return results.Cell(workload, {n: results.Entry("timed", numbers=v) for n, v in numbers.items()})
