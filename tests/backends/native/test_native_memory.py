"""Memory that runs out in the native CPU library, at each of its allocations in turn, is an exception and no crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels import dispatch
from lora_kernels.backends.native import toolchain
from lora_kernels.dispatch import Problem

_WHY_NOT = dispatch.backend("native").why_not(Problem("cpu", torch.float32))
pytestmark = [
    pytest.mark.skipif(bool(_WHY_NOT), reason=" ".join(_WHY_NOT)),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and posix_memalign's place in PyTorch are Linux's"),
]

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import ctypes, os, torch
from lora_kernels import dispatch, ops

assert dispatch.select("cpu", torch.float32, "native") == "native"
memory, native = ctypes.CDLL(os.environ["LD_PRELOAD"]), ops.operators("native")
torch.set_num_threads(4)  # regions of several threads, on a machine of few cores too


def arguments(dtype, m, k=160, n=96, r=4):
    def draw(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype)

    hidden = native.kept.hidden_dtype(dtype)
    x, w, dy, strided = draw(m, k), draw(n, k), draw(m, n), draw(n, m).t()
    a, b, bias, gain = draw(r, k, dtype=torch.float32), draw(n, r, dtype=torch.float64), draw(n), draw(n, dtype=hidden)
    h, linear, seed = draw(m, r, dtype=hidden), draw(m, n), torch.tensor([5, 7])
    return {
        "forward": (x, w, a, b, bias, 0.5, 0.1, seed),
        "backward": (strided, x, w, a, b, bias, h, 0.5, 0.1, seed),
        "mask": (seed, m, k, 0.1),
        "shrink": (x, a, 0.1, seed),
        "product": (x, w, b, h, bias, gain, 0.5, True),
        "output_grads": (strided, b, h, bias, 0.5),
        "input_grad": ([dy, strided], [w, w], [h, h], [a, a], 0.1, [seed, seed]),
        "a_grad": (h, x, 0.1, seed),
        "gain_grad": (dy, linear, gain, bias),
        "row_norms": (w, a, b, 0.5),
    }


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


for dtype, m in ((torch.bfloat16, 3), (torch.bfloat16, 700)):
    for name, given in arguments(dtype, m).items():
        call, failed, found = getattr(native, name), 0, None
        expected = tensors(call(*given))
        while found is None:
            memory.lora_fail_after(failed)
            try:
                found = tensors(call(*given))
            except (RuntimeError, MemoryError):
                assert memory.lora_allocations_left() == -1, "it failed for another reason"
                failed += 1
            finally:
                memory.lora_fail_after(-1)
        assert failed > 0, f"{name}: no allocation was seen"
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True)), name
print("every failure came out")
"""


def test_each_allocation_that_fails_is_an_exception(tmp_path: Path) -> None:
    """Then the same call gives the same bits."""
    library = tmp_path / "short_of_memory.so"
    source = ROOT / "tests" / "native_host" / "short_of_memory.cpp"
    compiler = toolchain.find_compiler("cpu").path
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.stdout == "every failure came out\n", f"status {done.returncode}\n{done.stderr[-4000:]}"
