"""The judgement of a GPU's results: every target of the forward grid, measured or predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_targets as judge
from lora_kernels.benchmark import results
from lora_kernels.benchmark.presets import preset
from lora_kernels.benchmark.workloads import Workload
from made_results import made_cell, result_of

CELLS = preset("gpu-forward").workloads
HOST = Workload("overhead", 1, 4096, 4096, 16, "bfloat16")


def host(ours: float, peft: float) -> results.Cell:
    cell = made_cell(HOST, auto=1.0, peft=1.0)
    for name, us in (("auto", ours), ("peft", peft)):
        cell.providers[name].numbers["over_floor_us"] = us
    return cell


def files(folder: Path, *found: results.Result) -> list[str]:
    for i, result in enumerate(found):
        result.save(folder / f"{i}.json")
    return [str(folder / f"{i}.json") for i in range(len(found))]


GOOD = [made_cell(w, auto=1.02, peft=1.9, addmm=1.3) for w in CELLS]


def test_all_targets_can_be_reached(tmp_path: Path) -> None:
    parts = result_of(*GOOD[:300]), result_of(*GOOD[300:], host(20.0, 40.0))
    assert judge.main(files(tmp_path, *parts)) == 0


@pytest.mark.parametrize(
    ("missed", "target"),
    [
        (made_cell(CELLS[0], auto=1.06, peft=1.9, addmm=1.3), "4096→4096, M = 8192"),
        (made_cell(CELLS[3], auto=1.04, peft=1.9, addmm=1.3), "8192→8192"),
        (made_cell(CELLS[10], auto=1.11, peft=1.9, addmm=1.3), "M = 1 to 16"),
        (made_cell(CELLS[-1], auto=1.4, peft=1.9, addmm=1.3), "every cell"),
        (made_cell(CELLS[-1], compile=0.99), "every cell"),
        (host(21.0, 40.0), "host time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_target_that_is_missed_is_named_with_its_cell(
    missed: results.Cell, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The later file counts, and adds to what the earlier one says of the cell's other providers."""
    late = result_of(missed, date="2026-02-01T00:00:00Z")
    assert judge.main(files(tmp_path, result_of(*GOOD, host(20.0, 40.0)), late)) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISS")]
    assert len(lines) == 1
    assert target in lines[0]
    assert str(missed.workload) in lines[0]


def test_a_prediction_is_judged_and_told_and_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        replace(
            c, providers={n: results.Entry("predicted", predicted={"ratio": 1.0}) for n in ("linear", "auto", "peft")}
        )
        for c in GOOD
    ]
    measured, predicted = result_of(*GOOD), replace(result_of(*GOOD), cells=cells, predicted=True)
    names = files(tmp_path, measured, predicted)
    assert judge.main(names[1:]) == 1  # nothing is predicted of host time
    out = capsys.readouterr().out
    assert out.startswith("PREDICTED")
    assert "7 of 8 targets" in out
    assert judge.main(names) == 2


STEPS = preset("gpu-step").workloads
GOOD_STEPS = [
    made_cell(w, auto=1.04 if w.out_features > 1024 else 1.2, peft=1.9, addmm=1.3, lorafusion=1.3, compile=1.5)
    for w in STEPS
]


def test_the_step_s_targets_can_be_reached(tmp_path: Path) -> None:
    assert judge.main(["--pass", "step", *files(tmp_path, result_of(*GOOD_STEPS))]) == 0


@pytest.mark.parametrize(
    ("missed", "target"),
    [
        (made_cell(STEPS[0], auto=1.09, peft=1.9, addmm=1.3, lorafusion=1.3), "4096→4096, M = 8192, r = 16, p = 0:"),
        (made_cell(STEPS[1], auto=1.11, peft=1.9, addmm=1.3, lorafusion=1.3), "4096→4096, M = 8192, r = 16, p = 0.1:"),
        (made_cell(STEPS[3], auto=1.065, peft=1.9, addmm=1.3, lorafusion=1.3), "8192→8192, M = 8192, r = 16, p = 0.1"),
        (made_cell(STEPS[1], auto=1.04, peft=1.39), "p = 0.1: time over peft's"),
        (made_cell(STEPS[-1], auto=1.4, lorafusion=1.3), "every cell"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_s_target_that_is_missed_is_named(
    missed: results.Cell, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = result_of(missed, date="2026-02-01T00:00:00Z")
    assert judge.main(["--pass", "step", *files(tmp_path, result_of(*GOOD_STEPS), late)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISS")]
    assert target in line
    assert str(missed.workload) in line
