"""Checks that several processes run at once (``distributed_worker.py``): one layer under a plan of torch's own.

Each process computes the same layer whole, in float64 and in its own dtype, and compares what came back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, use_backend
from lora_kernels.accuracy import run_reference
from models import acting
from numerics import check, check_all, same_bits

K, N, R, SCALING = 22, 26, 3, 4 / 3  # none of them is a multiple of four: the last process has less
PLANS: dict[str, Callable[[], Any]] = {
    "columns": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rows": lambda: RowwiseParallel(input_layouts=Replicate()),
    "columns, tokens apart": lambda: ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
    "rows, tokens apart": lambda: RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "bias": {},
    "bias of B": {"lora_bias": True},
    "bias of B alone": {"lora_bias": True, "bias": False},
    "DoRA": {"use_dora": True},
    "16 bit": {"dtype": torch.bfloat16},
}


def world() -> int:
    return distributed.get_world_size()


def every_case() -> Iterator[tuple[str, str]]:
    for plan in PLANS:
        for layer in LAYERS:
            yield plan, layer


def make(device: str, **arguments: Any) -> FusedLoRALinear:
    """The same layer in every process, its biases training too."""
    torch.manual_seed(1)
    layer = acting(K, N, **{"r": R, "lora_alpha": 4, "device": device, **arguments})
    for parameter in (layer.bias, layer.lora_bias, layer.lora_magnitude_vector):
        if parameter is not None:
            parameter.requires_grad_()
            parameter.data.add_(torch.rand_like(parameter) / 4)
    return layer


def batch(device: str, dtype: torch.dtype, tokens: int = 20) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(tokens, K, device=device).to(dtype), torch.randn(tokens, N, device=device).to(dtype)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, plan: str) -> Tensor:
    """What a process gives to the layer."""
    return tensor.chunk(world())[distributed.get_rank()] if plan.endswith("apart") else tensor


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, dx and the gradient of each Parameter that trains."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": x.grad, **grads}


def check_outputs_and_gradients_under_both_plans(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    for plan, kind in every_case():
        layer = make(device, **LAYERS[kind])
        x, dy = batch(device, layer.weight.dtype)
        exact = run(_rounded(layer).double(), x.double(), dy.double())
        yardstick = run(copy.deepcopy(layer), x, dy)
        split = parallelize_module(copy.deepcopy(layer), mesh, PLANS[plan]())
        found = run(split, part(x, plan), part(dy, plan))
        apart = plan.endswith("apart")
        exact |= {name: part(exact[name], plan) for name in ("y", "dx") if apart}
        yardstick |= {name: part(yardstick[name], plan) for name in ("y", "dx") if apart}
        assert found.keys() == exact.keys()
        assert all(type(p) is DTensor for p in split.parameters())
        for name, value in found.items():
            check(f"{plan}, {kind}: {name}", whole(value), exact[name], yardstick[name], x.dtype)


def _rounded(layer: FusedLoRALinear) -> FusedLoRALinear:
    """A copy whose adapter is rounded to the compute dtype, as the operators round it."""
    layer = copy.deepcopy(layer)
    for parameter in layer.adapter.values():
        parameter.data = parameter.data.to(layer.weight.dtype)
    return layer
