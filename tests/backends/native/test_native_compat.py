"""One library file for every Python 3 and every torch from 2.11 on: what its symbol table says, and a try.

``LORA_KERNELS_OTHER_PYTHON`` names the interpreter of another environment (another Python, another torch) for the try.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.backends.native import load
from stand_in import PACKAGE, needs_a_compiler

OTHER = "LORA_KERNELS_OTHER_PYTHON"
SHIM = re.compile(r"(aoti_)?torch_[a-z0-9_]+")  # the C functions of LibTorch's stable ABI
SYSTEM = re.compile(r"[A-Za-z0-9_]+@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+")
STANDARD = re.compile(r"_ZNK?S[tabiosd]\w+")  # of namespace std; weak ones have no version under some linkers
WEAK = ("__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable")
NEEDED = re.compile(r"lib(torch_cpu|torch_cuda|stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so[.0-9]*|ld-linux.*")


def library(kind: str) -> Path:
    """The real library: compiled here for the CPU; the CUDA one if ``lora-kernels build cuda`` has been run."""
    needs_a_compiler()
    if kind == "cuda" and load._search("cuda").library is None:
        pytest.skip("the native CUDA library is not compiled: run `lora-kernels build cuda` first")
    return load.compile_into_cache(kind).path


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def foreign(symbols: list[str]) -> list[str]:
    """Those that are neither of the stable shim nor of the system's C and C++ libraries."""
    known = (SHIM, SYSTEM, STANDARD)
    return [name for name in symbols if name not in WEAK and not any(pattern.fullmatch(name) for pattern in known)]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_only_the_stable_shim_of_torch_is_undefined(kind: str) -> None:
    symbols = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", str(library(kind))).splitlines()]
    assert sum(SHIM.fullmatch(name) is not None for name in symbols) > 10
    assert foreign(symbols) == []


def test_other_symbols_would_be_found() -> None:
    others = ["_ZN2at5emptyEv", "_ZN3c1011SymInt3fooE", "PyObject_Call", "Py_None", "_PyThing", "cudaMalloc"]
    assert foreign([*others, "torch_call_dispatcher", "free@GLIBC_2.2.5"]) == others


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_library_is_needed_but_torch_and_the_system(kind: str) -> None:
    found = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", str(library(kind))))
    assert f"libtorch_{kind}.so" in found
    assert [name for name in found if not NEEDED.fullmatch(name)] == []


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_nothing_of_ours_is_exported(kind: str) -> None:
    """But the C functions that Python asks by name."""
    exported = output("nm", "-D", "-C", "--defined-only", str(library(kind)))
    found = re.findall(r"^.*\blora\w*(?:::|_).*$", exported, re.MULTILINE)
    assert [line for line in found if not re.search(r" T lora_kernels_cpu_\w+$", line)] == []
    assert kind == "cpu" or not found


def test_another_python_and_another_torch_load_the_same_file(tmp_path: Path) -> None:
    """As a platform wheel puts it there: beside the package, whatever torch it was compiled against."""
    other = os.environ.get(OTHER)
    if not other:
        pytest.skip(f"{OTHER} names no interpreter of another environment")
    path = library("cpu")
    shutil.copytree(PACKAGE, tmp_path / "lora_kernels", ignore=shutil.ignore_patterns("__pycache__", "lib"))
    shutil.copytree(PACKAGE.parent / "csrc", tmp_path / "csrc")
    shutil.copytree(path.parent, tmp_path / "lora_kernels" / "lib" / "cpu")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "PYTHONPATH": str(tmp_path),
        "LORA_KERNELS_CACHE": str(tmp_path / "cache"),
        "LORA_KERNELS_BUILD": "off",
    }

    def answer(*arguments: str) -> dict[str, object]:
        command = [other, "-m", "lora_kernels", *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    info = answer("info", "--require", "native")
    assert info["native_library"]["cpu"]["path"] == str(tmp_path / "lora_kernels" / "lib" / "cpu" / path.name)
    versions = (info["versions"]["python"], info["versions"]["torch"])
    assert versions != (sys.version.split()[0], str(torch.__version__))
    assert answer("verify", "--backend", "native", "--dtype", "fp32")


@pytest.mark.parametrize("macro", ["STABLE_TORCH_ERROR", "STD_CUDA_"])
def test_the_sources_use_no_macro_that_the_oldest_torch_lacks(macro: str) -> None:
    """torch/csrc/stable/macros.h defines these, and came after 2.11."""
    sources = [path for path in (PACKAGE.parent / "csrc").rglob("*") if path.is_file()]
    assert [path.name for path in sources if macro in path.read_text(encoding="utf-8")] == []
    assert sources
