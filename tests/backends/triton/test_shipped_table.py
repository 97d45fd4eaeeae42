"""The tuned table that ships: made of what was measured, on one stream, never slower than a plain composition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import shipped_table
from lora_kernels.backends.triton.choose import candidates, tuned
from lora_kernels.backends.triton.choose.plans import Cell
from lora_kernels.backends.triton.choose.table import DeviceName
from lora_kernels.benchmark.roofline import MACHINES

H100 = DeviceName("NVIDIA H100 80GB HBM3", 90, 132)
DOCUMENT: dict[str, Any] = json.loads(shipped_table.MEASURED.read_text(encoding="utf-8"))
MEASURED = [
    (
        Cell(**cell["cell"]),
        {p: entry["ratio"] for entry in cell["measured"] if (p := shipped_table._plan(entry["plan"])) is not None},
    )
    for cell in DOCUMENT["cells"]
]


def test_it_is_what_was_measured(tmp_path: Path) -> None:
    assert shipped_table.main(["--check"]) == 0
    assert shipped_table.main(["--check", "--folder", str(tmp_path)]) == 1
    assert shipped_table.main(["--write", "--folder", str(tmp_path)]) == 0
    assert shipped_table.main(["--check", "--folder", str(tmp_path)]) == 0


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[Cell, Any]:
    """What an H100 would take of it, with the kernels and Triton that it was measured with."""
    table = shipped_table.table_of(DOCUMENT)
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "running_versions", lambda: {**table.rows[0].versions})
    kernels = {row.plan.kind: row.versions["kernels"] for row in table.rows}
    monkeypatch.setattr(tuned, "versions_of", lambda plan, running: {**running, "kernels": kernels[plan.kind]})
    loaded = tuned.load(H100)
    assert [(source.origin, source.used) for source in loaded.sources] == [("shipped", len(DOCUMENT["cells"]))]
    return {cell: loaded.rows[cell].plan for cell, _ in MEASURED}


def test_no_choice_takes_a_second_stream_or_has_no_room(shipped: dict[Cell, Any]) -> None:
    gpu = MACHINES["h100"].gpu
    assert gpu is not None
    assert [cell for cell, plan in shipped.items() if getattr(plan, "beside", False)] == []
    assert [cell for cell, plan in shipped.items() if not candidates.fits(gpu, cell, plan)] == []


def test_no_choice_is_slower_than_a_composition_or_the_untuned_choice(shipped: dict[Cell, Any]) -> None:
    """Within what the tuner itself takes for noise, 0.5 %: more rounds for one than the other."""
    gpu = MACHINES["h100"].gpu
    assert gpu is not None
    slower = []
    for cell, ratios in MEASURED:
        one_stream = {plan: ratio for plan, ratio in ratios.items() if not getattr(plan, "beside", False)}
        rivals = {plan: ratio for plan, ratio in one_stream.items() if plan.is_composition}
        untuned = candidates.candidates(gpu, cell)[0]
        rivals |= {untuned: ratios[untuned]} if untuned in ratios else {}
        slower += [cell for ratio in rivals.values() if ratios[shipped[cell]] > 1.005 * ratio]
    assert slower == []


def test_it_counts_here_or_says_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of kernels that have changed since are passed over by themselves, and ``info`` has the sentence."""
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tuned, "identify", lambda device: H100)
    (device,) = tuned.status()["devices"]
    (file,) = device["files"]
    assert file["used"] == file["rows"] or "passed over" in file["passed_over"][0]
