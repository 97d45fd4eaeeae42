"""The kernels in Triton that read a quantised weight as it is stored: bytes' values, and few tokens' forward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import LoRAKernelsError
from lora_kernels.backends.triton import code_operators, operators
from lora_kernels.backends.triton.kernels import few_four_bits
from lora_kernels.codes import FOUR_BITS, Codes
from lora_kernels.weights import four_bits
from numerics import check_all, same_bits, three_ways

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = (
    Codes("e4m3", 32, 128),
    Codes("e4m3", 16, 24),
    Codes("e4m3", 0, 0),
    Codes("int8", 1, 0, per=127),
    Codes("int8", 1, 32, zeros=True),
    Codes("int8", 1, 10, zeros=True),
)
E2M1 = (
    Codes("e2m1", 1, 32, scales="e8m0"),
    Codes("e2m1", 1, 128, scales="e8m0"),
    Codes("e2m1", 1, 16, scales="e4m3"),
)
FEW = {
    "4 bits": (Codes("nf4", 1, 64, 4), Codes("nf4", 1, 4096), Codes("fp4", 1, 32)),
    "8 bits": (
        Codes("e4m3", 16, 64),
        Codes("e4m3", 0, 0),
        Codes("int8", 1, 0, per=127),
        Codes("int8", 1, 10, zeros=True),
    ),
}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="it runs on the CPU, in Triton's interpreter")
N, K = 37, 288  # no whole strip, no whole step, and two shares of K


def parts_of(codes: Codes, n: int, k: int, device: str) -> list[Tensor]:
    """Random numbers, every byte among them, and factors that differ from block to block."""
    if codes.number == "e2m1":
        of_scales = (100, 150) if codes.scales == "e8m0" else (0, 127)
        data, scales = torch.randint(0, 256, (n, k // 2)), torch.randint(*of_scales, (n, k // codes.wide))
        whole = [torch.tensor(0.37)] if codes.scales == "e4m3" and n % 2 else []
        return [part.to(device) for part in (data.to(torch.uint8), scales.to(torch.uint8), *whole)]
    if codes.number in FOUR_BITS:
        count = -(-n * k // codes.wide)
        data = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8)
        if not codes.nested:
            return [data.to(device), (torch.rand(count) + 0.5).to(device)]
        index = torch.randint(0, 256, (count,), dtype=torch.uint8)
        index[-1] = 255
        outer, table = torch.rand(-(-count // codes.nested)) + 0.5, torch.linspace(0.1, 1.0, 256) ** 2
        return [part.to(device) for part in (data, index, outer, table, torch.tensor(0.1))]
    high, wide = codes.high or n, codes.wide or k
    data = torch.randint(0, 256, (n, k)).to(torch.uint8)
    data = data.view(torch.int8) if codes.number == "int8" else torch.where(data & 0x7F == 0x7F, data ^ 1, data)
    shape = -(-n // high), -(-k // wide)
    factor = (torch.rand(shape) + 0.5) * (0.01 if codes.per == 1 else 1.0)
    zeros = [torch.randint(-128, 128, shape, dtype=torch.int8)] if codes.zeros else []
    return [part.to(device) for part in (data, factor, *zeros)]


def by_formula(parts: list[Tensor], codes: Codes, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """W by PyTorch: each number less its zero, times its factor in fp32, rounded once."""
    data, factor = parts[0], parts[1]
    if codes.number == "e2m1":
        numbers = four_bits.e2m1(data).view(n, k)
        stored = torch.float8_e8m0fnu if codes.scales == "e8m0" else torch.float8_e4m3fn
        factor = factor.view(stored).float() * (parts[2] if len(parts) > 2 else 1.0)
        return (numbers * factor.repeat_interleave(codes.wide, 1)).to(dtype)
    if codes.number in FOUR_BITS:
        if codes.nested:
            factor = parts[3][factor.long()] * parts[2].repeat_interleave(codes.nested)[: factor.numel()] + parts[4]
        table = torch.tensor(four_bits.TABLES[codes.number], device=data.device)
        numbers = table[torch.stack([data >> 4, data & 15], -1).flatten().long()]
        return (numbers * factor.repeat_interleave(codes.wide)[: n * k]).to(dtype).view(n, k)
    high, wide = codes.high or n, codes.wide or k

    def spread(of_blocks: Tensor) -> Tensor:
        return of_blocks.float().repeat_interleave(high, 0)[:n].repeat_interleave(wide, 1)[:, :k]

    numbers = (data if codes.number == "int8" else data.view(torch.float8_e4m3fn)).float()
    numbers = numbers - spread(parts[2]) if codes.zeros else numbers
    return (numbers * spread(factor if codes.per == 1 else factor.mul(1.0 / codes.per))).to(dtype)


def test_the_values_of_bytes_have_the_formulas_bits(triton_device: str) -> None:
    check_every_byte_of_e4m3(triton_device)
    torch.manual_seed(5)
    for codes in BYTES:
        for (n, k), dtype in (((3, 1), torch.float32), ((37, 150), torch.bfloat16), ((33, 64), torch.float16)):
            parts = parts_of(codes, n, k, triton_device)
            found = code_operators.values(parts, codes, n, k, dtype)
            assert same_bits(found, by_formula(parts, codes, n, k, dtype)), (codes, n, k, dtype)


def check_every_byte_of_e4m3(device: str) -> None:
    data = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256)
    found = code_operators.values(
        [data, data.new_ones(1, dtype=torch.float32)], Codes("e4m3", 0, 0), 1, 256, torch.float32
    )
    expected = data.view(torch.float8_e4m3fn).float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert same_bits(found.nan_to_num(), expected.nan_to_num())


def test_the_values_of_e2m1_codes_have_the_formulas_bits(triton_device: str) -> None:
    """Of one block and of many programs; with a factor of all W and without."""
    torch.manual_seed(5)
    for codes, (n, k), dtype in itertools.product(E2M1, ((1, 128), (7, 384), (30, 256)), DTYPES):
        parts = parts_of(codes, n, k, triton_device)
        found = code_operators.values(parts, codes, n, k, dtype)
        assert same_bits(found, by_formula(parts, codes, n, k, dtype)), (codes, n, k, dtype)


def test_every_code_with_every_scale(triton_device: str) -> None:
    """Subnormal and infinite results too; a scale that is no number makes none."""
    for scales in ("e8m0", "e4m3"):
        check_every_code(Codes("e2m1", 1, 32, scales=scales), triton_device)


def check_every_code(codes: Codes, triton_device: str) -> None:
    data = torch.arange(16, dtype=torch.uint8, device=triton_device).repeat(256, 1) * 17
    parts = [data, torch.arange(256, dtype=torch.uint8, device=triton_device).view(256, 1)]
    for dtype in DTYPES:
        found, wanted = code_operators.values(parts, codes, 256, 32, dtype), by_formula(parts, codes, 256, 32, dtype)
        assert torch.equal(found.isnan(), wanted.isnan())
        first = 2 if dtype is torch.bfloat16 and triton_device == "cpu" else 0  # the interpreter has no subnormal bf16
        assert same_bits(found[first:].nan_to_num(7.0), wanted[first:].nan_to_num(7.0))


def few(codes: Codes, parts: list[Tensor], m: int, r: int, dtype: torch.dtype, with_a: bool, p: float) -> None:
    """y, h and l of one pass beside the formulas on W's values."""
    device, adapter = parts[0].device, torch.float32 if p else dtype

    def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, lora_a, lora_b, bias = drawn(K, m).t(), drawn(r, K, dtype=adapter), drawn(N, r, dtype=adapter), drawn(N)
    weight, gain, h = (
        by_formula(parts, codes, N, K, dtype),
        torch.rand(N, device=device) + 0.5,
        drawn(m, r, dtype=torch.float32),
    )
    state = torch.tensor([3, 5], device=device) if p else None
    keep = torch.ones(m, K, device=device) if state is None else operators.mask(state, m, K, p)
    rest = (lora_a, lora_b, None, bias, None) if with_a else (None, lora_b, h, bias, gain)
    found = code_operators.few_tokens(x, parts, codes, *rest, 0.5, p, state, not with_a)
    assert found is not None

    def formulas(number: Any) -> dict[str, Any]:
        hidden = number(x * keep.to(dtype)) @ number(lora_a.to(dtype)).t() * (1.0 / (1.0 - p)) if with_a else number(h)
        linear = number(x) @ number(weight).t() + (hidden @ number(lora_b.to(dtype)).t()) * 0.5
        y = linear + number(bias) if with_a else linear * number(gain) + number(bias)
        return {"y": y, "h": hidden} if with_a else {"y": y, "linear": linear}

    exact, yardstick, errors = three_ways(dtype, formulas)
    y, hidden, linear = found
    results = {"y": y, "h": hidden.to(dtype)} if with_a else {"y": y, "linear": linear}
    check_all(results, exact, yardstick, dtype, expected=errors)


