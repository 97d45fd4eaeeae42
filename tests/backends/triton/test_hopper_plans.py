"""Both passes by the Gluon plans, through the operators and the layer; the device code emulated on the CPU."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, keep_mask, make, measures, run
from cases import Inputs as CaseInputs
from emulated_hopper import EMULATED, run_launch
from lora_kernels import FusedLoRALinear, lora_linear, use_backend
from lora_kernels.backends.triton.choose import blocks as all_blocks
from lora_kernels.backends.triton.choose import hopper_blocks as blocks
from lora_kernels.backends.triton.choose import ranking
from lora_kernels.backends.triton.choose.blocks import INTERPRETER, Machine
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.hidden_operand import hidden_operand
from lora_kernels.backends.triton.choose.plans import Cell, DxHopper, DxInside, Hopper, HopperInside
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.kept import row_words
from lora_kernels.tuning import passes
from lora_kernels.tuning.passes import Inputs, pass_of
from numerics import check_all, same_bits, three_ways

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.run import descriptors, hopper, hopper_backward, streams
from lora_kernels.backends.triton.run.prepared import Launch
from test_hopper import Memory

MACHINE = Machine(capability=90, sm_count=4, shared_memory=blocks.SHARED_MEMORY)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYER = Case(m=200, k=264, n=328, r=16, dtype=BF16, adapter_dtype=FP32)
CASES = [
    LAYER,
    replace(LAYER, p=0.1),
    *[replace(LAYER, r=r, p=p, m=129) for r in (1, 17, 64, 128) for p in (0.0, 0.5)],
    *[replace(LAYER, m=m, p=p) for m in (1, 65) for p in (0.0, 0.1)],
    *[replace(LAYER, n=n, k=k, p=p) for n, k in ((8, 264), (520, 256), (264, 8), (600, 520)) for p in (0.0, 0.1)],
    *[replace(LAYER, dtype=FP16, r=r, p=p) for r in (5, 64) for p in (0.0, 0.1)],
    replace(LAYER, adapter_dtype=BF16, bias=False, scaling=-2.0, p=0.1),
    replace(LAYER, x_layout="rows", p=0.1, r=3),
    replace(LAYER, x_layout="rows", k=512, n=600),
    replace(LAYER, p=1e-6),
    replace(LAYER, p=0.99),
]
GLUON = {name.removeprefix("hopper_").removesuffix("_kernel") for name in EMULATED}
FORWARD = ("hopper", "hopper_small", "hopper_plain", "hopper_inside")
BACKWARD = ("dx_hopper", "dx_inside")


def forward_plan(name: str, case: Case) -> Hopper | HopperInside | None:
    """The plan of that name for the case; None where it has no such plan."""
    operand, wide = hidden_operand(case.dtype, case.r), case.dtype is FP16
    assert operand is not None
    shrinks, big, small = blocks.shrink_configs(operand.rank, wide), *blocks.forward_configs()
    if name in ("hopper", "hopper_small"):
        return Hopper(shrinks[0], big) if name == "hopper" else Hopper(shrinks[-1], small)
    if case.p > 1e-4 or wide:
        return None
    if name == "hopper_plain":
        plain = blocks.plain_shrink_configs(operand.rank)[0]
        return Hopper(plain, small) if plain.takes(case.k) else None
    inside = blocks.product_h_configs(operand.rank)[0]
    return HopperInside(inside) if inside.takes(case.n, case.k) else None


def backward_plan(name: str, case: Case, beside: bool = False) -> DxHopper | DxInside | None:
    operand, wide = hidden_operand(case.dtype, case.r), case.dtype is FP16
    assert operand is not None
    rank, masked = operand.rank, case.p > 0
    outer = blocks.outer_configs(rank, masked, wide)[0]
    if name == "dx_hopper":
        dx = next(config for config in blocks.dx_configs(masked) if config.takes(case.n))
        return DxHopper(blocks.dh_db_configs(rank, wide)[0], dx, outer, beside)
    if case.p > 1e-4 or wide:
        return None
    inside = blocks.product_h_configs(rank)[0]
    db = blocks.outer_configs(rank, False, wide)[0]
    return DxInside(inside, db, outer, beside) if inside.takes(case.k, case.n) else None


@dataclass
class Launches:
    """What was launched: the kernels' names, and streams; ``fault`` may raise in the place of one."""

    names: list[str] = field(default_factory=list)
    streams: list[int | None] = field(default_factory=list)
    read: list[weakref.ref[Any]] = field(default_factory=list)
    fault: Callable[[str], None] = lambda name: None


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """A machine of compute capability 9.0, the Gluon kernels emulated on guarded memory; the others are interpreted."""
    found = Memory()
    monkeypatch.setattr(all_blocks, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(hopper, "_new", found.new)
    descriptors.forget()
    operators.forget()
    yield found
    descriptors.forget()
    operators.forget()
    found.check()


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, memory: Memory) -> Launches:
    found, interpreted, describe = Launches(), Launch.__call__, hopper.descriptor

    def launch(self: Launch, stream: int | None, *arguments: Any) -> None:
        name = getattr(self.kernel, "fn", self.kernel).__name__
        found.fault(name)
        found.names.append(name.removeprefix("hopper_").removesuffix("_kernel"))
        found.streams.append(stream)
        found.read += [weakref.ref(argument) for argument in arguments if isinstance(argument, Tensor)]
        (run_launch if name in EMULATED else interpreted)(self, stream, *arguments)

    def descriptor(tensor: Tensor, block: tuple[int, int]) -> Any:
        found.read.append(weakref.ref(tensor))
        return describe(tensor, block)

    monkeypatch.setattr(Launch, "__call__", launch)
    monkeypatch.setattr(hopper, "descriptor", descriptor)
    return found


