"""The kernels for few tokens in CUDA C++, on a GPU: each plan that the choice has, its replays, and two streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from cases import Case, keep_mask, make, measures
from lora_kernels import lora_linear
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose import candidates, ranking
from lora_kernels.backends.triton.choose.blocks import machine_of
from lora_kernels.backends.triton.choose.plans import Cell, Ring, RingGrads
from lora_kernels.backends.triton.choose.ring import CONFIGS, ring_fault
from lora_kernels.errors import InvalidArgumentError
from numerics import check_all, same_bits
from test_cuda_graphs import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP32 = torch.bfloat16, torch.float32
REPLAYS = 1000


def case_of(m: int, k: int, n: int, r: int = 16, **fields: Any) -> Case:
    return Case(m=m, k=k, n=n, r=r, dtype=BF16, **{"adapter_dtype": FP32, **fields})


CASES = [
    *[case_of(m, 4096, 4096, p=p) for m in (1, 8, 16) for p in (0.0, 0.1)],
    *[case_of(m, 4096, 1024, p=p) for m in (1, 16) for p in (0.0, 0.1)],
    case_of(1, 4096, 14336),
    case_of(16, 14336, 4096, p=0.1),
    case_of(5, 1088, 100, 5, p=0.5, adapter_dtype=BF16),
    case_of(13, 2048, 1033, 64, bias=False),
    case_of(3, 1024, 48, 1, x_layout="rows"),
]


def cell_of(case: Case) -> Cell:
    return Cell("forward", case.m, case.k, case.n, case.r, "bfloat16", case.p > 0)


def ways(case: Case) -> list[Ring]:
    """The plans of the choice, each way once, with and without dependent launch."""
    machine = machine_of(torch.device("cuda"))
    if fault := ring_fault(machine, cell_of(case)):
        pytest.skip(f"the kernel does not run on this GPU: {fault}")
    found = [plan for plan in candidates.candidates(machine, cell_of(case)) if isinstance(plan, Ring)]
    assert {plan.config.name for plan in found} <= {config.name for config in CONFIGS}
    return found


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``by(plan)``: forward goes by it; backward as ever."""
    ranked = ranking.plans_for

    def choose(plan: Ring) -> None:
        @cache
        def plans_for(device: torch.device, machine: Any, cell: Cell, *how: Any) -> tuple[Any, ...]:
            others = tuple(ranked(device, machine, cell, *how))
            return others if cell.direction == "backward" else (plan, *others)

        monkeypatch.setattr(ranking, "plans_for", plans_for)
        operators.forget()

    yield choose
    monkeypatch.undo()
    operators.forget()


def step(case: Case, i: Any, seed: int = 1) -> dict[str, Tensor]:
    """y and the gradients of x, A and B, which take the h and the words that the kernel left."""
    torch.manual_seed(seed)
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, case.p, case.p > 0, "triton")
    dx, da, db = torch.autograd.grad(y, (i.x, i.lora_a, i.lora_b), i.dy)
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_plan_against_float64_and_twice_the_same(case: Case, by: Any) -> None:
    i = make(case, "cuda")
    plans = ways(case)
    assert plans
    exact, yardstick, errors = measures(case, i, keep_mask(case, i, "triton"))
    names = ("y", "dx", "da", "db")
    exact, yardstick = ({name: found[name] for name in names} for found in (exact, yardstick))
    for plan in plans:
        by(plan)
        first, second, third = (step(case, i) for _ in range(3))
        check_all(first, exact, yardstick, case.dtype, expected=errors)
        for again in (second, third):  # recorded, then by the launcher where it is there
            assert [name for name in names if not same_bits(again[name], first[name])] == [], str(plan)


@pytest.mark.parametrize(
    "case", [case_of(1, 4096, 4096), case_of(16, 4096, 1024), case_of(4, 4096, 1024, p=0.1)], ids=str
)
def test_a_thousand_replays(case: Case, by: Any) -> None:
    """The launches of a graph number themselves: none waits for ever, and each leaves the same bits."""
    i = make(case, "cuda")
    for plan in ways(case):
        by(plan)
        y = torch.empty(case.m, case.n, dtype=BF16, device="cuda")

        def run(y: Tensor = y) -> None:
            with torch.no_grad():
                for _ in range(2):
                    y.copy_(lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, backend="triton"))

        run()
        expected, wrong = y.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
        graph = captured(run)
        for _ in range(REPLAYS):
            y.zero_()
            graph.replay()
            wrong += (y.view(torch.int16) != expected.view(torch.int16)).any()
        assert wrong.item() == 0, str(plan)


def test_two_streams_and_a_graph_at_once(by: Any) -> None:
    """Launches that wait for their own blocks, beside each other: none hangs, and no bit differs."""
    case = case_of(4, 4096, 4096)
    i = make(case, "cuda")
    for plan in ways(case):
        by(plan)
        expected = step(case, i)
        y = torch.empty_like(expected["y"])

        def run(y: Tensor = y) -> None:
            with torch.no_grad():
                y.copy_(lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, backend="triton"))

        graph = captured(run)
        torch.cuda.synchronize()
        found = []
        for stream in [torch.cuda.Stream() for _ in range(2)] * 20:
            with torch.cuda.stream(stream):
                found.append(step(case, i))
            graph.replay()
            found.append({"y": y.clone()})
        torch.cuda.synchronize()
        wrong = [name for one in found for name in one if not same_bits(one[name], expected[name])]
        assert wrong == [], str(plan)


def gradients(plan: RingGrads, case: Case, i: Any, state: Tensor | None) -> dict[str, Tensor]:
    x, w, a, b, dy = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.dy))
    bias = None if i.bias is None else i.bias.detach()
    _, h, _ = operators.forward(x, w, a, b, bias, case.scaling, case.p, state)
    found = operators.run_backward(plan, dy, x, w, a, b, bias, h, case.scaling, case.p, state)
    return {name: t for name, t in zip(("dx", "da", "db", "dbias"), found, strict=True) if t is not None}


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 5, 9, 10, 11, 13, 14)], ids=str)
def test_every_gradient_against_float64_and_twice_the_same_bits(case: Case) -> None:
    machine, cell = machine_of(torch.device("cuda")), replace(cell_of(case), direction="backward")
    if fault := ring_fault(machine, cell):
        pytest.skip(f"the kernel does not run on this GPU: {fault}")
    plans = [plan for plan in candidates.candidates(machine, cell) if isinstance(plan, RingGrads)]
    i = make(case, "cuda")
    state = torch.tensor([3, 5], device="cuda") if case.p else None
    if case.n % 8:
        with pytest.raises(InvalidArgumentError, match="16-byte boundaries"):
            gradients(plans[0], case, i, state)
        return
    mask = None if state is None else operators.mask(state, case.m, case.k, case.p)
    exact, yardstick, errors = measures(case, i, mask)
    for plan in plans:
        found = gradients(plan, case, i, state)
        check_all(found, exact, yardstick, case.dtype, expected=errors)
        again = gradients(plan, case, i, state)
        assert all(same_bits(found[name], again[name]) for name in found)
