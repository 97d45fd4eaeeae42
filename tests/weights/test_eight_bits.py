"""The kernels in C++ that read 8-bit codes: their values are the packages', and few tokens' products are theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import ops
from lora_kernels.backends.native import load
from lora_kernels.weights import eight_bits, known
from numerics import same_bits
from quantised import KINDS, adapted, check_products, quantised

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
READ = [kind for kind in ("int8", "ao-int8", "ao-int8-group", "ao-int4", "ao-float8", "ao-mxfp8") if kind in KINDS]
READ += [kind for kind in KINDS if kind.startswith("fp8")]
SIZES = ((96, 64), (37, 48), (33, 272))
E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    if reasons := load.why_not("cpu"):
        pytest.skip(" ".join(reasons))
    load.load("cpu")


def _packed(kind: str, n: int, k: int, dtype: torch.dtype) -> Any:
    layer = quantised(kind, k, n, dtype)
    return known.packed(layer.requires_grad_(False))


def _codes(packed: Any) -> ops.CodedParts:
    found = ops.codes_of(list(packed.parts), *packed.layout[:-1])
    assert found is not None
    return found


@pytest.mark.own_kernels
@pytest.mark.parametrize("kind", READ)
def test_values_are_bit_for_bit_the_packages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, k in SIZES:
        for own in DTYPES:
            packed = _packed(kind, n, k, own)
            found = {dtype: packed.dequantize(dtype) for dtype in (*DTYPES, torch.float64)}
            assert packed.kernels == ("native",)
            with monkeypatch.context() as patch:
                patch.setattr(ops, "has_coded_kernels", lambda: False)
                for dtype, values in found.items():
                    assert same_bits(values, packed.dequantize(dtype)), (n, k, own, dtype)


@pytest.mark.own_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.0, -3.7e-5, 2.0**-130, 2.0**-120, 1e36], ids=str)
def test_every_number_of_eight_bits(dtype: torch.dtype, scale: float) -> None:
    """Those below the least normal one, both zeros and NaN too."""
    every = torch.arange(256, dtype=torch.uint8).repeat(2).view(2, 256)
    scales, zeros = torch.tensor([[scale], [2 * scale]]), torch.tensor([[-3], [127]], dtype=torch.int8)
    numbers = every.view(E4M3).float(), every.view(torch.int8).float() - zeros.float()
    for data, number, rest in ((every.view(E4M3), numbers[0], ()), (every.view(torch.int8), numbers[1], (zeros,))):
        found = eight_bits.values(eight_bits.codes(data, scales, 1, 256, *rest), 2, 256, dtype)
        assert found is not None
        expected = (number * scales).to(dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert same_bits(found[kept], expected[kept])


@pytest.mark.own_kernels
@pytest.mark.parametrize("kind", READ)
def test_few_tokens_are_multiplied_as_by_the_values(kind: str) -> None:
    for (n, k), dtype in zip(((37, 48), (13, 272), (96, 1040)), DTYPES, strict=True):
        packed = _packed(kind, n, k, dtype)
        for m, r in ((1, 4), (2, 1), (3, 0), (4, 3), (5, 8), (16, 16)):
            check_products(_codes(packed), packed.dequantize(dtype), m, r, dtype)


@pytest.mark.own_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [256, 203, 31])
@pytest.mark.parametrize("scale", [1.0, 0.0, -3.7e-5, 2.0**-130, 2.0**-120, 1e35], ids=str)
def test_few_tokens_meet_each_number_rounded_as_in_the_values(dtype: torch.dtype, k: int, scale: float) -> None:
    """A token of one 1 picks a column of W, exactly."""
    every = torch.arange(256, dtype=torch.uint8)[:k].repeat(2).view(2, k)
    finite = torch.where((every & 0x7F) == 0x7F, 0, every)
    for data in (finite.view(E4M3), every.view(torch.int8)):
        codes = eight_bits.codes(data, torch.tensor([[scale], [-3 * scale]]), 1, k)
        values = eight_bits.values(codes, 2, k, dtype)
        assert codes is not None
        assert values is not None
        if not values.isfinite().all():  # 0 times infinity is no 0
            continue
        picked = torch.eye(k).to(dtype)
        for m in (1, 2, 3, 4, 7):
            for start in range(0, k - m + 1, 16):
                y, _ = ops.coded_product(picked[start : start + m], codes, 2, None, None, None, None, 1.0, False)
                assert torch.equal(y, values[:, start : start + m].t()), (m, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_that_is_none_is_seen_by_few_tokens(dtype: torch.dtype) -> None:
    """In a code of e4m3, and in a scale, whatever bits it has; rows beside it stay as they are."""
    data = torch.full((4, 80), 0x38, dtype=torch.uint8)  # 1.0
    data[1, 40], data[2, 79] = 0x7F, 0xFF
    scales = torch.ones(4, 1)
    scales.view(torch.int32)[3] = 0x7FFFFFFF
    for m in (1, 2, 4, 6):
        codes = eight_bits.codes(data.view(E4M3), scales, 1, 80)
        assert codes is not None
        y, _ = ops.coded_product(torch.ones(m, 80, dtype=dtype), codes, 4, None, None, None, None, 1.0, False)
        assert y.isnan().tolist() == [[False, True, True, True]] * m
        assert (y[:, 0] == 80.0).all()


def _other_scale(parts: list[Tensor]) -> list[Tensor]:
    scales = parts[1].clone()
    scales[-1] *= 2
    return [parts[0], scales, *parts[2:]]


def _other_zero(parts: list[Tensor]) -> list[Tensor]:
    zeros = parts[2].clone()
    zeros[-1] += 3
    return [*parts[:2], zeros]


@pytest.mark.parametrize("fault", [_other_scale, _other_zero])
def test_each_kind_of_fault_shows(fault: Any) -> None:
    data, scales = torch.randint(-128, 128, (6, 40), dtype=torch.int8), torch.rand(6, 1)
    zeros = torch.randint(-3, 3, (6, 1), dtype=torch.int8)
    right = (data.float() - zeros.float()) * scales
    for parts, shows in (([data, scales, zeros], False), (fault([data, scales, zeros]), True)):
        codes = eight_bits.codes(parts[0], parts[1], 1, 40, parts[2])
        assert codes is not None
        if shows:
            with pytest.raises(AssertionError):
                check_products(codes, right, 2, 4, torch.float32)
        else:
            check_products(codes, right, 2, 4, torch.float32)


@pytest.mark.parametrize("kind", READ)
def test_a_layer_reads_the_codes_of_few_tokens_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, made = adapted(kind, 64, 96, torch.float32), []
    monkeypatch.setattr(ops, "coded_values", lambda *_: made.append(1))
    x = torch.randn(16, 64, requires_grad=True)
    layer(x).sum().backward()
    assert made == []


def test_what_the_kernels_do_not_read_is_left_to_the_package() -> None:
    data, scales = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1)
    assert eight_bits.codes(data, scales, 1, 64) is not None
    assert eight_bits.codes(data.view(torch.uint8), scales, 1, 64) is None
    assert eight_bits.codes(data, scales, 1, 32) is None
    assert eight_bits.codes(data, scales, 1, 64, torch.zeros(4, 1)) is None
    assert eight_bits.codes(data.t(), torch.ones(64, 1), 1, 4) is None
    assert eight_bits.codes(data.to("meta"), scales, 1, 64) is None