def plan_by(monkeypatch: pytest.MonkeyPatch, *plans: Any) -> None:
    """The operators choose these, in this order, each for its pass."""

    @cache
    def plans_for(device: torch.device, machine: Machine, cell: Cell, *how: Any) -> tuple[Any, ...]:
        passes = (DxHopper, DxInside) if cell.direction == "backward" else (Hopper, HopperInside)
        own = tuple(plan for plan in plans if isinstance(plan, passes))
        return own + candidates(INTERPRETER, replace(cell, tokens=min(cell.tokens, 256)))

    monkeypatch.setattr(ranking, "plans_for", plans_for)
    operators.forget()


def judge(found: dict[str, Any], case: Case, i: CaseInputs) -> None:
    """By the policy, what is there; and something is."""
    exact, yardstick, errors = measures(case, i, keep_mask(case, i, "triton"))
    there = {name: value for name, value in found.items() if value is not None}
    assert there
    check_all(there, *({name: m[name] for name in there} for m in (exact, yardstick)), case.dtype, expected=errors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of plans, through the public function and autograd; no other plan runs."""
    i = make(case)
    for first, second in itertools.zip_longest(FORWARD, BACKWARD, fillvalue=BACKWARD[0]):
        plans = forward_plan(first, case), backward_plan(second, case)
        if plans[0] is None:
            continue
        plan_by(monkeypatch, plans[0], plans[1] or backward_plan(BACKWARD[0], case))
        launches.names.clear()
        judge(run(case, i, "triton"), case, i)
        assert set(launches.names) <= GLUON | {"draw", "mask"}


DUE = [due for due in itertools.product((True, False), repeat=4) if any(due)]


@pytest.mark.parametrize("due", DUE, ids=str)
@pytest.mark.parametrize(("name", "p"), [("dx_hopper", 0.0), ("dx_hopper", 0.1), ("dx_inside", 0.0)])
def test_what_is_due(name: str, p: float, due: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each set of dx, da, db and dbias."""
    case = replace(LAYER, m=70, p=p)
    i = make(case)
    plan_by(monkeypatch, forward_plan("hopper", case), backward_plan(name, case))
    leaves = dict(zip(("dx", "da", "db", "dbias"), (i.x, i.lora_a, i.lora_b, i.bias), strict=True))
    for leaf, wanted in zip(leaves.values(), due, strict=True):
        assert leaf is not None
        leaf.requires_grad_(wanted)
    torch.manual_seed(1)
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, case.p, case.p > 0, "triton")
    names = [name for name, wanted in zip(leaves, due, strict=True) if wanted]
    wanted = [leaves[name] for name in names]
    judge(dict(zip(names, torch.autograd.grad(y, wanted, i.dy), strict=True)), case, i)  # type: ignore[arg-type]


# ---- in which order, and on which stream

MAIN, HIGH = 3, 4
PACKED = replace(LAYER, p=0.1)
ORDERS: list[tuple[Case, str, bool, list[str]]] = [
    (LAYER, "dx_hopper", False, ["pack", "dh_db", "reduce_dh", "product", "outer", "reduce_grads"]),
    (LAYER, "dx_hopper", True, ["pack", "dh_db", "reduce_dh", "product*", "outer", "reduce_grads"]),
    (PACKED, "dx_hopper", True, ["draw", "pack", "dh_db", "reduce_dh", "product*", "outer", "reduce_grads"]),
    (LAYER, "dx_inside", False, ["pack", "product_h", "outer", "outer", "reduce_grads"]),
    (LAYER, "dx_inside", True, ["pack", "product_h*", "outer", "outer", "reduce_grads"]),
]


