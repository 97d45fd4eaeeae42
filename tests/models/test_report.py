"""What is printed of a whole model: a screen, whatever its size, and what holds at the moment of printing."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRAConfig, replace_linear, restore_linear, share_inputs
from lora_kernels.models.summary import kinds
from made_models import Net

pytestmark = pytest.mark.filterwarnings("ignore::lora_kernels.errors.LoRAKernelsWarning")
SCREEN = 20
EVERY_LINEAR = LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear")
MARK = lora_kernels.mark_only_lora_as_trainable


def on_meta(name: str, **sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    return model


def llama() -> nn.Module:
    """32 layers of a Llama's shapes, and no memory."""
    return on_meta("Llama", num_key_value_heads=8, intermediate_size=14336)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def changed(report: Any, change: Callable[[], object]) -> list[str]:
    """The lines of ``report`` that ``change`` makes."""
    before = str(report).splitlines()
    change()
    return [line for line in str(report).splitlines() if line not in before]


def test_a_llama_of_32_layers_is_a_screen() -> None:
    model = llama()
    report = replace_linear(model, EVERY_LINEAR)
    MARK(model)
    assert str(report).splitlines() == [
        "replaced 224 layers:",
        "  32 × q_proj (4096→4096), r = 16, alpha = 32: 4,194,304 parameters",
        "  32 × k_proj (4096→1024), r = 16, alpha = 32: 2,621,440 parameters",
        "  32 × v_proj (4096→1024), r = 16, alpha = 32: 2,621,440 parameters",
        "  32 × o_proj (4096→4096), r = 16, alpha = 32: 4,194,304 parameters",
        "  32 × gate_proj (4096→14336), r = 16, alpha = 32: 9,437,184 parameters",
        "  32 × up_proj (4096→14336), r = 16, alpha = 32: 9,437,184 parameters",
        "  32 × down_proj (14336→4096), r = 16, alpha = 32: 9,437,184 parameters",
        "64 groups of layers with one input: 32 × q_proj + k_proj + v_proj, 32 × gate_proj + up_proj",
        "32 gated MLPs in one pass: 32 × mlp",
        "trainable parameters: 41,943,040 of 7,152,603,136 (0.5864 %)",
    ]
    assert repr(report) == str(report)
    assert "  layers.31.mlp.down_proj (14336 -> 4096), r=16, alpha=32, 294,912 parameters" in report.details()
    assert sum(line.startswith("  layers.") for line in report.details().splitlines()) == len(report) == 224


def test_layers_that_are_called_alike_are_told_apart() -> None:
    lines = str(replace_linear(on_meta("GPT2"), LoRAConfig(r=8, target_modules="all-linear"))).splitlines()
    labels = [line.partition(" (")[0].strip() for line in lines if " × " in line]
    assert labels == ["12 × c_attn", "12 × attn.c_proj", "12 × c_fc", "12 × mlp.c_proj"]


CASES = {
    "a rank for each layer": LoRAConfig(
        r=4, target_modules="all-linear", rank_pattern={f"layers.{i}.self_attn.q_proj": i + 1 for i in range(32)}
    ),
    "everything left alone": LoRAConfig(
        r=4,
        target_modules=["q_proj", "input_layernorm", "embed_tokens", "act_fn", "rotary_emb", "self_attn", "mlp"],
        exclude_modules=[f"layers.{i}.self_attn.q_proj" for i in range(1, 32)],
    ),
    "many notes": LoRAConfig(r=4, target_modules=["q_proj", *(f"absent{i}" for i in range(40))]),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_is_told_it_stays_a_screen(case: str) -> None:
    report = replace_linear(llama(), CASES[case])
    assert len(str(report).splitlines()) <= SCREEN
    assert set(report.notes) <= {line.removeprefix("note: ") for line in report.details().splitlines()}


def test_more_kinds_than_fit_are_counted() -> None:
    model = nn.ModuleDict({f"{word}s": nn.Linear(4, 4) for word in ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")})
    lines = str(replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))).splitlines()
    assert lines[7:9] == [
        "  gs (4→4), r = 2, alpha = 16: 16 parameters",
        "  and 3 layers of 3 more kinds; details() names them",
    ]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([f"h.{i}.fc" for i in range(9)], ["9 × fc"]),
        ([f"lin{i}" for i in range(9)], ["9 × lin*"]),
        ([f"h.{i}.fc1" for i in range(9)], ["9 × fc1"]),
        ([f"h.{i}.{j}" for i in range(5) for j in (0, 2)], ["10 × h.*.*"]),
        ([f"{i}" for i in range(9)], ["9 × 0, 1, 2, 3 and 5 more"]),
        ([*(f"h.{i}.fc" for i in range(8)), "head.fc"], ["8 × h.*.fc", "head.fc"]),
        ([f"{side}.{i}.q" for side in ("left", "right") for i in range(5)], ["5 × left.*.q", "5 × right.*.q"]),
    ],
)
def test_the_label_is_the_shortest_end_of_a_name_that_tells(names: list[str], labels: list[str]) -> None:
    found = kinds(names)
    assert [str(kind) for kind in found] == labels
    assert sorted(index for kind in found for index in kind.indices) == list(range(len(names)))


