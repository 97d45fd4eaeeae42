"""The native library's part operators on the CPU against float64: block and vector boundaries, strides, threads.

What every backend's parts must do is in ``test_parts.py`` and ``test_branches.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, make
from lora_kernels import dispatch, ops, reference
from lora_kernels.accuracy import sum_error
from lora_kernels.backends.native import choice
from lora_kernels.dispatch import Problem
from lora_kernels.ops import Operators
from numerics import check_all, same_bits, three_ways
from test_native_cpu import DTYPES, FEATURES, LAYOUTS, RANKS, TOKENS, threads

_WHY_NOT = dispatch.backend("native").why_not(Problem("cpu", torch.float32))
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=" ".join(_WHY_NOT))

SEEDS = (torch.tensor([-(2**62) - 12345, 2**63 - 7]), torch.tensor([11, -5]))
OUTPUTS = (*FEATURES[8:], *FEATURES[:8])  # beside FEATURES
BOUNDARIES = [
    *[Case(m=m, k=45, n=53, r=5, dtype=dtype, p=0.1) for m in TOKENS for dtype in DTYPES],
    *[Case(m=m, k=k, n=n, r=3, dtype=dtype) for m in (7, 35)
      for k, n in zip(FEATURES, OUTPUTS, strict=True) for dtype in DTYPES[::2]],
    *[Case(m=m, k=48, n=40, r=r, dtype=dtype, p=0.1) for m, r, dtype in product((2, 35), RANKS, DTYPES[::2])],
    *[Case(m=m, k=k, n=n, r=r, dtype=dtype, p=p) for m, k, n in ((200, 519, 390), (600, 258, 1030))
      for r, dtype, p in ((16, torch.float32, 0.0), (80, torch.bfloat16, 0.1))],
]  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Arguments of the part operators: two layers of one x, the second with the first half of the outputs."""

    x: Tensor  # (M, K)
    weight: Tensor  # (N, K)
    lora_a: Tensor  # (R, K)
    lora_b: Tensor  # (N, R)
    bias: Tensor  # (N,)
    gain: Tensor  # (N,)
    dy: Tensor  # (M, N)
    linear: Tensor  # (M, N)
    h: Tensor  # (M, R), hidden dtype, a column slice


def draw(case: Case, gain_dtype: torch.dtype | None = None) -> Parts:
    i = make(case)
    wide = torch.promote_types(case.dtype, torch.float32)
    generator = torch.Generator().manual_seed(7)
    h = torch.randn(case.m, case.r + 3, generator=generator, dtype=torch.float64).to(wide)[:, 1:-2]
    gain = torch.linspace(-1.0, 2.0, case.n, dtype=torch.float64).to(gain_dtype or wide)
    linear = torch.randn(case.m, case.n, generator=generator, dtype=torch.float64).to(case.dtype)
    return Parts(i.x.detach(), i.weight, i.lora_a.detach(), i.lora_b.detach(), i.bias.detach(), gain, i.dy, linear, h)


def run(o: Operators, case: Case, g: Parts) -> dict[str, Tensor]:
    """Every result of every operator."""
    s, p, half = case.scaling, case.p, case.n // 2
    first, second = SEEDS if p else (None, None)
    y, linear = o.product(g.x, g.weight, g.lora_b, g.h, g.bias, g.gain, s, True)
    plain, none = o.product(g.x, g.weight, g.lora_b, g.h, g.bias, None, s, False)
    assert none.shape == (0,)
    dh, db, dbias = o.output_grads(g.dy, g.lora_b, g.h, g.bias, s)
    dl, dgain, dbias2 = o.gain_grad(g.dy, g.linear, g.gain, g.bias)
    dx = o.input_grad([g.dy], [g.weight], [g.h], [g.lora_a], p, [first] if p else [])
    dys, weights = [g.dy, g.dy[:, :half]], [g.weight, g.weight[:half]]
    dx2 = o.input_grad(dys, weights, [g.h, g.h * 2], [g.lora_a, g.lora_a], p, [first, second] if p else [])
    return {"z": o.shrink(g.x, g.lora_a, p, first), "y": y, "l": linear, "plain": plain, "dh": dh, "db": db,
            "dbias": dbias, "dbias2": dbias2, "dx": dx, "dx2": dx2, "da": o.a_grad(g.h, g.x, p, first), "dl": dl,
            "dgain": dgain, "norms": o.row_norms(g.weight, g.lora_a, g.lora_b, s)}  # fmt: skip


