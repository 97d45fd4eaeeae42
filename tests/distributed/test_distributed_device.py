"""DDP, FSDP2, tensor parallelism and both, over NCCL: two processes where there are two GPUs, else one."""

from __future__ import annotations

import pytest
import torch

import distributed_worker
from distributed_worker import Outcomes, launch

GPUS = torch.cuda.device_count()
WORLD = 2 if GPUS > 1 else 1


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return launch([WORLD], "cuda", tmp_path_factory.mktemp("nccl"))


@pytest.mark.gpu
@pytest.mark.xdist_group("nccl")
@pytest.mark.skipif(not GPUS, reason="needs a CUDA GPU: NCCL runs on nothing else")
@pytest.mark.parametrize("name", distributed_worker.names(device="cuda"))
def test_over_nccl(name: str, outcomes: Outcomes) -> None:
    assert not outcomes[WORLD, name], outcomes[WORLD, name]
