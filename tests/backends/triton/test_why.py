"""What is explained is what runs: the plan, its launches, its numbers. Every way that is passed over has a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import Case, make
from lora_kernels import explain, use_backend
from lora_kernels.backends.triton.choose import ranking, tuned, why
from lora_kernels.backends.triton.choose.blocks import INTERPRETER, Machine
from lora_kernels.backends.triton.choose.candidates import candidates, in_order, predicted_seconds
from lora_kernels.backends.triton.choose.launching import Launching
from lora_kernels.backends.triton.choose.plans import DIRECTIONS, DTYPES, GLUON_PLANS, Cell
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES
from lora_kernels.benchmark.roofline import MACHINES
from lora_kernels.dispatch import Problem
from lora_kernels.explaining.report import PassPlan
from made_tables import CELL, DEVICE, FEW, H200, VERSIONS, row, write

GPU = torch.device("cuda", 0)
SMALL = replace(H200, shared_memory=49152)
DESCRIBED = {f"sm_{arch}": machine for arch, machine in ARCHITECTURES.items()}
DESCRIBED |= {name: machine.gpu for name, machine in MACHINES.items() if machine.gpu is not None}
DESCRIBED |= {"small": SMALL, "interpreter": INTERPRETER}
CELLS = [  # any three of their features meet in every way, and any five without the rank
    Cell(direction, tokens, k, n, (8, 100, 200)[(i + j + number) % 3], dtype, dropout)
    for direction in DIRECTIONS
    for i, tokens in enumerate((1, 16, 32, 2048, 8192))
    for j, (k, n) in enumerate(((4096, 4096), (4096, 1024), (700, 333)))
    for number, dtype in enumerate(DTYPES)
    for dropout in (False, True)
]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``table(*rows)``: what an H200 loads of them, its device being ``GPU``."""
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "identify", lambda device: DEVICE if device.type == "cuda" else None)
    monkeypatch.setattr(tuned, "running_versions", lambda: VERSIONS)
    tuned.forget()
    ranking.forget()

    def written(*rows: Any) -> tuned.Loaded:
        write(tmp_path / "tuned", *rows)
        return tuned.of(GPU)

    yield written
    tuned.forget()
    ranking.forget()


def told(cell: Cell, found: tuned.Loaded | None = None, machine: Machine = H200) -> PassPlan:
    return why.pass_plan(machine, cell, found or tuned.Loaded(), "made up", why.reads_by_descriptor(cell))


@pytest.fixture(scope="module", params=DESCRIBED)
def described(request: pytest.FixtureRequest) -> tuple[Machine, list[PassPlan]]:
    """A machine, and what it is told of every one of ``CELLS``: once, for all tests of these."""
    machine = DESCRIBED[request.param]
    return machine, [told(cell, machine=machine) for cell in CELLS]


# The plan that is explained is the one that is taken


def test_the_explained_plan_is_the_one_that_is_taken(described: tuple[Machine, list[PassPlan]]) -> None:
    (machine, plans), device = described, torch.device("cpu")  # for which there is no table
    explained = [plan.plan for plan in plans]
    assert explained == [str(ranking.plan_for(device, machine, cell, why.reads_by_descriptor(cell))) for cell in CELLS]


@pytest.mark.parametrize("cell", [CELL, replace(CELL, tokens=4096), replace(CELL, tokens=32768), FEW], ids=str)
def test_a_measured_plan_is_explained_where_it_is_taken(cell: Cell, table: Callable[..., tuned.Loaded]) -> None:
    found = table(row(place=3), row(FEW, "few_tokens"))
    assert told(cell, found).plan == str(ranking.plan_for(GPU, H200, cell))


