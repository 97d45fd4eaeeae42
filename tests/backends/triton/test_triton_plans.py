"""Forward by every plan against float64: on the GPU, or interpreted on the CPU; and that these tests can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, Inputs, make, measures
from lora_kernels import reference
from lora_kernels.backends.triton.choose import blocks
from lora_kernels.backends.triton.choose.blocks import INTERPRETER, machine_of
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.hidden_operand import HiddenOperand, operand_on
from lora_kernels.backends.triton.choose.plans import Cell, FewTokens, Plan
from lora_kernels.packed_mask import packed_keep_words, unpack
from numerics import check_all, same_bits, three_ways

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
SEED = (2**61 + 5, -77)
CASES = [
    Case(m=1, k=70, n=31, r=1),
    Case(m=5, k=72, n=40, r=3, dtype=BF16, adapter_dtype=FP32, p=0.1),
    Case(m=16, k=68, n=33, r=40, dtype=FP16, bias=False, p=0.5),
    Case(m=17, k=40, n=33, r=16, dtype=BF16, p=0.1),
    Case(m=33, k=72, n=70, r=3, dtype=BF16, adapter_dtype=FP32),
    Case(m=18, k=33, n=20, r=130, p=0.1),
    Case(m=20, k=64, n=32, r=16, dtype=FP16, x_layout="rows", bias=False),
    Case(m=20, k=48, n=40, r=5, x_layout="transposed", p=0.1),
    Case(m=34, k=36, n=65, r=17, dtype=FP32, adapter_dtype=FP16),
]


def cell_of(case: Case, m: int | None = None) -> Cell:
    tokens = 1 << ((m or case.m) - 1).bit_length()
    dtype = str(case.dtype).removeprefix("torch.")
    return Cell("forward", tokens, case.k, case.n, case.r, dtype, case.p > 0)


def plans_of(case: Case, device: str) -> tuple[Plan, ...]:
    return candidates(machine_of(torch.device(device)), cell_of(case))


@cache
def seed_on(device: torch.device) -> Tensor:
    """Made once for a device: within a captured graph nothing can be copied from the host."""
    return torch.tensor(SEED, device=device)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask that the kernels draw and read, by its specification."""
    return unpack(packed_keep_words(seed, rows, columns, p), columns)


def by_plan(plan: Plan, case: Case, i: Inputs) -> dict[str, Tensor]:
    from lora_kernels.backends.triton import operators

    x, weight, lora_a, lora_b = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b))
    bias = None if i.bias is None else i.bias.detach()
    state = seed_on(x.device) if case.p else None
    y, h = operators.run_plan(plan, x, weight, lora_a, lora_b, bias, case.scaling, case.p, state)
    operand = operand_of(case, x.device)
    return {"y": y, "h": h if operand is None else operand.unpack(h, case.r) / case.scaling}


