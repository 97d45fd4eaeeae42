"""``info`` tells what is there, and goes on telling when a part is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from lora_kernels import dispatch, info
from lora_kernels.backends.native import load
from lora_kernels.backends.triton.choose import tuned
from lora_kernels.cli import main
from made_tables import DEVICE, FEW, VERSIONS, row, write
from stand_in import StandIn

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = (
    *("versions", "installation", "platform", "devices", "backends"),
    *("native_library", "environment", "tuned_table"),
)


def test_it_tells_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert tuple(report) == SECTIONS
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["devices"][0]["torch_threads"] == torch.get_num_threads()
    assert tuple(report["backends"]) == dispatch.ORDER
    assert report["backends"]["eager"]["devices"]["cpu"]["dtypes"] == list(info.DTYPES)
    assert set(report["tuned_table"]) == {"devices", "shipped", "user_folder"}
    assert not [section for section in report.values() if "error" in section]


def test_the_text_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in text
    assert "eager on cpu          available: fp32, bf16, fp16, fp64." in text
    assert all(name in text for name in info.VARIABLES)
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
        capture_output=True, text=True, cwd=tmp_path, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("no torch here") == 5, done.stdout  # CUDA's version, threads, backends, library, table


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


def test_only_what_is_set_has_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in info.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORA_KERNELS_CPU_CAPABILITY", "avx2")
    assert main(["info"]) == 0
    section = capsys.readouterr().out.partition("\nenvironment\n")[2].partition("\ntuned table\n")[0]
    unset = [name for name in info.VARIABLES if name != "LORA_KERNELS_CPU_CAPABILITY"]
    assert section.splitlines() == [
        "  LORA_KERNELS_CPU_CAPABILITY avx2",
        f"  not set               {', '.join(unset)}",
    ]


def test_the_text_is_a_screen_where_there_are_eight_gpus(
    monkeypatch: pytest.MonkeyPatch, tables: Tables, native: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "H200", 9, 0, 140 * info.GIB, 132

    write(tables.shipped, row(), row(FEW, "few_tokens"))
    write(tables.user, row(kind="lora_first"))
    load.compile_into_cache("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "  cuda:0 and 7 more     NVIDIA H200: 2 cells were measured" in text
    assert len(text.splitlines()) <= 60


def told(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """What ``info --json`` says of the CPU's library, and the text's section on both."""
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["native_library"]
    assert main(["info"]) == 0
    return report["cpu"], capsys.readouterr().out.partition("\nnative library\n")[2].partition("\nenvironment\n")[0]


def test_the_native_library_before_it_is_compiled(native: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    report, text = told(capsys)
    assert (report["state"], report["path"]) == ("would be compiled at first use", None)
    assert f"by {native.compiler.path} (stand-in compiler 1.0); `lora-kernels build cpu` does it beforehand" in text
    assert f"cache                 {native.cache / 'native'}" in text
    assert not native.cache.exists()


def test_the_native_library_in_the_cache(native: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    path = load.compile_into_cache("cpu").path
    report, text = told(capsys)
    assert (report["state"], report["path"], report["origin"]) == ("found", str(path), "cache")
    assert report["build"]["compiler"] == str(native.compiler.path)
    assert f"found: {path}" in text
    assert f"by stand-in compiler 1.0 ({native.compiler.path})" in text
    assert f"against torch {report['build']['torch']}; any torch from 2.11 on loads it" in text
    load.load("cpu")
    assert told(capsys)[0]["state"] == "loaded"


def test_the_instruction_set_that_runs_and_why_it_is_not_amx(
    native: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    with (native.sources / "cpu" / "operators.cpp").open("a") as file:
        for name, answer in (("capability", "avx512_bf16"), ("amx_obstacle", "this CPU has none")):
            told_by = f'const char* lora_kernels_cpu_{name}() {{ return "{answer}"; }}'
            file.write(f'extern "C" __attribute__((visibility("default"))) {told_by}\n')
    load.compile_into_cache("cpu")
    report, text = told(capsys)
    assert report["instruction_set"] == {"capability": "avx512_bf16", "amx_obstacle": "this CPU has none"}
    assert "avx512_bf16 runs here; amx does not: this CPU has none" in text


def test_no_native_library_tells_why_and_what_to_do(
    native: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    report, text = told(capsys)
    assert (report["state"], report["path"]) == ("none", None)
    assert "apt install g++" in report["reasons"][0]
    assert "apt install g++" in text
    assert main(["info", "--require", "native"]) == 1


def test_a_library_that_is_passed_over_is_named(native: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    library = load.compile_into_cache("cpu").path
    library.write_bytes(b"")
    report, text = told(capsys)
    assert report["state"] == "would be compiled at first use"
    assert f"{library.parent} is passed over: {library.name} is truncated" in text
    assert main(["info", "--require", "native"]) == 0


class Tables:
    """An H200 under Triton 3.6 with a folder of shipped tables and one of the user's."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shipped, self.user = tmp_path / "shipped", tmp_path / "cache" / "tuned"
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(tuned, "SHIPPED", self.shipped)
        monkeypatch.setattr(tuned, "identify", lambda device: DEVICE)
        monkeypatch.setattr(tuned, "running_versions", lambda: VERSIONS)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def told(self) -> tuple[dict[str, Any], str]:
        """The section's report, and its text."""
        report = info.collect()["tuned_table"]
        return report, "\n".join(info._table_lines(report))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tables:
    return Tables(tmp_path, monkeypatch)


def test_without_a_gpu_no_table_is_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["info"]) == 0
    assert "in use                none: PyTorch sees no CUDA device" in capsys.readouterr().out


def test_without_a_table_the_model_chooses(tables: Tables) -> None:
    report, text = tables.told()
    assert (report["devices"][0]["cells"], report["devices"][0]["files"]) == (0, [])
    assert "cuda:0                none for NVIDIA H200: a model of the device chooses. `lora-kernels tune`" in text


def test_the_tables_in_use_are_named_with_rows_and_versions(tables: Tables) -> None:
    shipped = write(tables.shipped, row(), row(FEW, "few_tokens"))
    user = write(tables.user, row(kind="lora_first"))
    report, text = tables.told()
    assert report["shipped"] == ["nvidia-h200"]
    assert [(file["origin"], file["used"]) for file in report["devices"][0]["files"]] == [("shipped", 2), ("user", 1)]
    assert "NVIDIA H200: 2 cells were measured (2 of forward, 0 of backward), the model chooses for the others" in text
    assert f"shipped: {shipped}, 2 of 2 rows count" in text
    assert f"user: {user}, 1 of 1 rows count" in text
    assert "measured with torch 2.11.0+cu130, triton 3.6.0, lora_kernels" in text


def test_rows_that_do_not_count_are_told_with_the_reason(tables: Tables) -> None:
    path = write(tables.shipped, row(triton="3.5.1"), row(FEW, "few_tokens", triton="3.5.0"), row(kind="lora_first"))
    path.write_text(path.read_text().replace('"lora_first", "shrink"', '"teleport", "shrink"'))
    assert "0 of 3 rows count" in tables.told()[1]
    assert "2 rows are passed over, for Triton 3.5 ran when they were measured, and 3.6 runs here:" in tables.told()[1]
    assert "1 row is passed over, for this version of lora_kernels does not know them: a plan is" in tables.told()[1]


def test_a_table_that_cannot_be_read_is_told_without_a_warning(
    tables: Tables, recwarn: pytest.WarningsRecorder
) -> None:
    path = write(tables.user, row())
    path.write_text("{")
    assert f"A tuned table is passed over: {path} is no tuned table" in tables.told()[1]
    assert not recwarn.list
