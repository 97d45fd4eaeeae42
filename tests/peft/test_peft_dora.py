"""PEFT's DoRA on the fused operators: values and gradients against stock PEFT's, and what stays PEFT's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from numerics import check, same_bits

pytest.importorskip("peft")
from lora_kernels import dora, fuse_peft, unfuse_peft
from lora_kernels.branches import Branch
from lora_kernels.gate import run_branch
from lora_kernels.peft import calls
from lora_kernels.peft import dora as peft_dora
from lora_kernels.peft import layer as peft_layer
from peft_models import CONV1D, DORA, DORA_OPTIONS, Option, Small, SmallConv1D, assert_parity, fused, lora_layers, make
from peft_models import LORA_THEN_DORA as THEN

BFLOAT16 = torch.bfloat16
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
NAMED = {option.name: option for option in DORA_OPTIONS}
SOME = [NAMED[name] for name in ("dora", "dora, conv1d", "lora, then dora")]
MIXED_DTYPES = [
    *SOME,
    *(NAMED[f"dora, {name}"] for name in ("no tokens", "no bias", "weights train", "hot-swappable")),
    NAMED["lora, then dora, hot-swappable"],
]
every_option = pytest.mark.parametrize("option", DORA_OPTIONS, ids=str)
some_options = pytest.mark.parametrize("option", SOME, ids=str)


@every_option
def test_parity_in_fp32(option: Option) -> None:
    assert_parity(option)


@pytest.mark.parametrize("option", MIXED_DTYPES, ids=str)
def test_parity_of_fp32_adapters_over_a_bf16_base(option: Option) -> None:
    assert_parity(option, BFLOAT16)


@some_options
def test_parity_under_autocast(option: Option) -> None:
    assert_parity(option, autocast=True)


@some_options
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16, torch.float64], ids=str)
def test_parity_with_adapters_of_the_bases_dtype(option: Option, dtype: torch.dtype) -> None:
    assert_parity(option, dtype, dtype)


DROPPING = {"lora_dropout": 0.3, **DORA}
DROPPED = [
    Option("dropout", (DROPPING,)),
    Option("dropout, no bias", (DROPPING,), base=lambda: Small(bias=False)),
    Option("dropout, conv1d", (CONV1D | DROPPING,), base=SmallConv1D),
    Option("dropout of 0 beside another", ({}, {"r": 3, **DORA}), ("a0", "a1")),
]


@pytest.mark.parametrize("option", DROPPED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_parity_in_training_with_pefts_own_mask(option: Option, dtype: torch.dtype) -> None:
    """x Wᵀ is of the whole x, what DoRA changes is of the dropped one; both draw it by torch's own dropout."""
    assert_parity(option, dtype, seed=4)


def _gain_dropped(x: Tensor, branch: Branch, p: float) -> Tensor:
    return run_branch(x, replace(branch, gain=torch.ones_like(branch.gain)), p)


def _gain_detached(x: Tensor, branch: Branch, p: float) -> Tensor:
    return run_branch(x, replace(branch, gain=branch.gain.detach() + 0 * branch.gain), p)


def _bias_scaled(x: Tensor, branch: Branch, p: float) -> Tensor:
    return run_branch(x, replace(branch, bias=branch.bias * branch.gain.detach()), p)


def _base_dropped(x: Tensor, branch: Branch, p: float) -> Tensor:
    return run_branch(nn.functional.dropout(x, p), branch, 0.0)


@pytest.mark.parametrize("fault", [_gain_dropped, _gain_detached, _bias_scaled, _base_dropped])
def test_a_seeded_fault_is_caught(fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_layer, "run_branch", fault)
    with pytest.raises(AssertionError, match="FAILS"):
        assert_parity(DROPPED[0], seed=4)


def _norms_of_all(layer: Any, adapter: str, weight: Tensor, *own: Any) -> Tensor:
    return right_gains(layer, adapter, weight, *layer._factors(["a0", "a1"]))


right_gains = peft_dora.gains


def test_norms_of_all_adapters_together_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_dora, "gains", _norms_of_all)
    with pytest.raises(AssertionError, match="FAILS"):
        assert_parity(NAMED["lora, then dora"])


# What PEFT does with it besides


def test_a_mixed_batch_is_refused_as_ever() -> None:
    layer = lora_layers(fused(make(*THEN)))[0]
    with pytest.raises(ValueError, match="DoRA"):
        layer(X, adapter_names=["a0", "a1", "__base__", "a1", "a0"])


def test_pefts_caching_keeps_the_norm_and_training_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    caching = pytest.importorskip("peft.helpers").DoraCaching
    read: list[int] = []
    monkeypatch.setattr(dora, "row_norms", lambda *args, right=dora.row_norms: read.append(1) or right(*args))
    stock = make(DORA).eval()
    model = fused(stock)
    exact, expected = copy.deepcopy(stock).double(), model(X).detach()
    assert len(read) == 2
    with caching():
        assert all(same_bits(model(X).detach(), expected) for _ in range(3))
        assert len(read) == 4
        for m, x in ((model, X), (stock, X), (exact, X.double())):
            m(x)
            for layer in lora_layers(m):
                layer.base_layer.weight.data.mul_(2.0)
        kept = partial(exact, X.double())  # with the norm from before, as PEFT keeps it
        check("y", model(X).detach(), kept, stock(X).detach(), torch.float32)
        model.train()
        model(X)
    assert len(read) == 6
    model.eval()(X)
    assert not any(layer.lora_magnitude_vector["a0"]._dora_cache for layer in lora_layers(model))


def test_without_pefts_classes_dora_is_a_variant_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_dora, "_VARIANT", None)
    model = fused(make(DORA))
    assert "DoraLinearVariant" in fuse_peft(copy.deepcopy(model)).notes[0]
    model(X)
    assert list(calls(model).own) == ["DoraLinearVariant is a variant of LoRA"]


def test_merging_switching_and_unfusing_are_pefts() -> None:
    stock = make(*THEN)
    model = fused(stock)
    exact = partial(copy.deepcopy(stock).double(), X.double())
    for m in (model, stock):
        m.set_adapter("a1")
        m.merge_adapter()
    assert same_bits(model(X).detach(), stock(X).detach())
    for m in (model, stock):
        m.unmerge_adapter()
        m.set_adapter("a0")
    check("y", model(X).detach(), exact, stock(X).detach(), torch.float32)
    with model.disable_adapter(), stock.disable_adapter():
        assert same_bits(model(X).detach(), stock(X).detach())
    unfuse_peft(model)
    assert same_bits(model(X).detach(), stock(X).detach())


@pytest.mark.parametrize("active", [["a1"], ["a0", "a1"]], ids=str)
def test_it_compiles_whole(active: list[str]) -> None:
    stock = make(*THEN)
    stock.base_model.set_adapter(active)
    model = fused(stock)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pairs = [torch.autograd.grad(call(X).sum(), parameters) for call in (model, compiled)]
    assert all(same_bits(left, right) for left, right in zip(*pairs, strict=True))


def test_a_row_of_zeros_stays_finite() -> None:
    """PEFT divides 0 by 0 there."""
    model = fused(make({"target_modules": ["lin0"], **DORA}))
    (layer,) = lora_layers(model)
    for tensor in (layer.base_layer.weight, layer.lora_B["a0"].weight, layer.lora_magnitude_vector["a0"].weight):
        tensor.data[3] = 0.0
    y = layer(X)
    assert bool(y.isfinite().all())
    assert bool((y[:, 3] == layer.base_layer.bias[3]).all())
