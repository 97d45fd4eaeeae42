"""``lora-kernels tune``: the cells that it is given, its options, what it prints and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.backends.triton.choose import table, tuned
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.plans import Cell, Plan, plan_to_json
from lora_kernels.backends.triton.choose.table import read
from lora_kernels.cli import main
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.tuning import bench as device_bench
from lora_kernels.tuning import cells, command
from lora_kernels.tuning.search import NothingToStoreError, Refusal, shortlist
from made_tables import CELL, DEVICE, H200, VERSIONS, FakeBench, looked_up, plan

NO_ROOM = Refusal("does not run", "It raised OutOfResources: shared memory, Required: 300000")
WRONG = Refusal("is wrong", "y FAILS: error 1.0e+00")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))


# The cells

COUNTS = {"published": (15, 10), "goals": (19, 14), "quick": (38, 20), "grid": (600, 600)}  # of forward, of backward


@pytest.mark.parametrize("preset", [cells.PRESETS[name] for name in COUNTS], ids=COUNTS)
def test_a_preset_has_every_cell_once_the_published_ones_first(preset: cells.Preset) -> None:
    found = preset.cells()
    published = cells.preset("published").cells()
    assert len(set(found)) == len(found)
    assert found[: len(published)] == published
    assert (len(preset.cells(["forward"])), len(preset.cells(["backward"]))) == COUNTS[preset.name]
    assert published[0] == CELL
    assert replace(CELL, direction="backward") in published[:6]
    assert all(not cell.tokens & (cell.tokens - 1) for cell in found)
    assert candidates(H200, found[-1])


def test_of_each_list_the_first_values_come_first() -> None:
    found = cells.cells_of([(64, 32), (32, 64)], [100, 1], [16], ["bfloat16"], [0.0, 0.1], ["forward"])
    assert found[0] == Cell("forward", 128, 64, 32, 16, "bfloat16", False)
    assert [(cell.dropout, cell.tokens, cell.k) for cell in found] == [
        (False, 128, 64),
        *[(False, 128, 32), (False, 1, 64), (True, 128, 64)],  # one step from the first
        *[(False, 1, 32), (True, 128, 32), (True, 1, 64)],
        (True, 1, 32),
    ]


def test_tokens_of_one_bucket_are_one_cell() -> None:
    found = cells.cells_of([(8, 8)], [5, 8, 7, 9], [2], ["tf32"], [0.1, 0.5], ["backward"])
    assert [(cell.direction, cell.tokens) for cell in found] == [("backward", 8), ("backward", 16)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
            [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (4096, 4096, 1024, 1024), (4096, 14336, 14336)],
        ),
        (
            {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 8, "head_dim": 64},
            [(2048, 512), (2048, 8192), (8192, 2048), (512, 2048), (2048, 512, 512, 512), (2048, 8192, 8192)],
        ),
        (
            {"text_config": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}},
            [(64, 64), (64, 96), (96, 64), (64, 64, 64, 64), (64, 96, 96)],
        ),
    ],
    ids=["llama", "head_dim", "nested"],
)
def test_a_model_s_shapes_come_from_its_config(config: Any, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert cells.shapes_of_model(path) == expected


NOT_FINITE = '{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": Infinity}'


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"hidden_size": "4096"}', '{"hidden_size": 0}', NOT_FINITE])
def test_a_file_that_is_no_config_is_a_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=r"--from-config .* cannot be used .* or give --shapes"):
        cells.shapes_of_model(path)


# The command


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "all"], "preset 'all' is not known: name one of published"),
        (["--shapes", "4096"], "must be in_features x out_features, such as 4096x4096"),
        (["--shapes", "0x16"], "must be in_features x out_features"),
        (["--shapes", f"8x{2**31}"], "Sizes are below 2^31"),
        (["--shapes", f"8x{'9' * 5000}"], "Sizes are below 2^31"),
        (["--shapes", "8x8", "--tokens", "9" * 5000], "it must be positive integers below 2^31"),
        (["--shapes", "8x8", "--tokens", "0"], "--tokens 0 was given: it must be positive integers"),
        (["--shapes", "8x8", "--ranks", "sixteen"], "--ranks sixteen was given"),
        (["--shapes", "8x8", "--dtypes", "int8"], "dtype 'int8' is not known: name some of bfloat16"),
        (["--shapes", "8x8", "--dropout", "1"], "dropout 1 was given: it must be at least 0 and below 1"),
        (["--shapes", "8x8", "--dropout", "some"], "--dropout some was given"),
        (["--shapes", "8x8", "--preset", "grid"], "--preset grid has its own shapes"),
        (["--shapes", "8x8", "--from-config", "x"], "name the shapes in one way"),
        (["--from-config", "/nowhere/config.json"], "cannot be used (FileNotFoundError"),
        (["--tokens", "1"], "go with --shapes or --from-config"),
        (["--directions", "up"], "--directions names 'up': it must be some of forward, backward"),
        (["--machine", "h200"], "without --dry-run"),
        (["--budget", "0"], "--budget more than 0"),
        (["--candidates", "0"], "--candidates must be at least 1"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
        (["--table", "/nowhere/at/all.json"], "cannot be written"),
        (["--device", "cpu", "--preset", "grid"], "preset 'grid' is not one of the CPU's: name one of cpu,"),
        (["--device", "cpu", "--ranks", "8"], "--ranks was given with --device cpu"),
        (["--device", "cpu", "--tokens", "8"], "go with --shapes or --from-config"),
        (["--device", "cpu", "--shapes", "8x8", "--preset", "cpu"], "--preset cpu has its own shapes"),
        (["--device", "cpu", "--shapes", "8x8", "--from-config", "x"], "name the shapes in one way"),
        (["--device", "cpu", "--shapes", "8x8", "--dtypes", "tf32"], "dtype 'tf32' is not known: name some of float32"),
        (["--device", "tpu"], "--device tpu was given"),
        (["--device", "cuda:99"], "PyTorch sees"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lora-kernels: ")
    assert words in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_without_a_gpu_it_tells_what_was_found_and_what_to_do(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["tune", *options]) == 2
    said = capsys.readouterr().err
    assert "needs" in said or "needed" in said or "measures on an NVIDIA GPU of compute capability 8.0" in said
    assert "PyTorch sees 0 CUDA devices" in said
    assert "--machine h200" in said


@pytest.mark.parametrize("rich", [True, False])
def test_a_dry_run_lists_cells_candidates_and_predictions(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "_rich", lambda: rich)
    path = tmp_path / "dry.json"
    options = ["--shapes", "4096x4096", "--tokens", "8192,1", "--json", str(path)]
    assert main(["tune", "--dry-run", "--machine", "h200", *options]) == 0
    shown = capsys.readouterr().out
    assert "a dry run for NVIDIA H200" in shown
    assert "Nothing was run" in shown
    listed = json.loads(path.read_text())["cells"]
    assert [(found["cell"]["direction"], found["cell"]["tokens"]) for found in listed] == [
        ("forward", 8192), ("forward", 1), ("backward", 8192), ("backward", 1)
    ]  # fmt: skip
    assert 1.0 < listed[2]["candidates"][0]["predicted_ratio"] < 1.3
    best = listed[1]["candidates"][0]
    assert best["plan"] == plan_to_json(candidates(H200, replace(CELL, tokens=1))[0])
    assert 0.9 < best["predicted_ratio"] < 3.0


class Machine200:
    """The command on a made-up H200."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.bench = FakeBench()
        self.user, self.json = tmp_path / "cache" / "tuned" / "nvidia-h200.json", tmp_path / "tune.json"
        monkeypatch.setattr(command, "_device", lambda name, remedy: torch.device("cuda", 0))
        monkeypatch.setattr(device_bench, "DeviceBench", lambda device: self.bench)

    def tune(self, *options: str, status: int = 0, directions: str = "forward") -> list[dict[str, Any]]:
        which = ["--shapes", "4096x4096", "--directions", directions]
        assert main(["tune", *which, "--json", str(self.json), *options]) == status
        return json.loads(self.json.read_text())["cells"]


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine200:
    return Machine200(monkeypatch, tmp_path)