@pytest.mark.parametrize(("k", "n"), [(64, 48), (63, 48), (64, 31), (68, 40), (4, 8)])
def test_alignment_is_what_the_operators_go_by(
    triton_device: str, k: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kernels import lora_linear
    from lora_kernels.backends.triton import operators

    i, asked, choose = make(Case(m=32, k=k, n=n), triton_device), [], ranking.plans_for
    operators.forget()

    def spied(device: torch.device, machine: Machine, cell: Cell, descriptors: bool, launching: Launching) -> Any:
        asked.append((cell, descriptors))
        return choose(device, machine, cell, descriptors, launching)

    monkeypatch.setattr(ranking, "plans_for", spied)
    lora_linear(i.x, i.weight, i.lora_a, i.lora_b, backend="triton").backward(i.dy)
    assert [cell.direction for cell, _ in dict.fromkeys(asked)] == list(DIRECTIONS)
    assert all(descriptors == why.reads_by_descriptor(cell) for cell, descriptors in asked)


def test_a_transposed_weight_is_not_read_by_descriptor() -> None:
    (forward, backward) = why.plans(H200, "made up", tuned.Loaded(), (8192, 4096, 4096, 16), "bfloat16", False, True)
    for plan in (forward, backward):
        (persistent,) = [other for other in plan.passed_over if "persistent" in other.plan]
        assert "stored (K, N)" in persistent.why
        assert "persistent" not in plan.plan


# Its launches and bytes


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("m", [1, 16, 17, 40, 70])
def test_the_launches_are_those_that_run(triton_device: str, m: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels import lora_linear
    from test_triton_kernels import count_launches

    case = Case(m=m, k=64, n=48, r=5, dtype=torch.float32, bias=False, p=p)
    i = make(case, triton_device)
    problem = Problem(triton_device, case.dtype, case.k, case.n, case.r, p)
    launched = count_launches(monkeypatch)
    counts = []
    with use_backend("triton"):
        plans = explain(problem, m).plans
        y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, None, case.scaling, dropout_p=p, training=True)
        counts.append(len(launched))
        y.backward(i.dy)
    counts.append(len(launched) - counts[0])
    of_library = [sum("library" in launch.what for launch in plan.launches) for plan in plans]
    assert [len(plan.launches) for plan in plans] == [a + b for a, b in zip(counts, of_library, strict=True)]


def test_every_plan_s_launches_are_as_many_as_it_says(described: tuple[Machine, list[PassPlan]]) -> None:
    machine, _ = described
    for cell in [cell for cell in CELLS if cell.tokens >= 2048]:
        for plan in candidates(machine, cell):
            drawn = cell.dropout and cell.direction == "forward" and not isinstance(plan, GLUON_PLANS)
            assert len(why.launches(cell, plan)) == plan.launches + drawn
            assert all(launch.bytes > 0 for launch in why.launches(cell, plan))


def test_bytes_are_those_of_the_model() -> None:
    (hidden, begun, base), c = (
        why.launches(CELL, next(p for p in candidates(H200, CELL) if p.kind == "lora_first")),
        CELL,
    )
    assert hidden.bytes == 2 * c.tokens * c.k + 4 * c.r * c.k + 4 * c.tokens * c.r
    assert begun.bytes == 2 * c.tokens * c.n + 4 * c.tokens * c.r
    assert base.bytes == 2 * (c.tokens * c.k + c.n * c.k + 2 * c.tokens * c.n)


# Why not another


def test_every_other_way_is_slower_or_has_a_reason(described: tuple[Machine, list[PassPlan]]) -> None:
    machine, plans = described
    for cell, plan in zip(CELLS, plans, strict=True):
        order = in_order(machine, cell, None, why.reads_by_descriptor(cell))
        there = {why.way_of(other) for other in order}
        own = why.way_of(order[0])
        assert {other.plan for other in plan.passed_over} == set(why.WAYS[cell.direction]) - {own}
        for other in plan.passed_over:
            timed = other.plan in there and not machine.interpreter
            assert (other.slower is not None) == timed, (cell, other)
            assert other.slower is None or other.slower >= 0
            assert other.why.endswith(".")


@pytest.mark.parametrize(
    ("machine", "changes", "way", "words"),
    [
        (H200, {}, "few_tokens", "up to 16 tokens"),
        (H200, {"tokens": 32}, "few_tokens", "up to 16 tokens"),
        (H200, {"tokens": 16, "r": 200}, "few_tokens", "ranks up to 128"),
        (ARCHITECTURES[80], {}, "fused persistent", "capability 9.0; this is 8.0"),
        (H200, {"dtype": "float32"}, "fused persistent", "16-bit dtypes, and this is float32"),
        (H200, {"r": 129}, "hopper", "rank 129 is not from 1 to 128"),
        (H200, {"n": 4100}, "hopper_inside", "not both multiples of 8"),
        (H200, {"dropout": True}, "hopper_inside", "there is dropout"),
        (ARCHITECTURES[100], {}, "hopper", "compute capability 9.0 and this GPU has 10.0"),
        (ARCHITECTURES[80], {"direction": "backward"}, "dx_hopper", "compute capability 9.0 and this GPU has 8.0"),
        (ARCHITECTURES[100], {"dtype": "float16"}, "fused persistent", "tensor memory"),
        (H200, {"k": 4097}, "fused persistent", "K = 4097 of 2 bytes is not"),
        (H200, {"direction": "backward", "n": 4097}, "dx_fused persistent", "K = 4096 or N = 4097"),
        (SMALL, {}, "fused persistent", "49152 bytes of shared memory"),
        (INTERPRETER, {}, "hopper", "interpreter does not run Gluon"),
    ],
)
def test_a_way_that_does_not_run_is_told_why(machine: Machine, changes: dict[str, Any], way: str, words: str) -> None:
    (other,) = [other for other in told(replace(CELL, **changes), machine=machine).passed_over if other.plan == way]
    assert words in other.why


def test_the_runner_up_is_the_next_and_by_how_much() -> None:
    plan, (first, second) = told(CELL), candidates(H200, CELL)[:2]
    slower = predicted_seconds(H200, CELL, second) / predicted_seconds(H200, CELL, first) - 1.0
    assert plan.runner_up is not None
    assert (plan.runner_up.plan, plan.runner_up.slower) == (str(second), slower)
    assert plan.us == 1e6 * predicted_seconds(H200, CELL, first)


# Measured


def test_a_row_of_the_size_itself(table: Callable[..., tuned.Loaded]) -> None:
    plan = told(CELL, table(row(place=3)))
    assert (plan.basis, plan.us) == ("measured", 391.5)
    for words in ("391.5 µs", "1.03 of the frozen", "NVIDIA H200", "2026-11-24", "torch 2.11.0+cu130", "triton 3.6.0"):
        assert words in plan.why
    assert plan.runner_up is not None
    assert plan.runner_up.plan == "base_first"
    assert plan.runner_up.slower == 1.11 / 1.0296 - 1.0
    assert [other.why.partition(" ")[0] for other in plan.passed_over if other.plan == "base_first"] == ["measured"]


def test_a_neighbour_s_row_is_told_by_its_bucket(table: Callable[..., tuned.Loaded]) -> None:
    plan = told(replace(CELL, tokens=4096), table(row()))
    assert plan.basis == "neighbour"
    assert "for up to 8192 tokens, the nearest size" in plan.why
    assert plan.us != 391.5


def test_rows_that_do_not_count_are_told(table: Callable[..., tuned.Loaded]) -> None:
    plan = told(CELL, table(row(triton="3.5.0")))
    assert plan.basis == "predicted"
    assert any("Triton 3.5 ran when they were measured" in note for note in plan.notes)


def test_a_measured_plan_that_does_not_fit_is_told(table: Callable[..., tuned.Loaded]) -> None:
    plan = told(CELL, table(row()), SMALL)
    assert plan.basis == "predicted"
    assert any("does not fit this machine" in note for note in plan.notes)


def test_a_kind_that_was_quicker_among_many_is_no_contradiction(table: Callable[..., tuned.Loaded]) -> None:
    plan = told(CELL, table(row(kinds={"fused": 1.0296, "lora_first": 1.0290})))
    assert plan.runner_up is not None
    assert "0.058 % faster, but not when it was timed again" in plan.runner_up.why


# For people, for programs, and for a log


def test_text_and_json() -> None:
    plan = told(CELL)
    assert json.loads(json.dumps(plan.to_json()))["bytes"] == plan.bytes == sum(x.bytes for x in plan.launches)
    for words in (plan.plan, "predicted: ", "2 launches, ", "runner-up: ", "passed over:", "few_tokens: it serves"):
        assert words in str(plan)


def test_sizes_between_powers_of_2_say_whose_numbers_they_are() -> None:
    forward, _ = why.plans(H200, "made up", tuned.Loaded(), (5000, 4096, 4096, 16), "bfloat16", False)
    assert "these numbers are for 8192 tokens" in forward.notes[-1]


def test_the_variable_tells_a_choice_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ranking.forget()
    ranking.plan_for(torch.device("cpu"), H200, CELL)
    assert capsys.readouterr().err == ""
    ranking.forget()
    monkeypatch.setenv("LORA_KERNELS_EXPLAIN", "1")
    for _ in range(3):
        ranking.plan_for(torch.device("cpu"), H200, CELL)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora_kernels: {CELL}: {candidates(H200, CELL)[0]} (")
    ranking.forget()


def test_the_shipped_table_of_a_machine_is_found_by_its_name() -> None:
    found = tuned.shipped_for("h100", 90, 132)
    assert found is not None
    assert found.name.startswith("NVIDIA H100")
    assert tuned.shipped_for("h100", 90, 114) is None
    assert tuned.shipped_for("h1", 90, 132) is None
