"""DDP, FSDP2, tensor parallelism and both: several processes on the CPU; GPUs: ``test_distributed_device.py``.

The checks are in the files that ``distributed_worker.py`` names, which runs them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed_worker
from distributed_worker import ROOT, Outcomes, launch
from numerics import alike_as_printed

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return launch([2, 4], "cpu", tmp_path_factory.mktemp("gloo"))


@needs_gloo
@pytest.mark.parametrize("name", distributed_worker.names())
def test_with_two_processes(name: str, on_cpu: Outcomes) -> None:
    assert not on_cpu[2, name], on_cpu[2, name]


@needs_gloo
@pytest.mark.parametrize("name", distributed_worker.names(once=False))
def test_with_four_processes(name: str, on_cpu: Outcomes) -> None:
    assert not on_cpu[4, name], on_cpu[4, name]


def test_a_check_that_does_not_end_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_worker, "LIMIT", 1)
    monkeypatch.setattr(distributed_worker, "START", 0)
    outcomes = launch([1], "cpu", tmp_path, ("check_losses_under_ddp",))
    assert "did not come to its end" in outcomes[1, "check_losses_under_ddp"]


# accelerate's FSDP2 is for GPUs: on a CPU its launcher trains unsharded copies, and says nothing. Told that these are
# GPUs, it goes the whole way, on the CPU.
AS_GPUS = """
import os
if os.environ.get("LOCAL_RANK"):
    from accelerate.state import DistributedType, PartialState
    PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_GPU)
"""
FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_reshard_after_forward: true
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""


@needs_gloo
def test_accelerate_launches_the_finetune_example_with_fsdp2(tmp_path: Path) -> None:
    for package in ("accelerate", "transformers", "safetensors"):
        pytest.importorskip(package, reason="the fine-tune needs transformers and accelerate")
    (tmp_path / "sitecustomize.py").write_text(AS_GPUS)
    (tmp_path / "fsdp2.yaml").write_text(FSDP2)
    left_out = ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    env = {key: value for key, value in os.environ.items() if key not in left_out}
    env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"ACCELERATE_TORCH_DEVICE": "cpu", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp2.yaml"]
    example = [str(ROOT / "examples" / "finetune_llama.py"), "--steps", "5", "--out", "adapter"]
    command = [*launcher, "--main_process_port", "0", *example]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parallel_mode != ParallelMode.DISTRIBUTED" not in done.stderr
    found = re.findall(r"([\d.]+) before, ([\d.]+) after, ([\d.]+) merged", done.stdout)
    assert len(found) == 2
    assert found[0] == found[1]
    assert alike_as_printed([found[0][1]], [found[0][2]])
    assert done.stdout.count("loaded 14 layers onto the plain model: the same logits") == 2