def given(case: Case, i: CaseInputs, need_x: bool = True, need_a: bool = True, need_b: bool = True) -> tuple[Any, ...]:
    """``run_backward``'s arguments after the plan, with h as the Gluon forward leaves it."""
    x, weight, a, b = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b))
    state = torch.tensor([5, 6]) if case.p else None
    plan = forward_plan("hopper", case)
    assert plan is not None
    _, h = operators.run_plan(plan, x, weight, a, b, None, case.scaling, case.p, state)
    due = x if need_a else None, weight if need_x else None
    return (i.dy, *due, a, b, i.bias, h if need_b else None, case.scaling, case.p, state)


@pytest.fixture
def beside(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two streams: the large piece's launches, and then the others'; whatever the first reads is there at the join."""
    noted: list[str] = []

    def ahead_on(device: torch.device, beside: bool) -> streams.Together:
        def ahead(stream: int | None, large: streams.Large, small: streams.Small) -> tuple[Any, Any]:
            noted.append("beside")
            launches.read.clear()
            left = large(HIGH)
            read = list(launches.read)
            right = small(MAIN)
            assert read
            assert all(found() is not None for found in read), "memory was freed that the other stream still reads"
            return left, right

        return ahead if beside else streams.in_turn

    monkeypatch.setattr(hopper_backward, "ahead_on", ahead_on)
    return noted


@pytest.mark.parametrize(("case", "name", "two", "order"), ORDERS)
def test_the_order_of_launches(
    case: Case, name: str, two: bool, order: list[str], launches: Launches, beside: list[str]
) -> None:
    """As measured: "*" marks the stream of high priority; and a plan's launches are as many as it says."""
    i, plan = make(case), backward_plan(name, case, two)
    assert plan is not None
    arguments = given(case, i)
    launches.names.clear()
    launches.streams.clear()
    operators.run_backward(plan, *arguments)
    starred = [name + "*" * (s == HIGH) for name, s in zip(launches.names, launches.streams, strict=True)]
    assert starred == order
    assert len([name for name in order if name != "draw"]) == plan.launches
    assert bool(beside) == two


@pytest.mark.parametrize("name", FORWARD)
def test_forward_has_as_many_launches_as_its_plan_says(name: str, launches: Launches) -> None:
    case = replace(LAYER, k=512)
    plan = forward_plan(name, case)
    assert plan is not None
    i = make(case)
    operators.run_plan(plan, *(t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b)), None, case.scaling, 0.0, None)
    assert len(launches.names) == plan.launches


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("due", [due for due in DUE if due[3]], ids=str)
def test_neither_branch_needs_what_the_other_makes(
    name: str, due: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small pieces first gives the same bits; there are two streams where there are two branches."""
    case = replace(LAYER, m=70)
    i, noted = make(case), []

    def ahead_on(device: torch.device, beside: bool) -> streams.Together:
        def ahead(stream: int | None, large: streams.Large, small: streams.Small) -> tuple[Any, Any]:
            noted.append("beside")
            right = small(stream)
            return large(stream), right

        return ahead if beside else streams.in_turn

    plans = [backward_plan(name, case, two) for two in (False, True)]
    arguments = given(case, i, *due[:3])
    expected = operators.run_backward(plans[0], *arguments)  # type: ignore[arg-type]
    monkeypatch.setattr(hopper_backward, "ahead_on", ahead_on)
    found = operators.run_backward(plans[1], *arguments)  # type: ignore[arg-type]
    assert [result is not None for result in found] == list(due)
    assert all(a is None if b is None else same_bits(a, b) for a, b in zip(expected, found, strict=True))
    assert bool(noted) == (due[0] and (name == "dx_hopper" or due[2]))


# ---- what the plans do not take


REFUSED: list[tuple[Case, Any, str]] = [
    (replace(LAYER, r=17), forward_plan("hopper", LAYER), "ranks that are filled up to 16, and rank 17 is to 32"),
    (PACKED, forward_plan("hopper_inside", replace(LAYER, n=600)), "draws or reads no mask, and dropout is 0.1"),
    (PACKED, backward_plan("dx_inside", LAYER), "draws or reads no mask, and dropout is 0.1"),
    (PACKED, backward_plan("dx_hopper", LAYER), "draws or reads no mask, and dropout is 0.1"),
    (replace(LAYER, dtype=FP16), backward_plan("dx_inside", LAYER), "is for torch.bfloat16"),
    (replace(LAYER, n=256), forward_plan("hopper_inside", LAYER), "out_features 256 is too small"),
    (replace(LAYER, k=256), backward_plan("dx_inside", LAYER), "in_features 256 or"),
    (LAYER, forward_plan("hopper_plain", replace(LAYER, k=512)), "in_features 264 is no multiple of 128"),
    (replace(PACKED, n=64), backward_plan("dx_hopper", PACKED), "out_features 64 is too small for its masked product"),
    (LAYER, Hopper(blocks.shrink_configs(16)[0], blocks.dx_configs(True)[0]), "takes no mask"),
    (replace(LAYER, k=268), forward_plan("hopper", LAYER), "not both multiples of 8"),
    (replace(LAYER, dtype=FP32), forward_plan("hopper", LAYER), "for torch.bfloat16 and torch.float16"),
    (replace(LAYER, x_layout="transposed"), forward_plan("hopper", LAYER), "TMA cannot read one of x"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "plan", "sentence"), REFUSED)
def test_what_a_plan_does_not_take_is_told(case: Case, plan: Any, sentence: str) -> None:
    i, state = make(case), torch.tensor([5, 6]) if case.p else None
    tensors = [t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b)]
    with pytest.raises(InvalidArgumentError, match=sentence):
        by_plan(plan, case, i.dy, tensors, state)


def by_plan(plan: Any, case: Case, dy: Tensor, tensors: list[Tensor], state: Tensor | None) -> Any:
    if isinstance(plan, (Hopper, HopperInside)):
        return operators.run_plan(plan, *tensors, None, case.scaling, case.p, state)
    return operators.run_backward(plan, dy, *tensors, None, None, case.scaling, case.p, state)


def off_by_a_number(t: Tensor) -> Tensor:
    """The same values, 2 bytes behind a 16-byte boundary."""
    return torch.cat([t.new_zeros(1), t.detach().flatten()])[1:].view(t.shape).requires_grad_(t.requires_grad)


def both(case: Case) -> tuple[Any, Any]:
    return forward_plan("hopper", case), backward_plan("dx_hopper", case)


@pytest.mark.parametrize("which", ["", "x", "weight", "lora_a", "lora_b", "bias", "dy"])
def test_what_tma_cannot_read_goes_by_another_plan(
    which: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapters and the bias are read by pointers, wherever they are; and either pass may go by a plain plan."""
    case = replace(LAYER, m=40, k=72, n=64)
    plan_by(monkeypatch, *both(case))
    i = make(case)
    i = replace(i, **({which: off_by_a_number(getattr(i, which))} if which else {}))
    leaves = [i.x, i.lora_a, i.lora_b, i.bias]
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, backend="triton")
    by_gluon = ["pack" in launches.names]
    launches.names.clear()
    found = torch.autograd.grad(y, leaves, i.dy)  # type: ignore[arg-type]
    by_gluon.append("pack" in launches.names)
    assert by_gluon == [which not in ("x", "weight"), which not in ("x", "weight", "dy")]
    judge({"y": y.detach(), **dict(zip(("dx", "da", "db", "dbias"), found, strict=True))}, case, i)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("gluon", [0, 1], ids=["forward", "backward"])
