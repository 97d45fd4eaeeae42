"""Whole models that are converted to another dtype: the values stay, or a sentence says that they are lost."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, replace_linear
from lora_kernels.errors import InvalidTypeError, LoRAStateError
from lora_kernels.weights import known
from quantised import KINDS, adapted, quantised, values

STORED = ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16), (torch.float32, torch.float16))


@pytest.mark.parametrize("name", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("fp8")])
def test_the_values_are_those_from_before(kind: str, name: str) -> None:
    """To the rounding of scales and values to 16 bits: torchao's tensors convert them."""
    layer = adapted(kind, 64, 96, torch.bfloat16 if name == "half" else torch.float32)
    before = known.read(layer, layer.weight).dequantize(torch.float32)
    if (kind, name) == ("ao-nvfp4", "double"):
        with pytest.raises(AssertionError, match="NVFP4"):  # torchao's own
            layer.double()
        return
    getattr(layer, name)()
    after = known.read(layer, layer.weight).dequantize(torch.float32)
    assert (after - before).abs().max() <= torch.finfo(torch.bfloat16).eps * before.abs().max()
    assert layer(torch.randn(40, 64).to(layer.lora_A.dtype)).isfinite().all()


def _ours(layer: Any) -> Any:
    return FusedLoRALinear.from_linear(layer, r=2)


def _pefts(layer: Any) -> Any:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"]))
    lora_kernels.fuse_peft(model)
    return model


@pytest.mark.parametrize("made", [_ours, _pefts])
@pytest.mark.parametrize(("stored", "dtype"), STORED, ids=str)
def test_codes_that_were_converted_as_numbers_are_told_of(made: Any, stored: torch.dtype, dtype: torch.dtype) -> None:
    model = made(quantised("nf4", 64, 96, torch.float32, quant_storage=stored)).to(dtype)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(LoRAStateError, match=f"stored in {stored} was converted to {dtype}.*values are lost"):
            each(torch.randn(8, 64))
    layer = quantised("nf4", 64, 96, torch.float32, quant_storage=stored).to(dtype)
    with pytest.raises(LoRAStateError, match="values are lost"):
        made(layer)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.uint8], ids=str)
def test_codes_that_keep_their_dtype_keep_their_values(stored: torch.dtype) -> None:
    layer = _ours(quantised("nf4", 64, 96, torch.float32, quant_storage=stored))
    before = values(layer)
    for each in (layer.to(torch.bfloat16), pickle.loads(pickle.dumps(layer))):
        assert each.weight.dtype is stored
        assert torch.equal(values(each), before)
        each(torch.randn(8, 64))


def test_a_state_dict_whose_codes_are_stored_otherwise_is_refused_or_assigned() -> None:
    ours, other = (
        _ours(quantised("nf4", 64, 96, torch.float32, quant_storage=stored)) for stored in (torch.bfloat16, torch.half)
    )
    with pytest.raises(InvalidTypeError, match="bnb_4bit_quant_storage"):
        ours.load_state_dict(other.state_dict())
    ours.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(8, 64)
    assert torch.equal(ours(x), other(x))


@pytest.mark.skipif("fp8" not in KINDS, reason="this version of transformers has no FP8Linear")
@pytest.mark.parametrize("made", [_ours, _pefts])
def test_fp8_without_its_scales_is_told_of_wherever_it_is(made: Any) -> None:
    model = made(quantised("fp8", 64, 96, torch.float32)).half()
    with pytest.raises(LoRAStateError, match="without its scales"):
        model(torch.randn(8, 64).half())
    with pytest.raises(LoRAStateError, match="without its scales"):
        made(quantised("fp8", 64, 96, torch.float32).half())


def test_a_model_whose_codes_were_converted_is_left_as_it_was() -> None:
    layer = quantised("nf4", 64, 96, torch.float32, quant_storage=torch.bfloat16).half()
    model = nn.Sequential(nn.Linear(64, 64), layer)
    with pytest.raises(LoRAStateError, match="values are lost"):
        replace_linear(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("converted", [True, False])
def test_a_weight_that_lost_its_class_is_told_by_its_module(converted: bool) -> None:
    layer = quantised("nf4", 64, 96, torch.float32, quant_storage=torch.bfloat16)
    expected, data = values(layer), layer.weight.data.to(torch.float16 if converted else torch.bfloat16)
    layer._parameters["weight"] = nn.Parameter(data, requires_grad=False)
    if converted:
        with pytest.raises(LoRAStateError, match="values are lost"):
            _ours(layer)
        return
    ours = _ours(layer)
    ours(torch.randn(8, 64))
    assert torch.equal(values(ours), expected)