def formulas(case: Case, given: Parts, number: Callable[[Tensor], Any], masks: list[Tensor]) -> dict[str, Any]:
    """What ``ops.py`` says, on what ``number`` makes of each tensor, adapters first rounded as for the reference."""
    adapters = reference.adapter_dtype(case.dtype)
    kinds = {"gain": given.gain.dtype, "h": given.h.dtype, "lora_a": adapters, "lora_b": adapters}
    rounded = {name: tensor.to(kinds.get(name, case.dtype)) for name, tensor in vars(given).items()}
    g = Parts(**{name: number(tensor) for name, tensor in rounded.items()})
    s, half, keeps = case.scaling, case.n // 2, [number(mask.double() / (1.0 - case.p)) for mask in masks]
    linear = g.x @ g.weight.t() + s * (g.h @ g.lora_b.t())
    dx = g.dy @ g.weight + keeps[0] * (g.h @ g.lora_a)
    return {
        "z": (g.x * keeps[0]) @ g.lora_a.t(),
        "y": g.gain * linear + g.bias,
        "l": linear,
        "plain": linear + g.bias,
        "dh": s * (g.dy @ g.lora_b),
        "db": s * (g.dy.t() @ g.h),
        "dbias": g.dy.sum(0),
        "dbias2": g.dy.sum(0),
        "dx": dx,
        "dx2": dx + g.dy[:, :half] @ g.weight[:half] + keeps[1] * (2 * g.h @ g.lora_a),
        "da": g.h.t() @ (g.x * keeps[0]),
        "dl": g.gain * g.dy,
        "dgain": (g.dy * g.linear).sum(0),
        "norms": (g.weight + s * g.lora_b @ g.lora_a).norm(dim=1),
    }


def measures(case: Case, g: Parts, dtype: torch.dtype) -> tuple[dict[str, Tensor], ...]:
    """Exact, the yardstick, and the error to expect of each element."""
    ones = torch.ones(g.x.shape)
    masks = [reference.philox_keep_mask(seed, *g.x.shape, case.p) if case.p else ones for seed in SEEDS]
    return three_ways(dtype, lambda number: formulas(case, g, number, masks))


def check(o: Operators, case: Case, g: Parts) -> None:
    """Results that are sums in fp32 of what is stored in 16 bits are judged as fp32."""
    found, wide = run(o, case, g), torch.promote_types(case.dtype, torch.float32)
    for dtype in {wide, case.dtype}:
        judged = {n: value for n, value in found.items() if dtype is (wide if n in ("dgain", "norms") else case.dtype)}
        exact, yardstick, errors = measures(case, g, dtype)
        check_all(judged, exact, yardstick, dtype, expected=errors)


@pytest.fixture(scope="module")
def operators() -> Operators:
    dispatch.select("cpu", torch.float32, "native")
    return ops.operators("native")


@pytest.mark.parametrize("case", BOUNDARIES, ids=str)
def test_against_float64(operators: Operators, case: Case) -> None:
    check(operators, case, draw(case))


