"""The decoder block's benchmark, tiny, on the CPU: what it computes, counts and says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lora_kernels.benchmark import block
from lora_kernels.cli import main
from lora_kernels.errors import InvalidArgumentError

TINY = "hidden=64,inner=96,heads=4,key_heads=2,tokens=24"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("block") / "block.json"
    call = ["bench", "--preset", "gpu-block", "--block", TINY, "--device", "cpu", "--budget", "0.01"]
    assert main([*call, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_cell_is_right_and_timed(document: dict[str, Any]) -> None:
    assert [(cell["tokens"], cell["p"], cell["failed"]) for cell in document["cells"]] == [
        (24, 0.0, None), (24, 0.05, None)
    ]  # fmt: skip
    for cell in document["cells"]:
        assert set(cell["providers"]) == {"linear", "peft", "auto"}
        assert all(n["tokens_per_second"] > 0 and n["rounds"] >= 5 for n in cell["providers"].values())


def test_ours_keeps_less_than_pefts(document: dict[str, Any]) -> None:
    """No dropped x and no mask; without dropout, and nothing to cast, as much. The frozen block keeps least."""
    for cell in document["cells"]:
        kept = {name: n["bytes_kept"] for name, n in cell["providers"].items()}
        assert kept["linear"] < kept["auto"] <= kept["peft"] * (1.0 if cell["p"] == 0.0 else 0.8)
        assert cell["reached"]["bytes kept over PEFT's"] == kept["auto"] / kept["peft"]
        peak = {name: n["bytes_peak"] for name, n in cell["providers"].items()}
        assert all(peak[name] > kept[name] for name in peak)


def test_it_is_told_line_by_line(document: dict[str, Any]) -> None:
    lines = block.told(document)
    assert len(lines) == 10
    assert sum("over PEFT's" in line for line in lines) == 4


def test_another_function_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    copied = block._same_adapters

    def faulty(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
        copied(theirs, ours)
        ours.layers[0].mlp.down_proj.lora_B.data *= 1.5

    monkeypatch.setattr(block, "_same_adapters", faulty)
    found = block.run_block(block.sizes_of(TINY), "cpu", "2026-01-01", 0.0)
    assert all("FAILS" in cell["failed"] for cell in found["cells"])
    assert "computes something else" in block.told(found)[0]


def test_what_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block.importlib.util, "find_spec", lambda name: None)
    found = block.run_block(block.sizes_of(TINY), "cpu", "2026-01-01", 0.0)
    assert "transformers and peft is not installed" in found["left_out"]
    assert "was not run" in block.told(found)[0]


@pytest.mark.parametrize(
    "text",
    ["hidden=0", "depth=3", "hidden=a", f"hidden={'9' * 5000}", "heads=2/4", "hidden=60,heads=4", "key_heads=5"],
)
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"--block|must be a multiple"):
        block.sizes_of(text)
