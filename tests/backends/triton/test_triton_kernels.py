"""The Triton operators one by one against float64 on the same rounded inputs: on the GPU, or interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CUDA, HALF, Case, Inputs, make
from lora_kernels import reference
from numerics import check_all, same_bits, three_ways
from test_triton_plans import by_plan, keep_mask, launch_by_python, operand_of, plans_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANKS = [Case(m=m, k=48, n=40, r=r, dtype=torch.bfloat16, p=0.1) for r in (1, 2, 8, 16, 17, 64, 300) for m in (5, 35)]
FORMS = [
    *[Case(m=35, k=50, n=41, r=5, dtype=dtype, p=p) for dtype in DTYPES for p in (0.0, 0.1, 0.5)],
    *[Case(m=35, k=50, n=41, r=5, dtype=dtype, adapter_dtype=torch.float32) for dtype in HALF],
    Case(m=35, dtype=torch.float32, adapter_dtype=torch.float16),
    Case(m=35, dtype=torch.float16, adapter_dtype=torch.bfloat16),
    *[Case(m=m, k=33, n=31, r=3, p=0.1) for m in (1, 2, 15, 16, 17, 64)],
    *[Case(m=35, k=k, n=40, r=17, p=0.5) for k in (1, 7, 8, 31, 32, 65)],
    *[Case(m=35, k=40, n=n, r=3) for n in (1, 15, 32, 33, 97)],
    *[Case(m=m, x_layout=layout, bias=False, p=0.1) for m in (3, 35) for layout in ("rows", "transposed")],
    *[Case(m=35, dtype=torch.bfloat16, zeroed=name, p=0.1) for name in ("weight", "lora_a", "lora_b")],
    *[Case(m=600, k=776, n=520, r=r, dtype=dtype, p=0.1) for dtype in DTYPES for r in (16, 80) if CUDA],
]
SEED = (-(2**62) - 12345, 2**63 - 7)


@pytest.fixture(scope="module")
def launch() -> ModuleType:
    """The operators of whole layers."""
    return import_module("lora_kernels.backends.triton.operators")


def run(launch: ModuleType, case: Case, i: Inputs, dy: Tensor | None = None) -> dict[str, Tensor]:
    """All results of the kernels, the parts of backward one by one and fed to each other; ``dh_alone``: without db."""
    parts = import_module("lora_kernels.backends.triton.part_operators")
    i = Inputs(*(None if t is None else t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy)))
    dy = i.dy if dy is None else dy
    state = torch.tensor(SEED, device=i.x.device) if case.p else None
    y, h, _ = launch.forward(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, case.p, state)
    if (operand := operand_of(case, i.x.device)) is not None:  # the parts take a plain h
        h = operand.unpack(h, case.r) / case.scaling
    dh, db, dbias = parts.output_grads(dy, i.lora_b, h, i.bias, case.scaling)
    dx = parts.input_grad([dy], [i.weight], [dh], [i.lora_a], case.p, [] if state is None else [state])
    da = parts.a_grad(dh, i.x, case.p, state)
    dh_alone, _, _ = parts.output_grads(dy, i.lora_b, None, None, case.scaling)
    found = {"y": y, "h": h, "dh": dh, "dh_alone": dh_alone, "dx": dx, "da": da, "db": db}
    return found if i.bias is None else found | {"dbias": dbias}


def formulas(case: Case, i: Inputs, dy: Tensor | None, number: Callable[[Tensor], Any]) -> dict[str, Any]:
    """The reference's results on what ``number`` makes of the tensors, with the mask that the seed means."""
    given = (i.x, i.weight, i.lora_a, i.lora_b, i.dy if dy is None else dy)
    x, weight, lora_a, lora_b, dy_ = (number(t.detach().to(i.x.dtype)) for t in given)
    bias = None if i.bias is None else number(i.bias.detach().to(i.x.dtype))
    seed = torch.tensor(SEED, device=i.x.device)
    mask = keep_mask(seed, *i.x.shape, case.p) if case.p else None
    y, h = reference.forward(x, weight, lora_a, lora_b, bias, case.scaling, mask, case.p)
    g = reference.backward(dy_, x, weight, lora_a, lora_b, case.scaling, mask, case.p)
    dh = case.scaling * (dy_ @ lora_b)
    return {"y": y, "h": h, "dh": dh, "dh_alone": dh, "dx": g.dx, "da": g.da, "db": g.db, "dbias": g.dbias}


