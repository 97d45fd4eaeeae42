"""Backward by every plan against float64: on the GPU, or interpreted on the CPU; and that these tests can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, Inputs, make, measures
from lora_kernels import reference
from lora_kernels.backends.triton.choose.blocks import INTERPRETER, machine_of
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.plans import BackwardPlan
from lora_kernels.backends.triton.offline.compile_jobs import backward_plans_of
from numerics import check_all, same_bits
from test_triton_plans import SEED, Fault, _less, _without, cell_of, keep_mask, launch_by_python, operand_of, seed_on
from test_triton_plans import by_plan as forward_by_plan

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = [
    Case(m=1, k=70, n=31, r=1),
    Case(m=33, k=40, n=70, r=3, dtype=BF16, adapter_dtype=FP32, p=0.1),
    Case(m=70, k=40, n=24, r=17, dtype=FP16, bias=False, p=0.5),
    Case(m=18, k=33, n=20, r=70, x_layout="transposed"),
    Case(m=40, k=24, n=72, r=16, dtype=BF16),
]


def plans_of(case: Case, device: str) -> Sequence[BackwardPlan]:
    """In the interpreter all four; on a GPU the best predicted of each kind."""
    machine, cell = machine_of(torch.device(device)), replace(cell_of(case), direction="backward")
    return candidates(machine, cell) if machine.interpreter else backward_plans_of(machine, cell)


def hidden_of(case: Case, i: Inputs, mask: Tensor | None) -> Tensor:
    """h in fp32, as forward leaves it."""
    x, a = (t.detach().to(case.dtype).float() for t in (i.x, i.lora_a))
    return reference.drop(x, mask, case.p) @ a.t()


def by_plan(plan: BackwardPlan, case: Case, i: Inputs, h: Tensor | None = None) -> dict[str, Tensor | None]:
    """All gradients; ``h`` as ``hidden_of`` gives it, which a captured graph cannot compute."""
    from lora_kernels.backends.triton import operators

    x, weight, lora_a, lora_b = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b))
    state = seed_on(x.device) if case.p else None
    if h is None:
        h, operand = hidden_of(case, i, mask_of(case, i)), operand_of(case, x.device)
        h = h if operand is None else operand.pack(case.scaling * h)
    given = (i.dy, x, weight, lora_a, lora_b, i.bias, h, case.scaling, case.p, state)
    return dict(zip(("dx", "da", "db", "dbias"), operators.run_backward(plan, *given), strict=True))


def mask_of(case: Case, i: Inputs) -> Tensor | None:
    seed = torch.tensor(SEED, device=i.x.device)
    return keep_mask(seed, case.m, case.k, case.p) if case.p else None


def judge(plan: BackwardPlan, case: Case, i: Inputs) -> None:
    exact, yardstick, errors = measures(case, i, mask_of(case, i))
    check_all(by_plan(plan, case, i), exact, yardstick, case.dtype, expected=errors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(triton_device: str, case: Case) -> None:
    i = make(case, triton_device)
    for plan in plans_of(case, triton_device):
        judge(plan, case, i)


def test_the_same_bits_twice(triton_device: str) -> None:
    case = Case(m=40, k=24, n=20, r=3, dtype=BF16, p=0.1)
    i = make(case, triton_device)
    for plan in plans_of(case, triton_device):
        first, second = by_plan(plan, case, i), by_plan(plan, case, i)
        assert all(same_bits(first[name], second[name]) for name in first), plan


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        (Case(m=20, k=40, n=24, dtype=BF16), "dx_persistent_kernel"),
        (Case(m=20, k=40, n=20, dtype=BF16), "dx_kernel"),
        (Case(m=20, k=44, n=24, dtype=BF16), "dx_kernel"),
    ],
    ids=["rows", "dy's rows off 16 bytes", "W's rows off 16 bytes"],
)
def test_what_tma_cannot_read_goes_by_pointers(
    triton_device: str, case: Case, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_triton_kernels import count_launches

    plan = next(plan for plan in plans_of(case, triton_device) if "persistent" in str(plan))
    launched = count_launches(monkeypatch)
    judge(plan, case, make(case, triton_device))
    assert [name for name in launched if name.startswith("dx")] == [kernel]


def _stale_dh(position: int) -> Fault:
    def fault(grid: list[int], arguments: list[Any], static: list[Any]) -> None:
        arguments[position] = torch.roll(arguments[position], 1, dims=0)

    return fault


FAULTS: dict[str, tuple[str, str, Fault]] = {  # part of the plan's text, kernel, what goes wrong
    "no mask on the low-rank part": ("dx_fused pointer", "dx_kernel", _without(4)),
    "the last step of N is skipped": ("dx_fused pointer", "dx_kernel", _less(1, 32)),
    "dh of another row": ("dx_fused persistent", "dx_persistent_kernel", _stale_dh(2)),
    "the persistent product draws no mask": ("dx_fused persistent", "dx_persistent_kernel", _without(4)),
    "the low-rank term is not masked": ("dx_lora_first", "dx_low_rank_kernel", _without(2)),
    "the sum of da leaves out a part": ("da 32x64/1 splits=3", "reduce_kernel", _less(4, 1)),
    "the sum of dh leaves out a part": ("dh shrink", "reduce_kernel", _less(3, 1)),
    "dh and db are not scaled": ("dh+db", "reduce_kernel", _without(6)),
    "rows of da are skipped": ("da 32x64/1 splits=1", "da_kernel", _less(0, 1)),
    "da's mask is forgotten": ("da 32x64/1 splits=3", "da_kernel", _without(2)),
}


@pytest.mark.parametrize(("text", "kernel", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_caught(
    triton_device: str, text: str, kernel: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kernels.backends.triton.run.prepared import Launch

    case = Case(m=66, k=24, n=72, r=4, dtype=BF16, p=0.3)
    i = make(case, triton_device)
    cell = replace(cell_of(case), direction="backward")
    plan = next(plan for plan in candidates(INTERPRETER, cell) if text in str(plan))
    judge(plan, case, i)

    call: Callable[..., None] = Launch.__call__

    def faulty(self: Launch, stream: int | None, *arguments: Any) -> None:
        if self.kernel.__name__ != kernel:
            return call(self, stream, *arguments)
        grid, leading, static = list(self.grid), list(arguments), list(self.static)
        fault(grid, leading, static)
        return call(Launch(self.kernel, tuple(grid), tuple(static), **self.options), stream, *leading)

    launch_by_python(monkeypatch)
    monkeypatch.setattr(Launch, "__call__", faulty)
    with pytest.raises(AssertionError, match="FAILS"):
        judge(plan, case, i)


@pytest.mark.parametrize(("direction", "m"), [("forward", 9), ("forward", 70), ("backward", 70)])
def test_a_plan_launches_what_it_says(direction: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's product is counted too, and a composition's alone; of 9 rows backward would split fewer."""
    from lora_kernels.backends.triton.run.prepared import Launch

    case = Case(m=m, k=96, n=72, r=4)
    i, counted = make(case, "cpu"), []
    launch_by_python(monkeypatch)
    monkeypatch.setattr(Launch, "__call__", lambda self, *arguments: counted.append(self.kernel))
    for plan in candidates(INTERPRETER, replace(cell_of(case), direction=direction)):
        counted.clear()
        (forward_by_plan if direction == "forward" else by_plan)(plan, case, i)
        assert len(counted) == plan.launches - plan.is_composition, plan
