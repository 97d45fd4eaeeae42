"""fp32 adapters over fp16: h, dh, A and B count where fp16 holds none of them (above 65504, below 6e-8).

*Exact* is float64, the yardstick PEFT's composition: fp16 base, everything of the adapter in fp32.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import BACKENDS, Case, keep_mask, make, run
from lora_kernels import dispatch, lora_linear, ops
from lora_kernels.accuracy import run_reference
from lora_kernels.branches import Branch
from lora_kernels.gate import run_branches
from lora_kernels.verify.cases import Inputs
from numerics import check_all

HALF, FLOAT = torch.float16, torch.float32
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=str)
# Factors of x, A, B and dy: what fp16 cannot hold is named. The adapter's term stays as large as the base's.
SCALES = {
    "h": (60.0, 1e3, 1e-3, 1.0),
    "dh": (1.0, 1e5, 1e-5, 1e-3),
    "A": (1e-3, 1e6, 1e-6, 1.0),
    "small A": (1.0, 1e-9, 1e9, 1.0),
    "B": (1.0, 1e-7, 1e7, 1e-2),
    "small B": (30.0, 1e9, 1e-9, 1.0),
}
FEW, MANY = Case(m=5, k=40, n=24, r=4, p=0.25, scaling=2.0), Case(m=70, k=40, n=72, r=20, p=0.25, bias=False)


def scaled(case: Case, scale: str, device: str, adapters: torch.dtype = FLOAT) -> Inputs:
    """``make``'s tensors, of the scale; y and dx stay in fp16's range."""
    i = make(replace(case, dtype=HALF, adapter_dtype=adapters), device)
    x, a, b, dy = SCALES[scale]
    return replace(
        i,
        x=(i.x.detach() * x).requires_grad_(),
        lora_a=(i.lora_a.detach() * a).requires_grad_(),
        lora_b=(i.lora_b.detach() * b).requires_grad_(),
        dy=i.dy * dy,
    )


def expected(case: Case, i: Inputs, mask: Tensor | None, dtype: torch.dtype, **more: object) -> dict[str, Tensor]:
    found = run_reference(dtype, i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy, case.scaling, mask, case.p, **more)  # type: ignore[arg-type]
    rounded = ("y", "dx", "dbias") if dtype is FLOAT else ()
    return {name: value.to(HALF) if name in rounded else value for name, value in found.items()}


@every_backend
@pytest.mark.parametrize(("case", "scale"), [*((FEW, scale) for scale in SCALES), (MANY, "h"), (MANY, "dh")], ids=str)
def test_what_fp16_does_not_hold_counts(case: Case, scale: str, backend: str, device: str) -> None:
    case = replace(case, dtype=HALF, adapter_dtype=FLOAT)
    i = scaled(case, scale, device)
    actual = run(case, i, backend)
    mask = keep_mask(case, i, backend)
    check_all(actual, *(expected(case, i, mask, dtype) for dtype in (torch.float64, FLOAT)), HALF)


@every_backend
@pytest.mark.parametrize(
    ("m", "activation", "gain", "scale"),
    [(5, "identity", True, "h"), (70, "identity", True, "small B"), (5, "silu", False, "small B"),
     (70, "relu", True, "h"), (5, "gelu", False, "dh")],
)  # fmt: skip
def test_branches(m: int, activation: str, gain: bool, scale: str, backend: str, device: str) -> None:
    """Two of one x, with an activation and a gain: their y, one dx, each one's gradients."""
    case = Case(m=m, k=40, n=24, r=4, bias=False)
    given = [scaled(replace(case, r=r), scale, device) for r in (4, 3)]
    x = given[0].x
    given = [replace(i, x=x) for i in given]
    factors = 2.0 ** torch.arange(-2.0, 4.0, device=device).repeat(4) if gain else None  # exact in dl, which is fp16
    branches = [Branch(i.weight, i.lora_a, i.lora_b, None, case.scaling, factors, activation) for i in given]
    ys = run_branches(x, branches, 0.0, backend)
    leaves = [x, *(t for i in given for t in (i.lora_a, i.lora_b))]
    dx, *gradients = torch.autograd.grad(ys, leaves, [i.dy for i in given])
    for dtype in (torch.float64, FLOAT):
        parts = [expected(case, i, None, dtype, gain=factors, activation=activation) for i in given]
        if dtype is torch.float64:
            exact = parts
        else:
            yardstick = parts
    check_all(
        {"dx": dx}, {"dx": exact[0]["dx"] + exact[1]["dx"]}, {"dx": yardstick[0]["dx"] + yardstick[1]["dx"]}, HALF
    )
    for n, y in enumerate(ys):
        actual: dict[str, Tensor | None] = {"y": y.detach(), "da": gradients[2 * n], "db": gradients[2 * n + 1]}
        check_all(actual, exact[n], yardstick[n], HALF)


