"""A choice that knows how it is launched: by figures of an H100, in the model, and in the run that is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import measured_h100
from lora_kernels.backends.triton.choose import candidates, ranking, tuned, why
from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.backends.triton.choose.group_plans import Apart, DxHopperGroup
from lora_kernels.backends.triton.choose.launching import GRAPH, PREPARED, PYTHON, WAYS_TO_LAUNCH, Launching
from lora_kernels.backends.triton.choose.plans import BaseFirst, Cell, Plan
from lora_kernels.backends.triton.choose.table import Row, Timed
from lora_kernels.backends.triton.run import chosen
from lora_kernels.benchmark.roofline import MACHINES
from made_tables import CELL, row_of

pytestmark = pytest.mark.usefixtures("without_nvrtc")  # what was measured, or is told, had no such plan

_FOUND = MACHINES["h100"].gpu
assert _FOUND is not None
H100: Machine = _FOUND
HOST: dict[str, float] = json.loads((measured_h100.FOLDER / "host.json").read_text())["us"]
GPU = torch.device("cuda", 0)
BACKWARD = replace(CELL, direction="backward")
FLOORS = {Cell(**c["cell"]): c["floor"]["us"] for c in measured_h100._read("tune.json")["cells"]}
MEASURED: dict[Cell, dict[Plan, float]] = {}
for _cell, _plan, _ratio in measured_h100.plain():
    MEASURED.setdefault(_cell, {})[_plan] = _ratio


def row_of_measured(cell: Cell) -> Row:
    """What the tuner stores of these figures; the host's are the model's."""
    ratios = MEASURED[cell]
    best = min(ratios, key=ratios.__getitem__)
    row = row_of(cell, best, timed=tuple(Timed(plan, ratio) for plan, ratio in ratios.items()))
    return replace(row, floor_us=FLOORS[cell], us=ratios[best] * FLOORS[cell], ratio=ratios[best])


def beside(plan: Any) -> bool:
    return bool(getattr(plan, "beside", False))


# The model of the host


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("layer, one launch by Python", PYTHON.host(1, False)),
        ("layer, a second stream by Python", PYTHON.host(3, True)),
        ("two launches and their memory in one C++ operator", PREPARED.host(2, False) - PREPARED.layer),
    ],
)
def test_the_host_s_time_is_that_of_an_h100(name: str, seconds: float) -> None:
    assert seconds == pytest.approx(1e-6 * HOST[name], rel=0.1)


def test_each_member_apart_is_a_call() -> None:
    """And their dx are summed; a group's kernels are one call."""
    group = replace(BACKWARD, others=((1024, 16), (1024, 16)))
    apart, members = candidates.host_seconds(H100, group, Apart(), PREPARED), 0.0
    for member in group.members:
        plan = candidates.candidates(H100, member, PREPARED)[0]
        members += candidates.host_seconds(H100, member, plan, PREPARED) - PREPARED.layer
    assert apart == pytest.approx(PREPARED.layer + members + 2 * PREPARED.launch)
    kernels = next(plan for plan in candidates.candidates(H100, group) if isinstance(plan, DxHopperGroup))
    assert candidates.host_seconds(H100, group, kernels, PREPARED) < apart


def test_a_mask_that_forward_draws_is_a_launch() -> None:
    plan = next(plan for plan in candidates.candidates(H100, CELL) if isinstance(plan, BaseFirst))
    without, masked = (candidates.host_seconds(H100, replace(CELL, dropout=p), plan, PYTHON) for p in (False, True))
    assert masked - without == pytest.approx(PYTHON.launch)


# By measured figures


@pytest.mark.parametrize("launching", WAYS_TO_LAUNCH.values(), ids=WAYS_TO_LAUNCH)
@pytest.mark.parametrize("cell", MEASURED, ids=str)
def test_what_was_measured_is_chosen_by_how_it_is_launched(cell: Cell, launching: Launching) -> None:
    """Nothing measured costs 1 % less; and outside of graphs a second stream saves the device more than it costs."""
    row = row_of_measured(cell)
    taken = candidates.of_row(H100, cell, row, launching)
    if launching is GRAPH:
        assert taken == row.plan
        return
    device = {plan: 1e-6 * ratio * FLOORS[cell] for plan, ratio in MEASURED[cell].items()}
    host = {plan: candidates.host_seconds(H100, cell, plan, launching) for plan in device}
    costs = {p: max(device[p] + (launching.second_stream if beside(p) else 0.0), host[p]) for p in device}
    assert costs[taken] <= 1.01 * min(costs.values())
    one = min(seconds for plan, seconds in device.items() if not beside(plan))
    assert not beside(taken) or one - device[taken] > launching.second_stream


