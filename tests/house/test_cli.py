"""The command line: help, versions, exit statuses, and errors that are one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_kernels
from lora_kernels import cli, console, env
from lora_kernels.backends.native import command
from lora_kernels.backends.native.toolchain import BuildError
from lora_kernels.cli import main
from lora_kernels.errors import InvalidArgumentError
from stand_in import StandIn

ROOT = Path(__file__).resolve().parents[2]


EXPLAIN = ["explain", "--shape", "4096x4096", "--tokens", "8192"]


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [package, *(n for n in sys.modules if n.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, name, None)


def sentence(captured: str) -> str:
    assert captured.startswith("lora-kernels: ")
    assert captured.count("\n") == 1, captured
    return captured


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"lora-kernels {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"lora-kernels {lora_kernels.__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "--backend", "cutlass", "--json"], "'cutlass' is not known"),
        (["verify", "--dtype", "int8", "--json"], "must be one of fp32, bf16, fp16, fp64"),
        (["verify", "--device", "tpu", "--json"], "must be cpu, cuda or cuda:N"),
        (["verify", "--device", "cuda:99", "--json"], "PyTorch sees"),
        (["verify", "--backend", "triton", "--dtype", "fp64", "--json"], "float64"),
        (["info", "--require", "cutlass"], "the backends are"),
        (["demo", "--seeds", "0", "--json", "-"], "must be at least 1"),
        (["demo", "--plot", "/nowhere/at/all.png"], "cannot be written"),
        (["demo", "--plot", "curves.docx"], "writes no .docx files"),
        (["bench", "--preset", "smoke", "--plot", "ratios.docx"], "writes no .docx files"),
        (["verify", "--backend", "eager,cutlass", "--json"], "'cutlass' is not known"),
        (["bench", "--peers", "peft", "addmm,nobody"], "'nobody' are not known"),
        (["demo", "--no-plot", "--json", "/nowhere/at/all.json"], "cannot be written"),
        (["demo", "--device", "tpu", "--json", "-"], "cannot be used"),
        (["bench", "--preset", "nonsense"], "nonsense"),
        ([*EXPLAIN, "--machine", "v100"], "--machine v100 was given: it must be one of"),
        ([*EXPLAIN, "--machine", "h100", "--dtype", "fp64"], "accumulate in fp32"),
        ([*EXPLAIN, "--machine", "h100", "--backend", "cutlass"], "'cutlass', named by --backend cutlass"),
        ([*EXPLAIN, "--backend", "cutlass"], "'cutlass'"),
        ([*EXPLAIN, "--dtype", "int8"], "must be one of bf16, fp16, fp32, tf32, fp64"),
        ([*EXPLAIN, "--rank", "0"], "tells no r"),
        ([*EXPLAIN, "--dropout", "1"], "must lie in [0, 1)"),
        (["explain", "--shape", "4096", "--tokens", "8"], "must be in_features x out_features"),
        (["explain", "--shape", f"8x{2**31}", "--tokens", "8"], "both positive integers below 2^31"),
        (["explain", "--shape", f"8x{'9' * 5000}", "--tokens", "8"], "both positive integers below 2^31"),
        (["explain", "--shape", "8x8", "--tokens", str(2**31)], "above 0 and below 2^31"),
        ([*EXPLAIN, "--rank", str(2**31)], f"r={2**31} was given: a plan is for sizes below 2^31"),
        (["explain", "--shape", "64x64", "--tokens", "0", "--json"], "tokens=0 was given"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in sentence(captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["verfy"],
        ["build", "gpu"],
        ["explain"],
        [*EXPLAIN, "--rank", "x"],
        ["info", "--jsn"],
        ["verify", "--seed", "x"],
        ["demo", "--seeds", "0", "--no-plot", "--plot", "curves.png"],
    ],
)
def test_argparse_errors_are_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: lora-kernels" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["verify"], ["demo", "--no-plot"]])
def test_without_rich_the_sentence_tells_what_to_install(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "rich")
    assert main(arguments) == 2
    assert 'pip install "lora-kernels[cli]"' in sentence(capsys.readouterr().err)


def test_without_matplotlib_the_sentence_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    without(monkeypatch, "matplotlib")
    assert main(["demo", "--plot", str(tmp_path / "curves.png")]) == 2
    assert 'pip install "lora-kernels[plot]"' in sentence(capsys.readouterr().err)


def test_an_import_that_fails_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("help", "info", "run_command"))
    monkeypatch.setattr("lora_kernels.info.run_command", lambda args: __import__("torch_is_not_here"))
    assert main(["info"]) == 2
    assert "`lora-kernels info` tells" in sentence(capsys.readouterr().err)


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_kernels.info.run_command", interrupted)
    assert main(["info"]) == 130
    assert "interrupted" in sentence(capsys.readouterr().err)


@pytest.mark.parametrize("backend", [None, "triton", "native", "eager"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "tf32"])
def test_explain_on_a_machine_that_is_not_here(
    backend: str | None, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [] if backend is None else ["--backend", backend]
    options = [*EXPLAIN, "--machine", "h100", "--dtype", dtype, *named]
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert f"{backend or 'triton'}: runs, by --machine h100." in shown
    assert main([*options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["machine"], document["backend"]) == ("h100", backend or "triton")
    for plan in document["plans"]:
        assert f"{plan['direction']}: {plan['plan']}\n" in shown
        assert plan["bytes"] == sum(launch["bytes"] for launch in plan["launches"]) > 0


def test_explain_without_a_gpu_is_of_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*EXPLAIN, "--backend", "eager"]) == 0
    assert capsys.readouterr().out.startswith("PyTorch sees no CUDA device: the CPU is explained.")
    assert main([*EXPLAIN, "--backend", "eager", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"


def test_explain_leaves_the_precision_of_products_alone() -> None:
    import torch

    before = torch.backends.cuda.matmul.fp32_precision
    assert main([*EXPLAIN, "--machine", "h100", "--dtype", "tf32"]) == 0
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_the_module_runs_from_a_checkout() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "info", "--json"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["lora_kernels"] == lora_kernels.__version__


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"schema": {}, "cells": 3}'])
@pytest.mark.parametrize("option", ["--show", "--from-config"])
def test_a_file_that_is_none_is_one_sentence(
    option: str, text: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(text)
    command = ["bench"] if option == "--show" else ["tune", "--dry-run", "--machine", "h200"]
    assert main([*command, option, str(file)]) == 2
    assert str(file) in sentence(capsys.readouterr().err)


def test_a_written_file_is_whole_and_a_device_or_link_stays_one(tmp_path: Path) -> None:
    pipe, kept, link = tmp_path / "pipe", tmp_path / "kept.json", tmp_path / "link.json"
    kept.write_text("former")
    link.symlink_to(kept)
    console.write_file(link, "latter")
    assert link.is_symlink()
    assert kept.read_text() == "latter"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        console.write_file(pipe, "through")
        assert os.read(reader, 99) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert {file.name for file in tmp_path.iterdir()} == {"pipe", "kept.json", "link.json"}


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_a_sentence_and_what_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="No space left"):
        console.write_file(Path("/dev/full"), "text")
    assert Path("/dev/full").is_char_device()
    file = tmp_path / "file.json"
    file.write_text("former")

    def full(self: Path, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InvalidArgumentError, match="No space left"):
        console.write_file(file, "latter")
    assert file.read_text() == "former"
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


def test_output_in_ascii_is_shown_with_question_marks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "bench", "--predict", "h200", "--preset", "smoke"],
        capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_json_is_strict_where_numbers_are_not_finite() -> None:
    found = json.loads(console.json_text({"a": [float("nan"), 1.5], "b": (float("inf"),)}), parse_constant=pytest.fail)
    assert found == {"a": ["nan", 1.5], "b": ["inf"]}


def test_progress_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.progress_lines("verify")("eager fp32", 3, 14)
    assert capsys.readouterr() == ("", "verify: eager fp32 3/14\n")


def test_build_prints_path_log_and_time(native: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"cpu: {native.home}")
    log = native.home / "build.log"
    assert re.search(rf"compiled in [0-9.]+ s, by stand-in compiler 1\.0 .*\n  log: {log}\n", captured.out)
    assert not captured.err
    assert "-fPIC" in log.read_text()


def test_build_compiles_again_only_by_force(native: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for options in ([], [], ["--force"]):
        assert main(["build", "cpu", "--json", *options]) == 0
        reports.append(json.loads(capsys.readouterr().out)["cpu"])
    assert [report["compiled"] for report in reports] == [True, False, True]
    assert {report["path"] for report in reports} == {str(next(native.home.glob("lib*")))}


def test_build_that_fails_is_one_sentence_and_builds_the_others(
    native: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    assert main(["build", "all", "--json"]) == 2
    captured = capsys.readouterr()
    assert list(json.loads(captured.out)) == ["cpu", "launch"]
    assert "CUDACXX=no-such-nvcc was given" in sentence(captured.err.splitlines()[-1] + "\n")


def test_build_takes_cuda_by_itself_where_torch_is_a_cuda_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_nvcc(kind: str) -> None:
        raise BuildError("no nvcc was found.")

    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(command, "find_compiler", lambda kind: None)
    assert command._default_kinds() == ("cpu", "cuda", "launch")
    monkeypatch.setattr(command, "find_compiler", no_nvcc)
    assert command._default_kinds() == ("cpu", "launch")
    assert capsys.readouterr().err == "build: cuda is left out: no nvcc was found.\n"
    monkeypatch.setattr("torch.version.cuda", None)
    assert command._default_kinds() == ("cpu",)


def test_a_seed_that_no_generator_takes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("verify", "bench"):
        for seed in ("99999999999999999999999", "-1"):
            assert main([name, "--seed", seed]) == 2
            assert "a seed is an integer from 0 to 2^63 - 1" in capsys.readouterr().err


def test_nobody_reads_to_the_end() -> None:
    """As in ``lora-kernels info | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lora_kernels", "info", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_cache_of_a_user_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", "~nobody_of_this_name/x")
    folder = env.cache_folder()
    assert folder is not None
    assert folder.is_absolute()


def test_the_demo_runs_on_no_device_that_computes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "meta"]) == 2
    assert "'meta' was given, which computes nothing" in capsys.readouterr().err