def check(launch: ModuleType, case: Case, i: Inputs, dy: Tensor | None = None) -> None:
    exact, yardstick, errors = three_ways(case.dtype, lambda number: formulas(case, i, dy, number))
    check_all(run(launch, case, i, dy), exact, yardstick, case.dtype, expected=errors)


@pytest.mark.parametrize("case", RANKS + FORMS, ids=str)
def test_against_float64(launch: ModuleType, triton_device: str, case: Case) -> None:
    check(launch, case, make(case, triton_device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 35])
def test_any_strides(launch: ModuleType, triton_device: str, m: int, dtype: torch.dtype) -> None:
    """Weights, adapters and bias in other than their usual layouts; dy expanded, transposed, row-strided."""
    case = Case(m=m, k=37, n=41, r=17, dtype=dtype, p=0.1)
    i = make(case, triton_device)
    parts = (i.weight, i.lora_a, i.lora_b)
    weight, lora_a, lora_b = (t.detach().t().contiguous().t() for t in parts)
    bias = torch.stack([i.bias.detach()] * 2, dim=1)[:, 0]
    i = Inputs(i.x, weight, lora_a, lora_b, bias, i.dy)
    wide = torch.cat([i.dy, i.dy], dim=1)[:, 1 : case.n + 1]
    expanded = torch.ones((), dtype=dtype, device=triton_device).expand(case.m, case.n)
    for dy in (i.dy.t().contiguous().t(), wide, expanded, i.dy[:1].expand(case.m, case.n)):
        check(launch, case, i, dy)


