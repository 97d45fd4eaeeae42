"""The part operators in Triton: each way of the product with a gain, several members' dx, and how much is launched."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, Inputs, make
from lora_kernels import FusedLoRALinear, dispatch, reference
from lora_kernels.backends.triton.choose.blocks import machine_of
from lora_kernels.branches import Branch
from lora_kernels.gate import run_branches
from numerics import check_all
from test_triton_kernels import count_launches
from test_triton_plans import keep_mask, launch_by_python

BF16, FP32 = torch.bfloat16, torch.float32
WAYS = {"pointer": "forward_kernel", "persistent": "persistent_kernel", "base_first": "expand_kernel"}


def hidden(case: Case, device: str, extra: int = 3) -> Tensor:
    """h or dh, fp32, its rows ``extra`` further apart than they are long."""
    drawn = torch.randn(case.m, case.r + extra, generator=torch.Generator().manual_seed(5))
    return drawn.to(device)[:, extra:]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "case",
    [Case(m=35, k=72, n=56, r=5, dtype=BF16, adapter_dtype=FP32), Case(m=3, k=40, n=33, r=17, dtype=BF16, bias=False)],
    ids=str,
)
def test_a_gain_by_each_way(
    triton_device: str, case: Case, way: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y = g * l + bias rounded once, and l where it is kept, both in the product's own kernel."""
    from lora_kernels.backends.triton import part_operators
    from lora_kernels.backends.triton.choose.candidates import candidates

    i, h = make(case, triton_device), hidden(case, triton_device)
    gain = torch.linspace(-1.0, 2.0, case.n, device=triton_device)
    plan = next(
        p for p in candidates(machine_of(i.x.device), cell_of(case)) if way in str(p) and p.kind != "few_tokens"
    )
    monkeypatch.setattr(part_operators, "plans_for", lambda *arguments: (plan,))
    part_operators.forget()
    launched = count_launches(monkeypatch)
    x, b, bias = i.x.detach(), i.lora_b.detach(), None if i.bias is None else i.bias.detach()
    y, linear = part_operators.product(x, i.weight, b, h, bias, gain, case.scaling, keep)
    part_operators.forget()
    exact, yardstick = (gained(case, i, h, gain, dtype) for dtype in (torch.float64, case.dtype))
    check_all({"y": y, "linear": linear if keep else None}, exact, yardstick, case.dtype)
    assert launched == [WAYS[way]]
    assert keep or linear.numel() == 0


def cell_of(case: Case) -> Any:
    from test_triton_plans import cell_of as forward_cell

    return forward_cell(case)


def gained(case: Case, i: Inputs, h: Tensor, gain: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    x, weight, b = (t.detach().to(case.dtype).to(dtype) for t in (i.x, i.weight, i.lora_b))
    linear = x @ weight.t() + case.scaling * (h.to(dtype) @ b.t())
    y = linear * gain.to(dtype)
    return {"linear": linear, "y": y if i.bias is None else y + i.bias.detach().to(case.dtype).to(dtype)}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(5,), (8, 3, 17)])
def test_dx_of_several_members(triton_device: str, ranks: tuple[int, ...], p: float) -> None:
    """Of unequal N and R, each with a mask of its own, their dh as column slices: one launch for all low-rank terms."""
    part_operators = import_module("lora_kernels.backends.triton.part_operators")
    case = Case(m=37, k=50, dtype=BF16, adapter_dtype=FP32, p=p)
    cases = [replace(case, n=20 + 9 * i, r=r) for i, r in enumerate(ranks)]
    members = [make(case, triton_device, seed) for seed, case in enumerate(cases)]
    dhs = [hidden(case, triton_device) for case in cases]
    states = [torch.tensor([7 + i, -i], device=triton_device) for i in range(len(ranks))] if p else []
    dys, weights, lora_as = ([getattr(i, name).detach() for i in members] for name in ("dy", "weight", "lora_a"))
    dx = part_operators.input_grad(dys, weights, dhs, lora_as, p, states)

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        total = torch.zeros(case.m, case.k, dtype=dtype, device=triton_device)
        for i, (dy, weight, dh, a) in enumerate(zip(dys, weights, dhs, lora_as, strict=True)):
            mask = keep_mask(states[i], case.m, case.k, p) if p else None
            low_rank = dh.to(dtype) @ a.to(case.dtype).to(dtype)
            total = total + reference.drop(low_rank, mask, p) + dy.to(dtype) @ weight.to(dtype)
        return {"dx": total}

    check_all({"dx": dx}, expected(torch.float64), expected(case.dtype), case.dtype)


