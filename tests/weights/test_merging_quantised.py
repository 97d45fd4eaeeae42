"""Merging over quantised weights: refused, or asked for; exact unmerging, copies, state dicts, restoring."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRAConfig
from lora_kernels.errors import LoRAKernelsWarning, LoRAStateError
from lora_kernels.weights import known
from numerics import check_linear
from quantised import CALLABLE, KINDS, adapted, bits_of, quantised, twin, values

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"use_dora": True}, {"lora_bias": True})


def _values(layer: Any) -> torch.Tensor:
    return known.read(layer, layer.weight).dequantize(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_and_changes_nothing(kind: str) -> None:
    model = nn.Sequential(adapted(kind, 64, 96, torch.float32))
    x = torch.randn(8, 64)
    y = model(x)
    with pytest.raises(LoRAStateError, match="quantize=True"):
        model[0].merge()
    with pytest.raises(LoRAStateError, match="quantize=True"):
        lora_kernels.merge_lora(model)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_is_w_and_the_adapter_quantised_again(kind: str, options: dict[str, Any]) -> None:
    layer = adapted(kind, 64, 96, torch.float32, **options)
    x, before = torch.randn(8, 64), bits_of(layer)
    y, base = layer(x), _values(layer)
    plain = twin(layer, base, torch.float32)
    plain.merge()
    whole = plain.weight.detach()
    layer.merge(quantize=True)
    error = (_values(layer) - whole).norm() / whole.norm()
    assert layer.merged
    assert float(error) == pytest.approx(layer.merge_error, rel=1e-3)
    # A form's own error, on numbers of this kind: the same as that of quantising them in the package's own layer.
    other = quantised(kind, 64, 96, torch.float32, of=whole)
    assert torch.equal(_values(layer), known.packed(other).dequantize(torch.float32))
    check_linear(layer(x), x, _values(layer), layer.bias)  # up to 16 tokens read the codes: other last bits
    layer.unmerge()
    assert layer.merge_error is None
    assert bits_of(layer) == before
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_that_fails_leaves_the_weight_as_it_was(kind: str) -> None:
    model = nn.Sequential(adapted(kind, 64, 64, torch.float32), adapted(kind, 64, 64, torch.float32))
    before = [bits_of(layer) for layer in model]
    held = model[1].lora_A.data[0, 0].clone()
    model[1].lora_A.data[0, 0] = torch.inf
    with pytest.raises(LoRAStateError, match="so none is: merging gives a weight that is not finite"):
        lora_kernels.merge_lora(model, quantize=True)
    model[1].lora_A.data[0, 0] = held
    assert not any(layer.merged for layer in model)
    assert [bits_of(layer) for layer in model] == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_tells_the_error(kind: str) -> None:
    model = nn.Sequential(adapted(kind, 64, 64, torch.float32), adapted(kind, 64, 64, torch.float32))
    report = lora_kernels.merge_lora(model, quantize=True)
    errors = {str(i): layer.merge_error for i, layer in enumerate(model)}
    assert report.errors == errors
    assert f"at most {max(errors.values()):.2g}" in str(report)
    assert all(f"{name}: {error:.2g}" in report.details() for name, error in errors.items())
    lora_kernels.unmerge_lora(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layers_state_dict_is_the_bases(kind: str) -> None:
    layer = adapted(kind, 64, 96, torch.float32)
    before = {name: copy.deepcopy(value) for name, value in layer.state_dict().items()}
    bits = bits_of(layer)
    layer.merge(quantize=True)
    assert bits_of(layer) == bits
    y = layer(x := torch.randn(8, 64))
    layer.load_state_dict(before)
    assert layer.merged
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_merged_layer_are_merged(kind: str) -> None:
    layer, x = adapted(kind, 64, 96, torch.float32), torch.randn(8, 64)
    y, bits = layer(x), bits_of(layer)
    layer.merge(quantize=True)
    merged, file = layer(x), io.BytesIO()
    torch.save(layer, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for other in (copy.deepcopy(layer), loaded, layer.to("cpu")):
        assert other.merged
        assert torch.equal(other(x), merged)
        other.unmerge()
        assert torch.equal(other(x), y)
        assert bits_of(other) == bits


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_that_is_switched_off_is_the_base(kind: str) -> None:
    layer, x = adapted(kind, 64, 96, torch.float32), torch.randn(8, 64)
    with layer.enable_lora(False):
        base = layer(x)
        layer.merge(quantize=True)
        assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kind", [kind for kind in ("nf4", "int8", "fp8", "ao-int8") if kind in KINDS])
def test_exporting_a_merged_layer_is_refused(kind: str) -> None:
    """A saved program had the merged codes and the base's scales, or could not be loaded."""
    layer, x = adapted(kind, 64, 96, torch.float32).eval(), torch.randn(8, 64)
    layer.merge(quantize=True)
    with pytest.raises(LoRAStateError, match="unmerge"):
        torch.export.export(layer, (x,), strict=False)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_restoring_leaves_the_packages_layer_with_the_current_weight(kind: str, merged: bool) -> None:
    model = nn.Sequential(quantised(kind, 64, 96, torch.float32))
    own = type(model[0].weight)
    lora_kernels.replace_linear(model, LoRAConfig(r=4, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B)
    if merged:
        lora_kernels.merge_lora(model, quantize=True)
        expected = _values(model[0])
        lora_kernels.restore_linear(model)
    else:
        expected = _values(model[0])
        with pytest.warns(LoRAKernelsWarning, match="quantize=True"):
            lora_kernels.restore_linear(model)
    assert type(model[0].weight) is own
    assert torch.equal(values(model[0]).float(), expected)
    if kind in CALLABLE:
        x = torch.randn(8, 64)
        torch.testing.assert_close(model.train()(x), nn.functional.linear(x, expected, model[0].bias))


def test_the_layer_that_int8_gives_away_does_not_write_to_the_lora_layers_state() -> None:
    layer, x = adapted("int8", 64, 96, torch.float32), torch.randn(8, 64)
    y = layer(x)
    layer.merge(quantize=True)
    plain = layer.to_linear()
    layer.unmerge()
    plain(x)
    assert torch.equal(layer(x), y)


def test_a_merged_layer_compiles() -> None:
    layer, x = adapted("nf4", 64, 96, torch.float32), torch.randn(8, 64)
    layer.merge(quantize=True)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