@pytest.mark.parametrize("case", [Case(m=m, dtype=dtype, p=0.2) for m in (9, 70) for dtype in DTYPES], ids=str)
def test_the_same_bits_twice(launch: ModuleType, triton_device: str, case: Case) -> None:
    first, second = (run(launch, case, make(case, triton_device)) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize("m", [9, 70])
def test_every_output_is_written(
    launch: ModuleType, triton_device: str, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results allocated full of NaN come out as those allocated anyhow."""
    case = Case(m=m, k=45, n=50, r=5, p=0.2)
    usual = run(launch, case, make(case, triton_device))
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    poisoned = run(launch, case, make(case, triton_device))
    assert all(same_bits(usual[name], poisoned[name]) for name in usual)


def _poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*arguments: Any, **named: Any) -> Tensor:
        tensor = empty(*arguments, **named)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return poisoned


@pytest.mark.parametrize("p", [0.0, 0.9])
@pytest.mark.parametrize(("m", "k", "n"), [(0, 24, 40), (20, 24, 0), (3, 24, 0), (20, 0, 40), (3, 0, 40), (0, 0, 0)])
def test_empty_sizes(launch: ModuleType, triton_device: str, m: int, k: int, n: int, p: float) -> None:
    case = Case(m=m, k=max(k, 1), n=n, r=2, p=p)
    i = make(case, triton_device)
    parts = (i.x.detach()[:, :k], i.weight[:, :k], i.lora_a.detach()[:, :k], i.lora_b, i.bias, i.dy)
    check(launch, case, Inputs(*parts))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("m", [5, 35])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_dropped_element_does_not_hide_nan(launch: ModuleType, triton_device: str, m: int, bad: float) -> None:
    """As in torch.nn.functional.dropout, 0 times NaN is NaN."""
    case = Case(m=m, p=0.5)
    i = make(case, triton_device)
    keep = keep_mask(torch.tensor(SEED), case.m, case.k, case.p)
    column = int((~keep[2]).nonzero()[0])
    x = i.x.detach().clone()
    x[2, column] = bad
    out = run(launch, case, replace(i, x=x))
    clean = [row for row in range(m) if row != 2]
    for name in ("y", "h"):
        assert not torch.isfinite(out[name][2]).any()
        assert torch.isfinite(out[name][clean]).all()
    assert not torch.isfinite(out["da"][:, column]).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m", [5, 35])
def test_an_infinite_h_stays_infinite(launch: ModuleType, triton_device: str, m: int, dtype: torch.dtype) -> None:
    """h enters 16-bit products as two parts; the low part of an infinite h must not turn it into NaN."""
    case = Case(m=m, r=1, dtype=dtype)
    i = make(case, triton_device)
    x, weight, lora_a, lora_b = (torch.ones_like(t) for t in (i.x, i.weight, i.lora_a, i.lora_b))
    x[:, 0] = float("inf")
    y, _, _ = launch.forward(x, weight, lora_a, lora_b, None, 0.5, 0.0, None)
    assert torch.isinf(y).all()


@pytest.mark.parametrize("m", [16, 64])
def test_one_rounding(launch: ModuleType, triton_device: str, m: int) -> None:
    """y in bf16 by a fused plan: its error is below that of base, branch and sum each rounded, as in PEFT, and below
    that of one rounding of y where h was rounded before."""
    case = Case(m=m, k=128, n=96, r=16, dtype=torch.bfloat16)
    i = make(case, triton_device)
    exact, h = (formulas(case, i, None, Tensor.double)[name] for name in ("y", "h"))
    plan = next(plan for plan in plans_of(case, triton_device) if plan.kind in ("few_tokens", "fused"))
    y = by_plan(plan, case, i)["y"]
    base = torch.nn.functional.linear(i.x.detach(), i.weight, i.bias.detach())
    peft = base + (i.x.detach() @ i.lora_a.detach().t() @ i.lora_b.detach().t()) * case.scaling
    lost = case.scaling * ((h.to(case.dtype).double() - h) @ i.lora_b.detach().double().t())
    h_rounded = (exact + lost).to(case.dtype)
    error, error_peft, error_h_rounded = (float((t.double() - exact).norm()) for t in (y, peft, h_rounded))
    assert error < error_h_rounded < error_peft


@pytest.mark.parametrize("m", [3, 20])
def test_rows_beyond_32_bit_addresses(launch: ModuleType, triton_device: str, m: int) -> None:
    """The last row of x starts beyond 2**31 elements of its storage, of which only x's rows are ever touched."""
    case = Case(m=m, dtype=torch.bfloat16, p=0.1)
    i = make(case, triton_device)
    stride = 2**31 // (case.m - 1) + 1
    storage = torch.empty(stride * (case.m - 1) + case.k, dtype=case.dtype, device=triton_device)
    far = storage.as_strided((case.m, case.k), (stride, 1)).copy_(i.x.detach())
    check(launch, case, replace(i, x=far))


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched from now on, by name."""
    from lora_kernels.backends.triton.run.prepared import Launch

    launch_by_python(monkeypatch)
    launched: list[str] = []
    call = Launch.__call__

    def counted(self: Launch, *arguments: Any) -> None:
        launched.append(self.kernel.__name__)
        call(self, *arguments)

    monkeypatch.setattr(Launch, "__call__", counted)
    return launched


@pytest.mark.usefixtures("fixed_choices")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("m", "forward"), [(1, 1), (16, 1), (17, 2), (40, 2)])
def test_launches(triton_device: str, m: int, forward: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels import lora_linear

    i = make(Case(m=m), triton_device)
    launched = count_launches(monkeypatch)
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, 0.5, p, training=True, backend="triton")
    assert len(launched) == forward + (p > 0)  # the mask is drawn first
    launched.clear()
    y.backward(i.dy)
    assert launched == ["dh_db_kernel", "reduce_kernel", "dx_kernel", "da_kernel"]