def test_reasons_that_differ_by_a_number_are_one_line() -> None:
    model = llama()
    for layer in model.layers:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    (line,) = (line for line in str(report).splitlines() if "up_proj" in line)
    assert line.startswith("  32 × up_proj: its weight is also layers.*.mlp.gate_proj.weight, which is not replaced")
    assert "layers.31.mlp.gate_proj.weight" in report.details()


def test_what_trains_is_told_as_of_printing() -> None:
    model = small()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    assert "  of these 132 are not adapters; mark_only_lora_as_trainable(model) freezes them" in str(report)
    assert changed(report, lambda: MARK(model)) == ["trainable parameters: 96 of 772 (12.44 %)"]
    assert "are not adapters" not in str(report) + report.details()
    assert (report.trainable, report.total) == (228, 772)


def test_what_the_configuration_trains_is_not_called_freezable() -> None:
    model = Net()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["up"], bias="lora_only", modules_to_save=["head"]))
    MARK(model)
    asked_for = sum(p.numel() for p in model.parameters() if p.requires_grad) - report.adapter_parameters
    assert asked_for > 24
    assert f"  of these {asked_for:,} are biases and whole modules that the configuration trains" in str(report)
    assert "freezes them" not in str(report)


def test_without_its_model_a_report_says_of_when_it_tells() -> None:
    model = small()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    still = weakref.ref(model)
    MARK(model)
    del model
    gc.collect()
    assert still() is None
    assert "trainable parameters when the layers were replaced: 228 of 772 (29.53 %)" in str(report)
    assert "  of these 132 were not adapters" in str(report)


def test_parameters_in_shards_are_told_as_of_when_they_were_whole() -> None:
    model = small()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    model[2].weight.ds_id = 0  # DeepSpeed ZeRO-3's mark
    assert "trainable parameters when the layers were replaced: 228 of 772" in str(report)


def test_layers_that_left_and_settings_that_changed_are_told() -> None:
    model = small()
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))

    def another_alpha() -> None:
        model[0].lora_alpha = 1.0

    assert changed(report, another_alpha) == ["since then 1 of the 2 layers was given other adapters, ranks or alphas"]
    model[2] = nn.Linear(32, 4)
    assert "since then 1 of the 2 layers was taken out of the model" in str(report)
    restore_linear(model)
    assert "since then all 2 layers were taken out of the model" in report.details()


def test_groups_that_run_apart_again_are_told() -> None:
    model = llama()
    report = replace_linear(model, EVERY_LINEAR)
    told = changed(report, lambda: lora_kernels.unshare_inputs(model))
    assert [line.partition(": ")[0] for line in told] == [
        "64 groups of layers with one input, of which none runs together now",
        "32 gated MLPs in one pass, of which none is so now",
    ]
    shared = share_inputs(model)
    assert str(shared).splitlines() == [
        "64 groups of layers with one input:",
        "  32 × q_proj + k_proj + v_proj",
        "  32 × gate_proj + up_proj",
        "32 gated MLPs in one pass: 32 × mlp",
    ]
    assert len(shared.details().splitlines()) == 66
    lora_kernels.unshare_inputs(model.layers[0])
    assert "64 groups of layers with one input, of which 62 run together now" in str(shared)


def test_restored_layers_are_a_screen() -> None:
    model = llama()
    replace_linear(model, EVERY_LINEAR)
    report = restore_linear(model)
    assert str(report).splitlines()[1] == "  32 × q_proj: base weight; adapter dropped"
    assert str(report).splitlines()[-1] == "adapters merged: 0; adapters dropped: 224"
    assert (len(str(report).splitlines()), len(report.details().splitlines())) == (9, 226)


def test_a_loaded_adapter_is_a_screen(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12, "num_attention_heads": 2}
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=24, **sizes)
    trained, plain = transformers.LlamaModel(config), transformers.LlamaModel(config)
    replace_linear(trained, LoRAConfig(r=2, target_modules="all-linear", modules_to_save=["input_layernorm"]))
    MARK(trained)
    lora_kernels.save_adapter(trained, tmp_path)
    report = lora_kernels.load_adapter(plain, tmp_path)
    assert str(report).splitlines()[1] == "  12 × q_proj (16→16), r = 2, alpha = 16: 768 parameters"
    assert str(report).splitlines()[-1] == "loaded 12 other tensors: 12 × input_layernorm.weight"
    assert len(report.details().splitlines()) == 86
    assert changed(report, lambda: restore_linear(plain)) == ["since then all 84 layers were taken out of the model"]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_tells_of_the_same_model(again: Callable[[Any], Any]) -> None:
    model = small()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    copied = again(report)
    MARK(model)
    assert copied == report
    assert str(copied) == str(report)


def test_a_pickled_report_holds_what_was_counted_and_no_model() -> None:
    model = small()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    loaded = pickle.loads(pickle.dumps(report))
    assert loaded == report
    assert "trainable parameters when the layers were replaced: 228 of 772" in str(loaded)
    assert len(pickle.dumps(report)) < 1000


def test_programs_read_the_fields_they_have_read() -> None:
    report = replace_linear(small(), LoRAConfig(r=2, target_modules=["0"]))
    data = json.loads(json.dumps(asdict(report)))
    assert list(data) == ["layers", "skipped", "notes", "groups", "adapter_parameters", "trainable", "total", "mlps",
                          "plain_mlps"]  # fmt: skip


def test_signs_that_the_output_cannot_write_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    report = replace_linear(model, EVERY_LINEAR)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print(report)
    assert "  32 x q_proj (4096->4096), r = 16" in str(report)
