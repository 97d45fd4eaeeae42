"""The goals that hold on every kind of CPU, judged for each kind apart; the preset that measures their cells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import targets
from lora_kernels.benchmark import results, runner
from lora_kernels.benchmark.preset import Preset
from lora_kernels.benchmark.presets import preset
from lora_kernels.benchmark.workloads import Workload
from made_results import STEP, made_cell, result_of

CELLS = preset("cpu-goals").workloads
GOOD = {"auto": 0.9, "peft": 1.2, "addmm": 1.1}


def result(kind: str = "AVX2", **odd: results.Cell) -> results.Result:
    """Everything reached, but for the cells that are given."""
    changed = {cell.workload: cell for cell in odd.values()}
    made = result_of(*(changed.get(w, made_cell(w, **GOOD)) for w in CELLS), preset="cpu-goals")
    return replace(made, environment={**made.environment, "cpu_capability": kind})


def where(**fields: object) -> Workload:
    return next(w for w in CELLS if all(getattr(w, name) == value for name, value in fields.items()))


def test_the_preset_has_cells_for_every_goal_and_all_are_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(CELLS) == len(set(CELLS)) == 54
    result().save(tmp_path / "a.json")
    assert targets.main([str(tmp_path / "a.json")]) == 0
    assert "7 of 7 targets are reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "ratios", "told"),
    [
        ({"direction": "forward", "tokens": 384, "dtype": "bfloat16"}, {"auto": 1.06}, "bfloat16 forward, M >= 384"),
        ({"direction": "forward", "tokens": 1024, "dtype": "float32"}, {"auto": 1.06}, "float32 forward, M >= 384"),
        ({"direction": "step", "tokens": 384, "dtype": "float32"}, {"auto": 1.09}, "float32 step, M >= 384"),
        ({"direction": "forward", "tokens": 16, "dtype": "bfloat16"}, {"auto": 1.01}, "bfloat16 forward, M = 1 and 16"),
        ({"direction": "step", "tokens": 1, "dtype": "bfloat16"}, {"auto": 1.01}, "bfloat16 step, M = 1 and 16"),
        ({"direction": "step", "r": 64, "dtype": "float32"}, {"addmm": 0.87}, "every cell: the better of PEFT's"),
        ({"direction": "forward", "r": 2, "dtype": "bfloat16"}, {"peft": 0.87}, "every cell: the better of PEFT's"),
    ],
)
def test_a_goal_that_is_missed_is_named_with_its_cell(
    fields: dict[str, object], ratios: dict[str, float], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = where(**fields)
    result(odd=made_cell(odd, **GOOD | {"peft": 1.2, "addmm": 1.1} | ratios)).save(tmp_path / "a.json")
    assert targets.main([str(tmp_path / "a.json")]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISS")]
    assert told in line
    assert str(odd) in line


def test_each_kind_of_cpu_is_judged_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = where(direction="forward", tokens=16, dtype="bfloat16")
    result("AVX2").save(tmp_path / "a.json")
    result("AVX512", odd=made_cell(odd, **GOOD | {"auto": 1.05})).save(tmp_path / "b.json")
    assert targets.main([str(tmp_path / name) for name in ("a.json", "b.json")]) == 1
    out = capsys.readouterr().out
    assert "7 of 7 targets" in out
    assert "6 of 7 targets" in out
    assert "(AVX2" in out
    assert "(AVX512" in out


def test_results_of_another_preset_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result_of(made_cell(STEP, auto=1.0)).save(tmp_path / "a.json")
    assert targets.main([str(tmp_path / "a.json")]) == 2
    assert "targets are held for cpu-goals, cpu-grid" in capsys.readouterr().err


def test_without_a_committed_result_it_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "RESULTS", tmp_path)
    assert targets.main([]) == 1
    assert "bench --preset cpu-goals" in capsys.readouterr().out
    result().save(tmp_path / "box" / "cpu-goals.json")
    assert targets.main([]) == 0


def test_what_is_more_work_than_a_cell_that_took_too_long_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Workload("forward", 8, 16, 16, 2)
    others = (replace(small, tokens=9), replace(small, r=4), replace(small, direction="step"), replace(small, tokens=7))
    ran: list[Workload] = []

    def run_cell(workload: Workload, *rest: object) -> results.Cell:
        ran.append(workload)
        left_out = "One call of the floor took 9 s." if workload == small else None
        return results.Cell(workload, {}, left_out=left_out)

    monkeypatch.setattr(runner, "run_cell", run_cell)
    found = runner.run_preset(Preset("made", "", (small, *others), ("auto",)), "2026-01-01T00:00:00Z", "cpu")
    assert ran == [small, *others[2:]]
    assert str(small) in str(found.cells[1].left_out)
