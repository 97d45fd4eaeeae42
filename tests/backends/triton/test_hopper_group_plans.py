"""Layers of one x by the group operators, through the gate and autograd; the device code emulated on the CPU."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated_hopper import run_launch
from emulated_hopper_groups import EMULATED
from lora_kernels import use_backend
from lora_kernels.backends.triton.choose import blocks as all_blocks
from lora_kernels.backends.triton.choose import ranking
from lora_kernels.backends.triton.choose.blocks import INTERPRETER, Machine
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.group_candidates import group_plans
from lora_kernels.backends.triton.choose.group_plans import Apart, DxHopperGroup, HopperGroup
from lora_kernels.backends.triton.choose.plans import Cell
from lora_kernels.branches import Branch
from lora_kernels.errors import InvalidArgumentError, UnsupportedTransformError
from lora_kernels.gate import group_fault, run_branches
from lora_kernels.ops import operators as operators_of
from numerics import check_all, same_bits, three_ways
from test_hopper import Memory
from test_hopper_groups import CASES, Case, Inputs, formulas, make
from test_hopper_plans import MACHINE

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from lora_kernels.backends.triton import group_operators, operators
from lora_kernels.backends.triton.run import descriptors, hopper, hopper_group_passes, streams
from lora_kernels.backends.triton.run import hopper_groups as groups
from lora_kernels.backends.triton.run.group_call import GroupCall
from lora_kernels.backends.triton.run.prepared import Launch

QKV = Case(biases=(True, False, True), m=70)
DROPPED = replace(QKV, p=0.1)
SMALLER = replace(QKV, k=136, ns=(136, 72, 40), m=24)  # for members that the interpreter runs one by one
ALLOCATED = hopper._new
FORWARD = ["group_pack", "group_shrink", "group_product"]
BACKWARD = ["group_pack", "group_dh_db", "group_reduce_dh", "group_dx", "group_da", "group_reduce_grads"]
MAIN, HIGH = 3, 4


@dataclass
class Launches:
    """The kernels' names, and streams; ``fault`` may raise in the place of one."""

    names: list[str] = field(default_factory=list)
    streams: list[int | None] = field(default_factory=list)
    fault: Callable[[str], None] = lambda name: None


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """A machine of compute capability 9.0, the Gluon kernels emulated on guarded memory; the others are interpreted."""
    found = Memory()
    monkeypatch.setattr(all_blocks, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(hopper, "_new", found.new)
    monkeypatch.setattr(groups, "_new", found.new)
    descriptors.forget()
    operators.forget()
    yield found
    descriptors.forget()
    operators.forget()
    found.check()


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> Launches:
    found, interpreted = Launches(), Launch.__call__

    def launch(self: Launch, stream: int | None, *arguments: Any) -> None:
        name = getattr(self.kernel, "fn", self.kernel).__name__
        short = name.removeprefix("hopper_").removesuffix("_kernel")
        found.fault(short)
        found.names.append(short)
        found.streams.append(stream)
        (run_launch if name in EMULATED else interpreted)(self, stream, *arguments)

    monkeypatch.setattr(Launch, "__call__", launch)
    plan_by(monkeypatch)
    return found


def plan_by(monkeypatch: pytest.MonkeyPatch, *plans: Any, apart: tuple[str, ...] = ()) -> None:
    """Of a group's cell these come first, each for its pass, then the kernels' others; of the passes in ``apart`` none.
    Single layers go by plain plans."""

    @cache
    def plans_for(device: torch.device, machine: Machine, cell: Cell, *how: Any) -> tuple[Any, ...]:
        if not cell.others:
            return candidates(INTERPRETER, replace(cell, tokens=min(cell.tokens, 256)))
        if cell.direction in apart:
            return (Apart(),)
        kind = HopperGroup if cell.direction == "forward" else DxHopperGroup
        last, *kernels = group_plans(machine, cell)
        return (*(plan for plan in plans if isinstance(plan, kind)), *kernels, last)

    monkeypatch.setattr(ranking, "plans_for", plans_for)
    operators.forget()


def branches_of(case: Case, i: Inputs) -> list[Branch]:
    states = i.states if case.p else [None] * len(case.ns)
    return [
        Branch(*own, scaling, state=state)
        for own, scaling, state in zip(
            zip(i.weights, i.lora_as, i.lora_bs, i.biases, strict=True), case.scalings, states, strict=False
        )
    ]


def leaves_of(i: Inputs) -> dict[str, Tensor]:
    named = {"dx": i.x}
    for j, (a, b, bias) in enumerate(zip(i.lora_as, i.lora_bs, i.biases, strict=True)):
        named |= {f"da{j}": a, f"db{j}": b} | ({} if bias is None else {f"dbias{j}": bias})
    return named


def run(case: Case, i: Inputs, used: tuple[int, ...] | None = None, due: str = "") -> dict[str, Tensor]:
    """Both passes; ``used``: the outputs that get a dy; ``due``: which gradients, by how their names begin."""
    named = {name: leaf for name, leaf in leaves_of(i).items() if not due or name.rstrip("0123") in due.split()}
    for leaf in named.values():
        leaf.requires_grad_()
    ys = run_branches(i.x, branches_of(case, i), case.p, "triton")
    some = range(len(ys)) if used is None else used
    grads = torch.autograd.grad(
        [ys[j] for j in some], list(named.values()), [i.dys[j] for j in some], allow_unused=True
    )
    found = {f"y{j}": y.detach() for j, y in enumerate(ys)} | dict(zip(named, grads, strict=True))
    for leaf in named.values():
        leaf.requires_grad_(False)
    return {name: value for name, value in found.items() if value is not None}


def all_formulas(case: Case, i: Inputs, number: Callable[[Tensor], Any], used: tuple[int, ...]) -> dict[str, Any]:
    found = formulas(case, i, number)
    biases = {f"dbias{j}": number(i.dys[j]).sum(0) for j, bias in enumerate(i.biases) if bias is not None}
    return found | biases


def judge(found: dict[str, Tensor], case: Case, i: Inputs, used: tuple[int, ...] | None = None) -> None:
    """By the policy, what is there."""
    some = tuple(range(len(case.ns))) if used is None else used
    zeroed = replace(i, dys=[dy if j in some else torch.zeros_like(dy) for j, dy in enumerate(i.dys)])
    exact, yardstick, errors = three_ways(case.dtype, lambda number: all_formulas(case, zeroed, number, some))
    check_all(found, exact, yardstick, case.dtype, expected=errors)


def by_kernels(names: list[str]) -> bool:
    return [name for name in names if name not in ("draw", "mask")] == FORWARD + BACKWARD


TAKEN = [case for case in CASES if not (case.p and len(case.ns) > 3) and 16 < case.m < 700][1::2]


@pytest.mark.parametrize("case", [QKV, DROPPED, *TAKEN], ids=str)
def test_against_float64(case: Case, launches: Launches) -> None:
    """Through the gate and autograd, and no other kernel runs."""
    i = make(case)
    judge(run(case, i), case, i)
    assert by_kernels(launches.names)


DUE = ["dx", "da", "db", "dbias", "dx da", "dx db", "da db", "dx da db", "da db dbias", "dx da db dbias"]


@pytest.mark.parametrize("due", DUE)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_due(p: float, due: str, launches: Launches) -> None:
    """Without db, and with nothing that waits for dh, members run one by one; else the kernels, for what is due."""
    joint = "db" in due.split() and bool({"dx", "da"} & set(due.split()))
    case = replace(QKV if joint else SMALLER, p=p)
    i = make(case)
    judge(run(case, i, None, due), case, i)
    assert ("group_dh_db" in launches.names) == joint
    assert ("group_dx" in launches.names) == (joint and "dx" in due.split())
    assert ("group_da" in launches.names) == (joint and "da" in due.split())


@pytest.mark.parametrize("case", [QKV, DROPPED], ids=str)
@pytest.mark.parametrize("used", [(0,), (2,), (0, 1), (1, 2)])
def test_outputs_that_nobody_used(case: Case, used: tuple[int, ...], launches: Launches) -> None:
    """They give no gradients; of two the group's kernels run, of one its own."""
    i = make(case)
    found = run(case, i, used)
    named = {name for name in leaves_of(i) if name == "dx" or int(name[-1]) in used}
    assert set(found) == named | {f"y{j}" for j in range(3)}
    judge(found, case, i, used)
    assert ("group_dx" in launches.names) == (len(used) > 1)


def test_mixed_needs(launches: Launches) -> None:
    """Of a group every da and db is made, or none; each leaf gets its own."""
    i = make(DROPPED)
    leaves = [i.x, i.lora_as[0], i.lora_bs[1], i.biases[2]]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    ys = run_branches(i.x, branches_of(DROPPED, i), DROPPED.p, "triton")
    found = torch.autograd.grad(ys, leaves, i.dys)  # type: ignore[arg-type]
    for leaf in leaves:
        leaf.requires_grad_(False)  # type: ignore[union-attr]
    judge(dict(zip(("dx", "da0", "db1", "dbias2"), found, strict=True)), DROPPED, i)
    assert by_kernels(launches.names)


# ---- the mask, the seed and h are a layer's own


@pytest.mark.parametrize("keeps", ["mask", "seed"])
def test_backward_takes_the_words_or_the_seed(keeps: str, launches: Launches) -> None:
    """With the same bits; from the seed one more launch a member."""
    i, case = make(DROPPED), DROPPED
    tensors = i.weights, i.lora_as, i.lora_bs
    _, hs, words = group_operators.group_forward(i.x, *tensors, i.biases, case.scalings[:3], case.p, i.states)
    launches.names.clear()
    states = words if keeps == "mask" else i.states
    found = group_operators.group_backward(i.dys, i.x, *tensors, i.biases, hs, case.scalings[:3], case.p, states)
    assert launches.names == ["draw"] * (3 if keeps == "seed" else 0) + BACKWARD
    other = group_operators.group_backward(
        i.dys, i.x, *tensors, i.biases, hs, case.scalings[:3], case.p, i.states if keeps == "mask" else words
    )
    flat = [[one[0], *one[1], *one[2], *one[3]] for one in (found, other)]
    assert all(same_bits(a, b) for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize(
    "case", [SMALLER, replace(SMALLER, p=0.1), replace(SMALLER, p=0.1, dtype=torch.float16, rs=(5, 17, 16))], ids=str
)
def test_either_pass_may_go_member_by_member(case: Case, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """h and the words are the same, whoever wrote them."""
    i = make(case)
    for forward, backward in itertools.product(("group", "apart"), repeat=2):
        ways = {"forward": forward, "backward": backward}
        plan_by(monkeypatch, apart=tuple(name for name, way in ways.items() if way == "apart"))
        launches.names.clear()
        judge(run(case, i), case, i)
        assert ("group_product" in launches.names) == (forward == "group")
        assert ("group_dx" in launches.names) == (backward == "group")


# ---- order and streams


@pytest.mark.parametrize("beside", [False, True])
def test_the_order_of_launches(beside: bool, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """dx on the stream of high priority, the rest beside it; a plan's launches are as many as it says."""

    def ahead_on(device: torch.device, two: bool) -> streams.Together:
        return (lambda stream, large, small: (large(HIGH), small(MAIN))) if two else streams.in_turn

    monkeypatch.setattr(hopper_group_passes, "ahead_on", ahead_on)
    cell = GroupCall.of(*_call_of(QKV, make(QKV))).cell("backward")
    plan = next(p for p in group_plans(MACHINE, cell) if isinstance(p, DxHopperGroup) and p.beside == beside)
    plan_by(monkeypatch, plan)
    run(QKV, make(QKV))
    assert by_kernels(launches.names)
    assert len(BACKWARD) == plan.launches and len(FORWARD) == HopperGroup.launches  # noqa: PT018
    high = [name for name, s in zip(launches.names, launches.streams, strict=True) if s == HIGH]
    assert high == (["group_dx"] if beside else [])


def _call_of(case: Case, i: Inputs) -> tuple[Any, ...]:
    return i.x, i.lora_as, i.lora_bs, i.biases, case.p, i.states if case.p else [], (i.x, *i.weights)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_plan_gives_the_same(direction: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(DROPPED, m=40)
    i = make(case)
    cell = GroupCall.of(*_call_of(case, i)).cell(direction)
    found = []
    for plan in group_plans(MACHINE, cell):
        if not getattr(plan, "beside", False):
            plan_by(monkeypatch, *([] if isinstance(plan, Apart) else [plan]))
            found.append(run(case, i))
    assert len(found) > 2
    for results in found:
        judge(results, case, i)


def test_a_launch_that_is_refused_gives_way(launches: Launches) -> None:
    """To the members one by one, which is kept: each plan is tried once."""
    tried = []

    def fault(name: str) -> None:
        if name == "group_product":
            tried.append(name)
            raise RuntimeError("Triton Error [CUDA]: too many resources requested for launch")

    launches.fault = fault
    i = make(SMALLER)
    for _ in range(2):
        judge(run(SMALLER, i), SMALLER, i)
    cell = GroupCall.of(*_call_of(SMALLER, i)).cell("forward")
    assert len(tried) == len(list(group_plans(MACHINE, cell))) - 1


# ---- what the kernels do not take


def off_by_a_number(t: Tensor) -> Tensor:
    """The same values, 2 bytes behind a 16-byte boundary."""
    return torch.cat([t.new_zeros(1), t.detach().flatten()])[1:].view(t.shape)


def turned(t: Tensor) -> Tensor:
    return t.T.contiguous().T


APART: dict[str, Callable[[Inputs], Inputs]] = {
    "x": lambda i: replace(i, x=off_by_a_number(i.x)),
    "a weight": lambda i: replace(i, weights=[*i.weights[:2], off_by_a_number(i.weights[2])]),
    "x's rows": lambda i: replace(i, x=turned(i.x)),
}


@pytest.mark.parametrize("name", APART)
def test_what_tma_cannot_read_goes_member_by_member(name: str, launches: Launches) -> None:
    case = replace(SMALLER, p=0.1)
    i = APART[name](make(case))
    judge(run(case, i), case, i)
    assert not [name for name in launches.names if name.startswith("group")]


@pytest.mark.parametrize("m", [0, 1, 16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_few_tokens_go_member_by_member(m: int, p: float, launches: Launches) -> None:
    case = replace(SMALLER, m=m, p=p)
    i = make(case)
    found = run(case, i)
    if m:
        judge(found, case, i)
    assert not any(bool(found[name].any()) for name in found if not m)
    assert not [name for name in launches.names if name.startswith("group")]


PARTS: dict[str, tuple[Case, Callable[[list[Branch]], list[Branch]], str]] = {
    "four masks": (Case(ns=(136, 72, 8, 264), rs=(8, 16, 3, 1), p=0.1, m=40), list, "masked terms of 3 layers at most"),
    "fp32": (replace(QKV, dtype=torch.float32), list, "x is torch.float32"),
    "rank": (replace(QKV, rs=(16, 129, 16)), list, "of layer 2, rank 129 is not from 1 to 128"),
    "columns": (replace(QKV, ns=(328, 132, 72)), list, "out_features 132 are not both multiples of 8"),
    "five": (
        Case(ns=(8,) * 5, rs=(4,) * 5, scalings=(1.0,) * 5, biases=(False,) * 5, m=40),
        list,
        "there are 5 layers",
    ),
    "an A": (
        QKV,
        lambda bs: [replace(bs[0], lora_a=turned(bs[0].lora_a)), *bs[1:]],
        "an A or a B is not contiguous",
    ),
    "a W": (QKV, lambda bs: [*bs[:2], replace(bs[2], weight=turned(bs[2].weight))], r"a W is stored \(K, N\)"),
    "dtypes": (QKV, lambda bs: [replace(bs[0], lora_b=bs[0].lora_b.bfloat16()), *bs[1:]], "have several dtypes"),
    "a gain": (QKV, lambda bs: [replace(bs[0], gain=torch.ones(328)), *bs[1:]], r"a layer has a gain \(DoRA\)"),
    "an activation": (QKV, lambda bs: [*bs[:2], replace(bs[2], activation="relu")], "or an activation"),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_they_do_not_take_goes_by_parts_and_is_told(name: str, launches: Launches) -> None:
    """With the masks of a layer by itself; the reason is what ``explain`` tells."""
    case, change, sentence = PARTS[name]
    i = make(case)
    branches = change(branches_of(case, i))
    with use_backend("triton"):
        fault = group_fault(i.x, branches, case.p)
        assert fault is not None
        with pytest.raises(AssertionError, match=sentence):
            raise AssertionError(fault)
        ys = run_branches(i.x, branches, case.p)
    assert not [name for name in launches.names if name.startswith("group")]
    if all(b.is_plain for b in branches):
        judge({f"y{j}": y for j, y in enumerate(ys)}, case, i)


def test_another_machine_goes_by_parts(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    i = make(QKV)
    for machine, sentence in (
        (replace(MACHINE, capability=80), "compute capability 9.0 and this GPU has 8.0"),
        (INTERPRETER, "interpreter does not run Gluon"),
    ):
        monkeypatch.setattr(all_blocks, "machine_of", lambda device, machine=machine: machine)
        operators.forget()
        with use_backend("triton"):
            assert sentence in (group_fault(i.x, branches_of(QKV, i), 0.0) or "")
    with use_backend("eager"):
        assert group_fault(i.x, branches_of(QKV, i), 0.0) == "this backend has none"


def test_a_plan_that_does_not_fit_is_refused() -> None:
    i = make(DROPPED)
    tensors = i.weights, i.lora_as, i.lora_bs
    cell = GroupCall.of(*_call_of(QKV, i)).cell("forward")
    plan = next(p for p in group_plans(MACHINE, replace(cell, r=64)) if isinstance(p, HopperGroup))
    with pytest.raises(InvalidArgumentError, match="does not run: it is for other ranks"):
        group_operators.run_group_forward(plan, i.x, *tensors, i.biases, (1.0,) * 3, 0.0, [])


def test_words_of_another_mask_are_refused() -> None:
    i, case = make(DROPPED), DROPPED
    tensors = i.weights, i.lora_as, i.lora_bs
    _, hs, words = group_operators.group_forward(i.x, *tensors, i.biases, case.scalings[:3], case.p, i.states)
    short = [word[:-1].contiguous() for word in words]
    with pytest.raises(InvalidArgumentError, match="words"):
        group_operators.group_backward(i.dys, i.x, *tensors, i.biases, hs, case.scalings[:3], case.p, short)


# ---- autograd


def test_double_backward() -> None:
    """The reference's formulas, as ever; where x was not kept a sentence is raised."""
    i = make(DROPPED)
    i.x.requires_grad_()
    i.lora_as[0].requires_grad_()
    ys = run_branches(i.x, branches_of(DROPPED, i), DROPPED.p, "triton")
    (dx,) = torch.autograd.grad(ys, i.x, i.dys, create_graph=True)
    (da,) = torch.autograd.grad(dx.float().square().sum(), i.lora_as[0])
    assert bool(da.any())
    i.lora_as[0].requires_grad_(False)
    ys = run_branches(i.x, branches_of(DROPPED, i), DROPPED.p, "triton")
    with pytest.raises(UnsupportedTransformError, match="x was not kept"):
        torch.autograd.grad(ys, i.x, i.dys, create_graph=True)


def test_what_is_kept() -> None:
    """x once, h's operand of each member, and the words where a layer by itself keeps them."""
    i, kept = make(DROPPED), []
    for leaf in leaves_of(i).values():
        leaf.requires_grad_()
    own = {t.data_ptr() for t in (*i.weights, *leaves_of(i).values())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_branches(i.x, branches_of(DROPPED, i), DROPPED.p, "triton")
    words = 4 * 4 * -(-DROPPED.k // 128)
    assert sorted(kept) == sorted(3 * [DROPPED.m * 64] + 3 * [DROPPED.m * words])


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    i = make(QKV)
    with FlopCounterMode(display=False) as counter:
        run(QKV, i)
    m, k = QKV.m, QKV.k
    large = [2 * m * k * n for n in QKV.ns]
    small = [2 * m * r * (k + n) for n, r in zip(QKV.ns, QKV.rs, strict=True)]
    assert counter.get_total_flops() == sum(large) + sum(small) + sum(large) + 2 * sum(small)


def test_the_operators_are_as_their_fakes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake results and no aliases, by PyTorch's own check, on memory without guards."""
    monkeypatch.setattr(hopper, "_new", ALLOCATED)
    monkeypatch.setattr(groups, "_new", ALLOCATED)
    i, case = make(DROPPED), DROPPED
    tensors = i.weights, i.lora_as, i.lora_bs
    operators_of_triton()
    given = (i.x, *tensors, i.biases, list(case.scalings[:3]), case.p, i.states)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lora_kernels.triton_group_forward.default, given, test_utils=checks)
    _, hs, words = group_operators.group_forward(*given)
    for parts in ((i.x, i.weights, hs), (None, i.weights, hs), (i.x, [], hs), (i.x, i.weights, [])):
        x, weights, kept = parts
        due = (i.dys, x, weights, i.lora_as, i.lora_bs, i.biases, kept, list(case.scalings[:3]), case.p, words)
        torch.library.opcheck(torch.ops.lora_kernels.triton_group_backward.default, due, test_utils=checks)


def operators_of_triton() -> Any:
    from lora_kernels.dispatch import select

    return operators_of(select("cpu", torch.bfloat16, "triton"))
