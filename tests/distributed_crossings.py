"""Checks that several processes run at once (``distributed_worker.py``): sharding beside each other feature.

Under both of torch's plans for a linear layer, and under FSDP2, where all processes have one batch. What is right is
the reference's, which each process computes whole.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from cases import BACKENDS
from common_passes import passes
from distributed_layers import PLANS, K, N, R, batch, make, run, whole, world
from lora_kernels import FusedLoRAGroup, LoRAConfig, fuse_peft, replace_linear, use_backend
from lora_kernels.accuracy import expected_errors, run_reference
from made_models import disturb
from numerics import check_all

STYLES = ("columns", "rows", "FSDP2")
FP64, BF16 = torch.float64, torch.bfloat16
Measures = tuple[dict[str, Tensor], ...]


def split_by(style: str, layer: nn.Module, device: str) -> nn.Module:
    """A copy in parts."""
    mesh = init_device_mesh(device, (world(),))
    if style == "FSDP2":
        return fully_shard(copy.deepcopy(layer), mesh=mesh)
    return parallelize_module(copy.deepcopy(layer), mesh, PLANS[style]())


def measured(layer: Any, x: Tensor, dy: Tensor) -> Measures:
    """Exact, the yardstick and the errors to expect, by the names of :func:`run`, for what trains."""
    names = {"y": "y", "dx": "dx", "da": "lora_A", "db": "lora_B", "dbias": "bias"}
    weight = layer.matrix(layer.weight).to(x.dtype)
    given = (x, weight, layer.lora_A, layer.lora_B, layer.bias, dy, layer.scaling, None, 0.0, None, layer.activation)
    trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad} | {"y", "dx"}
    three = run_reference(FP64, *given), run_reference(x.dtype, *given), expected_errors(x.dtype, *given)
    return tuple({names[n]: value for n, value in own.items() if names.get(n) in trains} for own in three)


def compare(layer: Any, split: nn.Module, x: Tensor, dy: Tensor, call: Any = None, autocast: bool = False) -> None:
    """Outputs and every gradient of the layer in parts; ``call`` is what runs it, if not itself."""
    compute = BF16 if autocast else x.dtype
    exact, yardstick, errors = measured(layer, x.to(compute), dy)
    with torch.autocast(x.device.type, BF16) if autocast else nullcontext():
        found = {name: whole(value) for name, value in run(split, x, dy, call).items() if value is not None}
    assert found.keys() == exact.keys()
    check_all(found, exact, yardstick, compute, expected=errors)


def check_frozen_parts_stay_frozen(device: str, folder: Path) -> None:
    for style in STYLES:
        for frozen in (("lora_A",), ("lora_B",), ("bias", "lora_A")):
            layer = make(device, dtype=FP64)
            for name in frozen:
                layer.get_parameter(name).requires_grad_(False)
            compare(layer, split_by(style, layer, device), *batch(device, FP64))


def check_few_and_strided_tokens_in_parts(device: str, folder: Path) -> None:
    for style in STYLES:
        layer = make(device, dtype=FP64)
        for tokens in (0, 1, 3):
            compare(layer, split_by(style, layer, device), *batch(device, FP64, tokens))
        x, dy = (torch.stack([t, t * float("nan")], -1).flatten(-2)[:, ::2] for t in batch(device, FP64))
        compare(layer, split_by(style, layer, device), x, dy)


def check_autocast_in_parts(device: str, folder: Path) -> None:
    for style in STYLES:
        layer = make(device)
        x, dy = batch(device, torch.float32)
        compare(layer, split_by(style, layer, device), x, dy.to(BF16), autocast=True)


def check_every_backend_in_parts(device: str, folder: Path) -> None:
    for style in STYLES:
        for name in (name for name, kind in BACKENDS if kind == device):
            layer = make(device)
            with use_backend(name):
                compare(layer, split_by(style, layer, device), *batch(device, torch.float32))


def check_compiled_layers_in_parts(device: str, folder: Path) -> None:
    for style in STYLES:
        torch._dynamo.reset()
        layer = make(device, dtype=FP64)
        split = split_by(style, layer, device)
        compare(layer, split, *batch(device, FP64), torch.compile(split, backend="aot_eager"))


def check_checkpointed_layers_in_parts(device: str, folder: Path) -> None:
    for style in STYLES:
        for reentrant in (False, True):
            layer = make(device, dtype=FP64)
            split = split_by(style, layer, device)
            compare(layer, split, *batch(device, FP64), lambda x: checkpoint(split, x, use_reentrant=reentrant))  # noqa: B023


def check_activations_are_gathered(device: str, folder: Path) -> None:
    """By FSDP2; tensor parallelism is refused: ``check_what_cannot_be_is_a_sentence``."""
    for activation in ("relu", "gelu", "silu"):
        layer = make(device, dtype=FP64, activation=activation)
        compare(layer, split_by("FSDP2", layer, device), *batch(device, FP64))


def check_a_conv1d_in_parts(device: str, folder: Path) -> None:
    """By FSDP2, and cut on N and on K by hand, for torch's plans take an nn.Linear alone."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    mesh = init_device_mesh(device, (world(),))
    torch.manual_seed(1)
    plain = nn.Sequential(conv1d(N, K)).to(device, FP64)
    replace_linear(
        plain, LoRAConfig(r=R, lora_alpha=4, target_modules=["0"], init_lora_weights=False, bias="lora_only")
    )
    layer: Any = disturb(plain)[0]
    compare(layer, split_by("FSDP2", layer, device), *batch(device, FP64))
    for cut in (0, 1):  # W is stored (K, N)
        places = {"weight": Shard(cut), **({"bias": Shard(0), "lora_B": Shard(0)} if cut else {"lora_A": Shard(1)})}

        def lies(name: str, module: nn.Module, mesh: Any, places: Any = places) -> None:
            for own, parameter in list(module.named_parameters(recurse=False)):
                value = distribute_tensor(parameter.data, mesh, [places.get(own, Replicate())])
                module.register_parameter(own, nn.Parameter(value, parameter.requires_grad))

        split = distribute_module(copy.deepcopy(layer), mesh, lies)
        x, dy = (distribute_tensor(t, mesh, [Replicate()]) for t in batch(device, FP64))
        found = {name: whole(value) for name, value in run(split, x, dy, lambda x: everywhere(split(x))).items()}  # noqa: B023
        exact, yardstick, _ = measured(layer, *batch(device, FP64))
        check_all(found, exact, yardstick, FP64)