@pytest.mark.parametrize("numbers", FEW)
def test_few_tokens_are_multiplied_as_by_the_values(numbers: str, triton_device: str) -> None:
    """By a strided x; h formed in the pass, also from a dropped x, or given, with a gain."""
    torch.manual_seed(5)
    for codes, dtype in itertools.product(FEW[numbers], DTYPES):
        parts = parts_of(codes, N, K, triton_device)
        if dtype is torch.bfloat16:
            few(codes, parts, 16, 17, dtype, True, 0.5)
        else:
            few(codes, parts, 5, 3, dtype, True, 0.0)
        if dtype is torch.float16 or triton_device == "cuda":
            few(codes, parts, 1, 20, dtype, False, 0.0)


LOOKED_UP = (Codes("nf4", 1, 64), Codes("nf4", 1, 128, 4), Codes("fp4", 1, 192), Codes("fp4", 1, 32, 4))


def test_numbers_that_are_looked_up_are_the_values(triton_device: str) -> None:
    """Bit for bit, of columns all over W: units of 64 and of 32 columns, steps that end within K and beyond it.

    With an adapter that adds nothing, and without one.
    """
    torch.manual_seed(5)
    for codes, dtype, (n, k) in itertools.product(LOOKED_UP, DTYPES[1:], ((N, 320), (32, 1024), (5, 32))):
        if triton_device == "cpu" and dtype is torch.float16 and k > 320:
            continue
        parts, columns = parts_of(codes, n, k, triton_device), torch.randperm(k)[:16].to(triton_device)
        x, a = torch.eye(k, dtype=dtype, device=triton_device)[columns], torch.zeros(1, k, device=triton_device)
        b = torch.zeros(n, 1, device=triton_device)
        for adapter in ((a, b), (None, None)):
            found = code_operators.few_tokens(x, parts, codes, *adapter, None, None, None, 1.0, 0.0, None, False)
            assert found is not None
            assert same_bits(found[0] + 0.0, by_formula(parts, codes, n, k, dtype)[:, columns].t() + 0.0)


