"""``lora_plus_groups``: the groups of PEFT's LoRA+ optimizer, for its models and ours; errors are sentences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, fuse_peft, lora_plus_groups, mark_only_lora_as_trainable, replace_linear
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from made_models import Net, refused

RATES: dict[str, Any] = {"lr": 1e-3, "lr_ratio": 8.0, "weight_decay": 0.1, "embedding_lr": 1e-5}


class Normed(Net):
    """With a layer norm, and a layer whose name has ``bias`` in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.bias_head = nn.Linear(8, 3)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["up", "down"]},
    "biases": {"target_modules": ["up"], "bias": "all"},
    "DoRA": {"target_modules": ["up"], "use_dora": True},
    "bias of B": {"target_modules": ["up"], "lora_bias": True},
    "embedding": {"target_modules": ["embed", "up"]},
    "DoRA of an embedding": {"target_modules": ["embed"], "use_dora": True},
    "whole modules": {"target_modules": ["up"], "modules_to_save": ["norm", "head"]},
    "a name with bias": {"target_modules": ["bias_head"]},
}


def seen(model: nn.Module, groups: list[dict[str, Any]]) -> list[Any]:
    """Names, decay and rate of each group with parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ([names[parameter] for parameter in group["params"]], group["weight_decay"], group["lr"])
        for group in groups
        if group["params"]
    ]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_groups_are_pefts(case: str, fused: bool) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from peft.optimizers import create_loraplus_optimizer

    model = peft.get_peft_model(Normed(), peft.LoraConfig(r=2, **CASES[case]))
    if fused and case not in ("DoRA of an embedding",):
        fuse_peft(model)
    theirs = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=RATES["lr"],
        loraplus_lr_ratio=RATES["lr_ratio"],
        loraplus_weight_decay=RATES["weight_decay"],
        loraplus_lr_embedding=RATES["embedding_lr"],
    )
    assert seen(model, lora_plus_groups(model, **RATES)) == seen(model, theirs.param_groups)


OURS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "plain": ({}, [(["up.lora_A"], 0.1, 1e-3), (["up.lora_B"], 0.1, 8e-3)]),
    "DoRA": (
        {"use_dora": True},
        [(["up.lora_A"], 0.1, 1e-3), (["up.lora_B", "up.lora_magnitude_vector"], 0.1, 8e-3)],
    ),
    "biases": (
        {"lora_bias": True, "bias": "lora_only"},
        [(["up.lora_A"], 0.1, 1e-3), (["up.lora_B"], 0.1, 8e-3), (["up.bias", "up.lora_bias"], 0.0, 8e-3)],
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_the_groups_of_our_layers(case: str) -> None:
    arguments, expected = OURS[case]
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "frozen": nn.Linear(8, 8)})
    replace_linear(model, LoRAConfig(r=2, target_modules=["up"], **arguments))
    mark_only_lora_as_trainable(model, arguments.get("bias", "none"))
    assert seen(model, lora_plus_groups(model, **RATES)) == expected


def test_lora_b_moves_faster_by_the_ratio() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    replace_linear(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
    before = copy.deepcopy(model[0])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(lora_plus_groups(model, lr=2**-10, lr_ratio=16)).step()
    assert torch.equal(model[0].lora_A, before.lora_A - 2**-10)
    assert torch.equal(model[0].lora_B, before.lora_B - 2**-6)


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "lr of 0": ({"lr": 0.0}, "lr=0.0"),
    "negative lr": ({"lr": -1e-3}, "lr=-0.001"),
    "lr as text": ({"lr": "1e-3"}, "lr='1e-3'"),
    "infinite lr": ({"lr": float("inf")}, "lr=inf"),
    "ratio": ({"lr_ratio": 0.5}, "lr_ratio=0.5"),
    "NaN": ({"lr_ratio": float("nan")}, "lr_ratio=nan"),
    "decay": ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    "embedding": ({"embedding_lr": 0}, "embedding_lr=0"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_is_not_allowed_is_a_sentence(name: str) -> None:
    change, word = VALUES[name]
    model = nn.Sequential(nn.Linear(8, 8))
    replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    refused(model, lambda model: lora_plus_groups(model, **{**RATES, **change}), InvalidArgumentError, word)


def test_models_without_adapters_that_train_are_sentences() -> None:
    groups = lambda model: lora_plus_groups(model, 1e-3)  # noqa: E731
    model = nn.Sequential(nn.Linear(8, 8))
    refused(model, groups, LoRAStateError, "no LoRA parameters", "replace_linear")
    replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    refused(model.requires_grad_(False), groups, LoRAStateError, "all frozen", "mark_only_lora_as_trainable")
    refused(3, groups, InvalidTypeError, "int")
