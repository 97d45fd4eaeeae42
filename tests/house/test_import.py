"""Importing the package is cheap and has no effect: what it loads, writes and says, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import lora_kernels

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "triton", "transformers", "peft", "matplotlib", "rich", "numpy")
PROBE = """
import json, sys
{statement}
loaded = sorted({{name.partition(".")[0] for name in sys.modules}})
cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
print(json.dumps({{"loaded": loaded, "cuda": cuda}}))
"""


def run_fresh(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("LORA_KERNELS_BACKEND", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env, timeout=600)


def loaded_by(statement: str) -> dict[str, object]:
    done = run_fresh(PROBE.format(statement=statement))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_package_alone_loads_nothing_heavy() -> None:
    assert not set(HEAVY) & set(loaded_by("import lora_kernels, lora_kernels.cli")["loaded"])


def test_the_functions_for_peft_load_no_peft() -> None:
    assert "peft" not in loaded_by("import lora_kernels.peft; lora_kernels.peft.fuse_peft")["loaded"]


# One after the other in one process, and which of them are the first to load Triton or to start CUDA.
FIRST_TO_LOAD = """
import importlib, json, sys
found = []
for step in {steps!r}:
    importlib.import_module(f"lora_kernels.{{step}}") if step != LAYER else exec(LAYER)
    if "triton" in sys.modules or ("torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()):
        found.append(step)
        break
print(json.dumps(found))
"""
PUBLIC = ("config", "reference", "dispatch", "functional", "nn", "models.model")
LAYER = "import torch, lora_kernels; lora_kernels.FusedLoRALinear(4, 4, r=2)(torch.ones(2, 4)).sum().backward()"


def test_neither_the_public_surface_nor_a_layer_on_the_cpu_loads_triton_or_cuda() -> None:
    """And what does load it, after all of them, is told."""
    last = ["backends.triton.operators"] if find_spec("triton") else []
    done = run_fresh(f"LAYER = {LAYER!r}" + FIRST_TO_LOAD.format(steps=[*PUBLIC, LAYER, *last]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == last


def test_import_writes_nothing_and_says_nothing(tmp_path: Path) -> None:
    done = run_fresh(
        "import lora_kernels, lora_kernels.nn",
        cwd=tmp_path,
        PYTHONWARNINGS="error",
        PYTHONDONTWRITEBYTECODE="1",
        HOME=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path),
        TMPDIR=str(tmp_path),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", lora_kernels.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(lora_kernels, name) is not None


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'FusedLora'; it has .*FusedLoRALinear"):
        lora_kernels.FusedLora  # noqa: B018


def test_a_checkout_runs_without_being_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "--version"], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert done.stdout.split() == ["lora-kernels", lora_kernels.__version__], done.stderr
