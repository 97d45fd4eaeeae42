"""The tuner's bench: what it admits, what it refuses and why. Plans run in Triton's interpreter, or are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import reference
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose.blocks import INTERPRETER
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.launching import WAYS_TO_LAUNCH
from lora_kernels.backends.triton.choose.plans import Cell, Plan
from lora_kernels.backends.triton.choose.table import read, running_versions
from lora_kernels.backends.triton.run import chosen, launcher
from lora_kernels.benchmark.timing import Candidate, Timing
from lora_kernels.packed_mask import unpack
from lora_kernels.tuning import bench as device_bench
from lora_kernels.tuning.bench import DeviceBench, DeviceLostError, DeviceTrial
from lora_kernels.tuning.search import NothingToStoreError
from lora_kernels.tuning.session import Options, run
from made_tables import CELL, FEW, timing

SMALL = Cell("forward", 64, 40, 48, 4, "float32", False)
PLANS = candidates(INTERPRETER, SMALL)
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="kernels are not interpreted where there is a GPU; test_tuning_device.py runs them",
)


def test_rows_name_the_kernels_that_they_were_measured_with() -> None:
    assert DeviceBench(CPU).versions == running_versions()


def clock(runs: Sequence[Candidate], floor: str, budget: float, rounds: int, *rest: Any) -> dict[str, Timing]:
    """Runs one of them; the first candidates are the quickest."""
    runs[-1].run(0)
    return {candidate.name: timing([1.0 + 0.01 * i] * rounds) for i, candidate in enumerate(runs)}


@pytest.mark.parametrize("ways", [("python",), ("prepared", "python")])
def test_the_host_is_timed_by_each_way_to_launch(ways: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the host's clock; what is made ready by Python finds no library, and all is made ready anew after."""
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(launcher, "_found", launcher._Found(object(), None))  # type: ignore[arg-type]
    monkeypatch.setattr(chosen, "launching_on", lambda device: WAYS_TO_LAUNCH[ways[0]])

    def told(runs: Sequence[Candidate], *rest: Any) -> dict[str, Timing]:
        assert rest[-1] is True  # the host's clock
        seen.append((launcher.library() is None, bool(operators._runs)))
        return clock(runs, *rest[:-1])

    with trial() as opened:
        opened._bench.clock = told
        found = opened.host(PLANS[:2])
    assert [tuple(by_way) for by_way in found.values()] == [ways, ways]
    assert [without for without, _ in seen] == [way == "python" for way in ways]
    assert launcher.library() is not None
    assert not any(kept for _, kept in seen)
    assert not operators._runs


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's masks for the interpreter's, which takes its time and no threads."""
    monkeypatch.setattr(operators, "mask", reference.philox_keep_mask)


@contextmanager
def trial(cell: Cell = SMALL, workers: int = 1) -> Iterator[DeviceTrial]:
    bench = DeviceBench(CPU, clock=clock)
    bench.workers = workers
    with bench.open(cell) as opened:
        yield opened


def right(
    plan: Plan, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: None, s: float, p: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What every plan must compute."""
    kept = None if state is None else reference.philox_keep_mask(state, *x.shape, p)
    y, h = reference.forward(x.float(), w.float(), a.float(), b.float(), None, s, kept, p)
    return y.to(x.dtype), h


