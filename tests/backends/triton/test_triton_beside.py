"""A second stream: how it is forked and joined, and that no plan lets one branch need what the other makes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, make
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose.blocks import INTERPRETER
from lora_kernels.backends.triton.choose.candidates import candidates, predicted_seconds
from lora_kernels.backends.triton.choose.plans import GLUON_PLANS, BaseFirst, Cell
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES
from lora_kernels.backends.triton.run import backward, forward, streams
from test_triton_backward import judge as judge_backward
from test_triton_plans import cell_of
from test_triton_plans import judge as judge_forward

BF16 = torch.bfloat16


def noting(monkeypatch: pytest.MonkeyPatch, done: list[str]) -> None:
    """Streams that only note."""

    class Stream:
        def __init__(self, index: int, priority: int = 0, name: str = "", number: int = 5) -> None:
            self.name, self.cuda_stream = name or ("high" if priority < 0 else "side"), number + priority

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} waits for {other.name}")

    main = Stream(0, name="main", number=3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: main)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: done.append(f"kept for {stream.name}"))
    monkeypatch.setattr(streams, "_streams", {})


def test_it_is_forked_and_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small pieces begin after what was launched before, and what follows waits for both branches."""
    done: list[str] = []
    noting(monkeypatch, done)

    def piece(name: str) -> Callable[[int | None], Tensor]:
        return lambda stream: (done.append(f"{name} on {stream}"), torch.zeros(1))[1]

    beside = streams.together_on(torch.device("cuda", 0), True)
    large, small = beside(3, piece("dx"), lambda stream: (piece("da")(stream), None))
    assert done == ["side waits for main", "da on 5", "dx on 3", "main waits for side", "kept for main"]
    assert isinstance(large, Tensor)
    assert small[1] is None
    assert streams.together_on(torch.device("cuda", 0), False) is streams.in_turn
    assert streams.together_on(torch.device("cpu"), True) is streams.in_turn


def test_the_large_piece_goes_first_and_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of high priority; what is allocated meanwhile is the current stream's, so nothing is kept for it."""
    done: list[str] = []
    noting(monkeypatch, done)

    def piece(name: str) -> Callable[[int | None], Tensor]:
        return lambda stream: (done.append(f"{name} on {stream}"), torch.zeros(1))[1]

    ahead = streams.ahead_on(torch.device("cuda", 0), True)
    ahead(3, piece("dx"), piece("da"))
    assert done == ["high waits for main", "dx on 4", "da on 3", "main waits for high"]
    assert streams.ahead_on(torch.device("cuda", 0), False) is streams.in_turn
    assert streams.ahead_on(torch.device("cpu"), True) is streams.in_turn


@pytest.mark.parametrize("way", [streams.together_on, streams.ahead_on])
@pytest.mark.parametrize("failing", ["large", "small"])
def test_a_branch_that_fails_is_joined(way: Any, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one still runs, in memory that the next plan is given."""
    done: list[str] = []
    noting(monkeypatch, done)

    def piece(name: str) -> Any:
        if name == failing:
            raise RuntimeError("no room")
        return torch.zeros(1), None

    with pytest.raises(RuntimeError, match="no room"):
        way(torch.device("cuda", 0), True)(3, lambda own: piece("large"), lambda own: piece("small"))
    assert done[-1].startswith("main waits for")


def test_each_stream_has_a_side_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that one thread captures must not take what another thread launches."""
    noting(monkeypatch, [])
    mains = [torch.cuda.Stream(0), torch.cuda.Stream(0)]
    mains[1].cuda_stream = 9
    first, again, other = (streams._stream_beside(0, main, 0) for main in (mains[0], mains[0], mains[1]))
    assert first is again
    assert first is not other
    assert streams._stream_beside(0, mains[0], -1) is not first


CASES = [
    Case(m=33, k=40, n=70, r=3, dtype=BF16, adapter_dtype=torch.float32, p=0.1),
    Case(m=40, k=24, n=72, r=16, dtype=BF16),
]


@pytest.fixture
def branches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Both branches in turn, the small one first, as their kernels may run: what it cannot need is not there yet."""
    noted: list[str] = []

    def together_on(device: torch.device, beside: bool) -> streams.Together:
        def together(stream: int | None, large: streams.Large, small: streams.Small) -> tuple[Tensor, Any]:
            noted.append("beside")
            right = small(stream)
            return large(stream), right

        return together if beside else streams.in_turn

    for module in (forward, backward):
        monkeypatch.setattr(module, "together_on", together_on)
    operators.forget()
    yield noted
    operators.forget()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_beside(case: Case, branches: list[str]) -> None:
    """Every kind of plan, against float64."""
    i = make(case, "cpu")
    ways = candidates(INTERPRETER, replace(cell_of(case), direction="backward"))
    for plan in ways:
        judge_backward(replace(plan, beside=True), case, i)
    assert len(branches) == len(ways)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_beside(case: Case, branches: list[str]) -> None:
    plan = next(plan for plan in candidates(INTERPRETER, cell_of(case)) if isinstance(plan, BaseFirst))
    judge_forward(replace(plan, beside=True), case, make(case, "cpu"))
    assert branches == ["beside"]


@pytest.mark.parametrize("due", [(True, False, False), (True, True, False), (True, False, True), (False, True, True)])
def test_there_is_one_stream_where_there_is_one_branch(due: tuple[bool, bool, bool], branches: list[str]) -> None:
    """dx alone, or no dx: nothing runs beside anything."""
    case = CASES[0]
    i, h = make(case, "cpu"), torch.zeros(case.m, case.r)
    x, weight, lora_a, lora_b = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b))
    state = torch.tensor([1, 2])
    for plan in candidates(INTERPRETER, replace(cell_of(case), direction="backward")):
        branches.clear()
        given = (x if due[1] else None, weight if due[0] else None, lora_a, lora_b, None, h if due[2] else None)
        found = operators.run_backward(replace(plan, beside=True), i.dy, *given, case.scaling, case.p, state)
        assert [result is not None for result in found[:3]] == list(due)
        rest = due[1] or (due[2] and not plan.hidden.joint)
        assert bool(branches) == (due[0] and rest)


H200 = ARCHITECTURES[90]
BACKWARD = Cell("backward", 8192, 4096, 1024, 16, "bfloat16", False)


def test_a_second_stream_is_taken_where_the_device_takes_longer_than_the_host() -> None:
    """Measured with Gluon: what dx does not wait for hides in dx's last wave; for few tokens the host would pay."""
    best = candidates(H200, BACKWARD)[0]
    assert best.beside
    assert predicted_seconds(H200, BACKWARD, best) < predicted_seconds(H200, BACKWARD, replace(best, beside=False))
    few = candidates(H200, replace(BACKWARD, tokens=64))
    assert not few[0].beside
    assert any(plan.beside for plan in few)


def test_dx_waits_for_dh_alone_where_db_can_run_beside_it() -> None:
    """Among the candidates db comes beside dx as well, though one read of dy would give dh and db."""
    found = candidates(H200, BACKWARD)
    assert {plan.hidden.joint for plan in found if plan.beside and not isinstance(plan, GLUON_PLANS)} == {True, False}
