"""The benchmark of experts runs in small, checks before it times, and writes what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import moe
from scripts import gpu_stages

for package in ("peft", "transformers"):
    pytest.importorskip(package)


def test_small_sizes_run_and_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "moe.json"
    assert moe.main(["--small", "--rounds", "2", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [(row["dtype"], row["provider"]) for row in result["rows"]] == [
        (dtype, provider) for dtype in ("float32", "bfloat16") for provider in moe.PROVIDERS
    ]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in result["rows"])
    assert {row["ratio"] for row in result["rows"] if row["provider"] == "frozen"} == {1.0}
    assert len(capsys.readouterr().out.splitlines()) == len(result["rows"])


def test_the_layer_that_is_measured_on_a_gpu_runs_in_small(tmp_path: Path) -> None:
    file = tmp_path / "moe.json"
    layer = ["--layer", "qwen3-30b", "--dtypes", "bfloat16"]
    assert moe.main(["--small", "--rounds", "2", *layer, "--json", str(file)]) == 0
    told = [row["provider"] for row in json.loads(file.read_text())["rows"]]
    assert told == ["frozen", "ours", "peft", "loop"]
    assert gpu_stages.judge_moe(file).startswith("4 providers, ours ")
    assert moe.LAYERS["qwen3-30b"] == moe.Sizes(128, 2048, 768, 8, 8192, 16)


def test_what_is_wrong_is_not_timed() -> None:
    made, given = moe.models(moe.SMALL, torch.float32), moe.inputs(moe.SMALL, torch.float32)
    moe.check(made, given, torch.float32)
    factor = made["ours"].experts.lora_A["down_proj"]
    factor.data = factor.data.flip(0)
    with pytest.raises(SystemExit, match="ours is not timed"):
        moe.check(made, given, torch.float32)