@every_backend
@pytest.mark.parametrize("m", [3, 70])
def test_h_of_fp16_adapters_may_exceed_fp16(m: int, backend: str, device: str) -> None:
    """PEFT's h is infinite there; here h is fp32 whatever the adapters' dtype is."""
    case = Case(m=m, k=40, n=24, r=4, dtype=HALF)
    i = scaled(case, "h", device, adapters=HALF)
    exact, yardstick = (expected(case, i, None, dtype) for dtype in (torch.float64, FLOAT))
    check_all({"y": run(case, i, backend)["y"]}, exact, yardstick, HALF)


@every_backend
def test_autocast_to_fp16(backend: str, device: str) -> None:
    if device == "cpu" and not torch.amp.is_autocast_available("cpu"):
        pytest.skip("this torch has no autocast of CPUs")
    case = Case(m=5, k=40, n=24, r=4, dtype=HALF)
    i = scaled(case, "h", device)
    x, weight = i.x.detach().float().requires_grad_(), i.weight.float()
    with torch.autocast(device, dtype=HALF):
        y = lora_linear(x, weight, i.lora_a, i.lora_b, i.bias, case.scaling, backend=backend)
    da, db = torch.autograd.grad(y, (i.lora_a, i.lora_b), i.dy)
    exact, yardstick = (expected(case, i, None, dtype) for dtype in (torch.float64, FLOAT))
    check_all({"y": y.detach(), "da": da, "db": db}, exact, yardstick, HALF)


@every_backend
@pytest.mark.parametrize("scale", ["dh", "h"])
def test_create_graph(scale: str, backend: str, device: str) -> None:
    """The formulas that a double backward differentiates, plain and of branches."""
    case = Case(m=5, k=40, n=24, r=4, dtype=HALF, bias=False)
    i = scaled(case, scale, device)
    exact, yardstick = (expected(case, i, None, dtype) for dtype in (torch.float64, FLOAT))
    leaves = (i.x, i.lora_a, i.lora_b)
    plain = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, None, case.scaling, backend=backend)
    ones = torch.ones(case.n, device=device)
    (gained,) = run_branches(i.x, [Branch(i.weight, i.lora_a, i.lora_b, None, case.scaling, ones)], 0.0, backend)
    for y in (plain, gained):
        gradients = torch.autograd.grad(y, leaves, i.dy, create_graph=True)
        actual: dict[str, Tensor | None] = {
            name: gradient.detach() for name, gradient in zip(("dx", "da", "db"), gradients, strict=True)
        }
        check_all(actual, exact, yardstick, HALF)


@every_backend
def test_h_is_kept_beyond_the_range_of_fp16(backend: str, device: str) -> None:
    """In fp32, or in two parts of bf16, which has fp32's exponents."""
    dispatch.select(device, HALF, backend)
    table = ops.operators(backend)
    i = scaled(Case(m=5, r=3), "h", device)
    _, h, _ = table.forward(i.x.detach(), i.weight, i.lora_a.detach(), i.lora_b.detach(), None, 1.0, 0.0, None)
    assert table.kept.hidden_dtype(HALF) is FLOAT
    assert h.dtype is table.kept.h(i.x, i.weight.shape[0], 3)[1]
    assert h.dtype in (FLOAT, torch.bfloat16)
    assert h.abs().max() > torch.finfo(HALF).max


@every_backend
def test_the_norms_of_dora(backend: str, device: str) -> None:
    dispatch.select(device, HALF, backend)
    i = scaled(Case(k=40, n=24, r=4), "small B", device)
    a, b = i.lora_a.detach() * 1e3, i.lora_b.detach()
    norms = ops.operators(backend).row_norms(i.weight, a, b, 1.0)
    exact, yardstick = (
        (i.weight.to(dtype) + b.to(dtype) @ a.to(dtype)).norm(dim=1) for dtype in (torch.float64, FLOAT)
    )
    check_all({"y": norms}, {"y": exact}, {"y": yardstick}, FLOAT)


def test_eager_holds_a_block_of_x_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged blocks of rows give what one block gives."""
    from lora_kernels.backends import composed_fp16

    case = replace(MANY, dtype=HALF, adapter_dtype=FLOAT, bias=True)
    i = scaled(case, "h", "cpu")
    mask = keep_mask(case, i, "eager")
    monkeypatch.setattr(composed_fp16, "_BLOCK_ELEMENTS", 5 * 72)
    actual = run(case, i, "eager")
    check_all(actual, *(expected(case, i, mask, dtype) for dtype in (torch.float64, FLOAT)), HALF)
