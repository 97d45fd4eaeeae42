"""Layers of one x in the tuner: run by each plan, with the kernels emulated, and judged member by member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.group_plans import Apart, DxHopperGroup, HopperGroup
from lora_kernels.backends.triton.choose.plans import Cell
from lora_kernels.backends.triton.choose.table import read
from lora_kernels.benchmark.timing import Candidate, Timing
from lora_kernels.tuning import bench as device_bench
from lora_kernels.tuning import passes
from lora_kernels.tuning.bench import DeviceBench
from lora_kernels.tuning.session import Options, run
from made_tables import timing
from test_hopper_group_plans import launches, memory  # noqa: F401  (fixtures: the kernels emulated)
from test_hopper_plans import MACHINE

SMALL = Cell("forward", 32, 136, 136, 4, "bfloat16", False, ((72, 4), (40, 4)))
KINDS = {"forward": HopperGroup, "backward": DxHopperGroup}


def clock(runs: Sequence[Candidate], floor: str, budget: float, rounds: int, *rest: Any) -> dict[str, Timing]:
    """Runs the floor; the first candidates are the quickest."""
    runs[0].run(0)
    return {candidate.name: timing([1.0 + 0.01 * i] * rounds) for i, candidate in enumerate(runs)}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> DeviceBench:
    for module in (device_bench, passes):
        monkeypatch.setattr(module, "machine_of", lambda device: MACHINE)
    return DeviceBench(torch.device("cpu"), clock=clock)


@pytest.mark.parametrize(("direction", "dropout"), [("forward", True), ("backward", False)])
def test_a_group_is_tuned_with_its_kernels_emulated(
    direction: str, dropout: bool, bench: DeviceBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = replace(SMALL, direction=direction, dropout=dropout)
    few = [next(p for p in candidates(MACHINE, cell) if isinstance(p, kind)) for kind in (KINDS[direction], Apart)]
    monkeypatch.setattr("lora_kernels.tuning.search.shortlist", lambda *arguments: few)
    table = tmp_path / "table.json"
    (outcome,) = run([cell], bench, Options((table,), 600.0))
    assert outcome.status == "tuned", outcome.sentence
    assert outcome.found is not None
    assert outcome.found.refused == {}
    assert set(outcome.found.kinds) == {"apart", KINDS[direction].kind}
    assert [(row.cell, row.plan) for row in read(table).rows] == [(cell, few[0])]


FAULTS: dict[str, tuple[str, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], str]] = {
    "y of the last": ("forward", lambda r: (*r[:2], 0.99 * r[2], *r[3:]), "Of layer 3: y"),
    "h of the first": ("forward", lambda r: (*r[:3], r[3].flip(0), *r[4:]), "Of layer 1: h"),
    "dx": ("backward", lambda r: (0.99 * r[0], *r[1:]), "dx"),
    "dx without a member": ("backward", lambda r: (torch.full_like(r[0], float("nan")), *r[1:]), "not finite"),
    "da of the second": ("backward", lambda r: (*r[:2], r[2].flip(0), *r[3:]), "Of layer 2: da"),
    "db of the last": ("backward", lambda r: (*r[:6], 0.98 * r[6]), "Of layer 3: db"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_member_is_seen(name: str, bench: DeviceBench) -> None:
    direction, fault, sentence = FAULTS[name]
    with bench.open(replace(SMALL, direction=direction)) as trial:
        plan = next(p for p in candidates(MACHINE, trial._cell) if isinstance(p, KINDS[direction]))
        judged = trial._opened
        right = judged.run(plan, 0)
        assert judged.wrong(right) is None
        assert sentence in (judged.wrong(fault(right)) or "")
