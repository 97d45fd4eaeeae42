"""What becomes of measurements: their file, tables, the README's and the judgement by the targets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import tables, targets
from lora_kernels import LoRAKernelsError
from lora_kernels.benchmark import report, results, runner
from lora_kernels.benchmark.grid import grid
from lora_kernels.benchmark.presets import preset
from lora_kernels.benchmark.providers import FLOOR, PROVIDERS
from lora_kernels.benchmark.workloads import Workload
from made_results import STEP, made_cell, result_of


def run(workload: Workload, *names: str) -> results.Cell:
    return runner.run_cell(workload, [PROVIDERS[n] for n in (FLOOR, *names)], "cpu", budget=0.0, min_rounds=2)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = result_of(run(STEP, "addmm", "auto"), run(replace(STEP, direction="memory"), "auto"))
    result.save(tmp_path / "a.json")
    loaded = results.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert [c.workload for c in loaded.cells] == [c.workload for c in result.cells]
    assert loaded.cells[0].providers["addmm"].numbers["rounds"] == 2
    raw = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert {"torch", "triton", "peft", "lora-kernels"} == set(raw["environment"]["versions"])
    assert {"device", "threads", "git", "allocator"} <= set(raw["environment"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 0}', '{"schema": 1, "cells": []}'])
def test_a_file_that_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(LoRAKernelsError):
        results.load(tmp_path / "a.json")


def test_two_results_are_compared_cell_by_cell() -> None:
    before, after = result_of(run(STEP, "addmm")), result_of(run(STEP, "addmm", "auto"))
    assert {(workload, name) for workload, name, _, _ in results.compare(before, after)} == {
        (STEP, FLOOR),
        (STEP, "addmm"),
    }


def test_tables_show_winners_and_losses() -> None:
    table = report.table(result_of(made_cell(peft=1.5, auto=1.1), made_cell(peft=1.2, auto=1.4)), "step")
    peft, auto = table.header.index("PEFT"), table.header.index("lora_kernels")
    assert table.winners == {(0, auto), (1, peft)}
    assert table.losses == {(1, auto)}
    assert "| **1.10** |" in report.markdown(table)
    assert "more than 2 % in 1 of 2 cells" in report.markdown(table)


def test_a_failed_provider_is_told() -> None:
    cell = made_cell(auto=1.1)
    cell.providers["peft"] = results.Entry("failed", "It computes something else: y.")
    assert report.reasons(result_of(cell)) == ["PEFT, 1 of 1 cells: FAILED, not timed. It computes something else: y."]


def test_a_cell_whose_floor_is_too_slow_is_left_out_and_says_so(tmp_path: Path) -> None:
    cell = runner.run_cell(STEP, [PROVIDERS[FLOOR], PROVIDERS["addmm"]], "cpu", budget=0.0, max_call=0.0)
    assert not cell.providers
    assert "One call of the floor took" in (cell.left_out or "")
    result = result_of(made_cell(peft=1.5, auto=1.1), cell)
    result.save(tmp_path / "a.json")
    assert results.load(tmp_path / "a.json").cells[1].left_out == cell.left_out
    assert report.reasons(result) == [f"{STEP}: {cell.left_out}"]
    assert "1 cells" in report.table(result, "step").notes[-1]
    assert len(report.table(result, "step").rows) == 1


def test_the_grid_has_a_row_for_each_shape_and_sums_up_every_rank() -> None:
    cells = [made_cell(replace(STEP, tokens=m, r=r), peft=1.5, auto=1.0 + m / 100) for m in (1, 16) for r in (4, 8)]
    left_out = results.Cell(replace(STEP, dtype="bfloat16", tokens=1), {}, left_out="One call took 9 s.")
    content = grid(result_of(*cells, left_out), "step", {"r": ("4",)})
    ours = ["PEFT", "lora_kernels"]
    assert content.header == ["K→N", "M", "fp32 nn.Linear, ms", *ours, "bf16 nn.Linear, ms", *ours]
    assert [row[1] for row in content.rows] == ["1", "16"]
    assert content.rows[0][2:] == ["1", "1.50", "1.01", "–", "–", "–"]
    assert content.winners == {(0, 4), (1, 4)}
    assert "all 4 cells: PEFT takes 1.39 times" in content.notes[0]
    assert f"our worst ratio is 1.16, at {replace(STEP, tokens=16)}" in content.notes[0]
    assert "in 0 of 4 cells, the automatic choice of every rival in 4" in content.notes[1]
    assert "bf16: PEFT was not timed" in content.notes[2]


def test_targets_are_judged_cell_by_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workloads = preset("cpu-grid").workloads

    def status(path: str, **ratios: float) -> int:
        cells = [made_cell(w, **(ratios if w == odd else {"peft": 1.8, "auto": 0.69})) for w in workloads]
        result_of(*cells, preset="cpu-grid").save(tmp_path / path)
        return int(targets.main([str(tmp_path / path)]))

    odd = next(w for w in workloads if w.direction == "forward" and w.tokens == 512 and w.in_features == 4096)
    assert status("good.json", peft=1.8, auto=1.0) == 0
    assert status("slow.json", peft=1.0, auto=1.01) == 1
    shown = capsys.readouterr().out
    assert (
        f"MISS  float32 forward: PEFT's time over ours, every cell: 0.990 (>= 1; 1 of 60 cells miss it; worst: {odd})"
        in shown
    )
    assert targets.main([str(tmp_path / "none.json")]) == 2


def test_a_target_that_no_cell_speaks_of_is_not_reached(tmp_path: Path) -> None:
    result_of(made_cell(STEP, peft=1.8, auto=0.5), preset="cpu-grid").save(tmp_path / "a.json")
    assert targets.main([str(tmp_path / "a.json")]) == 1


def test_a_grid_is_written_too(tmp_path: Path) -> None:
    result_of(made_cell(peft=1.5, auto=1.25)).save(tmp_path / "box" / "a.json")
    text = tables.fill("<!-- grid:box/smoke/step/r=4 -->\n<!-- /grid -->\n", tmp_path)
    assert "| **1.25** |" in text
    assert tables.fill(text, tmp_path) == text


def test_tables_are_written_from_the_newest_result_and_stale_ones_found(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:box/smoke/step -->\n1.00\n<!-- /table -->\nafter\n", encoding="utf-8")
    arguments = ["--file", str(readme), "--results", str(tmp_path / "results")]
    for name, date, ratio in (("a", "2026-02-01", 1.25), ("b", "2026-01-01", 1.75)):
        result_of(made_cell(auto=ratio), date=date).save(tmp_path / "results" / "box" / f"{name}.json")
    assert tables.main(["--check", *arguments]) == 1
    assert tables.main(["--write", *arguments]) == 0
    assert tables.main(["--check", *arguments]) == 0
    text = readme.read_text(encoding="utf-8")
    assert "| **1.25** |" in text
    assert "1.75" not in text
    assert text.startswith("before\n<!-- table:box/smoke/step -->\n")
    assert text.endswith("<!-- /table -->\nafter\n")


@pytest.mark.parametrize("where", ["", "/float32", "/r=4", "/r=4,8/tokens=70"])
def test_a_table_may_hold_some_cells_only(where: str, tmp_path: Path) -> None:
    result_of(made_cell(auto=1.25)).save(tmp_path / "box" / "a.json")
    text = f"<!-- table:box/smoke/step{where} -->\n<!-- /table -->\n"
    assert "| **1.25** |" in tables.fill(text, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "box/smoke/step/r=5",
        "box/smoke/step/rank=4",
        "box",
        "box/smoke",
        "box/other/step",
        "box/smoke/forward",
        "none/smoke/step",
    ],
)
def test_a_table_without_a_result_is_an_error(name: str, tmp_path: Path) -> None:
    result_of(made_cell(auto=1.25)).save(tmp_path / "box" / "a.json")
    (tmp_path / "README.md").write_text(f"<!-- table:{name} -->\n<!-- /table -->\n", encoding="utf-8")
    assert tables.main(["--check", "--file", str(tmp_path / "README.md"), "--results", str(tmp_path)]) == 1


def foreseen(cell: results.Cell, **ratios: float) -> results.Cell:
    """``cell`` with what the model says of its providers."""
    for name, ratio in {FLOOR: 1.0, **ratios}.items():
        predicted = {"ratio": ratio, "us": 2000.0 * ratio}
        cell.providers[name] = replace(cell.providers.get(name, results.Entry("predicted")), predicted=predicted)
    return cell


def test_predicted_stands_beside_measured_with_wins_and_losses(tmp_path: Path) -> None:
    cells = [
        foreseen(made_cell(replace(STEP, r=r), peft=1.5, auto=auto), peft=1.4, auto=1.05)
        for r, auto in ((4, 1.2), (5, 1.505), (6, 1.8))
    ]
    result_of(*cells).save(tmp_path / "box" / "a.json")
    text = tables.fill("<!-- beside:box/smoke/step -->\n<!-- /beside -->\n", tmp_path)
    assert "measured (predicted)" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| 48")] == [
        "+25 %",
        "=",
        "−20 %",
    ]
    assert "| 1.50 (1.40) | **1.20 (1.05)** |" in text
    assert "| 1 (2) |" in text
    assert "more than 2 % in 1 of 3 cells (PEFT 1), the automatic choice of every rival in 1; 1 is level" in text


def test_a_prediction_is_a_table_of_its_own_and_never_a_measured_one(tmp_path: Path) -> None:
    cell = results.Cell(STEP, {})
    predicted = replace(
        result_of(foreseen(cell, peft=1.4, auto=1.05)),
        predicted=True,
        titles={FLOOR: "f", "peft": "P", "auto": "o"},
        ours=["auto"],
    )
    predicted.save(tmp_path / "box" / "p.json")
    text = tables.fill("<!-- predicted:box/smoke/step -->\n<!-- /predicted -->\n", tmp_path)
    assert "**Predicted, not measured.**" in text
    assert "| 2 | 1.40 | **1.05** | +33 % |" in text
    with pytest.raises(LoRAKernelsError, match="no result"):
        tables.fill("<!-- table:box/smoke/step -->\n<!-- /table -->\n", tmp_path)


def test_a_grid_that_ran_in_parts_is_joined() -> None:
    other = replace(STEP, dtype="bfloat16")
    first = result_of(made_cell(STEP, auto=1.5), made_cell(other, auto=1.25), preset="cpu-grid")
    second = result_of(made_cell(STEP, auto=1.0), preset="cpu-grid", date="2026-01-03T00:00:00Z")
    elsewhere = replace(first, environment={**first.environment, "threads": 64})
    joined = results.join([second, first])
    assert {cell.workload: cell.providers["auto"].ratio for cell in joined.cells} == {STEP: 1.0, other: 1.25}
    assert [cell.workload for cell in results.join([second, elsewhere]).cells] == [STEP]