@pytest.mark.parametrize("p", [0.0, 0.9])
@pytest.mark.parametrize(("m", "k", "n"), [(0, 24, 40), (20, 24, 0), (3, 24, 0), (20, 0, 40), (3, 0, 40), (0, 0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_sizes(operators: Operators, m: int, k: int, n: int, p: float, dtype: torch.dtype) -> None:
    case = Case(m=m, k=max(k, 1), n=n, r=2, p=p, dtype=dtype)
    g = draw(case)
    check(operators, case, replace(g, x=g.x[:, :k], weight=g.weight[:, :k], lora_a=g.lora_a[:, :k]))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("adapter", DTYPES[:3], ids=str)
@pytest.mark.parametrize("m", [3, 35])
def test_adapters_and_gains_of_any_dtype(
    operators: Operators, m: int, adapter: torch.dtype, dtype: torch.dtype
) -> None:
    case = Case(m=m, k=37, n=41, r=17, dtype=dtype, adapter_dtype=adapter)
    check(operators, case, draw(case, gain_dtype=adapter))


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "dy", "linear", "h"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("m", [3, 35])
def test_any_layout(
    operators: Operators, m: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], name: str
) -> None:
    case = Case(m=m, k=37, n=41, r=17, dtype=dtype, p=0.1)
    g = draw(case)
    check(operators, case, replace(g, **{name: layout(getattr(g, name))}))


@pytest.mark.parametrize("m", [3, 35])
def test_expanded_tensors(operators: Operators, m: int) -> None:
    """Strides of zero, in each dimension and in both."""
    case = Case(m=m, k=37, n=41, r=3, dtype=torch.bfloat16, p=0.1)
    g = draw(case)
    for name in ("x", "weight", "dy", "linear", "h"):
        tensor = getattr(g, name)
        for few in (tensor[:1], tensor[:, :1], tensor[:1, :1]):
            check(operators, case, replace(g, **{name: few.expand(tensor.shape)}))
    check(operators, case, replace(g, gain=g.gain[-1:].expand(case.n), bias=g.bias[:1].expand(case.n)))


@pytest.mark.parametrize("m", [3, 35])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_and_without_what_is_optional(operators: Operators, dtype: torch.dtype, m: int) -> None:
    """What is given and asked for besides changes no bit of the rest; what is not due is empty."""
    case = Case(m=m, k=70, n=90, r=9, dtype=dtype)
    g = draw(case)
    arguments = (g.x, g.weight, g.lora_b, g.h)
    (y, linear), (alone, none) = (operators.product(*arguments, g.bias, g.gain, 0.5, keep) for keep in (True, False))
    bare = operators.product(*arguments, None, None, 0.5, True)
    assert (none.shape, bare[1].shape) == ((0,), (0,))
    assert same_bits(linear, bare[0])
    assert same_bits(y, alone)
    dh, db, dbias = operators.output_grads(g.dy, g.lora_b, g.h, g.bias, 0.5)
    dh2, *others = operators.output_grads(g.dy, g.lora_b, None, None, 0.5)
    assert same_bits(dh, dh2)
    dl, dgain, dbias2 = operators.gain_grad(g.dy, g.linear, g.gain, g.bias)
    dl2, *others2 = operators.gain_grad(g.dy, None, g.gain, None)
    assert same_bits(dl, dl2)
    assert [t.shape for t in (*others, *others2)] == [(0,)] * 4
    assert [t.dtype for t in (*others, *others2)] == [db.dtype, dtype, dgain.dtype, dtype]
    assert dbias.dtype == dbias2.dtype == g.bias.dtype


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize(
    "case", [Case(m=m, k=130, n=97, r=9, p=0.1, dtype=dtype) for m in (2, 90) for dtype in DTYPES], ids=str
)
def test_any_number_of_threads_and_the_same_bits_twice(operators: Operators, case: Case, count: int) -> None:
    g = draw(case)
    with threads(count):
        check(operators, case, g)
        first, second = (run(operators, case, g) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [Case(m=m, dtype=dtype, p=0.2) for m in (2, 70) for dtype in DTYPES], ids=str)
def test_every_output_is_written(operators: Operators, case: Case) -> None:
    """Results and scratch allocated full of NaN come out as those allocated anyhow."""
    g = draw(case)
    usual = run(operators, case, g)
    torch.set_deterministic_debug_mode("error")  # which has torch fill what it allocates
    try:
        assert torch.empty(1).isnan()
        filled = run(operators, case, g)
    finally:
        torch.set_deterministic_debug_mode("default")
    assert all(same_bits(usual[name], filled[name]) for name in usual)


@pytest.mark.parametrize("m", [3, 16])
def test_one_rounding_of_several_layers_input_gradients(operators: Operators, m: int) -> None:
    """dx in bf16, where the kernels have all products: its error is below that of layers rounded one by one."""
    case = Case(m=m, k=128, n=32, r=16, dtype=torch.bfloat16)
    g = draw(case)
    members = ([g.dy] * 8, [g.weight] * 8, [g.h] * 8, [g.lora_a] * 8, 0.0, [])
    with choice.forced("own"):
        apart = [operators.input_grad(*([given[0]] for given in members[:4]), 0.0, []) for _ in range(8)]
        together = operators.input_grad(*members)
    exact = 8 * (g.dy.double() @ g.weight.double() + g.h.double() @ g.lora_a.double())
    one_by_one = apart[0]
    for dx in apart[1:]:
        one_by_one = one_by_one + dx
    assert (together.double() - exact).norm() < 0.5 * (one_by_one.double() - exact).norm()


@pytest.mark.parametrize("m", [3, 40, 130])
def test_h_and_dh_count_in_fp32(operators: Operators, m: int) -> None:
    """In bf16: y of an h whose halves nearly cancel; db and da of fp32 adapters, judged as sums in fp32."""
    case = Case(m=m, k=70, n=90, r=8, dtype=torch.bfloat16)
    g, s = draw(case), case.scaling
    h, b = torch.cat([g.h[:, :4], g.h[:, :4] * (1 + 1 / 32)], 1), torch.cat([g.lora_b[:, :4], -g.lora_b[:, :4]], 1)
    y, _ = operators.product(g.x, torch.zeros_like(g.weight), b, h, None, None, s, False)
    close("y", y, h, s * b.t().float(), torch.bfloat16)
    close("db", operators.output_grads(g.dy, g.lora_b.float(), g.h, None, s)[1], g.dy.t(), s * g.h, torch.float32)
    close("da", operators.a_grad(g.h, g.x, 0.0, None), g.h.t(), g.x, torch.float32)


def close(name: str, found: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """``found`` is left right, summed in fp32 and rounded to ``dtype``."""
    exact, yardstick = left.double() @ right.double(), (left.float() @ right.float()).to(dtype)
    check_all({name: found}, {name: exact}, {name: yardstick}, dtype, expected={name: sum_error(left, right)})


X, W, A, B, V, DY, H = (torch.ones(shape) for shape in ((6, 10), (8, 10), (3, 10), (8, 3), (8,), (6, 8), (6, 3)))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("shrink", (X, A[:, 1:], 0.0, None)),
        ("shrink", (X, A, 0.5, torch.ones(2))),
        ("shrink", (X.int(), A, 0.0, None)),
        ("product", (X, W[:, 1:], B, H, None, None, 1.0, False)),
        ("product", (X, W, B, H[1:], None, None, 1.0, False)),
        ("product", (X, W, B, H.bfloat16(), None, None, 1.0, False)),
        ("product", (X, W, B, H, V[1:], None, 1.0, False)),
        ("product", (X, W, B, H, None, V[1:], 1.0, True)),
        ("output_grads", (DY, B[1:], None, None, 1.0)),
        ("output_grads", (DY, B, H[:, 1:], None, 1.0)),
        ("output_grads", (DY, B, None, V[1:], 1.0)),
        ("input_grad", ([], [W], [], [], 0.0, [])),
        ("input_grad", ([DY], [W], [H], [], 0.0, [])),
        ("input_grad", ([DY, DY], [W, W], [H, H], [A, A], 0.5, [torch.ones(2, dtype=torch.int64)])),
        ("input_grad", ([DY, DY[1:]], [W, W], [H, H], [A, A], 0.0, [])),
        ("input_grad", ([DY, DY], [W, W.double()], [H, H], [A, A], 0.0, [])),
        ("input_grad", ([DY], [W], [H], [A[1:]], 0.0, [])),
        ("a_grad", (H[1:], X, 0.0, None)),
        ("a_grad", (H.double(), X, 0.0, None)),
        ("gain_grad", (DY, DY[1:], V, None)),
        ("gain_grad", (DY, None, V[1:], None)),
        ("gain_grad", (DY, None, V, V[1:])),
        ("row_norms", (W, A[:, 1:], B, 1.0)),
        ("row_norms", (W, A, B[:, 1:], 1.0)),
        ("row_norms", (V, A, B, 1.0)),
    ],
)
def test_an_operator_refuses_what_it_cannot_run(operators: Operators, name: str, arguments: tuple[object, ...]) -> None:
    """Callers check before; called by themselves the operators must raise and never touch other memory."""
    with pytest.raises(RuntimeError):
        getattr(operators, name)(*arguments)
