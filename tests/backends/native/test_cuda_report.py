"""The gate on the CUDA library: what it reads, that it can fail, and the library itself where it is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.backends.native import cuda_report, load
from lora_kernels.backends.native.cuda_report import ARCHITECTURES, PLAIN_KERNELS, TENSOR_KERNELS, Record

NUMBERS = ("fp16", "bf16", "fp32", "fp64")
GOOD = [
    *[
        Record(name, number, 16, a, 99, 0, 0, 48384, 8)
        for name in TENSOR_KERNELS
        for number in NUMBERS
        for a in ARCHITECTURES
    ],
    *[Record(name, "", 0, arch, 32, 0, 0, 0, 0) for name in PLAIN_KERNELS for arch in ARCHITECTURES],
]
USAGE = """
Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN12lora_kernels4cuda5entryINS0_6ShrinkINS0_8BFloat16ELi64EEEEEvNT_4ArgsE:
  REG:80 STACK:0 SHARED:37888 LOCAL:0 CONSTANT[0]:488 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN12lora_kernels4cuda5entryINS0_4DhDbIdEEEEvNT_4ArgsE:
  REG:72 STACK:8 SHARED:32032 LOCAL:4 CONSTANT[0]:488 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN12lora_kernels4cuda5entryINS0_4MaskEEEvNT_4ArgsE:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:488 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
MACHINE_CODE = """
	code for sm_90
		Function : _ZN12lora_kernels4cuda5entryINS0_6ShrinkINS0_8BFloat16ELi64EEEEEvNT_4ArgsE
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
		Function : _ZN12lora_kernels4cuda5entryINS0_4MaskEEEvNT_4ArgsE
        /*0010*/                   EXIT ;
"""


def test_what_cuobjdump_prints_is_read() -> None:
    assert list(cuda_report.parse(USAGE, MACHINE_CODE)) == [
        Record("Shrink", "bf16", 64, 90, 80, 0, 0, 36864, 2),
        Record("DhDb", "fp64", 0, 90, 72, 8, 4, 31008, 0),
        Record("Mask", "", 0, 90, 32, 0, 0, 0, 0),
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stack": 8}, "Shrink<fp16, 16> for sm_80 spills: 8 bytes of stack"),
        ({"local": 16}, "16 of local memory"),
        ({"shared": 49153}, "takes 49153 bytes of shared memory and a block has 49152"),
        ({"tensor_instructions": 0}, "has no tensor-core instruction where HMMA is meant"),
        ({"arch": 75}, "sm_80 is without Shrink<fp16>"),
    ],
)
def test_the_gate_can_fail(change: dict[str, object], sentence: str) -> None:
    assert cuda_report.faults(GOOD) == []
    first = Record(**({f: getattr(GOOD[0], f) for f in Record.__dataclass_fields__} | change))
    (fault,) = cuda_report.faults([first, *GOOD[1:]])
    assert sentence in fault


def test_without_nvcc_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    assert cuda_report.main(["--check"]) == cuda_report.EXIT_NO_TOOLS
    assert "CUDACXX=/nonexistent/nvcc was given" in capsys.readouterr().err


def library() -> Path:
    found = load._search("cuda").library
    if found is None:
        pytest.skip("the native CUDA library is not compiled: run `lora-kernels build cuda` first")
    return found.path


REGISTERS = """
import sys, torch
from lora_kernels import ops
from lora_kernels.kept import Kept

def there():
    names = [f"lora_kernels::native_{name}" for name in ("forward", "backward", "mask")]
    return [torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in names]

ops.register("native", {}, Kept())
before = there()
torch.ops.load_library(sys.argv[1])
print(torch.version.cuda, before, there())
"""


def test_the_library_loads_and_registers_without_a_gpu() -> None:
    """In this Python, or the one that LORA_KERNELS_OTHER_PYTHON names, whose torch must be a CUDA build."""
    python = os.environ.get("LORA_KERNELS_OTHER_PYTHON", sys.executable)
    path = library()
    asked = subprocess.run([python, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True)
    if asked.stdout.strip() in ("", "None"):
        pytest.skip(f"the torch of {python} is not a CUDA build: name one by LORA_KERNELS_OTHER_PYTHON")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([python, "-c", REGISTERS, path], capture_output=True, text=True, env=environment, timeout=600)
    assert done.stdout.split(maxsplit=1)[1:] == ["[False, False, False] [True, True, True]\n"], done.stderr