@pytest.mark.parametrize("rich", [True, False])
def test_tune_stores_and_tells(
    rich: bool, h200: Machine200, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_rich", lambda: rich)
    found = h200.tune("--tokens", "8192,2048", "--table", str(tmp_path / "ship.json"))
    shown = capsys.readouterr().out
    assert [cell["status"] for cell in found] == ["tuned", "tuned"]
    assert [cell["row"]["ratio"] for cell in found] == [1.08, 1.08]
    assert len(read(h200.user).rows) == len(read(tmp_path / "ship.json").rows) == 2
    assert "2 cells tuned in" in shown
    assert "tuned on NVIDIA H200" in shown
    assert f"The table is {h200.user}." in shown
    assert [cell["status"] for cell in h200.tune("--tokens", "8192,512")] == ["kept", "tuned"]


def test_the_json_tells_every_candidate(h200: Machine200) -> None:
    (found,) = h200.tune("--tokens", "8192")
    assert [m["ratio"] for m in found["measured"]] == sorted(m["ratio"] for m in found["measured"])
    assert len(found["measured"]) == len(shortlist(H200, CELL))
    assert {"ratio_p20", "us", "rounds", "clock", "predicted_us", "predicted_ratio"} <= set(found["measured"][0])
    assert found["beaten_composition"]["plan"]["kind"] == "lora_first"
    assert found["next"]["plan"]["kind"] == "fused"


@pytest.mark.parametrize(("refusal", "status"), [(NO_ROOM, 0), (WRONG, 1)])
def test_a_fault_is_told_and_is_status_1(
    refusal: Refusal, status: int, h200: Machine200, capsys: pytest.CaptureFixture[str]
) -> None:
    best = plan("fused")
    h200.bench = FakeBench(refused={best: refusal})
    (found,) = h200.tune("--tokens", "8192", status=status)
    assert [refused["why"] for refused in found["refused"]] == [refusal.why]
    shown = capsys.readouterr().out
    assert refusal.sentence in shown
    assert (str(best) in shown.replace("\n", " ")) or status == 0


def test_a_cell_that_fails_is_status_1(h200: Machine200, capsys: pytest.CaptureFixture[str]) -> None:
    def full(count: int) -> None:
        raise NothingToStoreError("CUDA out of memory. Free the device's memory.")

    h200.bench = FakeBench(at=full)
    (found,) = h200.tune("--tokens", "8192", status=1)
    assert (found["status"], found["row"]) == ("failed", None)
    assert "CUDA out of memory" in capsys.readouterr().out


def test_without_a_home_folder_it_is_a_sentence(
    h200: Machine200, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "user_folder", lambda: None)
    assert main(["tune"]) == 2
    assert "name a folder by LORA_KERNELS_CACHE" in capsys.readouterr().err


def test_what_was_tuned_is_looked_up(h200: Machine200, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "identify", lambda device: DEVICE)
    monkeypatch.setattr(tuned, "running_versions", lambda: VERSIONS)
    monkeypatch.setattr(tuned, "SHIPPED", h200.user.parent / "none")
    tuned.forget()
    assert looked_up(torch.device("cuda", 0), CELL) is None
    both = h200.tune("--tokens", "8192", directions="forward,backward")
    asked = (CELL, replace(CELL, direction="backward"))
    chosen: list[Plan | None] = [looked_up(torch.device("cuda", 0), cell) for cell in asked]
    tuned.forget()
    assert [plan_to_json(plan) for plan in chosen if plan is not None] == [found["row"]["plan"] for found in both]
