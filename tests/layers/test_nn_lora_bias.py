"""The branch's own bias, b_B: forward, gradients and merging beside the formula and PEFT's layer."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear, lora_state_dict, mark_only_lora_as_trainable, merge_lora
from lora_kernels.errors import InvalidArgumentError
from made_models import acting, disturb, layer_state, same_state
from numerics import check, check_all


def run(layer: FusedLoRALinear, x: Tensor, dy: Tensor, dtype: torch.dtype, own: bool) -> dict[str, Tensor]:
    """y and gradients by the layer itself, or by plain PyTorch from the layer's parameters in ``dtype``."""
    x = x.to(dtype).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    values = {name: p.detach().to(p.dtype if own else dtype).requires_grad_() for name, p in layer.named_parameters()}
    if own:
        y = torch.func.functional_call(layer, values, (x,))
    else:
        low = F.linear(F.linear(x, values["lora_A"]), values["lora_B"], values["lora_bias"])
        y = F.linear(x, values["weight"], values.get("bias")) + layer.scaling * low
    gradients = torch.autograd.grad(y, [x, *values.values()], dy.to(y.dtype))
    return dict(zip(["y", "dx", *names], [y.detach(), *gradients], strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_output_and_gradients(dtype: torch.dtype, bias: bool) -> None:
    layer = disturb(acting(24, 16, lora_alpha=6, lora_bias=True, bias=bias, dtype=dtype, adapter_dtype=dtype))
    x, dy = torch.randn(10, 24, dtype=dtype), torch.randn(10, 16, dtype=dtype)
    exact = partial(run, layer, x, dy, torch.float64, own=False)
    check_all(run(layer, x, dy, dtype, own=True), exact, run(layer, x, dy, dtype, own=False), dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_merging_adds_it_to_the_bias_and_unmerging_is_exact(bias: bool) -> None:
    layer, x = disturb(acting(lora_bias=True, bias=bias)).eval(), torch.randn(4, 8)
    before, own, base = layer_state(layer), layer.bias, F.linear(x, layer.weight, layer.bias)
    exact, apart = partial(copy.deepcopy(layer).double(), x.double()), layer(x)
    layer.merge()
    check("y", layer(x), exact, apart, torch.float32)
    check("y", layer.to_linear()(x), exact, apart, torch.float32)
    assert same_state(layer_state(layer), before)
    with layer.enable_lora(False):
        assert torch.equal(layer(x), base)
    layer.half()
    layer.unmerge()
    assert layer.bias is own
    assert same_state(layer_state(layer), {name: tensor.half() for name, tensor in before.items()})


@pytest.mark.parametrize("scope", ["lora_only", "all"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_models_biases_are_the_original_ones(bias: bool, scope: str) -> None:
    model = nn.Sequential(disturb(acting(lora_bias=True, bias=bias)))
    before = lora_state_dict(model, scope)
    merge_lora(model)
    assert same_state(lora_state_dict(model, scope), before)
    for trained, expected in ((scope, bias), ("none", False)):
        mark_only_lora_as_trainable(model, trained)
        assert [p.requires_grad for p in (model[0].base_bias,) if p is not None] == [expected] * bias
        assert not model[0].bias.requires_grad


@pytest.mark.parametrize("init", [True, False])
def test_it_starts_at_zero_unless_the_adapter_is_to_act(init: bool) -> None:
    layer = FusedLoRALinear(8, 64, r=4, init_lora_weights=init, lora_bias=True)
    assert bool(layer.lora_bias.any()) != init
    assert layer.lora_bias.abs().max() <= 0.5  # uniform up to 1 / sqrt(r), as nn.Linear's bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B", "lora_bias"]
    assert "lora_bias=True" in repr(layer)
    assert "lora_bias" not in repr(nn.Sequential(FusedLoRALinear(8, 8, r=4)))


@pytest.mark.parametrize("other", [{"use_dora": True}, {"init_lora_weights": "gaussian"}], ids=str)
def test_it_goes_with_neither_dora_nor_gaussian_initialisation(other: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match="lora_bias=True was given with"):
        FusedLoRALinear(8, 8, r=4, lora_bias=True, **other)