def ptx(text: str, given: list[int]) -> dict[str, int]:
    """The registers after such a text, the operands ``$n`` among them: the outputs come first, then ``given``."""
    count = 4 if "lop3" in text else 8
    at: dict[str, int] = {f"${count + i}": value for i, value in enumerate(given)}

    def number(of: str) -> int:
        return at[of] if of in at else int(of.replace("0f", "0x"), 0)

    def as_float(bits: int) -> Tensor:
        return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)

    def half(bits: int, dtype: torch.dtype) -> int:
        return int(as_float(bits).to(dtype).view(torch.int16)) & 0xFFFF

    for line in text.strip("{}").replace("\n", " ").split(";"):
        name, *of = line.replace(",", "").split() or [""]
        if name in ("", ".reg"):
            continue
        a, b, *rest = (number(operand) for operand in of[1:])
        if name == "mul.f32":
            at[of[0]] = int((as_float(a) * as_float(b)).view(torch.int32)) & 0xFFFFFFFF
        elif name.startswith("cvt.rn."):
            dtype = torch.bfloat16 if "bf16x2" in name else torch.float16
            at[of[0]] = half(a, dtype) << 16 | half(b, dtype)
        elif name == "prmt.b32":
            of_bytes, selected = (a | b << 32).to_bytes(8, "little"), [rest[0] >> 4 * i & 15 for i in range(4)]
            assert max(selected) < 8
            at[of[0]] = int.from_bytes(bytes(of_bytes[i] for i in selected), "little")
        elif name == "lop3.b32":
            assert rest[1] == 0xEA
            at[of[0]] = a & b | rest[0]
        else:
            at[of[0]] = {"and.b32": a & b, "shr.b32": a >> b}[name]
    return at


