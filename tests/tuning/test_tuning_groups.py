"""The tuner and layers of one x: which cells there are, what is stored and chosen, and where there is no choice.

``tests/backends/triton/test_tuned_groups.py`` runs and judges them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels.backends.triton.choose import ranking, tuned
from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.backends.triton.choose.group_plans import Apart, DxHopperGroup, HopperGroup
from lora_kernels.backends.triton.choose.launching import GRAPH, PREPARED
from lora_kernels.backends.triton.choose.plans import Cell
from lora_kernels.backends.triton.choose.table import read
from lora_kernels.cli import main
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.tuning import cells, report
from made_tables import DEVICE, H200, VERSIONS, FakeBench

GPU = torch.device("cuda", 0)
QKV = Cell("forward", 8192, 4096, 4096, 16, "bfloat16", False, ((1024, 16), (1024, 16)))
KINDS = {"forward": HopperGroup, "backward": DxHopperGroup}

# Which cells


def test_a_shape_of_several_widths_is_a_group() -> None:
    found = cells.cells_of(cells.shapes("64x64+32+32,64x64"), [100], [8, 4], ["bfloat16"], [0.0], ["forward"])
    group = Cell("forward", 128, 64, 64, 8, "bfloat16", False, ((32, 8), (32, 8)))
    assert found[0] == group
    assert set(found) == {group, replace(group, others=()), *(
        replace(cell, r=4, others=tuple((n, 4) for n, _ in cell.others)) for cell in (group, replace(group, others=()))
    )}  # fmt: skip


@pytest.mark.parametrize("text", ["64", "64x", "64x32+", "64x0", "64x1+1+1+1+1", "64x32x32"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"4096x4096\+1024\+1024 for 2 to 4 layers"):
        cells.shapes(text)


def test_a_preset_has_the_groups_of_a_model() -> None:
    found = cells.preset("groups").cells()
    assert len(set(found)) == len(found) == 24
    assert found[0] == QKV
    assert {cell.ns for cell in found} == {(4096, 1024, 1024), (14336, 14336)}


# One way, or several


@pytest.mark.parametrize(
    ("machine", "cell", "why"),
    [
        (H200, replace(QKV, tokens=16), "for more than 16 tokens"),
        (replace(H200, capability=100), QKV, "this GPU has 10.0"),
        (H200, replace(QKV, dtype="float32"), "torch.float32"),
        (H200, replace(QKV, direction="backward", dropout=True, others=((64, 16),) * 3), "3 layers at most"),
    ],
    ids=["few tokens", "10.0", "fp32", "four masks"],
)
def test_where_there_is_no_choice_it_says_so_and_measures_nothing(
    machine: Machine, cell: Cell, why: str, tmp_path: Path
) -> None:
    bench = FakeBench()
    bench.machine = machine  # type: ignore[misc]
    (outcome,) = bench.run([cell], tmp_path / "table.json")
    assert (outcome.status, outcome.row, bench.opened) == ("one way", None, [])
    assert "each layer by itself" in (outcome.sentence or "")
    assert why in (outcome.sentence or "")
    assert any(why in told for told in report.sentences([outcome]))
    assert report.outcomes_table([outcome], "made up", machine).notes[0].endswith("1 without a choice.")
    assert read(tmp_path / "table.json").rows == ()


@pytest.mark.parametrize("direction", KINDS)
@pytest.mark.parametrize(("apart", "taken"), [(1.2, True), (1.0, False)])
def test_what_was_measured_of_a_group_is_chosen(
    direction: str, apart: float, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored, read, and first of the plans that the operators try; members apart, which is the safe way, by no luck."""
    cell = replace(QKV, direction=direction)
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(tuned, "identify", lambda device: DEVICE)
    monkeypatch.setattr(tuned, "running_versions", lambda: VERSIONS)
    hosts = {"apart": {"prepared": 60.0}, KINDS[direction].kind: {"prepared": 30.0}}
    bench = FakeBench(ratios={"apart": apart, KINDS[direction].kind: 1.0995}, hosts=hosts)
    (outcome,) = bench.run([cell], tmp_path / "tuned" / "nvidia-h200.json")
    assert outcome.row is not None
    assert isinstance(outcome.row.plan, KINDS[direction] if taken else Apart)
    tuned.forget()
    ranking.forget()
    chosen = {way: ranking.plan_for(GPU, H200, cell, True, way) for way in (GRAPH, PREPARED)}
    assert chosen[GRAPH] == outcome.row.plan
    assert isinstance(chosen[PREPARED], KINDS[direction] if taken else Apart)
    tuned.forget()
    ranking.forget()


# By command


def test_a_dry_run_lists_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    command = "tune --dry-run --machine h200 --shapes 4096x4096+1024+1024 --tokens 8192 --directions forward"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "apart" in out
    assert "hopper_group" in out
