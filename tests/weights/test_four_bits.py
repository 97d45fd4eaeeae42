"""The kernels in C++ that read 4-bit codes: their values are the package's, and few tokens' products are theirs."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from lora_kernels import ops
from lora_kernels.backends.native import coded, load
from lora_kernels.weights import four_bits, known, mxfp4
from lora_kernels.weights.packed import Layout
from numerics import check_all, check_linear, same_bits, three_ways
from quantised import adapted, bnb, check_beside, check_products, quantised, results_of, twin, values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FEW_BLOCKS = (32, 64, 4096)
SIZES = ((8, 64), (7, 96), (5, 51), (3, 18), (37, 480), (9, 4112), (16, 4096), (3, 17))
RAGGED = 2.0  # the sizes' rows differ in magnitude by as much, so that another block's absmax shows


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    if reasons := load.why_not("cpu"):
        pytest.skip(" ".join(reasons))
    load.load("cpu")


def _packed(quant_type: str, blocksize: int, nested: bool, n: int, k: int) -> tuple[list[Tensor], int]:
    """The parts of a random weight, and how many of absmax make a block."""
    weight = torch.randn(n, k) * RAGGED ** torch.randn(n, 1)
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    if not nested:
        return [codes, state.absmax], 0
    return [codes, state.absmax, state.state2.absmax, state.state2.code, state.offset], state.state2.blocksize


def _by_the_package(
    parts: list[Tensor], nested: int, quant_type: str, blocksize: int, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    """The package's values; as one long row, whose blocks it never takes for another row's."""
    operators, absmax = torch.ops.bitsandbytes, parts[1]
    if nested:
        absmax = operators.dequantize_blockwise.default(absmax, parts[2], parts[3], nested, torch.float32) + parts[4]
    blocks = -(-n * k // blocksize)
    padded = torch.zeros(blocks * blocksize // 2, dtype=torch.uint8)  # an odd number of columns runs its slow code
    padded[: parts[0].numel()] = parts[0].flatten()
    shape = (blocks, min(blocksize, 1024))
    absmax = absmax.repeat_interleave(blocksize // shape[1])
    flat: Tensor = operators.dequantize_4bit.default(
        padded, absmax, shape[1], quant_type, (absmax.numel(), shape[1]), dtype
    )
    return flat.flatten()[: n * k].view(n, k)


@pytest.mark.own_kernels
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKS)
@pytest.mark.parametrize("quant_type", four_bits.TABLES)
def test_values_are_bit_for_bit_the_packages(quant_type: str, blocksize: int, nested: bool) -> None:
    for (n, k), dtype in itertools.product(SIZES, DTYPES):
        parts, outer = _packed(quant_type, blocksize, nested, n, k)
        found = four_bits.values(parts, quant_type, blocksize, outer, n, k, dtype)
        assert found is not None
        expected = _by_the_package(parts, outer, quant_type, blocksize, n, k, dtype)
        assert same_bits(found + 0.0, expected + 0.0), (n, k, dtype)  # the package has zeros of both signs


@pytest.mark.own_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", four_bits.TABLES)
def test_any_absmax_makes_the_values_that_pytorch_makes(quant_type: str, dtype: torch.dtype) -> None:
    """Zero, too small, too large, and no number, whatever bits that has; the product of few tokens sees the same."""
    absmax = torch.tensor([1.0, 0.0, 1e-42, -(2.0**-126), 3e38, -7e4, float("inf"), float("nan"), float("nan")])
    absmax.view(torch.int32)[-1] = 0x7FFFFFFF
    n, k = len(absmax), 64
    codes = (torch.arange(n * k // 2) * 37 % 256).to(torch.uint8)
    parts = [codes, absmax]
    found = four_bits.values(parts, quant_type, k, 0, n, k, dtype)
    assert found is not None
    index = torch.stack((codes >> 4, codes & 15), 1).view(n, k).int()
    expected = (torch.tensor(four_bits.TABLES[quant_type])[index] * absmax[:, None]).to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(found[kept], expected[kept])
    read = four_bits.codes(parts, quant_type, k, 0)
    assert read is not None
    finite = expected.isfinite().all(1)
    for m in (1, 2, 4, 6):
        for start in range(0, k - m + 1, 8):
            picked = torch.eye(k)[start : start + m].to(dtype)
            y, _ = ops.coded_product(picked, read, n, None, None, None, None, 1.0, False)
            assert torch.equal(y[:, finite], expected[finite, start : start + m].t()), (m, start)
        y, _ = ops.coded_product(torch.ones(m, k).to(dtype), read, n, None, None, None, None, 1.0, False)
        assert y[:, -2:].isnan().all()


@pytest.mark.parametrize("quant_type", four_bits.TABLES)
def test_the_table_is_the_packages(quant_type: str) -> None:
    table = bnb.functional.get_4bit_type(quant_type, device="cpu")
    assert torch.equal(table, torch.tensor(four_bits.TABLES[quant_type], dtype=torch.float32))


def test_rows_that_are_not_whole_blocks_have_their_own_absmax() -> None:
    """Through the seam, with the kernels and without: bitsandbytes' AVX-512 code takes other blocks' there."""
    parts, _ = _packed("nf4", 64, False, 7, 96)
    layout = Layout("bitsandbytes-4bit", "nf4/64/0/", 7, 96, 2)
    expected = _by_the_package(parts, 0, "nf4", 64, 7, 96, torch.float32)
    of = parts, layout.form, layout.spec, 7, 96, torch.float32, None
    assert torch.equal(ops.dequantize(*of), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "has_coded_kernels", lambda: False)
        assert torch.equal(ops.dequantize(*of), expected)


def _swapped_nibbles(parts: list[Tensor]) -> list[Tensor]:
    return [(parts[0] >> 4) | (parts[0] << 4), *parts[1:]]


def _last_absmax_of_the_one_before(parts: list[Tensor]) -> list[Tensor]:
    absmax = parts[1].clone()
    absmax[-1] = absmax[-2]
    return [parts[0], absmax, *parts[2:]]


def _last_columns_lost(parts: list[Tensor]) -> list[Tensor]:
    codes = parts[0].clone()
    codes[-1] = 0x77  # two zeros
    return [codes, *parts[1:]]


@pytest.mark.parametrize("fault", [_swapped_nibbles, _last_absmax_of_the_one_before, _last_columns_lost])
def test_each_kind_of_fault_shows_in_the_values_and_in_the_product(fault: Any) -> None:
    n, k, dtype = 7, 96, torch.float32
    parts, _ = _packed("nf4", 32, False, n, k)
    expected = _by_the_package(parts, 0, "nf4", 32, n, k, dtype)
    found = four_bits.values(fault(parts), "nf4", 32, 0, n, k, dtype)
    assert found is not None
    assert not same_bits(found, expected)
    with pytest.raises(AssertionError):
        _check_product(fault(parts), expected, "nf4", 32, 0, 1, 4, dtype)


def _check_product(
    parts: list[Tensor], weight: Tensor, quant_type: str, blocksize: int, outer: int, m: int, r: int, dtype: torch.dtype
) -> None:
    codes = four_bits.codes(parts, quant_type, blocksize, outer)
    assert codes is not None
    check_products(codes, weight, m, r, dtype)


@pytest.mark.own_kernels
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", FEW_BLOCKS)
@pytest.mark.parametrize("quant_type", four_bits.TABLES)
def test_few_tokens_are_multiplied_as_by_the_values(quant_type: str, blocksize: int, nested: bool) -> None:
    """Each size meets all tokens, each with one dtype; with each dtype in one blocksize of three."""
    for at, (n, k) in enumerate(((13, 64), (7, 96), (37, 480), (9, 4096), (2, 4128)), FEW_BLOCKS.index(blocksize)):
        parts, outer = _packed(quant_type, blocksize, nested, n, k)
        weights = [_by_the_package(parts, outer, quant_type, blocksize, n, k, dtype) for dtype in DTYPES]
        for number, (m, r) in enumerate(((1, 4), (2, 1), (3, 16), (4, 5), (5, 8), (16, 0)), at):
            which = number % len(DTYPES)
            _check_product(parts, weights[which], quant_type, blocksize, outer, m, r, DTYPES[which])


@pytest.mark.own_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(96, 64), (7, 480), (3, 4128)])
def test_mxfp4_is_read_as_torchao_reads_it(n: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two codes is in the lower half of their byte there."""
    tensors = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    layer = torch.nn.Linear(k, n, bias=False, dtype=dtype)
    weight = tensors.MXTensor.to_mx(torch.randn(n, k).to(torch.bfloat16), torch.float4_e2m1fn_x2, 32)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    packed = known.packed(layer)
    assert packed is not None
    assert packed.kernels == ("native",)
    found = packed.dequantize(dtype)
    codes = ops.codes_of(list(packed.parts), *packed.layout[:-1])
    assert codes is not None
    assert not torch.equal(ops.coded_values(codes._replace(low_first=False), n, k, dtype), found)
    for m, r in ((1, 4), (2, 1), (3, 16), (4, 5), (5, 8), (16, 0)):
        check_products(codes, found, m, r, dtype)
    monkeypatch.setattr(ops, "has_coded_kernels", lambda: False)
    assert same_bits(found, packed.dequantize(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_of_gpt_oss_has_the_same_values_by_the_kernels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, groups = 5, 3
    parts = [
        torch.randint(0, 256, (n, groups, 16), dtype=torch.uint8),
        torch.randint(115, 130, (n, groups), dtype=torch.uint8),
    ]
    of = parts, "", n, 32 * groups
    found = mxfp4.values(*of, dtype)
    assert mxfp4.codes(*of) is not None
    monkeypatch.setattr(ops, "has_coded_kernels", lambda: False)
    assert same_bits(found, mxfp4.values(*of, dtype))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4"])
def test_a_layer_reads_the_codes_of_few_tokens(
    kind: str, dtype: torch.dtype, options: dict[str, Any], calls: list[str]
) -> None:
    layer = adapted(kind, 64, 96, dtype, **options)
    other, x, dy = twin(layer, values(layer), dtype), torch.randn(3, 64).to(dtype), torch.randn(3, 96).to(dtype)
    found = results_of(layer, x, dy)
    assert calls[-2:] == ["coded_product", "coded_input_grad"]
    assert ("coded_values" in calls) == ("use_dora" in options)  # norms
    check_beside(found, results_of(other, x, dy), partial(results_of, other.double(), x, dy))
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), layer(x))
    calls.clear()
    layer(torch.randn(17, 64).to(dtype))
    assert set(calls) == {"coded_values"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the library's functions for codes that run, as they run."""
    names: list[str] = []
    for name in ("coded_product", "coded_input_grad", "coded_values"):
        noting = _noting(name, names, getattr(ops, name))
        for module in (ops, coded):
            monkeypatch.setattr(module, name, noting, raising=False)
    return names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_whose_adapter_is_off_reads_the_codes_too(dtype: torch.dtype, calls: list[str]) -> None:
    layer = adapted("nf4", 64, 96, dtype)
    x, dy, weight = torch.randn(3, 64).to(dtype), torch.randn(3, 96).to(dtype), values(layer)
    with layer.enable_lora(False):
        ix = x.clone().requires_grad_()
        y = layer(ix)
        y.backward(dy)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    assert calls == ["coded_product", "coded_input_grad", "coded_product"]

    def formulas(number: Any) -> dict[str, Any]:
        return {"y": number(x) @ number(weight).t() + number(layer.bias), "dx": number(dy) @ number(weight)}

    exact, yardstick, errors = three_ways(dtype, formulas)
    check_all({"y": y.detach(), "dx": ix.grad}, exact, yardstick, dtype, expected=errors)


@pytest.mark.one_library
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_a_graph_reads_the_codes_of_few_tokens_and_the_values_of_many(on: bool, calls: list[str]) -> None:
    layer = adapted("nf4", 64, 96, torch.float32)
    graphs: list[Any] = []

    def noting(graph: Any, _: Any) -> Any:
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=noting), fullgraph=True, dynamic=True)
    with layer.enable_lora(on):
        for m in (3, 24):
            x, dy = torch.randn(m, 64), torch.randn(m, 96)
            expected = results_of(layer, x, dy)
            calls.clear()
            found = results_of(compiled, x, dy)
            for one, other in zip(found.values(), expected.values(), strict=True):
                assert other is None or same_bits(one, other)
            assert set(calls) == ({"coded_product", "coded_input_grad"} if m <= 16 else {"coded_values"})
    assert len(graphs) == 2  # forward and backward, for both numbers of tokens
    for graph, name in zip(graphs, ("native_packed_product", "native_packed_input_grad"), strict=True):
        assert any(str(target).startswith(f"lora_kernels.{name}.") for target in graph)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_a_large_weight_is_made_in_parts(
    kind: str, options: dict[str, Any], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As even as they get; dropout's mask of dx is of whole rows."""
    monkeypatch.setattr(coded, "_PART_BYTES", 4 * 160 * 64)
    layer = adapted(kind, 160, 224, torch.float32, **options)
    other, x, dy = twin(layer, values(layer), torch.float32), torch.randn(24, 160), torch.randn(24, 224)
    calls.clear()
    found = results_of(layer, x, dy)
    assert calls.count("coded_values") == ("use_dora" in options) + 4 + (1 if "lora_dropout" in options else 3)
    check_beside(found, results_of(other, x, dy), partial(results_of, other.double(), x, dy))
    with layer.enable_lora(False):
        ix = x.clone().requires_grad_()
        y = layer(ix)
        y.backward(dy)
    check_linear(y.detach(), x, values(layer), layer.bias.detach())
    check_linear(ix.grad, dy, values(layer).t())


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_part_is_that_of_the_values(by_columns: bool) -> None:
    layer = quantised("nf4", 320, 96, torch.float32)
    if by_columns:
        pack = bnb.functional._convert_weight_packed_for_cpu
        layer.weight.data, layer.weight.quant_state = pack(layer.weight.data, layer.weight.quant_state)
    packed = known.packed(layer)
    assert packed is not None
    codes, whole = ops.codes_of(list(packed.parts), *packed.layout[:-1]), packed.dequantize(torch.bfloat16)
    assert codes is not None
    for row, column, height, width in ((0, 0, 96, 320), (32, 0, 64, 320), (64, 66, 32, 129), (0, 192, 96, 128)):
        part = ops.coded_values(codes, 96, 320, torch.bfloat16, (row, column, height, width))
        assert same_bits(part, whole[row : row + height, column : column + width])
    for wrong in ((16, 0, 32, 320), (0, 1, 96, 2), (64, 0, 64, 320)):
        with pytest.raises(RuntimeError, match="a part of a"):
            ops.coded_values(codes, 96, 320, torch.bfloat16, wrong)


def _noting(name: str, calls: list[str], function: Any) -> Any:
    def noted(*arguments: Any) -> Any:
        calls.append(name)
        return function(*arguments)

    return noted


def test_what_the_kernels_do_not_read_is_left_to_the_package() -> None:
    parts, _ = _packed("nf4", 64, False, 4, 64)
    of = "nf4", 64, 0, 4, 64
    assert four_bits.values(parts, *of, torch.float64) is None
    assert four_bits.values([parts[0], parts[1].bfloat16()], *of, torch.float32) is None
    assert four_bits.values(parts, "nf4", 48, 0, 4, 64, torch.float32) is None
    with pytest.raises(RuntimeError, match="at most 16 tokens are multiplied with codes"):
        check_products(four_bits.codes(parts, *of[:3]), torch.zeros(4, 64), 17, 0, torch.float32)
    parts, _ = _packed("nf4", 32, False, 2, 48)
    assert not ops.reads_codes(parts, "bitsandbytes-4bit", "nf4/32/0/", 2, 48)


def test_parts_that_are_too_short_are_refused() -> None:
    parts, _ = _packed("nf4", 64, False, 4, 64)
    for wrong in ([parts[0][:-1], parts[1]], [parts[0], parts[1][:-1]]):
        with pytest.raises(RuntimeError, match="of a coded weight must be contiguous"):
            four_bits.values(wrong, "nf4", 64, 0, 4, 64, torch.float32)