@pytest.mark.parametrize("number", FOUR_BITS)
def test_the_instructions_look_the_numbers_up(number: str) -> None:
    """What Triton's interpreter does not run, instruction by instruction."""
    torch.manual_seed(5)
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        for eight in (0x76543210, 0xFEDCBA98, *torch.randint(0, 2**32, (6,)).tolist()):
            factor = torch.randn(()).exp2() * (-1) ** (eight & 1)
            bits = int(factor.view(torch.int32)) & 0xFFFFFFFF
            made = ptx(few_four_bits._products_of(number, word), [bits])
            found = ptx(few_four_bits._look_up(), [eight, *(made[f"${i}"] for i in range(8))])
            pairs = b"".join(found[f"${i}"].to_bytes(4, "little") for i in range(4))
            codes = [eight >> shift & 15 for shift in (4, 0, 12, 8, 20, 16, 28, 24)]
            expected = (torch.tensor(four_bits.TABLES[number])[codes] * factor).to(dtype)
            assert same_bits(torch.frombuffer(bytearray(pairs), dtype=dtype) + 0.0, expected + 0.0)


@interpreted
def test_codes_off_a_16_byte_boundary_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The general kernel reads them."""
    codes = Codes("nf4", 1, 64)
    parts = parts_of(codes, N, K, "cpu")
    shifted = [torch.cat([parts[0][:3], parts[0]])[3:], parts[1]]
    looked_up, step = [], code_operators._four_bits_step

    def noted(*arguments: Any) -> Any:
        looked_up.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(code_operators, "_four_bits_step", noted)
    for given, count in ((shifted, 0), (parts, 1)):
        code_operators.forget()
        few(codes, given, 3, 2, torch.bfloat16, True, 0.0)
        assert len(looked_up) == count


@interpreted
@pytest.mark.parametrize("i", range(5))
def test_a_fault_in_each_part_shows(i: int) -> None:
    codes = Codes("nf4", 1, 64, 4)
    parts = parts_of(codes, N, K, "cpu")
    right, wrong = by_formula(parts, codes, N, K, torch.float32)[:, -16:].t(), [part.clone() for part in parts]
    wrong[i].view(-1)[-1] += 1  # the last of each
    x, a, b = torch.eye(K)[-16:], torch.zeros(1, K), torch.zeros(N, 1)
    for given, is_right in ((parts, True), (wrong, False)):
        found = code_operators.few_tokens(x, given, codes, a, b, None, None, None, 1.0, 0.0, None, False)
        assert found is not None
        assert torch.equal(found[0], right) == is_right


@interpreted
def test_what_the_kernel_does_not_take_is_left_to_the_values() -> None:
    def asked(codes: Codes, m: int = 2, k: int = 64, r: int = 2, **changed: Any) -> Any:
        given = {"lora_a": torch.ones(r, k), "h": None, "gain": None} | changed
        parts, lora_b = parts_of(codes, 4, k, "cpu"), torch.ones(4, r) if r else None
        rest = given["lora_a"] if r else None, lora_b, given["h"], None, given["gain"]
        return code_operators.few_tokens(torch.ones(m, k), parts, codes, *rest, 1.0, 0.0, None, False)

    nf4, fp8 = Codes("nf4", 1, 64), Codes("e4m3", 128, 128)
    assert asked(E2M1[0]) is None
    assert asked(nf4) is not None
    assert asked(fp8, k=51) is not None
    for none in (asked(nf4, m=17), asked(nf4, m=0), asked(nf4, k=48), asked(nf4, r=65), asked(nf4, gain=torch.ones(4))):
        assert none is None
    assert asked(nf4, r=0) is None  # without an adapter in fp32


@pytest.mark.parametrize("codes", [Codes("nf4", 1, 64, 4), Codes("int8", 1, 10, zeros=True), E2M1[2]], ids=str)
def test_parts_that_are_too_short_are_refused(codes: Codes) -> None:
    for i in range(5 if codes.nested else 3):
        parts = parts_of(codes, N, K, "cpu")
        parts[i] = parts[i].flatten()[:-1]
        with pytest.raises(LoRAKernelsError, match=r"-bit weight of 10656 numbers has .* and must have"):
            code_operators.values(parts, codes, N, K, torch.float32)
