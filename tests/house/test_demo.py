"""The worked example: what it counts, that fused and reference training agree, and that a fault parts them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import FusedLoRALinear, demo, dispatch, ops
from lora_kernels.cli import main
from lora_kernels.demo import command, experiment, training
from lora_kernels.dispatch import select

FEW = ["demo", "--seeds", "1", "--epochs", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "TIMING_ROUNDS", 3)
    monkeypatch.setattr(experiment, "TIMING_STEPS", 2)


def test_it_trains_160_parameters_in_place_of_1056() -> None:
    report = demo.run(seeds=1, epochs=1)
    assert (report.trainable, report.replaced) == (160, 1056)


def test_fused_and_reference_training_agree_over_seeds() -> None:
    report = demo.run(seeds=2, epochs=8)
    assert report.passed, [result.gap for result in report.results]
    assert [result.seed for result in report.results] == [0, 1]
    assert all(len(result.losses) == len(result.losses_reference) == 8 for result in report.results)


def test_training_learns() -> None:
    (result,) = demo.run(seeds=1, epochs=60).results
    assert result.sphere > 80.0
    assert result.losses[-1] < result.losses[0]
    assert min(result.lora, result.adapter) > result.gaussian
    assert result.adapter != result.lora


def test_only_the_second_layer_changes() -> None:
    start = training.with_lora(training.model())
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    training.train(start, training.gaussian(300, torch.Generator().manual_seed(0)), training.LORA_LR, 2, seed=0)
    changed = {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"hidden_2.lora_A", "hidden_2.lora_B", "hidden_2.bias"}
    assert isinstance(start.get_submodule("hidden_2"), FusedLoRALinear)


def scaling_dropped(right: ops.Operators) -> ops.Operators:
    return replace(right, forward=lambda x, w, a, b, bias, s, p, t: right.forward(x, w, a, b, bias, 1.0, p, t))


def permuted_gradient(right: ops.Operators) -> ops.Operators:
    def backward(*arguments: Any) -> Any:
        dx, da, db, dbias = right.backward(*arguments)
        return dx, da.roll(1, 1), db, dbias

    return replace(right, backward=backward)


@pytest.mark.parametrize("fault", [scaling_dropped, permuted_gradient])
def test_a_fault_in_the_fused_layer_is_status_1(
    fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "_environment", "eager")
    select("cpu", torch.float32)
    monkeypatch.setitem(ops._direct, "eager", fault(ops.operators("eager")))
    assert main([*FEW, "--json", "-"]) == 1
    assert not json.loads(capsys.readouterr().out)["passed"]


def test_losses_that_are_not_finite_do_not_agree() -> None:
    nan = torch.tensor([0.5, float("nan")], dtype=torch.float64)
    assert experiment._compare(nan, nan) == (float("inf"), float("inf"))


def test_the_command_prints_published_rows_beside_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert main([*FEW, "--json", "demo.json"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{published:.1f}" in shown for published in experiment.PUBLISHED.values())
    assert "FusedLoRALinear" in shown
    (plot,) = (tmp_path / "temporary").glob("*/lora_demo.png")
    assert str(plot) in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "demo.json"}
    assert "by an adapter" in shown
    assert set(json.loads((tmp_path / "demo.json").read_text())["summaries"]) == {*experiment.PUBLISHED, "adapter"}


def test_without_matplotlib_it_runs_and_says_that_there_are_no_curves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(FEW) == 0
    assert "lora-kernels[plot]" in capsys.readouterr().out


def test_json_on_stdout_is_alone_and_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FEW, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["epochs"] == 3
    assert "demo: timing" in captured.err
    assert not list(tmp_path.iterdir())


def test_the_state_of_torch_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    demo.run(seeds=1, epochs=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


def test_a_published_value_counts_to_its_decimal() -> None:
    assert experiment.Summary(98.3, 98.1, 0.2, 97.8, 98.26).published_is_within
    assert not experiment.Summary(98.3, 98.1, 0.2, 97.8, 98.2).published_is_within
    assert not experiment.Summary(None, 98.1, 0.2, 97.8, 98.2).published_is_within