def test_few_tokens_fork_in_graphs_alone() -> None:
    """The table of before took a second stream at M = 1 ... 16, which cost the host 104 µs a call."""
    few = [cell for cell in MEASURED if cell.tokens <= 16]
    assert len(few) == 5
    for cell in few:
        row = row_of_measured(cell)
        kinds = [candidates.of_row(H100, cell, row, way) for way in (GRAPH, PREPARED, PYTHON)]
        assert [(plan.kind, beside(plan)) for plan in kinds] == [("base_first", True), *[("few_tokens", False)] * 2]


def test_the_host_s_own_figures_count() -> None:
    """Measured for a way to launch they take the model's place, and only there."""
    quick, slow = (plan for plan in candidates.candidates(H100, replace(CELL, tokens=64))[:2])
    cell = replace(CELL, tokens=64)
    timed = (Timed(quick, 1.5, {"prepared": 90.0}), Timed(slow, 1.51, {"prepared": 9.0}))
    row = replace(row_of(cell, quick, timed=timed), floor_us=16.0)
    assert candidates.of_row(H100, cell, row, PREPARED) == slow
    assert candidates.of_row(H100, cell, row, GRAPH) == quick
    untold = replace(row, timed=tuple(replace(one, host_us={}) for one in timed))
    assert candidates.of_row(H100, cell, untold, PREPARED) == quick


@pytest.mark.parametrize(("us", "forks"), [(20.0, False), (300.0, False), (20000.0, True)])
def test_a_row_of_before_the_figures_forks_where_the_model_says_so(us: float, forks: bool) -> None:
    """It has no figure of the same kernels on one stream: the model's ratio of the two stands for it."""
    plan = next(p for p in candidates.candidates(H100, BACKWARD, GRAPH) if p.beside)
    row = row_of(BACKWARD, plan, us)
    taken = candidates.of_row(H100, BACKWARD, row, PYTHON)
    assert taken == replace(plan, beside=forks)
    assert candidates.of_row(H100, BACKWARD, row, GRAPH) == plan


def test_in_a_graph_what_was_measured_there_is_taken_whatever_the_model_holds() -> None:
    cell = replace(BACKWARD, tokens=64)
    seconds = {plan: candidates.predicted_seconds(H100, cell, plan) for plan in candidates.candidates(H100, cell)}
    plan = next(p for p in seconds if p.beside and seconds[candidates.on_one_stream(p)] < 0.98 * seconds[p])
    assert candidates.of_row(H100, cell, row_of(cell, plan), GRAPH) == plan


def test_a_neighbour_s_device_time_grows_with_the_tokens() -> None:
    """8192 tokens for 16384: what saves 3 µs of 5 there saves 6 here."""
    plan = next(p for p in candidates.candidates(H100, BACKWARD, GRAPH) if p.beside)
    one = candidates.on_one_stream(plan)
    row = replace(row_of(BACKWARD, plan, timed=(Timed(plan, 1.0), Timed(one, 1.01))), floor_us=300.0, ratio=1.0)
    sharp = Launching("sharp", second_stream=4e-6)
    here, there = (candidates.of_row(H100, replace(BACKWARD, tokens=t), row, sharp) for t in (8192, 16384))
    assert (here, there) == (plan, plan)  # 1 % is the clock's noise
    row = replace(row, timed=(Timed(plan, 1.0), Timed(one, 1.012)), floor_us=100.0)
    here, there = (candidates.of_row(H100, replace(BACKWARD, tokens=t), row, sharp) for t in (8192, 65536))
    assert (here, there) == (one, plan)


# By the model

FORKS = {GRAPH: (512, 1024, 2048, 4096, 8192, 16384), PREPARED: (2048, 4096, 8192, 16384), PYTHON: ()}


