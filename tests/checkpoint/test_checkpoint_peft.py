"""Adapters both ways between PEFT and us, for tiny transformers models: the same outputs, the same merged weights."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from architectures import logits, made, peft_model
from lora_kernels import LoRAConfig, load_adapter, replace_linear, save_adapter
from lora_kernels.models.model import lora_layers
from made_models import disturb
from numerics import check, check_all

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
    "alpha_pattern": {"^model.layers.0.mlp.up_proj": 3},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "llama, patterns": ("llama", {"target_modules": "all-linear", **PATTERNS}),
    "llama, one layer": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "llama, DoRA": ("llama", {"target_modules": r".*\.(gate|down)_proj", "use_dora": True}),
    "llama, excluded": (
        "llama",
        {"target_modules": ["up_proj", "o_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    ),
    "qwen2, its biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "qwen2, tied head": ("qwen2", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "gpt2, bias of B": ("gpt2", {"target_modules": "all-linear", "lora_bias": True}),
    "gpt2, DoRA": ("gpt2", {"target_modules": ["c_fc"], "use_dora": True, "bias": "all"}),
    "bert, head": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"}),
    "bert, bias of B": ("bert", {"target_modules": ["dense"], "lora_bias": True, "exclude_modules": ["pooler.dense"]}),
    "vit": ("vit", {"target_modules": "all-linear", "modules_to_save": ["classifier"], "use_rslora": True}),
}


def ours_of(name: str, **arguments: Any) -> nn.Module:
    arguments.pop("fan_in_fan_out", None)
    if arguments.pop("task_type", None) == "SEQ_CLS":
        arguments["modules_to_save"] = ["classifier"]
    model = made(name)
    if arguments.get("modules_to_save") == ["lm_head"]:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    replace_linear(model, LoRAConfig(r=4, lora_alpha=6, init_lora_weights=False, **arguments))
    lora_kernels.mark_only_lora_as_trainable(model, arguments.get("bias", "none"))
    return disturb(model)


def same_outputs(model: nn.Module, theirs: nn.Module) -> None:
    check("logits", logits(model), partial(logits, copy.deepcopy(theirs).double()), logits(theirs), torch.float32)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_gives_the_same_outputs_and_merged_weights(case: str, tmp_path: Path) -> None:
    name, arguments = CASES[case]
    theirs, model = peft_model(name, **arguments), made(name)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it knows every field that this PEFT writes
        load_adapter(model, tmp_path)
    same_outputs(model, theirs)
    lora_kernels.merge_lora(model)
    lora_kernels.restore_linear(model)
    exact, merged = copy.deepcopy(theirs).double().merge_and_unload().state_dict(), theirs.merge_and_unload()
    assert {key: type(module) for key, module in model.named_modules()} == {
        key: type(module) for key, module in merged.named_modules()
    }
    check_all(model.state_dict(), exact, merged.state_dict(), torch.float32)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", CASES)
def test_what_we_save_gives_peft_the_same_outputs_under_the_same_names(case: str, tmp_path: Path) -> None:
    name, arguments = CASES[case]
    model = ours_of(name, **arguments)
    save_adapter(model, tmp_path, task_type=arguments.get("task_type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|did not match|no modules were excluded).*")
        theirs = peft.PeftModel.from_pretrained(made(name), tmp_path).eval()
    same_outputs(model, theirs)
    saved = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    expected = {k for k in peft.get_peft_model_state_dict(theirs) if ".original_module." not in k}
    assert set(saved) == {key for key in expected if ".modules_to_save." not in key}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", ["llama, patterns", "gpt2, DoRA", "bert, head"])
def test_loading_and_saving_again_changes_neither_file(case: str, tmp_path: Path) -> None:
    name, arguments = CASES[case]
    peft_model(name, **arguments).save_pretrained(tmp_path / "theirs")
    model = made(name)
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    fields, again = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    assert again.keys() == fields.keys()
    same = {key for key in fields if key not in ("fan_in_fan_out", "target_modules", "init_lora_weights")}
    assert {key: again[key] for key in same} == {key: fields[key] for key in same}
    tensors, kept = (safetensors.load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert all(torch.equal(tensors[key], kept[key]) for key in kept)
    assert all(".original_module." in key or ".modules_to_save." in key for key in tensors.keys() - kept.keys())


def dtypes_in(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in safetensors.load_file(folder / "adapter_model.safetensors").values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_over_a_16_bit_base_trains_in_fp32_whatever_the_file_has(dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(made("llama", torch.bfloat16), config, autocast_adapter_dtype=dtype == torch.float32)
    theirs.save_pretrained(tmp_path)
    assert dtypes_in(tmp_path) == {dtype}
    model = made("llama", torch.bfloat16)
    load_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(made("llama", torch.bfloat16), tmp_path)
    expected = {parameter.dtype for name, parameter in again.named_parameters() if "lora_" in name}
    assert {layer.lora_A.dtype for _, layer in lora_layers(model)} == expected == {torch.float32}
    kept = made("llama", torch.bfloat16)
    load_adapter(kept, tmp_path, adapter_dtype=dtype)
    assert {layer.lora_B.dtype for _, layer in lora_layers(kept)} == {dtype}
    save_adapter(kept, tmp_path)
    assert dtypes_in(tmp_path) == {dtype}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_name_of_the_adapter_in_a_file_is_read_over(use_dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["c_fc"], init_lora_weights=False, use_dora=use_dora)
    config.lora_bias = not use_dora
    theirs = peft.get_peft_model(made("gpt2"), config)
    theirs.save_pretrained(tmp_path)
    live = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items() if "lora_" in name}
    assert all(".default" in name for name in live)
    safetensors.save_file(live, tmp_path / "adapter_model.safetensors")
    model = made("gpt2")
    load_adapter(model, tmp_path)
    check("logits", logits(model), partial(logits, copy.deepcopy(theirs).double()), logits(theirs), torch.float32)
