"""What the benchmark does for a GPU, as far as it can be told without one: presets, parts, predictions, captures."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.backends.triton.choose import candidates
from lora_kernels.backends.triton.choose.plans import Cell
from lora_kernels.benchmark import capture, device, prediction, results, roofline, runner, timing
from lora_kernels.benchmark.gpu_presets import RANKS, SHAPES, TOKENS
from lora_kernels.benchmark.presets import preset
from lora_kernels.benchmark.providers import FLOOR, PROVIDERS, make_setups
from lora_kernels.benchmark.workloads import Workload
from lora_kernels.cli import main
from lora_kernels.errors import InvalidArgumentError
from made_results import STEP, made_cell, result_of

FORWARD = replace(STEP, direction="forward")
TARGETS = [
    *[("forward", 8192, *shape, 16, p) for shape in SHAPES for p in (0.0, 0.1)],
    *[("forward", m, 4096, 4096, 16, 0.0) for m in (1, 2, 4, 8, 16)],
]


def key(w: Workload) -> tuple[Any, ...]:
    return w.direction, w.tokens, w.in_features, w.out_features, w.r, w.p


# The presets


def test_the_forward_grid_is_whole_and_begins_with_the_targets() -> None:
    cells = [key(w) for w in preset("gpu-forward").workloads]
    grid = {("forward", m, k, n, r, p) for m in TOKENS for k, n in SHAPES for r in RANKS for p in (0.0, 0.1)}
    assert set(cells) == grid
    assert len(cells) == len(grid) == 480
    assert cells[: len(TARGETS)] == TARGETS
    assert [c[4] for c in cells] == sorted((c[4] for c in cells), key=RANKS.index)


def test_compiled_rivals_go_layer_by_layer() -> None:
    layers = [key(w)[2:] for w in preset("gpu-compile").workloads]
    changes = sum(a != b for a, b in pairwise(layers))
    assert changes + 1 == len(set(layers)) == 40


@pytest.mark.parametrize("name", ["gpu-quick", "gpu-forward", "gpu-step", "gpu-backward"])
def test_the_cells_that_matter_most_come_first(name: str) -> None:
    first = preset(name).workloads[:10]
    assert {(w.tokens, w.r) for w in first} == {(8192, 16)}
    assert {w.dtype for w in preset(name).workloads} == {"bfloat16"}


# A run in parts


def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A preset of three cells that take no time, run on the floor and one rival."""
    monkeypatch.setattr(roofline, "measure_machine", lambda device, dtypes: roofline.MACHINES["h200"])
    cells = tuple(replace(FORWARD, tokens=m) for m in (1, 2, 3))
    return replace(preset("smoke"), workloads=cells, peers=("addmm",), budget=0.0, min_rounds=1)


def test_a_run_stops_at_its_limit_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = small(monkeypatch)
    ran: list[int] = []
    made = runner.run_cell

    def counted(workload: Workload, *arguments: Any) -> results.Cell:
        ran.append(workload.tokens)
        return made(workload, *arguments)

    monkeypatch.setattr(runner, "run_cell", counted)
    kept: list[int] = []
    keep = lambda result: kept.append(len(result.cells))  # noqa: E731
    first = runner.run_preset(chosen, "2026-01-01", "cpu", keep=keep, limit=0.0)
    assert (ran, kept, first.planned) == ([], [0], 3)
    part = replace(first, cells=[made_cell(chosen.workloads[1], addmm=1.5)])
    whole = runner.run_preset(chosen, "2026-01-01", "cpu", earlier=part.cells)
    assert ran == [1, 3]
    assert sorted(cell.workload.tokens for cell in whole.cells) == [1, 2, 3]
    assert next(c for c in whole.cells if c.workload.tokens == 2) is part.cells[0]


@pytest.mark.parametrize("change", ["preset", "seed", "peers", "source", "versions"])
def test_only_the_same_run_is_resumed(change: str, tmp_path: Path) -> None:
    result = result_of(made_cell(addmm=1.5))
    result.save(tmp_path / "a.json")
    asked = {"preset": result.preset, "seed": result.seed, "peers": list(result.titles)}
    now = dict(result.environment)

    def resumed() -> int:
        return len(results.continued(tmp_path / "a.json", asked["preset"], now, asked["seed"], asked["peers"]))

    assert resumed() == 1
    (asked if change in asked else now)[change] = "another"
    with pytest.raises(InvalidArgumentError, match=change):
        resumed()


def test_a_file_that_is_not_there_yet_is_begun(tmp_path: Path) -> None:
    assert results.continued(tmp_path / "none.json", "smoke", {}, 0, []) == []


