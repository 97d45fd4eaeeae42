"""Models of transformers, and parity with PEFT in what is replaced and what trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRAConfig, replace_linear, restore_linear, use_backend
from lora_kernels.models.model import lora_layers
from made_models import Net
from numerics import same_bits

# transformers


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


SETTINGS = [
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "target_modules": "all-linear"},
    {"r": 4, "target_modules": "all-linear", "exclude_modules": ["k_proj", "down_proj"], "use_dora": True},
    {"r": 4, "target_modules": r".*\.1\..*_proj", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}},
    {"r": 2, "target_modules": ["o_proj", "lm_head"], "bias": "all", "use_rslora": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_llama_trains_as_many_parameters_as_with_peft(llama: nn.Module, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(llama)
    report = replace_linear(model, LoRAConfig(**settings))
    lora_kernels.mark_only_lora_as_trainable(model, bias=settings.get("bias", "none"))
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(**settings))
    expected = theirs.get_nb_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (trainable, report.total) == expected
    assert (report.adapter_parameters, len(report)) == (
        expected[0],
        sum(isinstance(module, peft.tuners.lora.Linear) for module in theirs.modules()),
    )


def test_a_llama_runs_trains_merges_and_is_restored(llama: nn.Module) -> None:
    model, tokens = copy.deepcopy(llama).eval(), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        base = model(tokens).logits
    replace_linear(model, LoRAConfig(r=4, target_modules="all-linear"))
    assert type(model.lm_head) is nn.Linear
    lora_kernels.mark_only_lora_as_trainable(model)
    with use_backend("eager"):  # PyTorch's own product on both sides: the same bits
        assert torch.equal(model(tokens).logits, base)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.lora_B.grad is not None for _, layer in lora_layers(model))
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=2), llama.generate(tokens[:1], max_new_tokens=2))
    restore_linear(model)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["replaced", "fused"])
def test_activation_checkpointing_changes_no_bit(llama: nn.Module, fused: bool, reentrant: bool) -> None:
    """Of the loss and of every gradient, with dropout."""
    settings = {"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear", "init_lora_weights": False}
    model: Any = copy.deepcopy(llama)
    if fused:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        lora_kernels.fuse_peft(model)
    else:
        replace_linear(model, LoRAConfig(**settings))
        lora_kernels.mark_only_lora_as_trainable(model)
    tokens, results = torch.arange(12).reshape(2, 6), []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append([loss.detach().reshape(1), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(same_bits(recomputed, plain) for plain, recomputed in zip(*results, strict=True))


def test_the_parts_of_a_peft_layer_are_left_alone() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up"]))
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert {layer.name.rpartition(".")[2] for layer in report} == {"down", "head"}
    assert len(report.skipped) == 6
    assert all("PEFT" in layer.reason for layer in report.skipped)