@pytest.mark.parametrize(
    "cell",
    [
        replace(SMALL, tokens=16, dropout=True),
        replace(SMALL, tokens=32, dtype="float16"),
        replace(SMALL, tokens=32, direction="backward", dropout=True),
    ],
    ids=str,
)
def test_a_cell_is_tuned_end_to_end_in_the_interpreter(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    table = tmp_path / "interpreter.json"
    (outcome,) = run([cell], DeviceBench(CPU, clock=clock), Options((table,), 600.0, candidates=1))
    assert outcome.status == "tuned", outcome.sentence
    assert outcome.found.refused == {}
    assert set(outcome.found.kinds) == {plan.kind for plan in candidates(INTERPRETER, cell)}
    assert [(row.cell, row.plan) for row in read(table).rows] == [(cell, outcome.found.plan)]


def _last_column(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y[:, -1] = 0.0
    return y, h


def _one_nan(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y[0, 0] = float("nan")
    return y, h


def _noise(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return y * (1.0 + 1e-7 * torch.rand_like(y)), h


def _noise_in_h(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return y, h * (1.0 + 1e-6 * torch.rand_like(h))


FAULTS = {
    "the last column": (_last_column, "is wrong"),
    "half a percent": (lambda y, h: (0.995 * y, h), "is wrong"),
    "a NaN": (_one_nan, "is wrong"),
    "h of another time": (lambda y, h: (y, h.flip(0)), "is wrong"),
    "h without the last rank": (lambda y, h: (y, torch.cat([h[:, :-1], 0 * h[:, -1:]], 1)), "is wrong"),
    "noise in y": (_noise, "is not deterministic"),
    "noise in h": (_noise_in_h, "is not deterministic"),
}


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("cell", [SMALL, replace(SMALL, dropout=True)], ids=str)
@pytest.mark.parametrize(("fault", "why"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("workers", [1, 4])
def test_a_plan_that_is_wrong_is_refused_and_no_other(
    workers: int, fault: Callable[..., Any], why: str, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = PLANS[3]

    def run_plan(plan: Plan, *arguments: Any) -> Any:
        return fault(*right(plan, *arguments)) if plan == bad else right(plan, *arguments)

    monkeypatch.setattr(operators, "run_plan", run_plan)
    with trial(cell, workers) as opened:
        refused = opened.admit(PLANS)
    assert {plan: refusal.why for plan, refusal in refused.items()} == {bad: why}
    assert refused[bad].is_fault


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("left_out", [0, 1], ids=["y", "h"])
def test_what_a_plan_leaves_unwritten_is_seen_in_its_second_run(left_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run finds right values where it writes nothing, as after another plan's; the second what is there."""
    bad, poison = PLANS[3], list[Tensor]()
    fill = torch.full_like

    def kept(tensor: Tensor, value: float) -> Tensor:
        poison.append(fill(tensor, value))
        return poison[-1]

    def run_plan(plan: Plan, *arguments: Any) -> Any:
        results = list(right(plan, *arguments))
        if plan == bad and poison:
            unwritten = poison[left_out]
            unwritten[:, :-1] = results[left_out][:, :-1]
            results[left_out] = unwritten
        poison.clear()
        return tuple(results)

    monkeypatch.setattr(operators, "run_plan", run_plan)
    monkeypatch.setattr(torch, "full_like", kept)
    with trial() as opened:
        refused = opened.admit(PLANS)
    assert {plan: refusal.why for plan, refusal in refused.items()} == {bad: "is not deterministic"}


BACKWARD = replace(SMALL, direction="backward", dropout=True)
BACKWARD_FAULTS = {
    "dx without its last column": lambda dx, da, db: (torch.cat([dx[:, :-1], 0 * dx[:, -1:]], 1), da, db),
    "da of another rank": lambda dx, da, db: (dx, da.flip(0), db),
    "half a percent in db": lambda dx, da, db: (dx, da, 0.995 * db),
    "a NaN in dx": lambda dx, da, db: (dx.index_fill(0, torch.tensor([0]), float("nan")), da, db),
}


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("fault", BACKWARD_FAULTS.values(), ids=BACKWARD_FAULTS.keys())
def test_a_backward_plan_that_is_wrong_is_refused(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    every = candidates(INTERPRETER, BACKWARD)

    def run_backward(plan: Plan, dy: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Any:
        _, _, s, p, words = rest  # so narrow a layer keeps the words
        g = reference.backward(dy, x, w, a, b, s, unpack(words, x.shape[1]), p)
        return (*(fault if plan == every[1] else lambda *right: right)(g.dx, g.da, g.db), None)

    monkeypatch.setattr(operators, "run_backward", run_backward)
    with trial(BACKWARD) as opened:
        refused = opened.admit(every)
    assert {plan: refusal.why for plan, refusal in refused.items()} == {every[1]: "is wrong"}


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize(
    "cell", [replace(SMALL, dtype=dtype, dropout=drop) for dtype in ("float16", "bfloat16") for drop in (False, True)],
    ids=str,
)  # fmt: skip
def test_what_is_right_is_admitted_in_16_bits(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "run_plan", right)
    with trial(cell) as opened:
        assert opened.admit(PLANS) == {}


@pytest.mark.parametrize("error", [RuntimeError("out of resource: shared memory\nRequired: 9"), KeyError("acc")])
def test_what_does_not_run_is_stepped_over(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_plan(plan: Plan, *arguments: Any) -> Any:
        if plan.kind == "fused":
            raise error
        return right(plan, *arguments)

    monkeypatch.setattr(operators, "run_plan", run_plan)
    with trial() as opened:
        refused = opened.admit(PLANS)
    assert set(refused) == {plan for plan in PLANS if plan.kind == "fused"}
    assert {(refusal.is_fault, refusal.sentence) for refusal in refused.values()} == {
        (False, f"It raised {type(error).__name__}: {str(error).splitlines()[0]}")
    }


def test_what_fails_under_the_clock_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, calls = PLANS[2], []

    def run_plan(plan: Plan, *arguments: Any) -> Any:
        if plan == bad:
            calls.append(plan)
            if len(calls) > 3:  # compiled, then checked twice
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(plan, *arguments)

    monkeypatch.setattr(operators, "run_plan", run_plan)
    with trial() as opened:
        assert opened.admit(PLANS) == {}
        assert set(opened.time([*PLANS[:2], *PLANS[3:], bad], 3)) == {None, *PLANS} - {bad}


def test_a_clock_that_fails_by_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> dict[str, Timing]:
        raise ZeroDivisionError

    monkeypatch.setattr(operators, "run_plan", right)
    with DeviceBench(CPU, clock=broken).open(SMALL) as opened, pytest.raises(ZeroDivisionError):
        opened.time(PLANS, 3)


@pytest.mark.parametrize(("dtype", "inside"), [("tf32", "tf32"), ("float32", "ieee"), ("float16", "none")])
def test_fp32_products_round_as_the_cell_says_and_only_there(dtype: str, inside: str) -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with trial(replace(SMALL, dtype=dtype)):
        assert settings.fp32_precision == (before if inside == "none" else inside)
    assert settings.fp32_precision == before


def test_no_room_for_a_cell_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.\nmore")

    monkeypatch.setattr(device_bench, "make_setups", full)
    with pytest.raises(NothingToStoreError, match=r"Tried to allocate 80 GiB\. Free the device's memory"), trial():
        pass


def test_a_broken_context_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nhint")

    monkeypatch.setattr(operators, "run_plan", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with trial() as opened:
        opened._bench.device = torch.device("cuda", 0)
        with pytest.raises(DeviceLostError, match="What was tuned before is stored"):
            opened.admit(PLANS[:1])


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (CELL, 1),
        (replace(CELL, tokens=16384, n=14336), 1),
        (FEW, 4),
        (replace(FEW, n=1024), 13),
        (replace(FEW, k=64, n=64), 32),
        (replace(FEW, dtype="tf32"), 2),
    ],
    ids=str,
)
def test_the_input_sets_exceed_the_cache(cell: Cell, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 * 2**20))
    assert device_bench._sets(cell, torch.device("cuda", 0)) == expected
    assert device_bench._sets(cell, CPU) == 1


def test_the_interpreter_gets_one_thread() -> None:
    assert (DeviceBench(CPU).workers, DeviceBench(CPU, workers=8).workers) == (1, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_data_are_random_and_the_adapters_of_the_default_dtype(dtype: str) -> None:
    with trial(replace(SMALL, dtype=dtype)) as opened:
        (inputs,) = opened._sets
        assert all(
            float((t == 0).float().mean()) < 0.01 for t in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
        )
        assert inputs.x.dtype == getattr(torch, dtype)
        assert inputs.lora_a.dtype == inputs.lora_b.dtype == torch.float32
