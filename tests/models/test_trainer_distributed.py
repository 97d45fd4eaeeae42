"""``SaveAdapterCallback`` with transformers' real ``Trainer`` in two processes on the CPU: DDP, and accelerate's FSDP2.

accelerate's FSDP1 asks for a GPU: ``distributed_fsdp1.py`` calls the callback as ``Trainer`` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from documents import ROOT

for package in ("transformers", "accelerate", "safetensors"):
    pytest.importorskip(package, reason="Trainer needs transformers and accelerate")

WAYS = ("ddp", "fsdp2")
OWN = {"adapter_config.json", "adapter_model.safetensors"}
LEFT_OUT = ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND", "RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found, one after the other of WAYS: their imports take longer than the training."""
    folder = tmp_path_factory.mktemp("trainer")
    env = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    env |= {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "tests" / "trainer_worker.py"), str(folder), *WAYS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("how", WAYS)
def test_one_process_writes_and_the_run_is_resumed(how: str, found: Path) -> None:
    first, second = (json.loads((found / how / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["writes"] == ["checkpoint-2", "checkpoint-4"]
    assert second["writes"] == []
    for told in (first, second):
        assert told["adapters"] == 8
        assert told["trained"]
        assert told["resumed to the same bits"]
        assert set(told["files"]) >= OWN
    whole = {"config.json", "model.safetensors", "generation_config.json"}
    assert whole & set(first["files"]) == ({"model.safetensors"} if how == "ddp" else whole)  # FSDP's are Trainer's own
    assert how != "ddp" or all("lora_" in name for name in first["held"])
