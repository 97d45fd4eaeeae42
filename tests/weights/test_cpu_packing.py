"""bitsandbytes lays 4-bit weights out otherwise in evaluation on CPUs with AVX512-BF16; both layouts are read.

The package's flag is set by hand, so that each layout is tested on every CPU.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, ops, replace_linear
from lora_kernels.backends.native import load
from lora_kernels.weights import known
from numerics import check_linear, same_bits
from quantised import bnb, check_products, quantised, values

peft = pytest.importorskip("peft", reason="peft is not installed")

FOUR_BITS = ("nf4", "nf4-nested", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _packed(layer: Any) -> Any:
    """``layer`` as evaluation on such a CPU leaves it."""
    pack = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    return layer


def _rounded(kind: str, n: int = 96, k: int = 128) -> tuple[Any, torch.Tensor]:
    """A layer whose statistics are bf16 numbers, as that layout stores them, and its values."""
    layer = quantised(kind, k, n, torch.float32)
    state = layer.weight.quant_state
    if not state.nested:
        state.absmax = state.absmax.bfloat16().float()
        return layer, values(layer)
    flat = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state_of = copy.deepcopy(state)
    state_of.absmax, state_of.nested = flat.bfloat16().float(), False
    return layer, bnb.functional.dequantize_4bit(layer.weight.data, state_of)


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_both_layouts_hold_the_same_values(kind: str) -> None:
    layer, expected = _rounded(kind)
    _packed(layer)
    assert layer.weight.shape != (96 * 128 // 2, 1)
    assert torch.equal(known.read(layer, layer.weight).dequantize(torch.float32), expected)


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_the_kernels_read_both_layouts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values bit for bit, whole rows of vectors and rests of them, and few tokens' products."""
    if reasons := load.why_not("cpu"):
        pytest.skip(" ".join(reasons))
    load.load("cpu")
    for (n, k), dtype in itertools.product(((96, 64), (32, 320), (64, 1088)), DTYPES):
        layer = _packed(quantised(kind, k, n, torch.float32))
        packed = known.read(layer, layer.weight)
        found = packed.dequantize(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "has_coded_kernels", lambda: False)
            assert same_bits(found + 0.0, packed.dequantize(dtype) + 0.0)  # zeros of both signs
        codes = ops.codes_of(list(packed.parts), *packed.layout[:-1])
        assert codes is not None
        for m, r in ((1, 4), (4, 0), (5, 8), (16, 16)):
            check_products(codes, found, m, r, dtype)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_layer_that_is_replaced_gets_the_usual_layout(kind: str, storage: torch.dtype) -> None:
    layer = quantised(kind, 128, 96, torch.float32, quant_storage=storage)
    before = layer.weight.data.clone()
    values_of_packed = known.read(_packed(layer), layer.weight).dequantize(torch.float32)
    lora = FusedLoRALinear.from_linear(layer, r=2)
    assert same_bits(lora.weight.data, before)
    assert torch.equal(known.read(lora, lora.weight).dequantize(torch.float32), values_of_packed)
    assert torch.equal(values(lora.to_linear()), values_of_packed)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_replaced_model_trains_evaluates_and_trains(kind: str, flag: bool) -> None:
    model = nn.Sequential(quantised(kind, 128, 96, torch.float32))
    model[0].support_avx512bf16_for_cpu = flag
    replace_linear(model, LoRAConfig(r=2, target_modules=["0"]))
    x, before = torch.randn(8, 128), {name: value.clone() for name, value in model.state_dict().items()}
    first = model.train()(x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), first)
        with lora_kernels.adapters_disabled(model):
            model(x)
    assert torch.equal(model.train()(x), first)
    assert all(same_bits(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_fused_model_of_pefts_trains_evaluates_and_trains(kind: str, flag: bool) -> None:
    layer, expected = _rounded(kind)
    base = copy.deepcopy(layer)
    layer.support_avx512bf16_for_cpu = False
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"]))
    lora_kernels.fuse_peft(model)
    x, usual = torch.randn(8, 128), values(base)  # the adapter's B is zero
    check_linear(model.train()(x).detach(), x, usual, base.bias)
    with torch.no_grad(), model.disable_adapter():
        model.eval()(x)
    if flag:
        _packed(layer)  # what evaluation does with the flag, on such a CPU
    check_linear(model.train()(x).detach(), x, expected if flag else usual, base.bias)
    assert lora_kernels.peft.calls(model).own == {}
