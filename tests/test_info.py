"""``info`` tells what is there, and goes on telling when a part is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from lora_kernels import dispatch, info
from lora_kernels.cli import main

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("versions", "installation", "platform", "devices", "backends", "environment", "tuned_table")


def test_it_tells_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert tuple(report) == SECTIONS
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["devices"][0]["torch_threads"] == torch.get_num_threads()
    assert tuple(report["backends"]) == dispatch.ORDER
    assert report["backends"]["eager"]["devices"]["cpu"]["dtypes"] == list(info.DTYPES)
    assert report["tuned_table"] == "none: choices come from device properties"
    assert not [section for section in report.values() if "error" in section]


def test_the_text_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in text
    assert "eager on cpu          available: fp32, bf16, fp16, fp64." in text
    assert all(section.replace("_", " ") in text.splitlines() for section in SECTIONS)


def test_a_backend_that_cannot_run_tells_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        dispatch.backend("eager"), "why_not", lambda problem: ["the moon is full. Wait."], raising=False
    )
    assert main(["info", "--require", "eager"]) == 1
    captured = capsys.readouterr()
    assert "eager on cpu          not available: the moon is full. Wait." in captured.out
    assert "'eager'" in captured.err


def test_require_passes_for_a_backend_that_is_available() -> None:
    assert main(["info", "--require", "eager"]) == 0


def test_a_broken_backend_is_reported_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: object) -> NoReturn:
        raise OSError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(dispatch.backend("triton"), "why_not", broken, raising=False)
    backends = info.collect()["backends"]
    assert backends["triton"]["devices"]["cpu"] == {"error": "OSError: libfoo.so: cannot open shared object file"}
    assert not backends["triton"]["available"]
    assert backends["eager"]["available"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_it_works_without_torch_triton_numpy_and_rich(options: list[str], tmp_path: Path) -> None:
    for package in ("torch", "triton", "numpy", "rich"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('no {package} here')\n")
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "info", *options],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("no torch here") == 3, done.stdout  # CUDA's version, the CPU's threads, the backends


def test_require_fails_where_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["info", "--require", "eager"]) == 1


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "H200", 9, 0, 140 * info.GIB, 132

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    (cpu, gpu) = info.collect()["devices"]
    assert cpu["device"] == "cpu"
    assert info._device_line(gpu) == "cuda:0                H200, capability 9.0, 140.0 GiB, 132 SMs"
