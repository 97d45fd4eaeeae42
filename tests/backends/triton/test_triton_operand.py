"""h as the operand of compute capability 9.0: every plan of the plain kernels writes it, and every one reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import test_triton_backward
import test_triton_plans
from cases import Case, Inputs, make
from lora_kernels import dispatch, lora_linear, ops
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose import blocks
from lora_kernels.backends.triton.choose.blocks import INTERPRETER
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.hidden_operand import HiddenOperand, operand_on
from lora_kernels.backends.triton.choose.plans import Cell, Plan
from lora_kernels.backends.triton.offline.compile_jobs import backward_plans_of, plans_of
from numerics import check_all, same_bits
from test_triton_plans import SEED

HOPPER = replace(INTERPRETER, capability=90)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(blocks, "machine_of", lambda device: HOPPER)
    dispatch.select("cpu", BF16, "triton")
    operators.forget()
    yield
    operators.forget()


CASES = [
    Case(m=37, k=72, n=48, r=1, dtype=BF16),
    Case(m=20, k=136, n=48, r=8, dtype=BF16, p=0.3),
    Case(m=5, k=520, n=40, r=8, dtype=FP16, p=0.3),
    Case(m=33, k=264, n=56, r=16, dtype=FP16),
    Case(m=33, k=264, n=56, r=40, dtype=BF16, p=0.3, adapter_dtype=torch.float32),
    Case(m=9, k=520, n=40, r=40, dtype=FP16),
    Case(m=17, k=136, n=40, r=128, dtype=BF16),
]


def operand_of(case: Case) -> HiddenOperand:
    found = operand_on(90, case.dtype, case.k, case.n, case.r)
    assert found is not None
    return found


def plans_for(case: Case, direction: str) -> list[Plan]:
    """One of each kind; and those whose shrink is cut into parts."""
    dtype = str(case.dtype).removeprefix("torch.")
    cell = Cell(direction, blocks.next_power_of_2(case.m), case.k, case.n, case.r, dtype, case.p > 0)
    if direction == "backward":
        return list(backward_plans_of(HOPPER, cell))
    found = plans_of(HOPPER, cell)
    cut = [plan for plan in candidates(HOPPER, cell) if getattr(getattr(plan, "shrink", None), "splits", 1) > 1]
    return [*found, *{plan.kind: plan for plan in cut}.values()]


def tensors(i: Inputs) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_forward_plan_writes_it(case: Case) -> None:
    """Zeros fill the ranks up, and the parts sum to s h; y is as good as without the operand."""
    i, operand = make(case), operand_of(case)
    state = torch.tensor(SEED) if case.p else None
    plans = plans_for(case, "forward")
    assert len({plan.kind for plan in plans}) >= (2 if case.m > 32 else 3)
    for plan in plans:
        _, h = operators.run_plan(plan, *tensors(i), case.scaling, case.p, state)
        assert (h.dtype, h.shape) == (BF16, (case.m, operand.columns)), plan
        for part in h.split(operand.rank, 1):
            assert not part[:, case.r :].any(), plan
        test_triton_plans.judge(plan, case, i)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backward_plan_reads_it(case: Case) -> None:
    i = make(case)
    for plan in plans_for(case, "backward"):
        test_triton_backward.judge(plan, case, i)


def test_an_adapter_that_is_off_has_no_gradients() -> None:
    case = CASES[1]
    i, operand, state = make(case), operand_of(case), torch.tensor(SEED)
    x, weight, a, b, bias = tensors(i)
    for plan in plans_for(case, "backward"):
        kept = operand.pack(torch.zeros(case.m, case.r))
        dx, da, db, _ = operators.run_backward(plan, i.dy, x, weight, a, b, bias, kept, 0.0, case.p, state)
        assert not bool(db.any() or da.any()), plan
        assert dx.any()
    _, h, _ = ops.operators("triton").forward(x, weight, a, b, bias, 0.0, case.p, state)
    assert not h.any()


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[3]], ids=str)
def test_the_operators_give_what_their_fakes_say(case: Case) -> None:
    i, triton = make(case), ops.operators("triton")
    state = torch.tensor(SEED) if case.p else None
    given = (*tensors(i), case.scaling, case.p, state)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(torch.ops.lora_kernels.triton_forward.default, given, **checks)
    _, h, words = triton.forward(*given)
    back = (i.dy, *given[:5], h, case.scaling, case.p, words if case.p else None)
    torch.library.opcheck(torch.ops.lora_kernels.triton_backward.default, back, **checks)
    assert same_bits(triton.kept.scaled_h(h, case.r, case.scaling), operand_of(case).unpack(h, case.r))


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
@pytest.mark.parametrize("way", ["double backward", "compiled"])
def test_other_ways_give_the_gradients_of_the_kernels(case: Case, way: str) -> None:
    """The formulas of a double backward read what was kept; a compiled graph is laid out by the fakes."""
    i = make(case)
    x, weight, a, b, bias = tensors(i)

    def gradient(twice: bool, function: Any) -> Tensor:
        torch.manual_seed(3)
        leaf = b.clone().requires_grad_()
        y = function(x, weight, a, leaf, bias, case.scaling, case.p, True, "triton")
        (found,) = torch.autograd.grad(y, leaf, i.dy, create_graph=twice)
        return found.detach()

    plain = gradient(False, lora_linear)
    other = torch.compile(lora_linear, backend="aot_eager") if way == "compiled" else lora_linear
    wide = plain.double()
    check_all({"db": gradient(way == "double backward", other)}, {"db": wide}, {"db": wide.to(case.dtype)}, case.dtype)


def test_nothing_is_kept_where_there_are_no_rows() -> None:
    case = CASES[0]
    x, weight, a, b, bias = tensors(make(case))
    y, h, _ = ops.operators("triton").forward(x[:0], weight, a, b, bias, 0.5, 0.0, None)
    assert (y.shape, h.shape, h.dtype) == ((0, case.n), (0, 32), BF16)


def test_infinite_and_missing_numbers_stay() -> None:
    case = replace(CASES[0], r=8)
    x, weight, a, b, bias = tensors(make(case))
    x[3, 5], x[4, 6] = torch.inf, torch.nan
    _, h, _ = ops.operators("triton").forward(x, weight, a, b, bias, 0.5, 0.0, None)
    found = operand_of(case).unpack(h, case.r)
    assert not found[3].isfinite().any()
    assert found[4].isnan().all()
    assert found[torch.arange(case.m) > 4].isfinite().all()
