"""The benchmark itself: what it times is right, interleaved, and written down as it was."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels.accuracy import ceiling_of
from lora_kernels.benchmark import memory, results, roofline, runner, timing
from lora_kernels.benchmark.presets import PRESETS, preset
from lora_kernels.benchmark.providers import FLOOR, PROVIDERS, Layer, Provider, Setup, make_setups
from lora_kernels.benchmark.workloads import DIRECTIONS, Workload
from lora_kernels.cli import main
from made_results import STEP

RIVALS_WITHOUT_COMPILE = ("peft", "peft16", "addmm", "lora_first")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products on one thread: what is tested here is not speed, and a busy machine must not slow it down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(workload: Workload, *names: str) -> results.Cell:
    return runner.run_cell(workload, [PROVIDERS[n] for n in (FLOOR, *names)], "cpu", budget=0.0, min_rounds=2)


# What is measured


@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "memory"])
def test_every_direction_times_the_floor_and_ours(direction: str) -> None:
    cell = run(replace(STEP, direction=direction, tokens=5), "auto")
    assert [entry.status for entry in cell.providers.values()] == ["timed", "timed"]
    assert cell.providers[FLOOR].ratio == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", [*RIVALS_WITHOUT_COMPILE, "auto", "eager"])
def test_every_provider_computes_the_same_function(name: str, p: float, dtype: str) -> None:
    pytest.importorskip("peft") if name.startswith("peft") else None
    setup = make_setups(replace(STEP, dtype=dtype, p=p, bias=True), "cpu")
    provider = replace(PROVIDERS[name], backend="eager" if name == "eager" else None)
    if name == "peft16" and dtype == "float32":
        assert provider.why_not(setup[0])
        return
    verdict = runner.gate.check(provider, provider.build(setup[0]), setup[0])
    assert verdict.failure is None
    assert set(verdict.errors) == {"y", "dx", "da", "db"}


def test_all_providers_read_one_weight() -> None:
    pytest.importorskip("peft")
    (setup,) = make_setups(STEP, "cpu")
    layers = [PROVIDERS[n].build(setup) for n in ("peft", "auto")]
    weights = [p for layer in layers for p in layer.module.parameters() if p.shape == setup.linear.weight.shape]
    assert {w.data_ptr() for w in weights} == {setup.linear.weight.data_ptr()}


def _without_adapter(setup: Setup) -> Layer:
    return Layer(lambda x: setup.linear(x), ())


def _detached_input(setup: Setup) -> Layer:
    layer = PROVIDERS["addmm"].build(setup)
    return Layer(lambda x: layer.call(x.detach()) + setup.linear(x) - setup.linear(x.detach()), layer.trainable)


@pytest.mark.parametrize("build", [_without_adapter, _detached_input])
@pytest.mark.parametrize("ours", [False, True])
def test_the_gate_stops_a_wrong_provider(build: object, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "wrong", Provider("wrong", "wrong", build, ours=ours))  # type: ignore[arg-type]
    entry = run(STEP, "wrong").providers["wrong"]
    assert (entry.status, entry.numbers) == ("failed", {})
    assert "something else" in (entry.reason or "")


def _a_little_off(setup: Setup) -> Layer:
    """Each y is off by half the ceiling for rivals: far above what the policy allows a backend of ours."""
    layer = PROVIDERS["addmm"].build(setup)
    return Layer(lambda x: layer.call(x) * (1.0 + ceiling_of(setup.dtype, depth=setup.depth) / 2), layer.trainable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ours", "status"), [(False, "timed"), (True, "failed")])
def test_our_own_backends_are_held_to_the_policy_and_rivals_to_the_ceiling(
    ours: bool, status: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "off", Provider("off", "off", _a_little_off, ours=ours))
    entry = run(replace(STEP, dtype=dtype), "off").providers["off"]
    assert entry.status == status, entry.reason
    assert ("something else" in (entry.reason or "")) == ours


def test_a_provider_that_raises_or_is_missing_is_told_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "peft" else find(n, *a))
    monkeypatch.setitem(PROVIDERS, "raises", Provider("raises", "raises", lambda setup: [][1]))
    cell = run(STEP, "peft", "raises", "addmm")
    assert [cell.providers[n].status for n in ("peft", "raises", "addmm")] == ["unavailable", "failed", "timed"]
    assert "pip install" in (cell.providers["peft"].reason or "")
    assert "IndexError" in (cell.providers["raises"].reason or "")


def test_the_interpreter_is_never_timed() -> None:
    assert run(replace(STEP, direction="forward"), "triton").providers["triton"].status == "unavailable"


def test_a_bias_that_trains_has_its_gradient_judged_and_timed() -> None:
    workload = replace(STEP, bias=True, train_bias=True)
    (setup,) = make_setups(workload, "cpu")
    layers = {name: PROVIDERS[name].build(setup) for name in ("peft", "addmm", "eager")}
    assert all(layer.trainable[2] is setup.linear.bias for layer in layers.values())
    assert set(run(workload, "addmm").providers["addmm"].errors) == {"y", "dx", "da", "db", "dbias"}


# How it is measured


def test_rounds_alternate_and_hold_every_candidate_once() -> None:
    names = ["a", "b", "c"]
    orders = timing.rounds_in_order(names, 6)
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names)
    assert orders[0] == names
    assert orders[1] == ["a", "c", "b"]


def test_candidates_are_interleaved() -> None:
    calls: list[str] = []
    candidates = [timing.Candidate(n, lambda i, n=n: calls.append(n)) for n in "abc"]  # type: ignore[misc]
    measured = timing.measure(candidates, "a", budget=0.0, min_rounds=6)
    inner = measured["a"].inner
    blocks = calls[-6 * 3 * inner :][::inner]
    assert blocks == [n for order in timing.rounds_in_order(list("abc"), 6) for n in order]
    assert len(set(Counter(calls).values())) == 1


def test_the_ratio_is_taken_within_the_round() -> None:
    summary = timing._summary([2.0, 20.0, 200.0], [1.0, 10.0, 100.0], 1, "host")
    assert (summary.ratio, summary.ratio_p20, summary.ratio_p80) == (2.0, 2.0, 2.0)
    assert (summary.median, summary.difference) == (20.0, 10.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [3, 96])
def test_bytes_kept_with_dropout_are_x_h_parameters_and_a_seed(tokens: int, dtype: str) -> None:
    workload = replace(STEP, direction="memory", tokens=tokens, dtype=dtype, p=0.1, bias=True)
    (setup,) = make_setups(workload, "cpu")
    layer = PROVIDERS["eager"].build(setup)
    kept = memory.bytes_kept(layer, setup)
    h_bytes, seed_bytes = tokens * workload.r * setup.dtype.itemsize, 16
    assert kept.x == setup.x.nbytes
    assert kept.parameters == setup.linear.weight.nbytes + sum(t.nbytes for t in layer.trainable)
    assert kept.rest == h_bytes + seed_bytes
    assert sorted(kept.tensors) == sorted([f"{workload.dtype}[{tokens}, {workload.r}]", "int64[2]"])


def test_the_peak_of_a_step_holds_at_least_its_results() -> None:
    (setup,) = make_setups(replace(STEP, direction="memory"), "cpu")
    layer = PROVIDERS["eager"].build(setup)
    assert memory.peak_of_step(layer, setup) >= setup.x.nbytes + sum(t.nbytes for t in layer.trainable)


# The model of the machine


@pytest.mark.parametrize(
    ("provider", "p", "units"), [("peft16", 0.0, 16), ("peft16", 0.1, 21), ("addmm", 0.0, 8), ("addmm", 0.1, 13)]
)
def test_the_traffic_is_that_of_the_headroom_model(provider: str, p: float, units: int) -> None:
    """In a square layer, everything but the base products moves ``units`` times the bytes of x, and the adapters."""
    workload = Workload("step", 8192, 4096, 4096, 16, "bfloat16", p=p)
    work = roofline.kernels(provider, workload) or []
    assert round(sum(k.bytes for k in work if k.name != "base") / (8192 * 4096 * 2)) == units


@pytest.mark.parametrize("name", ["peft", "peft16", "compile", "addmm", "lora_first", "triton", "native"])
def test_no_provider_is_predicted_to_beat_the_floor(name: str) -> None:
    workload = Workload("step", 8192, 4096, 4096, 16, "bfloat16", p=0.1)
    own, floor = (roofline.cost(n, workload, roofline.MACHINES["h200"]) for n in (name, FLOOR))
    assert own is not None
    assert floor is not None
    assert own.seconds > floor.seconds


def test_overheads_have_no_prediction() -> None:
    assert roofline.kernels("peft", Workload("overhead", 1, 64, 64, 16)) is None


# The command


def test_the_command_writes_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = [
        "--preset",
        "smoke",
        "--dtype",
        "bfloat16",
        "--peers",
        "addmm,ours",
        "--device",
        "cpu",
        "--budget",
        "0",
    ]
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(["bench", *arguments, *files]) == 0
    result = results.load(tmp_path / "r.json")
    assert len(result.cells) == sum(w.dtype == "bfloat16" for w in PRESETS["smoke"].workloads)
    assert (tmp_path / "r.png").stat().st_size > 0
    assert "nn.Linear" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "none"],
        ["--peers", "none"],
        ["--dtype", "int8"],
        ["--only", "r=3"],
        ["--only", "rank=16"],
        ["--json", "/nowhere/at/all.json"],
        ["--preset", "overhead", "--plot", "x.png"],
    ],
)
def test_a_bad_argument_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "gpu-llama", "--predict", "h200"], "--predict was given, and preset 'gpu-llama'"),
        (["--preset", "gpu-block", "--dtype", "float32"], "--dtype was given, and preset 'gpu-block'"),
        (["--preset", "llama-small", "--limit", "0"], "--limit was given, and preset 'llama-small'"),
        (["--preset", "llama-small", "--resume"], "--resume was given, and preset 'llama-small'"),
        (["--preset", "llama-small", "--block", "hidden=64"], "--block was given, and preset 'llama-small'"),
        (["--preset", "smoke", "--model", "Qwen2.5-7B"], "--model was given, and preset 'smoke'"),
        (["--preset", "smoke", "--budget", "-1"], "--budget -1 was given: it must be seconds, 0 or more"),
        (["--preset", "smoke", "--limit", "nan"], "--limit nan was given: it must be seconds"),
        (["--preset", "gpu-lama"], "gpu-block, gpu-llama, llama-small"),
    ],
)
def test_what_a_preset_would_pass_over_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_preset_without_a_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--preset", "gpu-forward"]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_providers_that_exist(name: str) -> None:
    assert runner.expand_peers(preset(name).peers)[0].name == FLOOR
    assert len(set(preset(name).workloads)) == len(preset(name).workloads)
