"""``FusedLoRALinear`` itself: an ``nn.Linear`` in all that it does besides its adapter."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAKernelsError, lora_linear
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from models import acting, formula
from numerics import check, same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def refused(layer: FusedLoRALinear, function: Callable[[], Any], error: type[Exception], *words: str) -> None:
    """``function()`` raises one sentence with all the words, and leaves the layer as it was."""
    before, weight, merged = state(layer), layer.weight, layer.merged
    with pytest.raises(error) as caught:
        function()
    assert isinstance(caught.value, LoRAKernelsError)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert layer.weight is weight
    assert layer.merged == merged
    assert same_state(state(layer), before)


# Making


def test_it_is_an_nn_linear_with_an_adapter_that_starts_at_zero() -> None:
    layer = FusedLoRALinear(8, 6, r=3, lora_alpha=12)
    assert isinstance(layer, nn.Linear)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (6, 8),
        "bias": (6,),
        "lora_A": (3, 8),
        "lora_B": (6, 3),
    }
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.scaling == 4.0
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 3, 5, 8), (0, 8), (2, 0, 8)], ids=str)
def test_inputs_of_one_to_many_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = acting(bias=bias), torch.randn(shape, requires_grad=True)
    y = layer(x)
    flat = lora_linear(x.reshape(-1, 8), layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling)
    assert y.shape == (*shape[:-1], 6)
    assert torch.equal(y.reshape(-1, 6), flat)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert layer.lora_A.grad is not None
    if x.numel() == 0:
        assert not layer.lora_A.grad.any()


@pytest.mark.parametrize("adapter_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_adapter_output_and_gradients(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    layer = acting(dtype=dtype, adapter_dtype=adapter_dtype)
    default = torch.float32 if dtype.itemsize == 2 else dtype
    assert layer.lora_A.dtype == layer.lora_B.dtype == (adapter_dtype or default)
    y = layer(torch.randn(4, 8, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert layer.lora_A.grad.dtype == layer.lora_A.dtype
    assert layer.lora_B.grad.dtype == layer.lora_B.dtype


def test_rank_stabilised_scaling_and_one_that_is_set() -> None:
    layer, x = acting(r=4, lora_alpha=8, use_rslora=True), torch.randn(2, 8)
    assert layer.scaling == 4.0
    layer.scaling = 0.0
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_how_the_adapter_is_initialised(init: bool | str) -> None:
    layer = FusedLoRALinear(512, 64, r=64, init_lora_weights=init)
    assert bool(layer.lora_B.any()) == (init is False)
    largest = layer.lora_A.abs().max()
    if init == "gaussian":
        assert 3 / 64 < largest < 7 / 64  # of 32768 normal numbers with deviation 1/64
    else:
        assert 0.9 * 512**-0.5 < largest <= 512**-0.5  # uniform up to sqrt(6 / ((1 + 5) K))


def test_reset_draws_anew_and_rounds_what_it_drew_in_fp32() -> None:
    layer, wide = FusedLoRALinear(8, 6, r=3, adapter_dtype=torch.bfloat16), FusedLoRALinear(8, 6, r=3)
    first = layer.lora_A.detach().clone()
    layer.lora_B.data.fill_(1.0)
    torch.manual_seed(1)
    layer.reset_lora_parameters()
    torch.manual_seed(1)
    wide.reset_lora_parameters()
    assert not torch.equal(layer.lora_A, first)
    assert torch.equal(layer.lora_A, wide.lora_A.bfloat16())
    assert not layer.lora_B.any()
    layer.merge()
    refused(layer, layer.reset_lora_parameters, LoRAStateError, "reset_lora_parameters", "unmerge()")


def test_a_rank_above_both_dimensions_warns_once() -> None:
    with pytest.warns(UserWarning, match=r"r=9 .* = 6") as caught:
        layer = FusedLoRALinear(8, 6, r=9)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="r=9") as caught:
        FusedLoRALinear.from_linear(nn.Linear(8, 6), r=9)
    assert len(caught) == 1
    assert layer(torch.ones(8)).shape == (6,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedLoRALinear(8, 6, r=6)


REFUSED = {
    "rank": ({"r": 0}, InvalidArgumentError, "at least 1"),
    "alpha": ({"lora_alpha": -1}, InvalidArgumentError, "not negative"),
    "dropout": ({"lora_dropout": 1.0}, InvalidArgumentError, "[0, 1)"),
    "init": ({"init_lora_weights": "olora"}, InvalidArgumentError, "gaussian"),
    "adapter dtype": ({"adapter_dtype": torch.int8}, InvalidTypeError, "torch.float16"),
    "integer": ({"dtype": torch.int32}, InvalidTypeError, "float32"),
    "complex": ({"dtype": torch.complex64}, InvalidTypeError, "float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_are_not_allowed(name: str) -> None:
    arguments, error, words = REFUSED[name]
    with pytest.raises(error, match=re.escape(words)):
        FusedLoRALinear(8, 6, **arguments)


def test_the_printed_form_names_what_is_special() -> None:
    layer = FusedLoRALinear(8, 6, r=3, lora_alpha=12, lora_dropout=0.1, use_rslora=True)
    text = "in_features=8, out_features=6, bias=True, r=3, lora_alpha=12, lora_dropout=0.1, use_rslora=True"
    assert layer.extra_repr() == text
    layer.merge()
    layer.enable_lora(False)
    assert layer.extra_repr() == text + ", merged=True, disabled=True"


def test_explain_takes_a_layer() -> None:
    explanation = lora_kernels.explain(acting(lora_dropout=0.25))
    assert (explanation.problem.in_features, explanation.problem.out_features, explanation.problem.r) == (8, 6, 3)
    assert explanation.problem.dropout_p == 0.25
    assert explanation.backend in str(explanation)


# From and to nn.Linear


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_keeps_the_parameters_and_freezes_them(bias: bool) -> None:
    linear = nn.Linear(8, 6, bias=bias, dtype=torch.bfloat16).eval()
    layer = FusedLoRALinear.from_linear(linear, r=3)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not any(p.requires_grad for p in linear.parameters())
    assert not layer.training
    assert layer.lora_A.dtype == torch.float32
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight
    assert back.bias is linear.bias
    assert back.extra_repr() == linear.extra_repr()


def test_hooks_and_their_handles_are_carried_over_and_back() -> None:
    linear, seen = nn.Linear(8, 6), []
    handles = [
        linear.register_forward_pre_hook(lambda module, args: seen.append("pre")),
        linear.register_forward_hook(lambda module, args, kwargs, y: seen.append("post"), with_kwargs=True),
        linear.register_full_backward_pre_hook(lambda module, dy: seen.append("backward pre")),
        linear.register_full_backward_hook(lambda module, dx, dy: seen.append("backward")),
        linear.weight.register_hook(lambda gradient: seen.append("weight")),
    ]
    layer = FusedLoRALinear.from_linear(linear, r=3)
    for module in (layer, layer.to_linear()):
        seen.clear()
        module(torch.randn(2, 8, requires_grad=True)).sum().backward()
        assert seen == ["pre", "post", "backward pre", "backward"]
    for handle in handles:
        handle.remove()
    seen.clear()
    layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert seen == []


def test_from_linear_refuses_what_is_no_plain_linear() -> None:
    with pytest.raises(LoRAStateError, match="FusedLoRALinear already"):
        FusedLoRALinear.from_linear(acting())
    with pytest.raises(InvalidTypeError, match="Conv2d is not a plain"):
        FusedLoRALinear.from_linear(nn.Conv2d(1, 1, 1))
    linear = nn.Linear(8, 6)
    with pytest.raises(InvalidArgumentError, match="r=0"):
        FusedLoRALinear.from_linear(linear, r=0)
    assert linear.weight.requires_grad


def test_to_linear_leaves_the_current_weight() -> None:
    layer, x = acting(), torch.randn(4, 8)
    assert layer.to_linear().weight is layer.base_weight
    layer.merge()
    assert torch.equal(layer.to_linear()(x), layer(x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_state_dicts_load_both_ways(use_dora: bool) -> None:
    layer, linear = acting(use_dora=use_dora), nn.Linear(8, 6)
    lora = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * use_dora
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (lora, [])
    assert torch.equal(layer.weight, linear.weight)
    other = nn.Linear(8, 6)
    result = other.load_state_dict(layer.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], lora)
    assert torch.equal(other.weight, layer.weight)
    twin = acting(use_dora=use_dora)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(torch.ones(8)), layer(torch.ones(8)))


def test_a_state_dict_of_another_rank_is_refused() -> None:
    layer, other = acting(r=3), acting(r=5)
    refused(
        layer, lambda: layer.load_state_dict(other.state_dict()), InvalidArgumentError, "rank 5", "r=3", "strict=False"
    )


# Merging


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_weight_is_rounded_once_and_unmerging_is_exact(dtype: torch.dtype, use_dora: bool) -> None:
    layer = acting(40, 24, dtype=dtype, use_dora=use_dora)
    if use_dora:
        layer.lora_magnitude_vector.data.uniform_(0.5, 2.0)
    weight, before = layer.weight, state(layer)
    layer.merge()
    assert layer.merged
    assert layer.weight is not weight
    assert layer.weight.dtype == dtype
    assert not layer.weight.requires_grad
    exact = formula(layer, torch.float64)
    check("weight", layer.weight, exact, formula(layer, torch.promote_types(dtype, torch.float32)).to(dtype), dtype)
    layer.unmerge()
    assert layer.weight is weight
    assert same_state(state(layer), before)


def test_a_merged_layer_is_the_merged_product_and_dropout_does_not_act() -> None:
    layer, x = acting(lora_dropout=0.5), torch.randn(4, 8)
    layer.merge()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not layer(x).requires_grad


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
    before = state(layer)
    layer.merge()
    assert same_state(state(layer), before)
    assert layer.state_dict(keep_vars=True)["weight"] is layer.base_weight
    other = nn.Linear(8, 6)
    layer.load_state_dict(other.state_dict(), strict=False)
    assert layer.merged
    assert torch.equal(layer.base_weight, other.weight)
    check("weight", layer.weight, formula(layer, torch.float64), formula(layer, torch.float32), torch.float32)


def test_merging_twice_unmerging_twice_and_what_cannot_be_merged() -> None:
    layer = acting()
    refused(layer, layer.unmerge, LoRAStateError, "not merged", "merge()")
    layer.merge()
    refused(layer, layer.merge, LoRAStateError, "merged already", "unmerge()")
    for bad in (float("nan"), float("inf")):
        layer = acting()
        layer.lora_A.data[0, 0] = bad
        refused(layer, layer.merge, LoRAStateError, "not finite", "lora_A")
    layer = acting(dtype=torch.float16)
    layer.scaling = 1e8
    refused(layer, layer.merge, LoRAStateError, "not finite", "torch.float16")


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
    layer, x = acting(use_dora=True), torch.randn(4, 8)
    if merged:
        layer.merge()
    other, before = copied(layer), state(layer)
    assert torch.equal(other(x), layer(x))
    assert other.merged == merged
    assert same_state(state(other), before)
    if merged:
        other.unmerge()
        assert layer.merged
    other.weight.data.zero_()
    other.lora_A.data.zero_()
    assert same_state(state(layer), before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_change_of_dtype_carries_all_weights(merged: bool) -> None:
    layer = acting()
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
    layer, x = acting(), torch.randn(4, 8)
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


# What stands in a parameter's place


class _Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2.0 * value


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "bias"])
def test_a_parametrization_put_on_later_is_followed(name: str) -> None:
    layer, x = acting(), torch.randn(5, 8)
    doubled = copy.deepcopy(layer)
    getattr(doubled, name).data.mul_(2.0)
    parametrize.register_parametrization(layer, name, _Doubled())
    assert same_bits(layer(x).detach(), doubled(x).detach())


# The meta device


def test_a_layer_on_meta_is_made_filled_and_run() -> None:
    layer = FusedLoRALinear(8, 6, r=3, use_dora=True, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    with pytest.raises(LoRAStateError, match="meta device"):
        layer.merge()
    assert not layer.merged
    layer.to_empty(device="cpu")
    linear = nn.Linear(8, 6)
    layer.load_state_dict(linear.state_dict(), strict=False)
    layer.reset_lora_parameters()
    weight, x = linear.weight.detach(), torch.randn(4, 8)
    check("m", layer.lora_magnitude_vector, weight.double().norm(dim=1), weight.norm(dim=1), torch.float32)
    exact = copy.deepcopy(linear).double()(x.double()).detach()
    check("y", layer(x), exact, linear(x), torch.float32)


# Dropout


def test_dropout_acts_in_training_only() -> None:
    layer, x = acting(lora_dropout=0.5), torch.randn(64, 8)
    plain = copy.deepcopy(layer)
    plain.lora_dropout = 0.0
    assert not torch.equal(layer(x), plain(x))
    assert torch.equal(layer.eval()(x), plain(x))
