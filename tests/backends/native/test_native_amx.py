"""AMX in the native CPU library: its instructions are compiled in, and it runs where the machine grants them.

Its layouts and arithmetic are tested on every machine by ``scripts/native_variants.py amx``, which writes the
instructions out in C++.
"""

from __future__ import annotations

import ast
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from lora_kernels import dispatch
from lora_kernels.backends.native import load
from lora_kernels.backends.native.toolchain import find_compiler
from lora_kernels.dispatch import Problem
from lora_kernels.env import CPU_CHOICES

_WHY_NOT = dispatch.backend("native").why_not(Problem("cpu", torch.float32))
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=" ".join(_WHY_NOT))

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc/cpu"
CAPABILITY, PRODUCT = CPU_CHOICES


def library() -> load.Library:
    found = load.load("cpu")
    if "amx" not in found.info.get("capabilities", ()):
        pytest.skip(f"{found.path} holds no kernels for AMX: its compiler or assembler knows none")
    return found


def told() -> dict[str, str]:
    answer = load.instruction_set(str(library().path))
    assert answer is not None
    return answer


def test_the_instructions_are_in_the_library() -> None:
    """Tiles are released as often as the configuration before them is stored, at the least: on every way out."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump, which reads machine code, is not installed")
    command = ["objdump", "-d", "--no-show-raw-insn", str(library().path)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = ("sttilecfg", "ldtilecfg", "tilerelease", "tileloadd", "tileloaddt1", "tdpbf16ps", "tilestored")
    found = Counter(word for word in code.split() if word in names)
    assert set(found) == set(names)
    assert found["tilerelease"] >= found["sttilecfg"]


def tiles(folder: Path, real: bool) -> list[str]:
    """What ``native_host/tiles.cpp`` says, with the instructions or with their emulation."""
    flags = ["-DLORA_HAVE_AMX", "-mamx-tile", "-mamx-bf16"] if real else ["-DLORA_EMULATE_TILES"]
    sources = [ROOT / "tests/native_host/tiles.cpp", CSRC / "amx.cpp"]
    program = folder / f"tiles-{real}"
    compiler = [find_compiler("cpu").path, "-std=c++17", "-O2", "-DLORA_CAPABILITY=tests", f"-I{CSRC}", *flags]
    subprocess.run([*compiler, *map(str, sources), "-o", str(program)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("real", [False, True], ids=["emulated", "real"])
def test_a_configuration_that_was_there_comes_back(tmp_path: Path, real: bool) -> None:
    if real and (obstacle := told()["amx_obstacle"]):
        pytest.skip(f"AMX cannot run here: {obstacle}")
    none, others = (line.split() for line in tiles(tmp_path, real)[-2:])
    assert none == ["none", *["00"] * 64]
    shapes = bytes.fromhex("".join(others[1:]))
    assert (shapes[0], shapes[48:56]) == (1, bytes([0, 0, 0, 9, 0, 9, 4, 0]))
    assert struct.unpack_from("<8H", shapes, 16) == (0, 0, 0, 48, 0, 16, 48, 0)


def test_the_emulation_computes_as_the_instructions_do(tmp_path: Path) -> None:
    """Bit for bit, whole and ragged tiles, with subnormal numbers, infinities and NaN."""
    if obstacle := told()["amx_obstacle"]:
        pytest.skip(f"AMX cannot run here: {obstacle}")
    assert tiles(tmp_path, real=True) == tiles(tmp_path, real=False)


def test_it_tells_what_runs_and_why_amx_does_not() -> None:
    answer, named = told(), os.environ.get(CAPABILITY)
    assert answer["capability"] in CPU_CHOICES[CAPABILITY]
    assert answer["capability"] != "amx" or answer["amx_obstacle"] == ""
    assert answer["amx_obstacle"] or answer["capability"] == (named or "amx")
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and "amx_bf16" not in cpu.read_text().split():
        assert "AMX" in answer["amx_obstacle"]


def test_amx_that_is_named_where_it_cannot_run_gives_way_to_the_next_best() -> None:
    path = str(library().path)
    asked = f"load.instruction_set({path!r})"
    code = f"import torch; from lora_kernels.backends.native import load; print({asked})"
    environment = os.environ | {CAPABILITY: "amx"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answer = ast.literal_eval(done.stdout)
    assert (answer["capability"] == "amx") == (answer["amx_obstacle"] == "")


def test_on_a_machine_with_amx_its_kernels_make_every_product() -> None:
    """The kernels' own products throughout, which the automatic choice does not take for all sizes."""
    if obstacle := told()["amx_obstacle"]:
        pytest.skip(f"AMX cannot run here: {obstacle}")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "bfloat16"]
    files = ["tests/backends/native/test_native_cpu.py", "tests/backends/native/test_native_parts.py"]
    environment = os.environ | {CAPABILITY: "amx", PRODUCT: "own"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