@pytest.mark.parametrize("launching", FORKS, ids=lambda way: way.name)
def test_from_which_size_on_the_model_forks(launching: Launching) -> None:
    """4096 -> 4096, M = 1 ... 16384: forward never; backward where what dx hides is more than the host pays."""
    sizes = [2**i for i in range(15)]
    forks = [m for m in sizes if beside(candidates.candidates(H100, replace(BACKWARD, tokens=m), launching)[0])]
    assert tuple(m for m in forks if m >= 512) == FORKS[launching]
    assert launching is GRAPH or forks == list(FORKS[launching])
    if launching is not GRAPH:
        assert not any(beside(candidates.candidates(H100, replace(CELL, tokens=m), launching)[0]) for m in sizes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_first_of_each_order_costs_least(direction: str) -> None:
    for tokens in (1, 16, 64, 512, 2048, 16384):
        cell = replace(CELL, direction=direction, tokens=tokens)
        for launching in WAYS_TO_LAUNCH.values():
            first, *others = candidates.candidates(H100, cell, launching)
            cost = candidates.order(H100, cell, first, launching)
            assert all(cost <= candidates.order(H100, cell, plan, launching) for plan in others)
            assert cost >= candidates.predicted_seconds(H100, cell, first)


def test_it_is_explained() -> None:
    few = why.pass_plan(H100, replace(CELL, tokens=64), tuned.Loaded(), "an H100", launching=PYTHON)
    assert any("The host takes longer than the device" in note and "by Python" in note for note in few.notes)
    told = why.pass_plan(H100, replace(BACKWARD, tokens=1024), tuned.Loaded(), "an H100", launching=PREPARED)
    assert any("captured graph" in note and "second stream" in note for note in told.notes)
    plan = next(p for p in candidates.candidates(H100, BACKWARD, GRAPH) if p.beside)
    table = tuned.Loaded(rows={BACKWARD: row_of(BACKWARD, plan)})
    told = why.pass_plan(H100, BACKWARD, table, "an H100", launching=PYTHON)
    assert (told.basis, told.plan) == ("measured", str(replace(plan, beside=False)))
    assert any("measured with a second stream" in note for note in told.notes)


# The run that is kept


@dataclass
class Call:
    """What a choice is made for, of a GPU that is not here."""

    asked: Cell
    machine: Machine = H100
    device: torch.device = GPU

    def cell(self, direction: str) -> Cell:
        return replace(self.asked, direction=direction)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``first(cell, launcher, fails)``: the kept run's answers outside of a capture and in it, and what was tried."""
    state = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(chosen, "make_pools", lambda index: None)
    monkeypatch.setattr(tuned, "identify", lambda device: None)

    def made(cell: Cell, launcher: bool = True, fails: Any = None, capturing: bool = False) -> Any:
        monkeypatch.setattr(chosen, "library", lambda: object() if launcher else None)
        tried: list[Plan] = []

        def make(plan: Plan) -> Callable[[], Plan]:
            return lambda: plan

        def attempt(run: Callable[[], Plan]) -> Plan:
            tried.append(run())
            if fails is not None and len(tried) == 2:
                raise fails
            return run()

        state["capturing"] = capturing
        run, result = chosen.first_run(
            Call(cell),
            cell.direction,
            lambda launching: ranking.plans_for(GPU, H100, cell, True, launching),
            make,
            attempt,
        )
        answers = []
        for state["capturing"] in (False, True):
            answers.append(run())
        state["capturing"] = False
        assert result == answers[0]
        return answers[0], answers[1], tried

    tuned.forget()
    ranking.forget()
    yield made
    tuned.forget()
    ranking.forget()


def test_a_graph_forks_with_the_same_kernels(first: Callable[..., Any]) -> None:
    """Nothing else is compiled for it, nor run."""
    eager, captured, tried = first(replace(BACKWARD, tokens=4096, dropout=True), launcher=False)
    assert (beside(eager), beside(captured)) == (False, True)
    assert replace(captured, beside=False) == eager
    assert tried == [eager]


def test_a_graph_s_own_kernels_run_once_before_it(first: Callable[..., Any]) -> None:
    cell = replace(CELL, tokens=64)
    eager, captured, tried = first(cell)
    assert tried == [eager, captured]
    assert captured == candidates.candidates(H100, cell, GRAPH)[0]
    assert eager.launches < captured.launches


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("PassManager failed")])
def test_what_cannot_be_had_for_graphs_harms_nobody(first: Callable[..., Any], error: Exception) -> None:
    eager, captured, tried = first(replace(CELL, tokens=64), fails=error)
    assert captured == eager
    assert len(tried) >= 2


def test_a_first_call_within_a_capture_makes_nothing_more(first: Callable[..., Any]) -> None:
    eager, captured, tried = first(replace(CELL, tokens=64), capturing=True)
    assert (captured, tried) == (eager, [eager])


def test_where_both_agree_there_is_one_run(first: Callable[..., Any]) -> None:
    eager, captured, tried = first(CELL)
    assert (captured, tried) == (eager, [eager])
