"""Benchmarks of DoRA, several adapters, groups and a decoder block: what is timed is right, and the table says it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
from bench import tables
from lora_kernels.benchmark import model_providers, runner
from lora_kernels.benchmark.models import make_model_setups, names
from lora_kernels.benchmark.presets import PRESETS, preset
from lora_kernels.benchmark.providers import FLOOR, PROVIDERS, Layer
from lora_kernels.benchmark.ratios import ratios
from lora_kernels.benchmark.workloads import LAYERS, SUBJECTS, Workload
from made_results import made_cell, result_of

CELLS = {w.subject: w for w in preset("smoke-ratios").workloads}
MODEL_PROVIDERS = {p.name: p for p in model_providers.MODEL_PROVIDERS}
ONE = ("peft-lora", "fused-lora", "ours-lora", "peft-dora", "fused-dora", "ours-dora")
TIMED = {
    "dora": ONE,
    "two-adapters": ("peft-lora", "fused-lora"),
    "three-adapters": ("peft-lora", "fused-lora"),
    "mixed-batch": ("peft-lora", "fused-lora"),
    "three-layers": (*ONE, "group"),
    "decoder-block": ONE,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("subject", TIMED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_who_is_timed_computes_what_it_should(subject: str, dtype: str) -> None:
    cell = replace(CELLS[subject], dtype=dtype)
    if subject == "decoder-block" and dtype == "bfloat16":  # a few tokens' roundings do not average out in a chain
        cell = replace(cell, tokens=64, in_features=256, out_features=512)
    setups = runner._make(cell, "cpu", 1, 0)
    entries = {name: runner.admit(provider, setups)[0] for name, provider in MODEL_PROVIDERS.items()}
    assert {name: e.reason for name, e in entries.items() if e.status == "failed"} == {}
    assert {name for name, e in entries.items() if e.status == "checked"} == set(TIMED[subject])
    errors = {name: set(entries[name].errors) - {"y0", "y1", "y2", "dx"} for name in TIMED[subject]}
    gradients = set() if subject == "mixed-batch" else set(names(setups[0], dora=False))
    assert all(found >= gradients for found in errors.values())
    assert all(any("magnitude" in name for name in found) == ("dora" in who) for who, found in errors.items())


def test_every_subject_has_a_cell_and_every_provider_is_in_the_presets() -> None:
    assert set(CELLS) == set(TIMED) == set(SUBJECTS) - set(LAYERS)
    for name in ("ratios", "gpu-ratios"):
        assert set(PRESETS[name].peers) == set(MODEL_PROVIDERS)
        assert {w.subject for w in PRESETS[name].workloads} == set(CELLS)


@pytest.mark.parametrize("subject", ["dora", "decoder-block"])
def test_all_providers_read_one_weight(subject: str) -> None:
    (setup,) = make_model_setups(CELLS[subject], "cpu")
    weights = {p.data_ptr() for p in setup.base.parameters()}
    for name in TIMED[subject]:
        module = MODEL_PROVIDERS[name].build(setup).module
        assert weights <= {p.data_ptr() for p in module.parameters()}


def _swapped(layer: Layer) -> Layer:
    return replace(layer, call=lambda x: (lambda q, k, v: (q, v, k))(*layer.call(x)))


def _magnitude_forgotten(layer: Layer) -> Layer:
    layer.trainable[2].data.mul_(1.01)
    return layer


def _last_adapter_forgotten(layer: Layer) -> Layer:
    layer.trainable[-1].data.zero_()
    return layer


@pytest.mark.parametrize(
    ("subject", "name", "fault"),
    [
        ("three-layers", "group", _swapped),
        ("dora", "peft-dora", _magnitude_forgotten),
        ("dora", "fused-dora", _magnitude_forgotten),
        ("three-adapters", "peft-lora", _last_adapter_forgotten),
        ("mixed-batch", "fused-lora", _last_adapter_forgotten),
        ("decoder-block", "ours-lora", _last_adapter_forgotten),
    ],
)
def test_the_gate_stops_a_wrong_provider(subject: str, name: str, fault: object) -> None:
    right = MODEL_PROVIDERS[name]
    wrong = replace(right, build=lambda setup: fault(right.build(setup)))  # type: ignore[operator]
    entry, layers = runner.admit(wrong, runner._make(CELLS[subject], "cpu", 1, 0))
    assert (entry.status, layers) == ("failed", [])
    assert "something else" in (entry.reason or "")


def test_a_cell_is_timed_against_the_frozen_module_and_the_rest_is_told() -> None:
    peers = [PROVIDERS[name] for name in (FLOOR, "peft", "fused-lora", "ours-lora")]
    cell = runner.run_cell(CELLS["mixed-batch"], peers, "cpu", budget=0.0, min_rounds=2)
    assert [e.status for e in cell.providers.values()] == ["timed", "unavailable", "timed", "unavailable"]
    assert "two adapters" in (cell.providers["peft"].reason or "")
    assert cell.providers[FLOOR].ratio == 1.0


DORA = Workload("step", tokens=8, in_features=64, out_features=48, r=4, subject="dora")
MADE = {"peft-lora": 1.5, "peft-dora": 3.0, "fused-lora": 1.25, "fused-dora": 1.5, "ours-lora": 1.2, "ours-dora": 1.32}


def test_the_table_has_dora_over_lora_and_peft_over_ours() -> None:
    lost = made_cell(replace(DORA, subject="two-adapters"), **{"peft-lora": 1.2, "fused-lora": 1.5})
    table = ratios(result_of(made_cell(DORA, **MADE), lost), "step")
    first = dict(zip(table.header, table.rows[0], strict=True))
    assert first["PEFT"] == "1.50 / 3.00"
    assert [first[f"DoRA / LoRA, {who}"] for who in ("PEFT", "fuse_peft", "replace_linear")] == ["2.00", "1.20", "1.10"]
    ways = [table.header.index(f"PEFT / {way}") for way in ("fuse_peft", "replace_linear")]
    assert [[row[way] for way in ways] for row in table.rows] == [["1.20 / 2.00", "1.25 / 2.27"], ["0.80", "–"]]
    assert table.losses == {(1, ways[0])}
    told = " ".join(table.notes)
    assert "LoRA: PEFT takes 0.98 times as long as fuse_peft (geometric mean of 2 cells; least 0.80), and is" in told
    assert "ahead by more than 2 % in 1. LoRA: PEFT takes 1.25 times as long as replace_linear" in told
    assert "DoRA: PEFT takes 2.27 times as long as replace_linear" in told


def test_a_page_is_filled_with_it(tmp_path: Path) -> None:
    result_of(made_cell(DORA, **MADE), preset="ratios").save(tmp_path / "box" / "ratios.json")
    marked = "<!-- ratios:box/ratios/step/subject=dora -->\n<!-- /ratios -->\n"
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    page.write_text(marked)
    other.write_text("no table\n")
    where = ["--file", str(page), str(other), "--results", str(tmp_path)]
    assert [tables.main([how, *where]) for how in ("--check", "--write", "--check")] == [1, 0, 0]
    assert "| dora | 64→48 | 8 | 1 | 1.50 / 3.00 |" in page.read_text()