def everywhere(y: Any) -> Any:
    return y.redistribute(placements=[Replicate()])


class Summed(nn.Module):
    """Both layers' outputs beside each other, as one."""

    def __init__(self, group: nn.Module) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.group(x), -1)


def check_a_group_in_parts(device: str, folder: Path) -> None:
    """Under FSDP2 in common where the group is gathered as one; a layer that is gathered alone runs alone."""
    mesh = init_device_mesh(device, (world(),))
    for style, together in (("columns", False), ("rows", False), ("group", True), ("each", False)):
        layers = [make(device, dtype=FP64), make(device, dtype=FP64)]
        disturb(layers[1])
        model = Summed(FusedLoRAGroup(copy.deepcopy(layers)))
        if style in PLANS:
            plan = PLANS[style]
            parallelize_module(model.group, mesh, {"0": plan(), "1": plan()})
        elif style == "each":
            for member in model.group.children():
                fully_shard(member, mesh=mesh)
        split = model if style in PLANS else fully_shard(model, mesh=mesh)
        x, dy = batch(device, FP64)
        dys = [dy, 2 * dy]
        with passes() as counted:
            found = {name: whole(value) for name, value in run(split, x, torch.cat(dys, -1)).items()}
        assert counted == ([2] if together else []), style
        own = [measured(layer, x, dy)[0] for layer, dy in zip(layers, dys, strict=True)]
        exact = {"y": torch.cat([each["y"] for each in own], -1), "dx": own[0]["dx"] + own[1]["dx"]}
        exact |= {f"group.{i}.{name}": each[name] for i, each in enumerate(own) for name in each if name not in exact}
        assert found.keys() == exact.keys()
        check_all(found, exact, exact, FP64)


def check_two_adapters_of_peft_in_parts(device: str, folder: Path) -> None:
    """Under FSDP2 on the fused path; under tensor parallelism by PEFT's own forward, whatever that does."""
    peft = pytest.importorskip("peft")
    from lora_kernels.peft import calls

    torch.manual_seed(3)
    config = {"r": 3, "lora_alpha": 4, "target_modules": ["0"], "init_lora_weights": False}
    stock = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)).to(FP64), peft.LoraConfig(**config), adapter_name="a0")
    stock.add_adapter("a1", peft.LoraConfig(**{**config, "r": 2}))
    stock = stock.to(device, FP64)
    stock.base_model.set_adapter(["a0", "a1"])
    x, dy = batch(device, FP64)
    exact = run(copy.deepcopy(stock), x, dy)
    model = copy.deepcopy(stock)
    fuse_peft(model)
    split = fully_shard(model, mesh=init_device_mesh(device, (world(),)))
    found = {name: whole(value) for name, value in run(split, x, dy).items()}
    assert found.keys() == exact.keys()
    check_all(found, exact, exact, FP64)
    assert (calls(model).fused, calls(model).own) == (1, {})