def test_dx_of_a_layer_without_outputs(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a described GPU too, of which no model says what a product over nothing takes."""
    from lora_kernels.backends.triton import part_operators
    from lora_kernels.backends.triton.choose import blocks
    from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES

    monkeypatch.setattr(blocks, "machine_of", lambda device: ARCHITECTURES[80])
    part_operators.forget()
    case = Case(m=20, k=24, r=2)
    i, dh = make(case, triton_device), hidden(case, triton_device)
    dx = part_operators.input_grad([i.dy[:, :0]], [i.weight[:0]], [dh], [i.lora_a.detach()], 0.0, [])
    part_operators.forget()
    exact, yardstick = (dh.to(dtype) @ i.lora_a.detach().to(dtype) for dtype in (torch.float64, torch.float32))
    check_all({"dx": dx}, {"dx": exact}, {"dx": yardstick}, torch.float32)


@pytest.mark.usefixtures("fixed_choices")
def test_launches_of_a_dora_step(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """W is read once for the norms and once for y; dy once for the gain and once for dh and db."""
    linear = torch.nn.Linear(40, 56, device=triton_device)
    with dispatch.use_backend("triton"):
        layer = FusedLoRALinear.from_linear(linear, r=8, use_dora=True)
        x = torch.randn(24, 40, device=triton_device, requires_grad=True)
        launched = count_launches(monkeypatch)
        y = layer(x)
        assert launched == ["row_norms_kernel", "shrink_kernel", "forward_kernel"]
        launched.clear()
        y.sum().backward()
    assert launched == [
        "gain_grad_kernel", "reduce_kernel", "dh_db_kernel", "reduce_kernel", "dx_kernel", "da_kernel"
    ]  # fmt: skip


@pytest.mark.usefixtures("fixed_choices")
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_launches_of_a_group_step(triton_device: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of one x: without dropout one read of x for all h and one for all da; one launch for dx's terms."""
    members = [make(Case(n=n, bias=False), triton_device, seed) for seed, n in enumerate((56, 24, 24))]
    x = members[0].x
    launched = count_launches(monkeypatch)
    ys = run_branches(x, [Branch(i.weight, i.lora_a, i.lora_b) for i in members], p, "triton")
    each = 3 if p else 1
    drawn = ["draw_kernel"] if p else []
    assert launched == [*drawn, "shrink_kernel"] * each + ["forward_kernel"] * 3
    launched.clear()
    torch.autograd.backward(ys, [i.dy for i in members])
    of_dx, of_da = [*drawn, "dx_low_rank_kernel"], [*drawn, "da_kernel"] * each
    assert launched == ["dh_db_kernel", "reduce_kernel"] * 3 + of_dx + of_da


@pytest.mark.usefixtures("fixed_choices")
@pytest.mark.parametrize(
    ("frozen", "kernels"),
    [
        ("x", ["dh_db_kernel", "reduce_kernel", "da_kernel"]),
        ("lora_a", ["dh_db_kernel", "reduce_kernel", "dx_kernel"]),
        ("lora_b", ["shrink_kernel", "dx_kernel", "da_kernel"]),
        ("both adapters", ["shrink_kernel", "dx_kernel"]),
        ("x and lora_a", ["dh_db_kernel", "reduce_kernel"]),
    ],
)
def test_nothing_is_computed_that_is_not_due(
    triton_device: str, frozen: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dx for the first layer, nothing for a frozen adapter, and dh once."""
    from lora_kernels import lora_linear

    i = make(Case(bias=False), triton_device)
    of = {"both adapters": ("lora_a", "lora_b"), "x and lora_a": ("x", "lora_a")}.get(frozen, (frozen,))
    for name in of:
        getattr(i, name).requires_grad_(False)
    launched = count_launches(monkeypatch)
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, None, 0.5, backend="triton")
    launched.clear()
    y.backward(i.dy)
    assert launched == kernels


@pytest.mark.parametrize(
    ("way", "kernel", "m", "split", "whole"),
    [
        ("h", "shrink_kernel", 64, 8192, 256),
        ("dh", "shrink_kernel", 64, 8192, 256),
        ("da", "da_kernel", 8192, 1024, 65536),
        ("db", "da_kernel", 8192, 1024, 65536),
    ],
)
def test_a_part_is_split_by_its_own_columns(
    way: str, kernel: str, m: int, split: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x's for h and da, dy's for dh and db, on a described GPU; a rank of 128 takes dy twice."""
    from lora_kernels.backends.triton import part_operators
    from lora_kernels.backends.triton.choose import blocks
    from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES
    from lora_kernels.backends.triton.run.prepared import Launch

    def run(columns: int) -> None:
        wide, h = (torch.empty(m, n, dtype=BF16, device="meta") for n in (columns, 128))
        a, b = torch.empty(16, columns, device="meta"), torch.empty(columns, 128, device="meta")
        {
            "h": lambda: part_operators.shrink(wide, a, 0.0, None),
            "dh": lambda: part_operators.output_grads(wide, b[:, :16], None, None, 1.0),
            "da": lambda: part_operators.a_grad(h[:, :16].float(), wide, 0.0, None),
            "db": lambda: part_operators.output_grads(wide, b, h.float(), None, 1.0),
        }[way]()

    grids = []
    monkeypatch.setattr(blocks, "machine_of", lambda device: ARCHITECTURES[90])
    launch_by_python(monkeypatch)
    monkeypatch.setattr(Launch, "__call__", lambda self, *arguments: grids.append((self.kernel.__name__, self.grid)))
    part_operators.forget()
    for columns in (split, whole):
        run(columns)
    part_operators.forget()
    first, second = (grid[2] for name, grid in grids if name == kernel)
    assert first > 1 == second
