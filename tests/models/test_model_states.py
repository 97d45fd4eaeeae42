"""Merging, restoring, saving and loading whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, replace_linear, restore_linear, use_backend
from lora_kernels.errors import InvalidArgumentError, LoRAKernelsWarning, LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import TOKENS, UP, Net, Snapshot, kinds, refused
from numerics import same_bits


def test_merging_gives_each_layer_its_own_merge_and_unmerging_is_exact() -> None:
    model = Net().eval()
    replace_linear(model, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    expected = copy.deepcopy(model)
    for _, layer in lora_layers(expected):
        layer.merge()
    before = Snapshot(model)
    lora_kernels.merge_lora(model)
    assert torch.equal(model(TOKENS), expected(TOKENS))
    lora_kernels.unmerge_lora(model)
    before.assert_unchanged(model)


def test_a_layer_that_cannot_be_merged_undoes_those_that_were() -> None:
    model = Net()
    replace_linear(model, UP)
    with torch.no_grad():
        model.blocks[1]["up"].lora_A.fill_(float("nan"))
    refused(model, lora_kernels.merge_lora, LoRAStateError, "'blocks.1.up'", "not finite")
    assert not any(layer.merged for _, layer in lora_layers(model))


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused() -> None:
    model = Net()
    replace_linear(model, UP)
    refused(model, lora_kernels.unmerge_lora, LoRAStateError, "'blocks.0.up', 'blocks.1.up'", "merge_lora(model) first")
    model.blocks[0]["up"].merge()
    refused(model, lora_kernels.merge_lora, LoRAStateError, "'blocks.0.up'", "unmerge_lora(model) first")
    refused(model, lora_kernels.unmerge_lora, LoRAStateError, "'blocks.1.up'")
    model.blocks[0]["up"].unmerge()
    lora_kernels.merge_lora(model)
    refused(model, lora_kernels.merge_lora, LoRAStateError, "merged already")


@pytest.mark.parametrize(
    "function",
    [
        lora_kernels.merge_lora,
        lora_kernels.unmerge_lora,
        restore_linear,
        lora_kernels.lora_state_dict,
        lora_kernels.mark_only_lora_as_trainable,
    ],
)
def test_a_model_without_lora_is_refused(function: Callable[[nn.Module], Any]) -> None:
    refused(Net(), function, LoRAStateError, function.__name__, "Net", "replace_linear")


@pytest.mark.parametrize("function", [lora_kernels.mark_only_lora_as_trainable, lora_kernels.lora_state_dict])
def test_another_bias_is_refused(function: Callable[..., Any]) -> None:
    model = Net()
    replace_linear(model, UP)
    refused(model, lambda model: function(model, bias="some"), InvalidArgumentError, "bias='some'", "lora_only")


def test_restoring_drops_what_is_not_merged() -> None:
    model = Net()
    plain, before = Snapshot(model), model(TOKENS)
    replace_linear(model, UP)
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
        report = restore_linear(model)
    assert report.dropped == ("blocks.0.up", "blocks.1.up")
    assert report.kept == ()
    assert "base weight; adapter dropped" in str(report)
    assert set(kinds(model).values()) == {"Linear"}
    assert [id(p) for _, p in model.named_parameters()] == [id(p) for _, p in plain.parameters]
    assert torch.equal(model(TOKENS), before)
    assert not model.blocks[0]["up"].weight.requires_grad
    assert not model._load_state_dict_pre_hooks


def test_restoring_keeps_what_is_merged() -> None:
    model = Net().eval()
    replace_linear(model, UP)
    model.blocks[0]["up"].merge()
    before = model.blocks[0]["up"](torch.ones(8))
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
        report = restore_linear(model)
    assert (report.kept, report.dropped) == (("blocks.0.up",), ("blocks.1.up",))
    assert torch.equal(model.blocks[0]["up"](torch.ones(8)), before)
    assert not model.blocks[0]["up"].training
    replace_linear(model, UP)


def test_restoring_a_layer_itself_is_refused() -> None:
    refused(FusedLoRALinear(4, 4, r=2), restore_linear, LoRAStateError, "to_linear()")


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapters_state_is_loaded_back(use_dora: bool) -> None:
    config = LoRAConfig(r=2, target_modules=["up"], init_lora_weights=False, use_dora=use_dora)
    model = Net().eval()
    other = copy.deepcopy(model)
    replace_linear(model, config)
    replace_linear(other, config)
    tensors = lora_kernels.lora_state_dict(model)
    per_layer = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * use_dora
    assert list(tensors) == [f"blocks.{i}.up.{name}" for i in (0, 1) for name in per_layer]
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert not torch.equal(other(TOKENS), model(TOKENS))
    assert other.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert torch.equal(other(TOKENS), model(TOKENS))
    lora_kernels.merge_lora(other)
    lora_kernels.merge_lora(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert all(same_bits(tensor, lora_kernels.lora_state_dict(other)[name]) for name, tensor in tensors.items())


def test_the_adapters_state_with_biases() -> None:
    model = Net()
    replace_linear(model, UP)
    lora = set(lora_kernels.lora_state_dict(model))
    assert set(lora_kernels.lora_state_dict(model, bias="lora_only")) - lora == {f"blocks.{i}.up.bias" for i in (0, 1)}
    every = {f"blocks.{i}.{name}.bias" for i in (0, 1) for name in ("up", "down")}
    assert set(lora_kernels.lora_state_dict(model, bias="all")) - lora == every


@pytest.mark.parametrize("merged", [False, True])
def test_a_plain_models_state_dict_loads(merged: bool) -> None:
    plain, model = Net().eval(), Net().eval()
    replace_linear(model, LoRAConfig(r=2, target_modules=["up"]))
    if merged:
        lora_kernels.merge_lora(model)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == set(lora_kernels.lora_state_dict(model))
    assert result.unexpected_keys == []
    with use_backend("eager"):  # PyTorch's own product on both sides: the same bits
        assert torch.equal(model(TOKENS), plain(TOKENS))


def test_an_adapter_of_another_rank_is_refused_before_anything_is_loaded() -> None:
    model, other = Net(), Net()
    replace_linear(model, LoRAConfig(r=2, target_modules=["up"]))
    replace_linear(other, LoRAConfig(r=2, target_modules=["up"], rank_pattern={"blocks.1.up": 4}))
    load = lambda model: model.load_state_dict(other.state_dict())  # noqa: E731
    refused(model, load, InvalidArgumentError, "blocks.1.up.lora_A has rank 4", "r=2")
    wrapped = nn.Sequential(model)
    load = lambda model: model.load_state_dict({f"0.{k}": v for k, v in other.state_dict().items()})  # noqa: E731
    refused(wrapped, load, InvalidArgumentError, "0.blocks.1.up.lora_A has rank 4", "r=2")
