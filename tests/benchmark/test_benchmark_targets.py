"""The judgement of a GPU's results: every target of the forward grid, measured or predicted."""

from __future__ import annotations

import json
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


def failed(workload: Workload) -> results.Cell:
    """Ours computed something else; what the model held of it counts for nothing."""
    cell = made_cell(workload, peft=1.9)
    cell.providers["auto"] = results.Entry("failed", "It computes something else: y.", predicted={"ratio": 0.9})
    return cell


GOOD = [made_cell(w, auto=0.98, peft=1.9, addmm=1.3) for w in CELLS]


def test_all_targets_can_be_reached(tmp_path: Path) -> None:
    parts = result_of(*GOOD[:300]), result_of(*GOOD[300:], host(20.0, 40.0))
    assert judge.main(files(tmp_path, *parts)) == 0


@pytest.mark.parametrize(
    ("missed", "target"),
    [
        (made_cell(CELLS[0], auto=1.045, peft=1.9, addmm=1.3), "4096→4096, M = 8192"),
        (made_cell(CELLS[1], auto=1.055, peft=1.9, addmm=1.3), "4096→4096, M = 8192, r = 16, p = 0.1"),
        (made_cell(CELLS[3], auto=1.04, peft=1.9, addmm=1.3), "8192→8192"),
        (made_cell(CELLS[10], auto=1.11, peft=1.9, addmm=1.3), "M = 1 to 16"),
        (made_cell(CELLS[-1], auto=1.4, peft=1.9, addmm=1.3), "every forward"),
        (made_cell(CELLS[-1], compile=0.95), "every forward"),
        (made_cell(CELLS[-1], peft16=0.95), "every forward"),
        (made_cell(CELLS[-1], lorafusion=0.95, eager=0.9), "every forward"),
        (failed(CELLS[-1]), "every forward"),
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
            c, providers={n: results.Entry("predicted", predicted={"ratio": 0.98}) for n in ("linear", "auto", "peft")}
        )
        for c in GOOD
    ]
    measured, predicted = result_of(*GOOD), replace(result_of(*GOOD), cells=cells, predicted=True)
    names = files(tmp_path, measured, predicted)
    assert judge.main(names[1:]) == 1  # nothing is predicted of host time
    out = capsys.readouterr().out
    assert out.startswith("PREDICTED")
    assert "12 of 13 targets" in out
    assert judge.main(names) == 2


STEPS = preset("gpu-step").workloads
GOOD_STEPS = [
    made_cell(w, auto=1.0 if w.out_features > 1024 else 1.2, peft=1.9, addmm=1.3, lorafusion=1.3, compile=1.5)
    for w in STEPS
]


def test_the_step_s_targets_can_be_reached(tmp_path: Path) -> None:
    assert judge.main(["--pass", "step", *files(tmp_path, result_of(*GOOD_STEPS))]) == 0


@pytest.mark.parametrize(
    ("missed", "target"),
    [
        (made_cell(STEPS[0], auto=1.09, peft=1.9, addmm=1.3, lorafusion=1.3), "4096→4096, M = 8192, r = 16, p = 0:"),
        (made_cell(STEPS[1], auto=1.12, peft=1.9, addmm=1.3, lorafusion=1.3), "4096→4096, M = 8192, r = 16, p = 0.1:"),
        (made_cell(STEPS[3], auto=1.02, peft=1.9, addmm=1.3, lorafusion=1.3), "8192→8192, M = 8192, r = 16, p = 0.1"),
        (made_cell(STEPS[1], auto=1.04, peft=1.39), "p = 0.1: time over peft's"),
        (made_cell(STEPS[-1], auto=1.4, lorafusion=1.3), "every step"),
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


# The goals, which name a group and a decoder block too

GOALS = preset("gpu-goals").workloads
GROUPS = preset("gpu-goals-group").workloads
GOOD_GOALS = [made_cell(w, auto=0.98 if w.out_features > 1024 else 1.1, peft=1.9, lorafusion=1.3) for w in GOALS]
GOOD_GROUPS = [made_cell(w, **{"group": 1.04, "ours-lora": 1.2, "peft-lora": 1.9}) for w in GROUPS]


def block(folder: Path, p: float = -1.0, **changes: float) -> str:
    """A decoder block's document that reaches its goals, but for ``changes`` of ours at dropout ``p``."""
    cells = []
    for dropout in (0.0, 0.05):
        ours = {"tokens_per_second": 1.6, "ratio": 1.05, "ratio_p20": 1.04, "ratio_p80": 1.06}
        ours |= changes if p == dropout else {}
        theirs = {"tokens_per_second": 1.0, "ratio": 1.7}
        providers = {"auto": ours, "peft": theirs}
        cells.append({"tokens": 4096, "p": dropout, "failed": None, "providers": providers})
    device = {"device": results.environment("cpu")["device"]}
    document = {"preset": "gpu-block", "date": "2026-01-01", "environment": device, "cells": cells}
    path = folder / "block.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_the_goals_can_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = files(tmp_path, result_of(*GOOD_GOALS), result_of(*GOOD_GROUPS))
    assert judge.main(["--pass", "goals", *named, block(tmp_path)]) == 0
    assert "28 of 28 targets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missed", "changed", "target"),
    [
        (made_cell(GOALS[1], auto=0.995, peft=1.9), {}, "forward, 8192→8192"),
        (made_cell(GOALS[5], auto=1.08, peft=1.9), {}, "step, 4096→4096, M = 8192, r = 16, p = 0:"),
        (made_cell(GOALS[10], auto=1.12, peft=1.9), {}, "step, 4096→4096, M = 8192, r = 16, p = 0.1:"),
        (made_cell(GOALS[15], auto=1.15, peft=1.9), {}, "step, 4096→4096, M = 2048"),
        (made_cell(GOALS[18], auto=1.46, peft=1.9, lorafusion=1.9), {}, "step, 4096→4096, M = 512"),
        (made_cell(GROUPS[2], **{"group": 1.14, "ours-lora": 1.0}), {}, "step, q, k, v of 4096"),
        (None, {"p": 0.0, "ratio": 1.09}, "decoder block, 4096 tokens, p = 0: 1.090 ±0.010"),
        (None, {"p": 0.05, "tokens_per_second": 1.45}, "decoder block, 4096 tokens, p = 0.05: tokens/s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_goal_that_is_missed_is_named(
    missed: results.Cell | None,
    changed: dict[str, float],
    target: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    late = [result_of(missed, date="2026-02-01T00:00:00Z")] if missed else []
    named = files(tmp_path, result_of(*GOOD_GOALS), result_of(*GOOD_GROUPS), *late)
    assert judge.main(["--pass", "goals", *named, block(tmp_path, **changed)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISS")]
    assert target in line


def test_goals_of_what_was_not_timed_are_not_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge.main(["--pass", "goals", *files(tmp_path, result_of(*GOOD_GOALS))]) == 1
    out = capsys.readouterr().out
    assert out.count("no such cell was timed") == 5  # three of the group, two of the block
