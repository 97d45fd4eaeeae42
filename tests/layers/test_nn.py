"""``FusedLoRALinear`` itself: an ``nn.Linear`` in all that it does besides its adapter."""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_kernels
from cases import BACKENDS
from lora_kernels import FusedLoRALinear, lora_linear, lora_state_dict, mark_only_lora_as_trainable, use_backend
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from made_models import acting, layer_refused
from numerics import check, check_linear, same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


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
    check_linear(layer(x), x, layer.weight, layer.bias)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_while_b_is_zero_no_bit_depends_on_the_adapter(dtype: torch.dtype, backend: str, device: str) -> None:
    """Not the bits of ``F.linear``: a backend may make the base product itself."""
    layer = FusedLoRALinear(40, 24, r=3, device=device, dtype=dtype)
    with use_backend(backend):
        for x in torch.randn(1, 40, device=device), torch.randn(70, 40, device=device):
            first = layer(x.to(dtype))
            check_linear(first, x.to(dtype), layer.weight, layer.bias)
            layer.lora_A.data.normal_()
            assert same_bits(layer(x.to(dtype)), first)


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
    check_linear(layer(x), x, layer.weight, layer.bias)


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
    layer_refused(layer, layer.reset_lora_parameters, LoRAStateError, "reset_lora_parameters", "unmerge()")


def test_a_rank_above_both_dimensions_warns_once() -> None:
    with pytest.warns(UserWarning, match=r"r=9 .* = 6") as caught:
        layer = FusedLoRALinear(8, 6, r=9)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="r=9") as caught:
        FusedLoRALinear.from_linear(nn.Linear(8, 6), r=9)
    assert [warning.filename for warning in caught] == [__file__]
    assert layer(torch.ones(8)).shape == (6,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedLoRALinear(8, 6, r=6)


REFUSED = {
    "rank": ({"r": 0}, InvalidArgumentError, "at least 1"),
    "alpha": ({"lora_alpha": -1}, InvalidArgumentError, "not negative"),
    "dropout": ({"lora_dropout": 1.0}, InvalidArgumentError, "[0, 1)"),
    "init": ({"init_lora_weights": "kaiming"}, InvalidArgumentError, "gaussian"),
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
    with pytest.raises(InvalidTypeError, match="Conv2d was given to from_linear, which takes"):
        FusedLoRALinear.from_linear(nn.Conv2d(1, 1, 1))
    linear = nn.Linear(8, 6)
    with pytest.raises(InvalidArgumentError, match="r=0"):
        FusedLoRALinear.from_linear(linear, r=0)
    assert linear.weight.requires_grad


def test_to_linear_leaves_the_current_weight() -> None:
    layer, x = acting().eval(), torch.randn(4, 8)
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
    layer_refused(
        layer, lambda: layer.load_state_dict(other.state_dict()), InvalidArgumentError, "rank 5", "r=3", "strict=False"
    )


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


def test_a_parametrized_adapter_is_named_by_what_it_is_computed_from_and_trains() -> None:
    model, doubled = nn.Sequential(acting()), "parametrizations.lora_A.original"
    parametrize.register_parametrization(model[0], "lora_A", _Doubled())
    mark_only_lora_as_trainable(model)
    assert {f"0.{doubled}", "0.lora_B"} == set(lora_state_dict(model)) <= set(model.state_dict())
    assert model.get_parameter(f"0.{doubled}").requires_grad


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
    exact = partial(copy.deepcopy(linear).double(), x.double())
    check("y", layer(x), exact, linear(x), torch.float32)


# Dropout


def test_dropout_acts_in_training_only() -> None:
    layer, x = acting(lora_dropout=0.5), torch.randn(64, 8)
    plain = copy.deepcopy(layer)
    plain.lora_dropout = 0.0
    assert not torch.equal(layer(x), plain(x))
    assert torch.equal(layer.eval()(x), plain(x))


@pytest.mark.parametrize("p", [1.0, -0.5, float("nan")])
def test_a_dropout_that_is_set_outside_its_range_is_told(p: float) -> None:
    layer = acting()
    layer.lora_dropout = p
    with pytest.raises(InvalidArgumentError, match=r"\[0, 1\)"):
        layer(torch.ones(2, 8))
