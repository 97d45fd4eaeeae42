"""The preset 'qlora': every provider computes the same over one NF4 weight, and its memory is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_kernels.benchmark.presets import preset
from lora_kernels.benchmark.runner import run_preset
from lora_kernels.benchmark.setups import nf4_values
from quantised import bnb

assert bnb is not None
pytest.importorskip("peft", reason="PEFT is a provider of it")


@pytest.fixture(scope="module")
def result() -> Any:
    return run_preset(preset("smoke-qlora"), "2026-01-01", "cpu")


def test_every_provider_is_measured(result: Any) -> None:
    for cell in result.cells:
        status = "measured" if cell.workload.direction == "memory" else "timed"
        assert {name: entry.status for name, entry in cell.providers.items()} == dict.fromkeys(
            ("linear", "nf4", "peft-nf4", "ours-nf4"), status
        ), cell


def test_what_is_kept_beyond_x_and_the_weight_is_h(result: Any) -> None:
    (cell,) = (cell for cell in result.cells if cell.workload.direction == "memory")
    ours = cell.providers["ours-nf4"].numbers
    assert ours["rest"] == 4 * 24 * 4  # h (M, R) in fp32
    assert cell.providers["peft-nf4"].numbers["rest"] >= ours["rest"]


def test_a_layer_of_plain_numbers_is_no_cell_of_these() -> None:
    from lora_kernels.benchmark.providers import PROVIDERS

    sentence = PROVIDERS["ours-nf4"].why_not_subject("layer")
    assert sentence is not None
    assert "not made for one layer with LoRA" in sentence
    assert PROVIDERS["auto"].why_not_subject("nf4") is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weights_values_are_what_nf4_makes_of_them(dtype: torch.dtype) -> None:
    values = nf4_values(torch.randn(96, 64, dtype=dtype))
    assert torch.equal(nf4_values(values), values)