def launch_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no launch is one call into C++, where a test sees nothing of it."""
    from lora_kernels.backends.triton import operators
    from lora_kernels.backends.triton.run import launcher

    monkeypatch.setattr(launcher, "_found", launcher._Found(None, "a test watches the launches"))
    operators.forget()


def operand_of(case: Case, device: torch.device) -> HiddenOperand | None:
    """How forward leaves h there; None: fp32, without s."""
    return operand_on(blocks.machine_of(device).capability, case.dtype, case.k, case.n, case.r)


def judge(plan: Plan, case: Case, i: Inputs) -> None:
    """y by the policy of ``numerics.py``; h too, by fp32's, as backward reads it.

    Tensor cores cut off where they add, rather than round: so on a GPU the yardstick of h of 16-bit products is the
    library's own such product with fp32 results.
    """
    seed = torch.tensor(SEED, device=i.x.device)
    mask = keep_mask(seed, case.m, case.k, case.p) if case.p else None
    exact, yardstick, errors = measures(case, i, mask)
    x, a = (t.detach().to(case.dtype) for t in (i.x, i.lora_a))
    hidden = three_ways(torch.float32, lambda number: {"h": reference.drop(number(x), mask, case.p) @ number(a).t()})
    if x.is_cuda and case.dtype.itemsize == 2:
        kept = x if mask is None else x * mask
        hidden[1]["h"] = torch.mm(kept, a.t(), out_dtype=torch.float32) / (1.0 - case.p)
    if (operand := operand_of(case, x.device)) is not None:  # a plain h in these two parts
        hidden[1]["h"] = operand.unpack(operand.pack(hidden[1]["h"]), case.r)
    result = by_plan(plan, case, i)
    check_all({"y": result["y"]}, exact, yardstick, case.dtype, expected=errors)
    check_all({"h": result["h"]}, *hidden[:2], torch.float32, expected=hidden[2])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(triton_device: str, case: Case) -> None:
    i = make(case, triton_device)
    for plan in plans_of(case, triton_device):
        judge(plan, case, i)


@pytest.mark.parametrize("m", [2, 21])
def test_the_same_bits_twice(triton_device: str, m: int) -> None:
    case = Case(m=m, k=72, n=20, r=3, dtype=BF16, p=0.1)
    i = make(case, triton_device)
    for plan in plans_of(case, triton_device):
        first, second = by_plan(plan, case, i), by_plan(plan, case, i)
        assert all(same_bits(first[name], second[name]) for name in first), plan


def test_a_plan_for_fewer_tokens_is_refused(triton_device: str) -> None:
    from lora_kernels.errors import InvalidArgumentError

    few = next(plan for plan in plans_of(Case(m=16), triton_device) if isinstance(plan, FewTokens))
    with pytest.raises(InvalidArgumentError, match="is for at most 16 tokens of rank 16; got 17 of rank 8"):
        by_plan(few, Case(m=17), make(Case(m=17), triton_device))


@pytest.mark.parametrize(
    ("case", "offset", "kernel"),
    [
        (Case(m=20, k=40, dtype=BF16), 0, "persistent_kernel"),
        (Case(m=20, k=40, dtype=BF16, x_layout="rows"), 0, "persistent_kernel"),
        (Case(m=20, k=40, dtype=BF16, x_layout="transposed"), 0, "forward_kernel"),
        (Case(m=20, k=44, dtype=BF16), 0, "forward_kernel"),
        (Case(m=20, k=40, dtype=BF16), 1, "forward_kernel"),
    ],
    ids=["rows", "every second row", "columns", "rows off 16 bytes", "storage off 16 bytes"],
)
def test_what_tma_cannot_read_goes_by_pointers(
    triton_device: str, case: Case, offset: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_triton_kernels import count_launches

    i = make(case, triton_device)
    weight = torch.cat([i.weight.new_zeros(offset), i.weight.flatten()])[offset:].view(case.n, case.k)
    plan = next(plan for plan in plans_of(case, triton_device) if "persistent" in str(plan))
    launched = count_launches(monkeypatch)
    judge(plan, case, replace(i, weight=weight))
    assert launched == ["shrink_kernel", kernel]


Fault = Callable[[Any, list[Any], list[Any]], None]  # changes the grid, the leading and the static arguments in place


def _without(position: int) -> Fault:
    """The leading argument at ``position`` forgotten: a None, or a zero."""

    def fault(grid: Any, arguments: list[Any], static: list[Any]) -> None:
        arguments[position] = 0.0 if isinstance(arguments[position], float) else None

    return fault


def _less(position: int, by: int) -> Fault:
    def fault(grid: Any, arguments: list[Any], static: list[Any]) -> None:
        static[position] -= by

    return fault


def _last_part_not_computed(grid: list[int], arguments: list[Any], static: list[Any]) -> None:
    arguments[2].zero_()
    grid[2] -= 1


def _stale_h(grid: list[int], arguments: list[Any], static: list[Any]) -> None:
    arguments[5] = torch.roll(arguments[5], 1, dims=-2)


FAULTS: dict[str, tuple[str, str, Fault]] = {  # part of the plan's text, kernel, what goes wrong
    "the sum leaves out the last part": ("few_tokens", "sum_parts_kernel", _less(5, 1)),
    "the sum forgets the bias": ("few_tokens", "sum_parts_kernel", _without(2)),
    "no low-rank term": ("few_tokens", "few_tokens_kernel", _without(8)),
    "a part of K is skipped": ("few_tokens", "few_tokens_kernel", _less(2, 32)),
    "the last part of h is not computed": ("fused pointer", "shrink_kernel", _last_part_not_computed),
    "the product adds one part of h": ("fused pointer", "forward_kernel", _less(18, 1)),
    "no low-rank step": ("fused persistent", "persistent_kernel", _without(9)),
    "the last K step is skipped": ("fused persistent", "persistent_kernel", _less(2, 32)),
    "the persistent product forgets the bias": ("fused persistent", "persistent_kernel", _without(3)),
    "h of another row": ("fused persistent", "persistent_kernel", _stale_h),
    "the expansion forgets the bias": ("lora_first", "expand_kernel", _without(1)),
    "the expansion overwrites the base": ("base_first", "expand_kernel", _less(13, True)),
}


@pytest.mark.parametrize(("text", "kernel", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_caught(
    triton_device: str, text: str, kernel: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kernels.backends.triton.run.prepared import Launch

    case = Case(m=9 if text == "few_tokens" else 37, k=96, n=40, r=4, dtype=BF16)
    i = make(case, triton_device)
    plans = candidates(INTERPRETER, cell_of(case))  # on a GPU too: for so small a layer it would split nothing
    plan = next(plan for plan in plans if text in str(plan) and "splits=1" not in str(plan))
    judge(plan, case, i)

    call = Launch.__call__

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