def test_the_command_goes_on_where_its_file_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["bench", "--preset", "smoke", "--only", "direction=forward", "--peers", "addmm", "--device", "cpu"]
    call += ["--budget", "0", "--json", str(tmp_path / "a.json"), "--resume"]
    assert main([*call, "--limit", "0"]) == 0
    assert "0 of 2 cells are done" in capsys.readouterr().out
    assert main(call) == 0
    assert "cells are done" not in capsys.readouterr().out
    assert len(results.load(tmp_path / "a.json").cells) == 2


@pytest.mark.parametrize("arguments", [["--resume"], ["--show", "/nowhere/a.json"]])
def test_an_option_without_its_file_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# Predictions


@pytest.mark.parametrize("workload", preset("gpu-forward").workloads[::29], ids=str)
def test_our_prediction_is_the_one_by_which_plans_are_ranked(workload: Workload) -> None:
    machine = roofline.MACHINES["h200"]
    cell = Cell(*key(workload)[:5], workload.dtype, workload.p > 0)
    best = candidates.predicted_seconds(machine.gpu, cell, candidates.candidates(machine.gpu, cell)[0])
    found = roofline.cost("triton", workload, machine)
    assert found is not None
    assert found.seconds == best


@pytest.mark.parametrize("workload", preset("gpu-step").workloads[::61], ids=str)
def test_a_step_is_predicted_as_both_its_passes_plans(workload: Workload) -> None:
    machine = roofline.MACHINES["h200"]
    passes = [Cell(d, *key(workload)[1:5], workload.dtype, workload.p > 0) for d in ("forward", "backward")]
    seconds = [
        candidates.predicted_seconds(machine.gpu, cell, candidates.candidates(machine.gpu, cell)[0]) for cell in passes
    ]
    step, alone = (roofline.cost("triton", replace(workload, direction=d), machine) for d in ("step", "backward"))
    assert step is not None
    assert alone is not None
    assert (step.seconds, alone.seconds) == (sum(seconds), seconds[1])


@pytest.mark.usefixtures("without_nvrtc")  # with it, few tokens take less than the frozen layer
@pytest.mark.parametrize("name", ["gpu-forward", "gpu-step"])
def test_every_cell_of_the_grid_is_predicted_for_every_provider(name: str) -> None:
    chosen = preset(name)
    providers = runner.expand_peers(chosen.peers)
    found = prediction.predict_preset(chosen, roofline.MACHINES["h200"], providers, "2026-01-01")
    assert len(found.cells) == len(chosen.workloads)
    ratios = [entry.predicted["ratio"] for cell in found.cells for entry in cell.providers.values()]
    assert len(ratios) == len(found.cells) * len(providers)
    assert min(ratios) == 1.0
    assert all(cell.providers[FLOOR].predicted["ratio"] == 1.0 for cell in found.cells)


def test_a_prediction_is_written_told_as_such_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, figure = str(tmp_path / "p.json"), tmp_path / "p.png"
    only = ["--only", "r=16", "tokens=8192"]
    assert main(["bench", "--preset", "gpu-forward", "--predict", "h200", *only, "--json", file]) == 0
    assert "Predicted, not measured." in capsys.readouterr().out
    assert results.load(file).predicted
    assert main(["bench", "--show", file, "--plot", str(figure)]) == 0
    assert "Predicted, not measured." in capsys.readouterr().out
    assert figure.stat().st_size > 0


# What is timed


def test_input_sets_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    l2 = 60 * 2**20
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=l2))
    for workload in preset("gpu-forward").workloads:
        one = 2 * workload.in_features * (workload.tokens + workload.out_features)
        sets = runner._sets(workload, "cuda")
        assert sets * one >= 2 * l2
        assert sets == 1 or (sets - 1) * one < 3 * l2
        assert sets * one < 4 * 2**30


