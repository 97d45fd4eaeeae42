"""``lora-kernels tune --device cpu``: its cells, what is decided and stored, what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels import dispatch
from lora_kernels.backends.native import choice, choice_table
from lora_kernels.backends.native.choice_table import Machine, ProductCell
from lora_kernels.cli import main
from lora_kernels.dispatch import Problem
from lora_kernels.tuning import cpu
from made_tables import timing

_WHY_NOT = dispatch.backend("native").why_not(Problem("cpu", torch.float32))
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=" ".join(_WHY_NOT))

CELL = ProductCell("forward", 16, 64, 48, "float32")
CELLS = [replace(CELL, tokens=m) for m in (16, 32, 64)]
SHORT = ["tune", "--device", "cpu", "--shapes", "64x48", "--tokens", "16,40", "--dtypes", "float32"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache without a table; the library, and what it was told, as they were."""
    dispatch.select("cpu", torch.float32, "native")
    with monkeypatch.context() as patched:
        patched.setenv("LORA_KERNELS_CACHE", str(tmp_path))
        patched.setattr(cpu, "CELL_SECONDS", 0.01)
        yield
    choice.install()


def made(own: float, library: float, composition: float = 9.0) -> cpu.Outcome:
    """What the clock would tell of steady ways."""
    ratios = {"linear": 1.0, "own": own, "library": library, "addmm": composition}
    timings = {name: timing([ratio * (1 + 0.001 * (i % 3)) for i in range(9)]) for name, ratio in ratios.items()}
    machine = choice.machine()
    return cpu.Outcome(CELL, "tuned", cpu._row(CELL, machine, timings), timings)


@pytest.mark.parametrize("preset", cpu.PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_has_every_cell_once(preset: cpu.Preset) -> None:
    cells = preset.cells()
    assert len(cells) == len(set(cells)) == 2 * len(preset.shapes) * len(preset.tokens) * len(preset.dtypes)
    assert cells[0] == ProductCell("forward", 16, 2048, 2048, preset.dtypes[0])
    assert preset.cells(["backward"]) == [cell for cell in cells if cell.direction == "backward"]


@pytest.mark.parametrize(("own", "library", "expected"), [(1.0, 1.2, "own"), (1.2, 1.0, "library")])
def test_who_wins_beyond_the_noise_is_stored(own: float, library: float, expected: str) -> None:
    assert made(own, library).row.choice == expected  # type: ignore[union-attr]


def test_where_nobody_wins_the_model_s_answer_is_stored() -> None:
    """On either side of the model's border, so that it is no constant."""
    timings = made(1.1, 1.1).timings
    for features, tokens in (("own=avx2", 128), ("own=avx2", 4096)):
        cell = ProductCell("forward", tokens, 2048, 2048, "float32")
        machine = replace(choice.machine(), features=features)
        assert cpu.decide(cell, machine, timings) == choice.model(features, cell)


def test_a_composition_that_is_quicker_than_both_is_told() -> None:
    assert made(1.3, 1.2, 1.1).composition_wins
    assert not made(1.1, 1.2, 1.1).composition_wins


def test_each_cell_is_on_disk_as_soon_as_it_is_done_and_kept_by_the_next_run() -> None:
    path, told = choice_table.table_path(), []

    def measured(cell: ProductCell, machine: Machine, seconds: float) -> cpu.Outcome:
        told.append(cell)
        if len(told) == 3:
            raise KeyboardInterrupt
        outcome = made(1.0, 1.2)
        return replace(outcome, cell=cell, row=replace(outcome.row, cell=cell))

    with pytest.raises(KeyboardInterrupt):
        cpu.run(CELLS, path, measured=measured)
    assert [row.cell for row in choice_table.read(path)] == CELLS[:2]
    outcomes = cpu.run(CELLS, path, measured=measured)
    assert [outcome.status for outcome in outcomes] == ["kept", "kept", "tuned"]
    assert [o.status for o in cpu.run(CELLS, path, again=True, measured=measured)] == ["tuned"] * 3


def test_what_the_budget_leaves_no_time_for_is_not_begun() -> None:
    outcomes = cpu.run(CELLS, choice_table.table_path(), budget=1e-9, measured=None)
    assert {outcome.status for outcome in outcomes} == {"not reached"}


def test_a_product_that_takes_too_long_is_left_to_the_model_and_so_are_larger_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "first_call", lambda candidate, device: 99.0)
    outcomes = cpu.run(CELLS, choice_table.table_path())
    assert [outcome.status for outcome in outcomes] == ["left out"] * 3
    assert "the model chooses" in str(outcomes[0].sentence)
    assert choice_table.read(choice_table.table_path()) == []


@pytest.mark.parametrize("size", [2**20, 2**31 - 1])
def test_what_no_memory_holds_is_left_to_the_model(size: int) -> None:
    cell = replace(CELL, tokens=size, k=2**31 - 1, n=size)
    (found,) = cpu.run([cell], choice_table.table_path())
    assert found.status == "left out"
    assert "does not fit into this machine's memory" in str(found.sentence)


@pytest.mark.parametrize("wrong", ["own", "library", "addmm"])
def test_a_way_that_computes_something_else_is_told_and_nothing_is_stored(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate is told to find a fault while that way is forced; the command then ends with 1."""
    right = cpu.gate.check

    def check(provider: object, layer: object, setup: object) -> object:
        forced = {0: "addmm", 1: "own", 2: "library"}[choice._functions().lora_kernels_cpu_force_product(0)]
        verdict = right(provider, layer, setup)  # type: ignore[arg-type]
        return replace(verdict, failure="It computes something else.") if forced == wrong else verdict

    monkeypatch.setattr(cpu.gate, "check", check)
    assert main([*SHORT, "--directions", "forward"]) == 1
    assert choice_table.read(choice_table.table_path()) == []


def test_it_measures_stores_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main([*SHORT, "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "64→48" in out
    assert "4 cells tuned" in out
    rows = choice_table.read(choice_table.table_path())
    assert {(row.cell.direction, row.cell.tokens) for row in rows} == {
        (d, m) for d in choice_table.DIRECTIONS for m in (16, 40)
    }
    assert all(set(row.ratios) == {"own", "library", "addmm"} and row.machine == choice.machine() for row in rows)
    document = json.loads(report.read_text())
    assert [cell["status"] for cell in document["cells"]] == ["tuned"] * 4
    assert set(document["cells"][0]["timings"]) == {"linear", "own", "library", "addmm"}


def test_a_dry_run_lists_the_cells_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "measure", lambda *arguments: pytest.fail("it was timed"))
    report = tmp_path / "report.json"
    assert main(["tune", "--device", "cpu", "--preset", "cpu-quick", "--dry-run", "--json", str(report)]) == 0
    assert "24 cells would be measured" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["cells"]) == 24
    assert not choice_table.table_path().exists()
