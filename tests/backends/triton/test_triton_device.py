"""Plans on a GPU: what the interpreter cannot show (dependent launch, captured graphs, prepared launches)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CUDA, Case, make
from lora_kernels import use_backend
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose import ranking
from lora_kernels.backends.triton.choose.blocks import Machine, machine_of
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.plans import GLUON_PLANS, BackwardPlan, Cell, FewTokens, Plan, Ring
from made_models import acting
from numerics import same_bits
from test_triton_backward import by_plan as backward_by_plan
from test_triton_backward import hidden_of, mask_of
from test_triton_plans import by_plan, cell_of, judge, plans_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="it needs a GPU and torch sees no CUDA device"),
]

CASES = [
    Case(m=16, k=4096, n=1000, r=16, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1),
    Case(m=1000, k=1000, n=1400, r=40, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1),
]


def sample(case: Case) -> list[Plan]:
    """The best predicted plan of each kind, variant, launch, stream and split."""
    found: dict[Any, Plan] = {}
    for plan in plans_of(case, "cuda"):
        config = plan if isinstance(plan, (FewTokens, Ring, *GLUON_PLANS)) else plan.shrink
        splits = getattr(config, "splits", 1)
        flavour = (getattr(plan, name, None) for name in ("kind", "variant", "pdl", "beside"))
        found.setdefault((*flavour, splits > 1), plan)
    return list(found.values())


PLANS = [(case, plan) for case in CASES for plan in (sample(case) if CUDA else ())]
EARLY = [(case, plan) for case, plan in PLANS if getattr(plan, "pdl", False)]


@pytest.mark.parametrize(("case", "plan"), PLANS, ids=str)
def test_against_float64(case: Case, plan: Plan) -> None:
    judge(plan, case, make(case, "cuda"))


@pytest.mark.parametrize(("case", "plan"), EARLY, ids=str)
def test_an_early_start_changes_no_bit(case: Case, plan: Any) -> None:
    """Many calls in a row, each with memory that the one before has just given back: none reads what is not there."""
    inputs = [make(case, "cuda", seed) for seed in range(4)]
    in_order = [by_plan(replace(plan, pdl=False), case, i) for i in inputs]
    for _ in range(25):
        early = [by_plan(plan, case, i) for i in inputs]
        for left, right in zip(early, in_order, strict=True):
            assert all(same_bits(left[name], right[name]) for name in left)
        del early


@pytest.mark.parametrize(("case", "plan"), PLANS, ids=str)
def test_a_captured_graph_replays_the_same_bits(case: Case, plan: Plan) -> None:
    """Twice, the second time on other numbers."""
    i, other = make(case, "cuda"), make(case, "cuda", seed=1)
    i = replace(i, x=i.x.detach().clone())
    wanted = [by_plan(plan, case, i)["y"], by_plan(plan, case, replace(i, x=other.x))["y"]]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = by_plan(plan, case, i)["y"]
    replayed: list[Tensor] = []
    for x in (None, other.x.detach()):
        if x is not None:
            i.x.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        replayed.append(y.clone())
    assert all(same_bits(left, right) for left, right in zip(replayed, wanted, strict=True))


@pytest.mark.parametrize(("case", "plan"), PLANS, ids=str)
def test_a_second_call_does_without_triton_s_own_launch(
    case: Case, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on another stream, while the first one is busy."""
    from triton.runtime.jit import JITFunction

    i = make(case, "cuda")
    first = by_plan(plan, case, i)

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("bound anew")

    monkeypatch.setattr(JITFunction, "run", refused)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = by_plan(plan, case, i)
    torch.cuda.synchronize()
    assert all(same_bits(first[name], second[name]) for name in first)


def beside_plans(cell: Cell) -> list[BackwardPlan]:
    """The best predicted of each kind of backward, beside: of plain ones by dh alone, and by dh and db in one read."""
    found: dict[Any, BackwardPlan] = {}
    for plan in candidates(machine_of(torch.device("cuda", torch.cuda.current_device())), cell):
        if plan.beside:
            joint = isinstance(plan, GLUON_PLANS) or plan.hidden.joint
            found.setdefault((plan.kind, getattr(plan, "variant", ""), joint), plan)
    return list(found.values())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_join_their_streams(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward beside, under torch.compile and in its CUDA graphs: the bits of the layer that is not."""
    layer = acting(1024, 1408, r=16, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1000, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, layer.lora_A, layer.lora_B]

    def beside(device: torch.device, machine: Machine, cell: Cell, *how: Any) -> tuple[Any, ...]:
        return tuple(plan for plan in candidates(machine, cell) if getattr(plan, "beside", False))

    monkeypatch.setattr(ranking, "plans_for", beside)
    operators.forget()
    with use_backend("triton"):
        wanted = torch.autograd.grad(layer(x).float().square().sum(), leaves)
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for _ in range(4):  # the graphs are taken in the second call, and replayed after
            found = torch.autograd.grad(compiled(x).float().square().sum(), leaves)
            assert all(same_bits(*pair) for pair in zip(found, wanted, strict=True))
    operators.forget()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_backward_beside_changes_no_bit_and_can_be_captured(p: float) -> None:
    """Small kernels on a second stream: the same bits as in turn, many times, and from a graph on other numbers."""
    case = Case(m=1000, k=1024, n=1408, r=16, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=p)
    cell = replace(cell_of(case), direction="backward")
    i, other = make(case, "cuda"), make(case, "cuda", seed=1)
    for plan in beside_plans(cell):
        beside, in_turn = replace(plan, beside=True), replace(plan, beside=False)
        wanted = [backward_by_plan(in_turn, case, inputs) for inputs in (i, other)]
        for _ in range(25):
            for inputs, right in zip((i, other), wanted, strict=True):
                found = backward_by_plan(beside, case, inputs)
                assert all(same_bits(found[name], right[name]) for name in ("dx", "da", "db"))
        own, h = replace(i, dy=i.dy.clone()), hidden_of(case, i, mask_of(case, i))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = backward_by_plan(beside, case, own, h)
        for inputs in (i, other):
            own.dy.copy_(inputs.dy)
            graph.replay()
            right = backward_by_plan(in_turn, case, own, h)
            torch.cuda.synchronize()
            assert all(same_bits(captured[name], right[name]) for name in ("dx", "da", "db"))