@pytest.mark.parametrize("lost", [False, True])
def test_what_breaks_in_the_clock_costs_one_provider_or_with_the_device_one_cell(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([None, RuntimeError("unspecified launch failure")] if lost else [None, None])

    def synchronize() -> None:
        if error := next(calls):
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    setup: Any = SimpleNamespace(device=torch.device("cuda"), workload=FORWARD)
    fine = timing.Candidate("addmm", lambda i: i)
    assert runner._runs_on_every_set(fine, [setup]) is None
    breaks = replace(fine, run=lambda i: [][i])
    if lost:
        with pytest.raises(device.DeviceLostError, match=r"addmm_.*unspecified launch failure"):
            runner._runs_on_every_set(breaks, [setup])
    else:
        failed = runner._runs_on_every_set(breaks, [setup])
        assert failed is not None
        assert (failed.status, "IndexError" in (failed.reason or "")) == ("failed", True)


def test_a_lost_device_ends_the_run_and_leaves_the_cell_out(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = small(monkeypatch)
    kept: list[int] = []

    def broken(workload: Workload, *arguments: Any) -> results.Cell:
        raise device.DeviceLostError("gone")

    monkeypatch.setattr(runner, "run_cell", broken)
    result: list[results.Result] = []
    with pytest.raises(device.DeviceLostError):
        runner.run_preset(chosen, "2026-01-01", "cpu", keep=lambda r: (kept.append(len(r.cells)), result.append(r))[0])
    assert kept == [0, 1]
    assert result[-1].cells[0].left_out == "gone"


class Timer:
    """Stands in for ``timing._Timer``; ``seconds`` is None where no graph can be taken."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.asked = seconds, 0

    def capture(self, inner: int) -> float | None:
        self.asked += 1
        return self.seconds


@pytest.mark.parametrize(
    ("floor", "rival", "expected", "asked"),
    [(1.0, 2.0, {"f": 1.0, "r": 2.0}, 1), (1.0, None, {"f": 1.0}, 1), (None, 2.0, {}, 0)],
)
def test_no_graph_is_compared_with_a_floor_that_has_none(
    floor: float | None, rival: float | None, expected: dict[str, float], asked: int
) -> None:
    timers = {"r": Timer(rival), "f": Timer(floor)}
    assert timing._captured(timers, "f", 8) == expected  # type: ignore[arg-type]
    assert timers["r"].asked == asked


class Graph:
    """Stands in for ``torch.cuda.CUDAGraph``; ``fails``: what ends the capture finds it broken."""

    def __init__(self, events: list[str], fails: bool) -> None:
        self.events, self.fails = events, fails

    def capture_begin(self, **options: Any) -> None:
        self.events.append(f"begin {sorted(options)}")

    def capture_end(self) -> None:
        self.events.append("end")
        if self.fails:
            raise RuntimeError("capture is invalid")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``capture`` calls of torch.cuda, noted down; ``start(fails)`` before the capture."""
    events: list[str] = []

    @contextmanager
    def stream(stream: Any) -> Iterator[None]:
        events.append("enter")
        try:
            yield
        finally:
            events.append("leave")

    generator = SimpleNamespace(
        initial_seed=lambda: 7, graphsafe_set_state=lambda state: events.append(f"state {state}")
    )
    fresh = SimpleNamespace(manual_seed=lambda seed: SimpleNamespace(graphsafe_get_state=lambda: f"of {seed}"))
    monkeypatch.setattr(capture, "_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch, "Generator", lambda device: fresh)

    def start(fails: bool) -> list[str]:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(events, fails))
        return events

    return start


def test_a_capture_runs_the_work_between_begin_and_end(cuda: Any) -> None:
    events = cuda(fails=False)
    capture.capture(lambda: events.append("work"), pool=(0, 1))
    assert events == ["enter", "begin ['capture_error_mode', 'pool']", "work", "end", "leave"]


@pytest.mark.parametrize("where", ["work", "end"])
def test_a_failed_capture_gives_back_stream_and_generator(cuda: Any, where: str) -> None:
    events = cuda(fails=where == "end")
    with pytest.raises(RuntimeError):
        capture.capture(lambda: (_ for _ in ()).throw(RuntimeError("work")) if where == "work" else None)
    assert events[-3:] == ["end", "state of 7", "leave"]


def test_the_gpu_s_state_comes_from_the_driver_s_program_where_nvml_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    answer = subprocess.CompletedProcess([], 0, stdout="1980, 350.5, 41\n", stderr="")
    monkeypatch.setattr(device.subprocess, "run", lambda *arguments, **options: answer)
    assert device.gpu_state() == {"sm_mhz": 1980.0, "watts": 350.5, "celsius": 41.0}
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert device.gpu_state() == {}


# Rivals


def test_one_compilation_serves_all_sets_and_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compile_(call, backend=backend))
    counts = []
    for tokens in (64, 4, 512, 1):
        layers = [PROVIDERS["compile"].build(s) for s in make_setups(replace(FORWARD, tokens=tokens), "cpu", 3)]
        work = runner.candidate("compile", layers, make_setups(replace(FORWARD, tokens=tokens), "cpu", 3))
        with work.context():
            for i in range(3):
                work.run(i)
        counts.append(len(compiled))
    assert counts == [1, 1, 1, 2]  # M = 1 is a case of its own to any compiler