def test_one_pass_by_gluon(gluon: int, p: float, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain kernels write and read the same h and the same words."""
    case = replace(LAYER, m=40, k=72, n=64, p=p)
    plan_by(monkeypatch, both(case)[gluon])
    judge(run(case, i := make(case), "triton"), case, i)
    assert launches.names.count("pack") == 1


REFUSALS = [
    ("product_h", RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")),
    ("product_h", RuntimeError("Triton Error [CUDA]: operation not supported")),
    ("product_h", RuntimeError("Triton Error [CUDA]: too many resources requested for launch")),
    ("pack", RuntimeError("Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument")),
    ("pack", OutOfResources(9, 1, "shared memory")),
    ("pack", PTXASError("ptxas failed")),
    ("pack", CompilationError(None, None, "this Gluon differs")),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "error"), REFUSALS, ids=str)
def test_a_launch_that_is_refused_gives_way(
    kernel: str, error: Exception, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the next plan, which is kept: what was refused is tried once."""
    case, tried = replace(LAYER, m=9, n=600), []

    def fault(name: str) -> None:
        if name == f"hopper_{kernel}_kernel":
            tried.append(name)
            raise error

    launches.fault = fault
    inside = forward_plan("hopper_inside", case)
    plan_by(monkeypatch, inside, *(() if kernel == "pack" else (forward_plan("hopper", case),)))
    i = make(case)
    for _ in range(2):
        launches.names.clear()
        with torch.no_grad():
            y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, backend="triton")
        judge({"y": y}, case, i)
    assert ("product" in launches.names) == (kernel != "pack")
    assert len(tried) == 1


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("no")], ids=str)
def test_what_is_no_refusal_is_raised(error: Exception, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(name: str) -> None:
        raise error

    launches.fault = fault
    plan_by(monkeypatch, *both(LAYER))
    i = make(LAYER)
    with pytest.raises(type(error), match=str(error)):
        lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, LAYER.scaling, backend="triton")


