"""The tuner's decisions, on a clock that is made up: what is tried, what wins, what is stored, when it stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.backends.triton.choose.candidates import candidates, predicted_seconds
from lora_kernels.backends.triton.choose.plans import Cell
from lora_kernels.backends.triton.choose.table import Row, TableError, _rounded, read, versions_of
from lora_kernels.tuning import report, search, session
from lora_kernels.tuning.search import (
    CONFIRMATION,
    STAGES,
    NothingToStoreError,
    Refusal,
    beats,
    shortlist,
)
from lora_kernels.tuning.session import Outcome
from made_tables import CELL, CELLS, DEVICE, FEW, H200, KINDS, VERSIONS, FakeBench, FakeTrial, row, timing, write

pytestmark = pytest.mark.usefixtures("without_nvrtc")  # what was measured, or is told, had no such plan

A100 = Machine(capability=80, sm_count=108, shared_memory=166912)
NO_ROOM = Refusal("does not run", "It raised OutOfResources: shared memory, Required: 300000")
WRONG = Refusal("is wrong", "y FAILS: error 1.0e+00")


# What is tried


@pytest.mark.parametrize("machine", [H200, A100], ids=["h200", "a100"])
@pytest.mark.parametrize(
    "cell", [CELL, FEW, replace(CELL, r=100), replace(CELL, dtype="tf32"), replace(FEW, n=7)], ids=str
)
def test_every_flavour_is_tried_and_the_model_s_best(machine: Machine, cell: Cell) -> None:
    tried, every = shortlist(machine, cell), candidates(machine, cell)
    predicted = [predicted_seconds(machine, cell, plan) for plan in tried]
    assert {plan.kind for plan in tried} == {plan.kind for plan in every} > {"lora_first", "base_first"} - {"fused"}
    assert predicted == sorted(predicted)
    assert predicted[0] == min(predicted_seconds(machine, cell, plan) for plan in every)
    assert len(tried) <= search.CANDIDATES
    assert len(set(tried)) == len(tried)


def test_a_limit_leaves_one_of_each_flavour() -> None:
    names = ("kind", "variant", "pdl", "beside")
    flavours = [tuple(getattr(plan, name, "") for name in names) for plan in shortlist(H200, FEW, 1)]
    assert len(set(flavours)) == len(flavours)
    assert set(flavours) >= {("few_tokens", "", False, ""), ("fused", "persistent", True, "")}
    assert set(flavours) >= {("base_first", "", "", False), ("base_first", "", "", True)}


# What wins


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("place", [0, 5, -1])
def test_the_quickest_plan_wins_whatever_the_model_holds_of_it(place: int, seed: int) -> None:
    best = [plan for plan in shortlist(H200, CELL) if plan.kind == "fused"][place]
    found = search.search(H200, CELL, FakeTrial({**KINDS, best: 1.02}, noise=0.01, seed=seed))
    assert found.plan == best
    assert found.composition is not None
    assert found.composition.kind == "lora_first"
    assert found.runner_up not in (None, best)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("gain", [0.0, 0.001, 0.0025])
def test_the_composition_wins_ties(gain: float, seed: int) -> None:
    trial = FakeTrial({"fused": 1.1 - gain, "lora_first": 1.1, "base_first": 1.1}, noise=0.0005, seed=seed)
    assert search.search(H200, CELL, trial).plan.is_composition


@pytest.mark.parametrize("seed", range(10))
def test_what_the_model_prefers_is_not_stored_where_it_is_slow(seed: int) -> None:
    trial = FakeTrial({"few_tokens": 1.4, "lora_first": 1.3, "base_first": 1.1}, noise=0.02, seed=seed)
    assert candidates(H200, FEW)[0].kind == "few_tokens"
    assert search.search(H200, FEW, trial).plan.kind == "base_first"


@pytest.mark.parametrize(
    ("left", "right", "quicker"),
    [
        ([1.0] * 25, [1.01] * 25, True),
        ([1.0] * 25, [1.002] * 25, False),  # less than 0.3 %
        ([1.01] * 25, [1.0] * 25, False),
        ([1.0] * 25, [1.0] * 25, False),
        ([0.95, 1.05] * 12 + [1.0], [0.97, 1.07] * 12 + [1.02], False),  # 2 %, and 5 % of noise
        ([0.98, 1.02] * 12 + [1.0], [1.0, 1.04] * 12 + [1.02], True),  # 2 %, and 2 % of noise
        ([0.98, 1.02, 1.0], [1.0, 1.04, 1.02], False),  # the same in 3 rounds
    ],
)
def test_to_beat_is_to_be_quicker_beyond_noise(left: list[float], right: list[float], quicker: bool) -> None:
    assert beats(timing(left), timing(right)) is quicker


def test_many_rounds_are_for_the_best() -> None:
    trial = FakeTrial(KINDS, noise=0.001)
    best = [plan for plan in shortlist(H200, CELL) if plan.kind == "fused"][2]
    trial.ratios = {**KINDS, best: 1.01}
    search.search(H200, CELL, trial)
    assert [rounds for _, rounds in trial.stages] == [*STAGES, CONFIRMATION]
    counts = [len(plans) for plans, _ in trial.stages]
    assert counts[0] == len(shortlist(H200, CELL))
    assert counts[1] <= (counts[0] + 1) // 2 + 1
    assert counts[2] <= (counts[1] + 1) // 2 + 1
    assert counts[3] == 2
    assert all(best in plans and any(plan.is_composition for plan in plans) for plans, _ in trial.stages)


def test_what_is_as_good_as_the_best_stays() -> None:
    trial = FakeTrial({plan.kind: 1.0 for plan in shortlist(H200, CELL)})
    search.search(H200, CELL, trial)
    counts = [len(plans) for plans, _ in trial.stages[: len(STAGES)]]
    assert counts == [len(shortlist(H200, CELL))] * len(STAGES)


@pytest.mark.parametrize("refusal", [NO_ROOM, WRONG], ids=["no room", "wrong"])
def test_what_is_refused_is_stepped_over_and_told(refusal: Refusal) -> None:
    best, second = [plan for plan in shortlist(H200, CELL) if plan.kind == "fused"][:2]
    trial = FakeTrial({**KINDS, best: 1.0, second: 1.05}, refused={best: refusal})
    found = search.search(H200, CELL, trial)
    assert (found.plan, found.refused) == (second, {best: refusal})
    assert all(best not in plans for plans, _ in trial.stages)


def test_what_fails_under_the_clock_is_out() -> None:
    best, second = [plan for plan in shortlist(H200, CELL) if plan.kind == "fused"][:2]
    found = search.search(H200, CELL, FakeTrial({**KINDS, best: 1.0, second: 1.05}, lost=[best]))
    assert (found.plan, list(found.refused)) == (second, [best])


def test_without_a_composition_nothing_is_stored() -> None:
    compositions = {plan: NO_ROOM for plan in shortlist(H200, CELL) if plan.is_composition}
    with pytest.raises(
        NothingToStoreError, match=r"no plain composition runs there. .*OutOfResources.*Free the device"
    ):
        search.search(H200, CELL, FakeTrial({"fused": 1.0}, refused=compositions))


# A session


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "nvidia-h200.json"


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def test_every_cell_is_stored_with_what_was_measured(table: Path) -> None:
    (outcome,) = FakeBench().run([CELL], table)
    (stored,) = read(table).rows
    assert (stored.cell, stored.plan.kind) == (CELL, "fused")
    assert stored.versions == versions_of(stored.plan, VERSIONS)
    assert (stored.ratio, stored.us, stored.floor_us) == (1.08, 108.0, 100.0)
    assert stored.kinds == {"fused": 1.08, "lora_first": 1.1, "base_first": 1.15, "hopper": 1.5, "hopper_inside": 1.5}
    assert stored.predicted_us == _rounded(1e6 * predicted_seconds(H200, CELL, stored.plan))
    assert (outcome.status, outcome.seconds) == ("tuned", 10.0)


@pytest.mark.parametrize(("budget", "reached"), [(5.0, 1), (10.0, 1), (25.0, 2), (30.0, 2), (31.0, 3), (1e9, 4)])
def test_no_cell_is_begun_that_would_outlast_the_budget(budget: float, reached: int, table: Path) -> None:
    outcomes = FakeBench().run(CELLS, table, budget=budget)
    assert statuses(outcomes) == ["tuned"] * reached + ["not reached"] * (4 - reached)
    assert {stored.cell for stored in read(table).rows} == set(CELLS[:reached])


def test_a_rerun_goes_on_where_the_last_one_stopped(table: Path) -> None:
    FakeBench().run(CELLS, table, budget=25.0)
    bench = FakeBench()
    assert statuses(bench.run(CELLS, table)) == ["kept", "kept", "tuned", "tuned"]
    assert bench.opened == CELLS[2:]
    assert statuses(FakeBench().run(CELLS[:1], table, again=True)) == ["tuned"]


@pytest.mark.parametrize("package", ["torch", "triton", "lora_kernels"])
def test_other_versions_are_measured_anew(package: str, table: Path) -> None:
    FakeBench().run([CELL], table)
    bench = FakeBench()
    bench.versions = VERSIONS | {package: "99.1"}
    assert statuses(bench.run([CELL], table)) == ["tuned"]


def test_each_cell_is_on_disk_before_the_next_is_begun(table: Path) -> None:
    def interrupt(count: int) -> None:
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FakeBench(at=interrupt).run(CELLS, table)
    assert {stored.cell for stored in read(table).rows} == set(CELLS[:2])


def test_a_cell_that_fails_costs_that_cell(table: Path) -> None:
    def full(count: int) -> None:
        if not count:
            bench.opened.append(CELL)
            raise NothingToStoreError("CUDA out of memory.")

    bench = FakeBench(at=full)
    outcomes = bench.run(CELLS[:2], table)
    assert statuses(outcomes) == ["failed", "tuned"]
    assert outcomes[0].sentence == "CUDA out of memory."


def test_a_table_to_ship_gets_the_rows_that_were_there_too(table: Path, tmp_path: Path) -> None:
    FakeBench().run(CELLS[:1], table)
    shippable = write(tmp_path, row(FEW, "few_tokens"), name="to-ship")
    FakeBench().run(CELLS[:2], table, shippable)
    assert {stored.cell for stored in read(shippable).rows} == {FEW, *CELLS[:2]}


def test_another_device_s_table_is_told_before_anything_is_measured(table: Path, tmp_path: Path) -> None:
    foreign = write(tmp_path, row(), device=replace(DEVICE, name="NVIDIA H100"), name="foreign")
    bench = FakeBench()
    with pytest.raises(TableError, match="is the table of NVIDIA H100"):
        bench.run(CELLS, table, foreign)
    assert bench.opened == []


# The host's time


def test_what_takes_the_host_less_is_stored_too() -> None:
    """The front: the stored plan, and whatever saves the host what it takes the device. No luck counts."""
    hosts = {
        "fused": {"prepared": 24.0, "python": 40.0},
        "lora_first": {"prepared": 28.0, "python": 50.0},
        "few_tokens": {"prepared": 20.0, "python": 30.0},
    }
    ratios = {"fused": 1.08, "lora_first": 1.1, "few_tokens": 1.2, "base_first": 1.3}
    trial = FakeTrial(ratios, hosts=hosts)
    found = search.search(H200, FEW, trial)
    row = session._row(found, VERSIONS)
    assert row.plan.kind == "fused"
    assert [(one.plan.kind, one.ratio, one.host_us) for one in row.timed] == [
        ("fused", pytest.approx(1.08), pytest.approx(hosts["fused"])),
        ("few_tokens", pytest.approx(1.2), pytest.approx(hosts["few_tokens"])),
    ]
    assert all(one.kernels == versions_of(one.plan, VERSIONS)["kernels"] for one in row.timed)
    assert Row.from_json(row.to_json()).to_json() == row.to_json()
    (entry,) = report.outcomes_json([Outcome(FEW, "tuned", row, found)], H200)
    told = {one["plan"]["kind"]: one["host_us"] for one in entry["measured"]}
    assert told["lora_first"] == pytest.approx(hosts["lora_first"])


def test_a_composition_that_is_stored_is_not_overtaken_by_luck() -> None:
    """What was faster by less than the clock's noise counts as no faster."""
    trial = FakeTrial({"lora_first": 1.1, "fused": 1.0995}, hosts={"fused": {"python": 9.0}})
    row = session._row(search.search(H200, CELL, trial), VERSIONS)
    assert row.plan.kind == "lora_first"
    assert all(one.ratio >= row.ratio for one in row.timed)
