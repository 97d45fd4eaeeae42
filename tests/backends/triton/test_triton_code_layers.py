"""LoRA layers over quantised weights whose codes the kernels in Triton read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from lora_kernels import explain, ops, packed_autograd, use_backend
from lora_kernels.backends import triton
from lora_kernels.backends.triton import code_operators
from lora_kernels.weights import known
from lora_kernels.weights.by_codes import number_of
from numerics import same_bits
from quantised import KINDS, adapted, check_beside, quantised, results_of, twin, values

DTYPES = (torch.float32, torch.bfloat16)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="it runs on the CPU, in Triton's interpreter")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels in Triton, where the backend runs, and which of them were called and took the call."""
    called: list[str] = []

    def noting(name: str, kernel: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            found = kernel(*arguments)
            called.extend([name] if found is not None else [])
            return found

        return noted

    kernels = ops.CodeKernels(*(noting(of, getattr(code_operators, of)) for of in ops.CodeKernels._fields))
    for name, noted in kernels._asdict().items():  # on a GPU the backend registers them anew at its first choice
        monkeypatch.setattr(code_operators, name, noted)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's
    monkeypatch.setattr(ops, "_code_kernels", {device: kernels})
    return called


def layer_and_twin(kind: str, dtype: torch.dtype, device: str, **options: Any) -> tuple[Any, Any]:
    layer = adapted(kind, 96, 80, dtype, **options)
    return layer.to(device), twin(layer, values(layer), dtype).to(device)


@pytest.mark.parametrize("kind", KINDS)
@interpreted
def test_a_form_is_read_by_its_codes(kind: str, own: list[str]) -> None:
    """Its values have the package's bits."""
    torch.manual_seed(0)
    layer = quantised(kind, 96, 80, torch.float32)
    packed = known.packed(layer)
    assert packed is not None
    with_kernels = {dtype: packed.dequantize(dtype) for dtype in DTYPES}
    if not (reads := bool(own)):
        assert kind in ("ao-nvfp4", "ao-mxfp4", "ao-mxfp8")
    ops._code_kernels.clear()
    assert all(same_bits(found + 0.0, packed.dequantize(dtype) + 0.0) for dtype, found in with_kernels.items())
    assert (number_of(packed.layout) != "") == reads


def check_passes(kind: str, own: list[str], device: str, options: dict[str, Any]) -> None:
    """Five tokens, forward and backward, beside the twin's: W is dequantised for dx alone, and for DoRA's norms."""
    layer, other = layer_and_twin(kind, torch.float32, device, **options)
    x, dy = torch.randn(5, 96, device=device), torch.randn(5, 80, device=device)
    own.clear()
    with use_backend("triton"):
        found, yardstick = results_of(layer, x, dy), results_of(other, x, dy)
    assert own == [*["values"] * bool(layer.use_dora), "few_tokens", "values"], (kind, options)
    check_beside(found, yardstick, partial(results_of, other.double(), x.double(), dy.double()))


def test_a_layer_multiplies_few_tokens_by_the_codes(own: list[str], triton_device: str) -> None:
    for kind in ("nf4-nested", "int8"):
        for options in ({}, {"use_dora": True}):
            check_passes(kind, own, triton_device, options)


def test_while_the_adapter_is_off_few_tokens_are_multiplied_by_the_codes(own: list[str], triton_device: str) -> None:
    layer, other = layer_and_twin("nf4", torch.bfloat16, triton_device)
    x = torch.randn(5, 96, device=triton_device).bfloat16()
    with use_backend("triton"), torch.no_grad(), layer.enable_lora(False), other.enable_lora(False):
        own.clear()
        found, yardstick = layer(x), other(x)
        assert own == ["few_tokens"]
        check_beside({"y": found}, {"y": yardstick}, lambda: {"y": other.double()(x.double())})


@interpreted
def test_many_tokens_take_the_values_and_a_watched_call_the_codes(
    own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched, h is formed in a launch of its own; so it is in compiled code, which sees one operator of the weight."""
    layer, other = layer_and_twin("nf4", torch.float32, "cpu")
    x = torch.randn(17, 96)
    with use_backend("triton"), torch.no_grad():
        layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x[:3])
        monkeypatch.setattr(packed_autograd, "is_watched", lambda: True)
        watched, yardstick = layer(x[:3]), other(x[:3])
    assert own == ["values", "few_tokens", "few_tokens"]
    with torch.no_grad():
        check_beside({"y": watched}, {"y": yardstick}, lambda: {"y": other.double()(x[:3].double())})
    assert same_bits(compiled, watched)


@pytest.mark.parametrize(
    ("word", "told"), [("package", "LORA_KERNELS_GPU_QUANTIZED=own takes"), ("own", "Up to 16 tokens are multiplied")]
)
def test_explain_tells_whose_kernels_read_the_weight(word: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_GPU_QUANTIZED", word)
    triton.quantized.cache_clear()
    try:
        with use_backend("triton"):
            assert told in str(explain(adapted("nf4", 64, 96)))
            assert told not in str(explain(twin(adapted("nf4", 64, 96), torch.ones(96, 64), torch.float32)))
    finally:
        triton.quantized.cache_clear()
