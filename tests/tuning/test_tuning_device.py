"""The tuner on a GPU: one small cell, from the clock to the call that takes what it stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cases import Case, keep_mask, make, measures, run
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose import tuned
from lora_kernels.backends.triton.choose.blocks import machine_of
from lora_kernels.backends.triton.choose.candidates import fits
from lora_kernels.backends.triton.choose.launching import GRAPH
from lora_kernels.backends.triton.choose.plans import Cell, plan_to_json
from lora_kernels.backends.triton.choose.ranking import plan_for
from lora_kernels.cli import main
from numerics import check_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU and torch sees no CUDA device"),
]
SIZES = ["--shapes", "1024x512", "--ranks", "16", "--candidates", "6"]


@pytest.mark.parametrize(
    ("direction", "tokens", "dropout"), [("forward", 8, False), ("forward", 256, True), ("backward", 256, True)]
)
def test_what_is_tuned_runs_and_is_right(
    direction: str, tokens: int, dropout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    tuned.forget()
    operators.forget()
    options = [*SIZES, "--tokens", str(tokens), "--dropout", "0.1" if dropout else "0", "--directions", direction]
    assert main(["tune", *options, "--json", str(tmp_path / "tune.json")]) == 0
    (found,) = json.loads((tmp_path / "tune.json").read_text())["cells"]
    assert (found["status"], len(found["measured"]) >= 4) == ("tuned", True)
    assert {entry["clock"] for entry in found["measured"]} == {"graph"}
    device = torch.device("cuda", torch.cuda.current_device())
    cell = Cell(direction, tokens, 1024, 512, 16, "bfloat16", dropout)
    in_a_graph = plan_for(device, machine_of(device), cell, launching=GRAPH)
    assert plan_to_json(in_a_graph) == found["row"]["plan"]
    chosen = plan_for(device, machine_of(device), cell)  # another one where launching it costs the host less
    assert plan_to_json(chosen) in [found["row"]["plan"], *(entry["plan"] for entry in found["row"]["timed"])]
    assert fits(machine_of(device), cell, chosen)
    p = 0.1 if dropout else 0.0
    case = Case(m=tokens, k=1024, n=512, r=16, p=p, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    inputs = make(case, "cuda")
    mask = keep_mask(case, inputs, "triton")
    exact, yardstick, errors = measures(case, inputs, mask)
    check_all(run(case, inputs, "triton"), exact, yardstick, case.dtype, expected=errors)
    tuned.forget()
    operators.forget()
