"""GPT-2's ``Conv1D`` with an adapter: its weight stays (K, N), and all else is as for ``nn.Linear``."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch

import lora_kernels
from architectures import logits, made, peft_model
from lora_kernels import FusedLoRALinear, LoRAConfig, replace_linear
from lora_kernels.errors import InvalidTypeError
from lora_kernels.models.model import lora_layers
from made_models import refused, replacing
from numerics import check, check_all, same_bits


def test_gpt2s_conv1d_keeps_its_weight_its_names_and_its_outputs() -> None:
    model, plain = made("gpt2"), made("gpt2")
    weights = dict(model.named_parameters())
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear", bias="lora_only"))
    assert len(report) == 8
    assert all(model.get_parameter(name) is parameter for name, parameter in weights.items())
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (16, 48, (16, 48))
    assert "nf=48, nx=16, r=2" in repr(layer)
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    forward, backward = lora_kernels.explain(layer, tokens=6).plans
    assert lora_kernels.explain(layer).problem.transposed
    assert (forward.direction, backward.direction) == ("forward", "backward")
    check("logits", logits(model), partial(logits, copy.deepcopy(plain).double()), logits(plain), torch.float32)
    with layer.enable_lora(False):
        assert torch.equal(layer(torch.ones(2, 3, 16)), plain.transformer.h[0].attn.c_attn(torch.ones(2, 3, 16)))
    copied = pickle.loads(pickle.dumps(model))
    lora_kernels.merge_lora(copied)
    assert copied.transformer.h[0].attn.c_attn.weight.shape == layer.weight.shape
    lora_kernels.unmerge_lora(copied)
    for each in (copied, model):
        lora_kernels.restore_linear(each)
        assert repr(each) == repr(plain)
        assert all(same_bits(each.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_the_gradients_of_a_conv1d_are_pefts(options: dict[str, Any]) -> None:
    theirs = peft_model("gpt2", target_modules=["c_attn"], fan_in_fan_out=True, **options).double()
    model = made("gpt2").double()
    replace_linear(model, LoRAConfig(r=4, lora_alpha=6, target_modules=["c_attn"], **options))
    pairs = []
    for name, layer in lora_layers(model):
        other = theirs.get_submodule(f"base_model.model.{name}")
        part = {"lora_A": other.lora_A, "lora_B": other.lora_B, "lora_magnitude_vector": other.lora_magnitude_vector}
        pairs += [
            (f"{name}.{own}", layer.adapter[own], part[own].default.weight) for own in layer.adapter.keys() & part
        ]
        if "lora_bias" in layer.adapter:
            pairs.append((f"{name}.lora_bias", layer.lora_bias, other.lora_B.default.bias))
    for _, parameter, value in pairs:
        parameter.data.copy_(value.detach())
    for either in (model, theirs):
        either(input_ids=torch.arange(6).reshape(2, 3)).logits.square().sum().backward()
    exact = {name: value.grad for name, _, value in pairs}
    check_all({name: parameter.grad for name, parameter, _ in pairs}, exact, exact, torch.float64)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
def test_a_conv1d_runs_under_autocast_and_compiles_in_one_graph(options: dict[str, Any]) -> None:
    model = made("gpt2")
    replace_linear(model, LoRAConfig(r=2, target_modules=["c_fc"], init_lora_weights=False, **options))
    layer, x = model.transformer.h[0].mlp.c_fc, torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_a_conv1d_itself_is_no_linear_layer() -> None:
    conv = made("gpt2").transformer.h[0].mlp.c_fc
    refused(conv, replacing(target_modules=".*"), InvalidTypeError, "itself a Conv1D", "that holds it")
    refused(conv, FusedLoRALinear.from_linear, InvalidTypeError, "Conv1D", "replace_linear")
