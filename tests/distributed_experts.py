"""Checks that several processes run at once (``distributed_worker.py``): a mixture's stacked experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import mixtures
from distributed_layers import whole, world
from lora_kernels import LoRAConfig, mark_only_lora_as_trainable, merge_lora, replace_linear, save_adapter
from lora_kernels.errors import LoRAStateError
from lora_kernels.experts.layer import FusedLoRAExperts
from numerics import check_all, same_bits

FP64 = torch.float64
FILE = "adapter_model.safetensors"


def adapted(device: str) -> nn.Module:
    model = mixtures.made("qwen3_moe", FP64)
    replace_linear(model, LoRAConfig(r=3, lora_alpha=6, target_parameters=mixtures.TARGETS))
    mark_only_lora_as_trainable(model)
    mixtures.move(p for p in model.parameters() if p.requires_grad)
    return model.to(device).train()


def results(model: nn.Module, device: str) -> dict[str, Tensor]:
    logits = model(mixtures.TOKENS.to(device)).logits
    logits.square().mean().backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def check_experts_under_fsdp_give_what_they_give_alone(device: str, folder: Path) -> None:
    """Every process has the whole batch, so the mean of their gradients is one process's."""
    exact = results(adapted(device), device)
    model, mesh = adapted(device), init_device_mesh(device, (world(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    stacked = [
        p for name, p in model.named_parameters() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]
    assert stacked
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in stacked)
    found = results(model, device)
    assert found.keys() == exact.keys()
    check_all(found, exact, exact, FP64)
    with pytest.raises(LoRAStateError, match=r"sharded over processes.*save_adapter"):
        merge_lora(model)
    rank = distributed.get_rank()
    save_adapter(model, folder / "experts" / "sharded")
    distributed.barrier()
    save_adapter(adapted(device), folder / "experts" / f"whole {rank}")
    one, other = (load_file(folder / "experts" / n / FILE) for n in ("sharded", f"whole {rank}"))
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in other)


def check_experts_that_are_sharded_by_hand_are_refused(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    layer = next(module for module in adapted(device).modules() if isinstance(module, FusedLoRAExperts))
    sharded = distribute_tensor(layer.down_proj.data, mesh, [Shard(0)])
    layer.down_proj = nn.Parameter(sharded, requires_grad=False)
    x, index = torch.randn(3, 16, dtype=FP64, device=device), torch.zeros(3, 2, dtype=torch.int64, device=device)
    with pytest.raises(LoRAStateError, match="tensor and expert parallelism do not give"):
        layer(x, index, torch.ones(3, 2, dtype=FP64, device=device))
