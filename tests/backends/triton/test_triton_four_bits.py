"""The kernel in Triton that makes a weight's values of 4-bit codes: bit for bit what bitsandbytes makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import LoRAKernelsError, ops
from lora_kernels.backends import triton
from lora_kernels.backends.triton import code_operators
from lora_kernels.codes import Codes
from lora_kernels.weights import four_bits
from numerics import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Blocks, rows, columns: one value, odd numbers of them, rows that are not whole blocks, more than OUTER blocks.
SIZES = ((64, 1, 1), (64, 7, 95), (64, 3, 1401), (4096, 1, 4162))
ON_A_GPU = ((64, 4096, 4096), (64, 129, 1001), (512, 1024, 80))
OUTER = 64
MISSING = "bitsandbytes is not installed: pip install 'lora-kernels[quant]'"


def parts_of(blocksize: int, nested: bool, n: int, k: int, device: str) -> list[Tensor]:
    """Random codes and statistics of a weight (n, k), each block's another; the statistics' magnitudes are fp16's."""
    count = -(-n * k // blocksize)
    codes = torch.randint(0, 256, (-(-n * k // 2),), dtype=torch.uint8)
    if nested:
        absmax = [
            torch.randint(0, 256, (count,), dtype=torch.uint8),
            torch.rand(-(-count // OUTER)) + 0.5,
            torch.linspace(-1.0, 1.0, 256) ** 3,
            torch.tensor(0.7),
        ]
    else:
        absmax = [torch.randn(count).exp2()]
    return [part.to(device) for part in (codes, *absmax)]


def by_formula(parts: list[Tensor], quant_type: str, blocksize: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """table[code] * absmax by PyTorch, in the package's order of roundings."""
    codes, absmax = parts[0], parts[1]
    if len(parts) > 2:
        absmax = parts[3][absmax.long()] * parts[2].repeat_interleave(OUTER)[: absmax.numel()]
        absmax = absmax + parts[4]
    table = torch.tensor(four_bits.TABLES[quant_type], device=codes.device)
    numbers = table[torch.stack([codes >> 4, codes & 15], -1).flatten()[: n * k].long()]
    return (numbers * absmax.repeat_interleave(blocksize)[: n * k]).to(dtype).view(n, k)


def by_the_package(parts: list[Tensor], quant_type: str, blocksize: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Its operators' values, of whole blocks as one long row."""
    pytest.importorskip("bitsandbytes", reason=MISSING)
    operators, absmax = torch.ops.bitsandbytes, parts[1]
    if len(parts) > 2:
        absmax = operators.dequantize_blockwise.default(absmax, parts[2], parts[3], OUTER, torch.float32) + parts[4]
    count = absmax.numel() * blocksize
    padded = parts[0].new_zeros(count // 2)
    padded[: parts[0].numel()] = parts[0]
    flat: Tensor = operators.dequantize_4bit.default(padded, absmax, blocksize, quant_type, (1, count), dtype)
    return flat.flatten()[: n * k].view(n, k)


def by_the_kernel(parts: list[Tensor], quant_type: str, blocksize: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    codes = Codes(quant_type, 1, blocksize, OUTER if len(parts) > 2 else 0)
    return code_operators.values(parts, codes, n, k, dtype)


@pytest.fixture(params=list(itertools.product(four_bits.TABLES, ("plain", "nested"))), ids="-".join)
def cases(request: pytest.FixtureRequest, triton_device: str) -> list[tuple[Any, ...]]:
    """Arguments of one quantisation type, with statistics of one kind; the same ones in each test."""
    quant_type, nested = request.param
    torch.manual_seed(5)
    sizes = (*SIZES, *(ON_A_GPU if triton_device == "cuda" else ()))
    made = [(parts_of(b, nested == "nested", n, k, triton_device), quant_type, b, n, k) for b, n, k in sizes]
    return [(*of, dtype) for of in made for dtype in DTYPES]


def test_the_kernel_gives_the_formulas_bits(cases: list[tuple[Any, ...]]) -> None:
    for of in cases:
        assert same_bits(by_the_kernel(*of) + 0.0, by_formula(*of) + 0.0), of[1:]  # FP4 has zeros of both signs


def test_the_formulas_bits_are_the_packages(cases: list[tuple[Any, ...]]) -> None:
    for of in cases:
        assert same_bits(by_formula(*of) + 0.0, by_the_package(*of) + 0.0), of[1:]


def _nibbles_swapped(parts: list[Tensor]) -> list[Tensor]:
    return [(parts[0] >> 4) | (parts[0] << 4), *parts[1:]]


def _one_absmax_of_the_block_before(parts: list[Tensor]) -> list[Tensor]:
    return [parts[0], torch.cat([parts[1][:-1], parts[1][-2:-1]]), *parts[2:]]


def _offset_lost(parts: list[Tensor]) -> list[Tensor]:
    return [*parts[:-1], torch.zeros_like(parts[-1])]


def _one_code_other(parts: list[Tensor]) -> list[Tensor]:
    codes = parts[0].clone()
    codes[-1] ^= 0x10
    return [codes, *parts[1:]]


def test_each_kind_of_fault_shows(triton_device: str) -> None:
    of = "nf4", 64, 4, 96, torch.bfloat16
    parts = parts_of(64, True, 4, 96, triton_device)
    parts[1][-2:] = torch.tensor([255, 200], dtype=torch.uint8)
    expected = by_formula(parts, *of)
    assert same_bits(by_the_kernel(parts, *of), expected)
    for fault in (_nibbles_swapped, _one_absmax_of_the_block_before, _offset_lost, _one_code_other):
        assert not same_bits(by_the_kernel(fault(parts), *of), expected), fault


def test_parts_that_are_too_short_are_refused() -> None:
    parts = parts_of(64, True, 4, 96, "cpu")
    for i in range(4):
        wrong = [*parts[:i], parts[i][:-1], *parts[i + 1 :]]
        with pytest.raises(LoRAKernelsError, match=r"a 4-bit weight of 384 numbers has .* and must have"):
            by_the_kernel(wrong, "nf4", 64, 4, 96, torch.float32)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Whom ``dequantize`` asks for the values, in order; who that is is chosen anew."""
    asked: list[str] = []

    def noting(*arguments: Any) -> Tensor:
        asked.append("own")
        return by_kernel(*arguments)

    by_kernel = code_operators.values
    monkeypatch.setattr(code_operators, "values", noting)
    monkeypatch.setattr(ops, "_code_kernels", {})
    triton.quantized.cache_clear()
    yield asked
    triton.quantized.cache_clear()


@pytest.mark.parametrize(("word", "own"), [("", 2 if torch.cuda.is_available() else 0), ("package", 0), ("own", 2)])
def test_the_switch_decides_who_makes_the_values(
    word: str, own: int, chosen: list[str], monkeypatch: pytest.MonkeyPatch, triton_device: str
) -> None:
    """Of a weight that the package has quantised; called plainly, and in a graph, which sees one operator."""
    package = pytest.importorskip("bitsandbytes", reason=MISSING).functional
    from lora_kernels.weights import bitsandbytes as form

    monkeypatch.setenv("LORA_KERNELS_GPU_QUANTIZED", word)
    triton.BACKEND.register(triton_device)
    weight = torch.randn(6, 64, device=triton_device)
    codes, state = package.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = [codes, state.absmax, state.state2.absmax, state.state2.code, state.offset]
    of = form.FOUR_BITS.name, f"nf4/64/{state.state2.blocksize}/", 6, 64, torch.float32, None

    def values(parts: list[Tensor]) -> Tensor:
        return ops.dequantize(parts, *of)

    expected = package.dequantize_4bit(codes, state)
    assert same_bits(values(parts), expected)
    assert same_bits(torch.compile(values, backend="eager", fullgraph=True)(parts), expected)
    assert len(chosen) == own


def test_an_unknown_word_is_refused(chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_GPU_QUANTIZED", "mine")
    with pytest.raises(LoRAKernelsError, match=r"QUANTIZED=mine was given: it must be one of package, own\. Set"):
        triton.BACKEND.register("cpu")
