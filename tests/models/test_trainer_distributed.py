"""``SaveAdapterCallback`` with transformers' real ``Trainer`` in two processes on the CPU: DDP, and accelerate's FSDP2.

accelerate's FSDP1 asks for a GPU: ``distributed_fsdp1.py`` calls the callback as ``Trainer`` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from documents import ROOT

for package in ("transformers", "accelerate", "safetensors"):
    pytest.importorskip(package, reason="Trainer needs transformers and accelerate")

OWN = {"adapter_config.json", "adapter_model.safetensors"}
LEFT_OUT = ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND", "RANK", "LOCAL_RANK", "WORLD_SIZE")


def in_two_processes(how: str, folder: Path) -> list[dict[str, Any]]:
    env = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    env |= {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "tests" / "trainer_worker.py"), how, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_one_process_writes_and_the_run_is_resumed(how: str, tmp_path: Path) -> None:
    first, second = in_two_processes(how, tmp_path)
    assert first["writes"] == ["checkpoint-2", "checkpoint-4"]
    assert second["writes"] == []
    for found in (first, second):
        assert found["adapters"] == 8
        assert found["trained"]
        assert found["resumed to the same bits"]
        assert set(found["files"]) >= OWN
    whole = {"config.json", "model.safetensors", "generation_config.json"}
    assert whole & set(first["files"]) == ({"model.safetensors"} if how == "ddp" else whole)  # FSDP's are Trainer's own
    assert how != "ddp" or all("lora_" in name for name in first["held"])