# ---- the layer


def layer_of(case: Case, i: CaseInputs) -> FusedLoRALinear:
    layer = FusedLoRALinear(
        case.k, case.n, r=case.r, lora_alpha=case.scaling * case.r, lora_dropout=case.p, dtype=case.dtype,
        device=i.x.device,
    )  # fmt: skip
    with torch.no_grad():
        for name, value in (("weight", i.weight), ("bias", i.bias), ("lora_A", i.lora_a), ("lora_B", i.lora_b)):
            layer.get_parameter(name).copy_(value)  # type: ignore[arg-type]
    layer.bias.requires_grad_(True)
    return layer


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_layer(p: float, checkpointed: bool, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, of three dimensions; recomputed under a checkpoint with the same mask."""
    from torch.utils.checkpoint import checkpoint

    case = replace(LAYER, p=p)
    plan_by(monkeypatch, *both(case))
    i = make(case)
    layer, x = layer_of(case, i), i.x.detach().view(2, -1, case.k).requires_grad_()
    torch.manual_seed(1)
    with use_backend("triton"):
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        leaves = (x, layer.lora_A, layer.lora_B, layer.bias)
        dx, da, db, dbias = torch.autograd.grad(y, leaves, i.dy.view(y.shape))
    found = {"y": y.detach().flatten(0, 1), "dx": dx.flatten(0, 1), "da": da, "db": db, "dbias": dbias}
    assert "dh_db" in launches.names
    judge(found, case, i)


def test_of_s_zero_the_adapter_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(LAYER, p=0.1)
    plan_by(monkeypatch, *both(case))
    i = make(case)
    torch.manual_seed(1)
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, None, 0.0, case.p, True, "triton")
    dx, da, db = torch.autograd.grad(y, (i.x, i.lora_a, i.lora_b), i.dy)
    assert not bool(da.any() or db.any())
    judge({"y": y.detach(), "dx": dx}, replace(case, zeroed="lora_b"), replace(i, bias=None, lora_b=0 * i.lora_b))


def test_double_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where x is not kept, s h comes from the operand: db's own gradient by dy is s h."""
    plan_by(monkeypatch, *both(LAYER))
    i = make(LAYER)
    dy = i.dy.clone().requires_grad_()
    y = lora_linear(i.x.detach(), i.weight, i.lora_a.detach(), i.lora_b, None, LAYER.scaling, backend="triton")
    (db,) = torch.autograd.grad(y, i.lora_b, dy, create_graph=True)
    (by_dy,) = torch.autograd.grad(db, dy, torch.ones_like(db))
    a, x = i.lora_a.detach(), i.x.detach()
    ones = torch.ones(LAYER.r, 1)
    exact, yardstick, errors = three_ways(
        BF16, lambda number: {"by_dy": (LAYER.scaling * (number(x) @ number(a).t())) @ number(ones)}
    )
    check_all({"by_dy": by_dy[:, :1]}, exact, yardstick, BF16, expected=errors)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_tuner_judges_them(direction: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """h by what the operand stands for, whichever plan wrote it; and a wrong factor is seen."""
    monkeypatch.setattr(passes, "machine_of", lambda device: MACHINE)
    case = replace(LAYER, m=128, p=p)
    i = make(replace(case, p=0.0))
    inputs = Inputs(i.x.detach(), i.weight, i.lora_a.detach(), i.lora_b.detach(), i.dy)
    cell = Cell(direction, case.m, case.k, case.n, case.r, "bfloat16", p > 0)
    plan = backward_plan("dx_hopper", case) if direction == "backward" else forward_plan("hopper", case)
    judged = pass_of(cell, [inputs], case.scaling)
    results = judged.run(plan, 0)  # type: ignore[arg-type]
    assert judged.wrong(results) is None
    assert judged.wrong((results[0], 1.1 * results[1], *results[2:])) is not None
    if isinstance(judged, passes.BackwardPass) and p:  # so narrow a layer keeps the mask: the pass does not draw it
        assert judged.kept is not None
        assert judged.kept.shape == (case.m, row_words(case.k))
