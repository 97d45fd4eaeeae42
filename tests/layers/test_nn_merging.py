"""Merging a ``FusedLoRALinear``, taking it back, copies of merged and other layers, and switching the adapter off."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lora_kernels import FusedLoRALinear
from lora_kernels.errors import LoRAKernelsWarning, LoRAStateError
from made_models import acting, formula, layer_refused, layer_state, same_state
from numerics import check, same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_weight_is_rounded_once_and_unmerging_is_exact(dtype: torch.dtype, use_dora: bool) -> None:
    layer = acting(40, 24, dtype=dtype, use_dora=use_dora)
    if use_dora:
        layer.lora_magnitude_vector.data.uniform_(0.5, 2.0)
    weight, before = layer.weight, layer_state(layer)
    layer.merge()
    assert layer.merged
    assert layer.weight is not weight
    assert layer.weight.dtype == dtype
    assert not layer.weight.requires_grad
    exact = formula(layer, torch.float64)
    check("weight", layer.weight, exact, formula(layer, torch.promote_types(dtype, torch.float32)).to(dtype), dtype)
    layer.unmerge()
    assert layer.weight is weight
    assert same_state(layer_state(layer), before)


def test_a_merged_layer_is_the_merged_product_and_dropout_does_not_act() -> None:
    layer, x = acting(lora_dropout=0.5), torch.randn(4, 8)
    layer.merge()
    with pytest.warns(LoRAKernelsWarning, match="dropout does not act"):
        y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    assert not y.requires_grad


def test_merging_under_autocast_gives_the_same_bits() -> None:
    layer, other = acting(40, 24), None
    other = copy.deepcopy(layer)
    layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        other.merge()
    assert same_bits(layer.weight, other.weight)


def test_a_tied_weight_sees_nothing_of_a_merge() -> None:
    embedding, linear = nn.Embedding(6, 8), nn.Linear(8, 6)
    linear.weight = embedding.weight
    layer = FusedLoRALinear.from_linear(linear, r=3, init_lora_weights=False)
    before = embedding.weight.detach().clone()
    layer.merge()
    assert layer.base_weight is embedding.weight
    assert same_bits(embedding.weight, before)
    model = nn.ModuleList([embedding, layer]).half()
    assert embedding.weight.dtype == torch.float16
    layer.unmerge()
    assert model[1].weight is embedding.weight


def test_while_merged_the_state_dict_is_the_base_layers() -> None:
    layer = acting()
    before = layer_state(layer)
    layer.merge()
    assert same_state(layer_state(layer), before)
    assert list(layer.state_dict()) == list(acting().state_dict())
    assert layer.state_dict(keep_vars=True)["weight"] is layer.base_weight
    other = nn.Linear(8, 6)
    layer.load_state_dict(other.state_dict(), strict=False)
    assert layer.merged
    assert torch.equal(layer.base_weight, other.weight)
    check("weight", layer.weight, formula(layer, torch.float64), formula(layer, torch.float32), torch.float32)


def test_merging_twice_unmerging_twice_and_what_cannot_be_merged() -> None:
    layer = acting()
    layer_refused(layer, layer.unmerge, LoRAStateError, "not merged", "merge()")
    layer.merge()
    layer_refused(layer, layer.merge, LoRAStateError, "merged already", "unmerge()")
    for bad in (float("nan"), float("inf")):
        layer = acting()
        layer.lora_A.data[0, 0] = bad
        layer_refused(layer, layer.merge, LoRAStateError, "not finite", "lora_A")
    layer = acting()
    prune.l1_unstructured(layer, "weight", amount=1)
    layer_refused(layer, layer.merge, LoRAStateError, "pruned", "prune.remove")
    layer = acting(dtype=torch.float16)
    layer.scaling = 1e8
    layer_refused(layer, layer.merge, LoRAStateError, "not finite", "torch.float16")


def test_a_base_that_is_not_finite_itself_is_merged() -> None:
    layer = acting()
    layer.weight.data[0, 0] = float("nan")
    layer.merge()
    assert torch.isnan(layer.weight).sum() == 1


def through_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_torch_save])
def test_copies_are_whole_and_apart(copied: Callable[[nn.Module], Any], merged: bool) -> None:
    layer, x = acting(use_dora=True).eval(), torch.randn(4, 8)
    if merged:
        layer.merge()
    other, before = copied(layer), layer_state(layer)
    assert torch.equal(other(x), layer(x))
    assert other.merged == merged
    assert same_state(layer_state(other), before)
    if merged:
        other.unmerge()
        assert layer.merged
    other.weight.data.zero_()
    other.lora_A.data.zero_()
    assert same_state(layer_state(layer), before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_change_of_dtype_carries_all_weights(merged: bool) -> None:
    layer = acting().eval()
    base = layer.weight.detach().clone()
    if merged:
        layer.merge()
    layer.half()
    assert {t.dtype for t in (layer.weight, layer.base_weight, layer.lora_A, layer.lora_B)} == {torch.float16}
    assert layer(torch.ones(8, dtype=torch.float16)).dtype == torch.float16
    if merged:
        layer.unmerge()
    assert same_bits(layer.weight, base.half())


def test_a_merged_layer_moves_to_meta_and_is_made_empty_with_both_weights() -> None:
    layer = acting()
    layer.merge()
    layer.to("meta")
    assert layer.base_weight.is_meta
    layer.to_empty(device="cpu")
    assert (layer.weight.device.type, layer.base_weight.device.type) == ("cpu", "cpu")


# Switching the adapter off


@pytest.mark.parametrize("merged", [False, True])
def test_without_the_adapter_it_is_the_base_layer(merged: bool) -> None:
    layer, x = acting().eval(), torch.randn(4, 8)
    base = F.linear(x, layer.weight, layer.bias)
    if merged:
        layer.merge()
    adapted = layer(x)
    with layer.enable_lora(False) as same:
        assert same is layer
        assert torch.equal(layer(x), base)
        with layer.enable_lora():
            assert torch.equal(layer(x), adapted)
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), adapted)
    layer.enable_lora(False)
    assert torch.equal(layer(x), base)
    layer.enable_lora()
    assert torch.equal(layer(x), adapted)


def test_the_adapter_comes_back_after_an_exception() -> None:
    layer = acting()
    with pytest.raises(KeyError), layer.enable_lora(False):
        raise KeyError
    assert "disabled" not in layer.extra_repr()
