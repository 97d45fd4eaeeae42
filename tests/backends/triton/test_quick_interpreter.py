"""``tests/quick_interpreter.py``: the interpreter that the other tests run in gives what Triton's own gives."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is for machines without a GPU", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

import quick_interpreter
from cases import Case, make, run
from numerics import same_bits

BUILTINS = [(tl, "load"), (tl.core, "load"), (tl.tensor, "__add__"), (tl.tensor, "__bool__"), (tl.dtype, "to_ir")]


def builtins() -> list[object]:
    return [getattr(owner, name, None) for owner, name in BUILTINS]


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, value in quick_interpreter.STOCK:
        monkeypatch.setattr(owner, name, value)


@triton.jit
def largest_sum(x, y):
    return tl.max(x + y, 0)


@triton.jit
def kernel(x_ptr, out_ptr, GOOD: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 8))
    tl.static_assert(GOOD, "the test wants it so")
    tl.store(out_ptr, largest_sum(x, x * 65536))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_same_bits_as_triton_s_own(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    case = Case(m=20, dtype=dtype, adapter_dtype=torch.float32, p=0.3)
    quick = run(case, make(case), "triton")
    request.getfixturevalue("stock")
    own = run(case, make(case), "triton")
    assert all(same_bits(quick[name], own[name]) for name in own)


def test_integers_wrap_as_in_triton_s_own(request: pytest.FixtureRequest) -> None:
    x = torch.arange(2**30, 2**30 + 8, dtype=torch.int32)
    quick, own = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernel[(1,)](x, quick, True)
    request.getfixturevalue("stock")
    kernel[(1,)](x, own, True)
    assert same_bits(quick, own)


@triton.jit
def mixing_kernel(x_ptr, y_ptr, out_ptr):
    at = tl.arange(0, 8)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, (x + y).to(tl.float64))
    tl.store(out_ptr + 8 + at, (x * 3 - 2 * y).to(tl.float64))
    tl.store(out_ptr + 16 + at, (x / y).to(tl.float64))
    tl.store(out_ptr + 24 + at, (x / 3 + 7 / y).to(tl.float64))
    tl.store(out_ptr + 32 + at, (x * 1.1 + 0.3 * y).to(tl.float64))
    tl.store(out_ptr + 40 + at, tl.where((x < y) & (y > 2) | (x == 3), x, y).to(tl.float64))
    tl.store(out_ptr + 48 + at, (x.to(tl.int64) + 5000000000).to(tl.float64))
    tl.store(out_ptr + 56 + at, (1 - (x > 2)).to(tl.float64))
    tl.store(out_ptr + 64 + at, tl.maximum(x, 3).to(tl.float16).to(tl.float64))
    tl.store(out_ptr + 72 + at, tl.minimum(x, y).to(tl.float32).to(tl.float64))


NUMBERS = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)


@pytest.mark.parametrize("other", NUMBERS, ids=str)
@pytest.mark.parametrize("one", NUMBERS, ids=str)
def test_dtypes_meet_as_in_triton_s_own(one: torch.dtype, other: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Each other, and numbers of either kind; Triton's own has no numbers of bf16."""
    x, y = torch.arange(8).to(one), torch.arange(1, 9).to(other) * 3
    quick, own = torch.zeros(80, dtype=torch.float64), torch.zeros(80, dtype=torch.float64)
    mixing_kernel[(1,)](x, y, quick)
    request.getfixturevalue("stock")
    mixing_kernel[(1,)](x, y, own)
    assert same_bits(quick, own)


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("kind", ["float32 to bfloat16", "float16 to bfloat16", "bfloat16 to float32"])
def test_bf16_is_rounded_as_a_gpu_does(kind: str) -> None:
    """Zeros, subnormals, ties, what overflows, infinities and NaN too; Triton's own cuts off."""
    source, target = (getattr(torch, name) for name in kind.split(" to "))
    ties = torch.tensor([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 1e-40, 3.4e38, 6e-8, -0.0, float("inf"), float("nan")])
    x = torch.cat([torch.randn(240) * 10.0 ** torch.randint(-6, 5, (240,)), ties, -ties]).to(source)
    found = torch.zeros(256, dtype=target)
    cast_kernel[(1,)](x, found, 256)
    expected = x.to(target)
    assert same_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(found.isnan(), expected.isnan())


@triton.jit
def broadcasting_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr):
    rows, columns = tl.arange(0, 8)[:, None], tl.arange(0, 4)
    x = tl.load(x_ptr + tl.arange(0, 8))[:, None] + tl.full((8, WIDTH), 1.0, tl.float32)
    tl.store(out_ptr + rows * 4 + columns[None, :], x * columns)


@pytest.mark.parametrize("width", [1, 4, 2, 3])
def test_shapes_are_broadcast_and_refused_as_by_triton_s_own(width: int, request: pytest.FixtureRequest) -> None:
    """Of 1 and 4 columns the sum goes with 4; of 2 it is refused, and 3 is no size of a block."""
    found = []
    for _ in range(2):
        x, out = torch.arange(8.0), torch.zeros(8, 4)
        try:
            broadcasting_kernel[(1,)](x, out, width)
            found.append(("", out.tolist()))
        except interpreter.InterpreterError as error:
            found.append((str(error), []))
        request.getfixturevalue("stock")
    assert found[0] == found[1]
    assert bool(found[0][0]) == (width in (2, 3))


@pytest.mark.parametrize("good", [True, False])
def test_after_a_launch_the_language_is_as_before(good: bool) -> None:
    """That of the device functions too, and where the launch ends in an error."""
    before = builtins()
    x, out = torch.zeros(8), torch.zeros(1)
    for _ in range(2):
        if good:
            kernel[(1,)](x, out, True)
        else:
            with pytest.raises(interpreter.InterpreterError, match="the test wants it so"):
                kernel[(1,)](x, out, False)
        assert all(now is then for now, then in zip(builtins(), before, strict=True))


def test_it_is_installed_once() -> None:
    """A second time within itself it would note all that it replaces twice, the third time four times."""
    installed = [getattr(owner, name) for owner, name, _ in quick_interpreter.STOCK]
    assert all(now is not before for now, (_, _, before) in zip(installed, quick_interpreter.STOCK, strict=True))
    quick_interpreter.install()
    again = [getattr(owner, name) for owner, name, _ in quick_interpreter.STOCK]
    assert all(one is other for one, other in zip(installed, again, strict=True))
