"""Checks that several processes run at once (``distributed_worker.py``): models that train, are saved and resumed.

Losses are compared over ``STEPS`` steps with those of one process, which each process computes for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distributed_layers import whole, world
from lora_kernels import (
    LoRAConfig,
    fuse_peft,
    load_adapter,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    replace_linear,
    restore_linear,
    save_adapter,
    unmerge_lora,
    use_backend,
)
from lora_kernels.checkpoint.files import CONFIG, WEIGHTS
from lora_kernels.errors import LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import Net, disturb
from numerics import check, same_bits

STEPS, ROWS, WIDTH = 16, 8, 5
KINDS: dict[str, dict[str, Any]] = {
    "bias of the layers": {"bias": "lora_only"},
    "DoRA": {"use_dora": True, "use_rslora": True},
}


def adapted(device: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> nn.Module:
    """The same model in every process."""
    torch.manual_seed(3)
    model = Net().to(device=device, dtype=dtype)
    config = LoRAConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["up", "down", "head"], **arguments})
    replace_linear(model, config)
    mark_only_lora_as_trainable(model, config.bias)
    return disturb(model)


def tokens(step: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(10, (ROWS, WIDTH), generator=generator).to(device)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The cross entropy of a permutation of the tokens, in fp32 or wider."""
    logits = model(ids).flatten(0, 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), (ids * 3 + 1).flatten() % 10)


def trained(
    model: nn.Module,
    device: str,
    steps: range | None = None,
    mesh: DeviceMesh | None = None,
    pieces: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
) -> Tensor:
    """The losses of ``steps``, one optimizer step each, summed up over the processes of ``mesh``, which share a batch.

    ``pieces``: the gradients of so many parts of a batch are accumulated.
    """
    optimizer = optimizer or adamw(model)
    losses = []
    for step in steps or range(STEPS):
        ids = tokens(step, device)
        if mesh is not None:
            ids = ids.chunk(mesh.size())[mesh.get_local_rank()]
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, part in enumerate(ids.chunk(pieces)):
            later = number < pieces - 1 and isinstance(model, DistributedDataParallel)
            with model.no_sync() if later else nullcontext():
                loss = loss_of(model, part) / pieces
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if mesh is not None:
            distributed.all_reduce(total, group=mesh.get_group())
            total /= mesh.size()
        losses.append(total)
    return torch.stack(losses)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


class Cast(nn.Module):
    """A model that computes in ``dtype``, its fp32 Parameters cast for each forward, as FSDP2 has it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, ids: Tensor) -> Tensor:
        if self.dtype is torch.float32:
            return self.model(ids)
        cast = {name: parameter.to(self.dtype) for name, parameter in self.model.named_parameters()}
        return torch.func.functional_call(self.model, cast, (ids,))


_single: dict[Any, list[Tensor]] = {}


def same_losses(name: str, losses: Tensor, device: str, compute: torch.dtype = torch.float32, **made: Any) -> None:
    """Compares with the model of :func:`adapted` in one process; see :func:`alone`."""
    key = (len(losses), compute, *made.items())
    if key not in _single:
        _single[key] = alone(lambda: adapted(device, **made), device, range(len(losses)), compute)
    check(name, losses, *_single[key], compute)
    assert losses[-3:].mean() < losses[:3].mean() - 0.1


def alone(make: Callable[[], nn.Module], device: str, steps: range, compute: torch.dtype) -> list[Tensor]:
    """What the first process finds without the others: exact losses, in float64, and those of plain PyTorch.

    The latter with whole batches and with halves, for the order of a sum is not the model's to choose.
    """
    results = [torch.zeros(len(steps), dtype=torch.float64, device=device) for _ in range(2)]
    if distributed.get_rank() == 0:
        exact = trained(make().double(), device, steps)
        with use_backend("eager"):
            ways = [trained(Cast(make(), compute), device, steps, pieces=pieces) for pieces in (1, 2)]
        results = [exact, max(ways, key=lambda way: float((way - exact).norm()))]
    for result in results:
        distributed.broadcast(result, 0)
    return results


def by_blocks(model: nn.Module, mesh: DeviceMesh, **arguments: Any) -> nn.Module:
    """FSDP2 as one applies it: the blocks (here their layers, for a ModuleDict has no forward), then the root."""
    for block in model.blocks:
        fully_shard([block["up"], block["down"]], mesh=mesh, **arguments)
    return fully_shard(model, mesh=mesh, **arguments)


def in_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Torch's plans, as for any nn.Linear."""
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan | {"head": ColwiseParallel(output_layouts=Replicate())})


def two_dimensions(device: str) -> DeviceMesh:
    return init_device_mesh(device, (max(world() // 2, 1), min(world(), 2)), mesh_dim_names=("data", "model"))


def check_losses_under_ddp(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("bias of the layers", 1, {}),
        ("bias of the layers", 2, {}),  # the first part under no_sync
        ("DoRA", 1, {"static_graph": True}),
    ]
    for kind, pieces, options in cases:
        model = adapted(device, **KINDS[kind])
        parallel = DistributedDataParallel(model, find_unused_parameters=False, **options)
        losses = trained(parallel, device, mesh=mesh, pieces=pieces)
        same_losses(f"{kind}, {pieces}, {options}", losses, device, **KINDS[kind])


def check_losses_under_fsdp(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    for kind, reshard in (("bias of the layers", True), ("DoRA", False))[: some()]:
        split = by_blocks(adapted(device, **KINDS[kind]), mesh, reshard_after_forward=reshard)
        assert type(split.blocks[0]["up"].weight) is DTensor
        same_losses(kind, trained(split, device, mesh=mesh), device, **KINDS[kind])


def check_losses_under_tensor_parallelism(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    for kind, arguments in list(KINDS.items())[-some() :]:
        model = adapted(device, **arguments)
        names = trainable(model)
        split = in_parallel(model, mesh)
        assert trainable(split) == names
        same_losses(kind, trained(split, device), device, **arguments)


def check_losses_under_fsdp_and_tensor_parallelism(device: str, folder: Path) -> None:
    mesh = two_dimensions(device)
    for kind, arguments in list(KINDS.items())[-some() :]:
        split = by_blocks(in_parallel(adapted(device, **arguments), mesh["model"]), mesh["data"])
        assert split.blocks[0]["up"].weight.device_mesh.ndim == 2
        same_losses(kind, trained(split, device, mesh=mesh["data"]), device, **arguments)


def some() -> int:
    """How many of two kinds of layers, likewise."""
    return 2 if world() < 4 else 1


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_policies_of_fsdp(device: str, folder: Path) -> None:
    """Mixed precision as one uses it, fp32 adapters over 16-bit weights, and Parameters that are kept on the CPU."""
    mesh = init_device_mesh(device, (world(),))
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device == "cuda")
    cases: list[tuple[torch.dtype, dict[str, Any], torch.dtype]] = [
        (torch.float32, {"mp_policy": narrow}, torch.bfloat16),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, {"mp_policy": narrow}, torch.bfloat16),
        (torch.float32, {"offload_policy": offload}, torch.float32),
    ]
    for dtype, options, compute in cases:
        split = by_blocks(adapted(device, dtype=dtype), mesh, **options)
        seen: list[torch.dtype] = []
        handle = split.blocks[0]["up"].register_forward_hook(lambda layer, x, y, seen=seen: seen.append(y.dtype))
        losses = trained(split, device, range(STEPS), mesh)
        handle.remove()
        assert set(seen) == {compute}
        same_losses(f"{dtype}, {list(options)}", losses, device, compute, dtype=dtype)
        loss_of(split, tokens(0, device)).backward()
        grads = {name: p.grad for name, p in split.named_parameters() if p.grad is not None}
        assert set(grads) == set(trainable(split))
        assert all(type(grad) is DTensor and grad.dtype == torch.float32 for grad in grads.values())


STYLES: dict[str, Callable[[nn.Module, str], tuple[nn.Module, DeviceMesh | None]]] = {
    "FSDP2": lambda model, device: (by_blocks(model, mesh := init_device_mesh(device, (world(),))), mesh),
    "tensor parallelism": lambda model, device: (in_parallel(model, init_device_mesh(device, (world(),))), None),
    "both": lambda model, device: (
        by_blocks(in_parallel(model, (mesh := two_dimensions(device))["model"]), mesh["data"]),
        mesh["data"],
    ),
}


def check_merging_whole_models(device: str, folder: Path) -> None:
    ids = tokens(0, device)
    with_bias = {"lora_bias": True, "target_modules": ["up", "down"]}  # a head without a bias is refused under FSDP2
    for style, arguments in ((style, arguments) for style in STYLES for arguments in (*KINDS.values(), with_bias)):
        model = adapted(device, **arguments)
        split, _ = STYLES[style](copy.deepcopy(model), device)
        exact = copy.deepcopy(model).double()
        state = {name: whole(tensor).clone() for name, tensor in split.state_dict().items()}
        before = split(ids).detach()  # FSDP2's root keeps what it has gathered, for a backward
        with torch.no_grad():
            for part in (model, exact, split):
                merge_lora(part)
            check(style, split(ids), exact(ids), model(ids), torch.float32)
            for _, layer in lora_layers(split):
                layer.enable_lora(False)
            plain = split(ids)
            after = split.state_dict()
            assert all(same_bits(whole(after[name]), tensor) for name, tensor in state.items()), style
            unmerge_lora(split)
            assert same_bits(split(ids), plain), style
            for _, layer in lora_layers(split):
                layer.enable_lora(True)
            assert same_bits(split(ids), before), style
            if style == "tensor parallelism":
                merge_lora(split)
                merged = split(ids)
                restore_linear(split)
                assert type(split.blocks[0]["up"]) is nn.Linear
                assert same_bits(split(ids), merged)


def check_adapters_are_saved_whole(device: str, folder: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"init_lora_weights": "pissa"},
        {"bias": "lora_only"},
        {"use_dora": True, "modules_to_save": ["embed"]},
    ]
    for style, (number, arguments) in ((style, case) for style in STYLES for case in enumerate(cases)):
        model = adapted(device, **arguments)
        for _, layer in lora_layers(model):
            layer.scaling *= -1
        split, _ = STYLES[style](copy.deepcopy(model), device)
        split(tokens(0, device))  # FSDP2's root keeps what it has gathered
        here, there = folder / f"{style}-{number}", folder / f"whole-{style}-{number}-{distributed.get_rank()}"
        save_adapter(split, here)
        save_adapter(model, there)
        assert same_files(here, there), (style, arguments)
        torch.manual_seed(3)
        loaded = Net().to(device)
        load_adapter(loaded, here)
        distributed.barrier()
    blocked = folder / "blocked"
    if distributed.get_rank() == 0:
        blocked.write_text("a file, where a folder should be")
    distributed.barrier()
    with pytest.raises(LoRAStateError, match="blocked"):
        save_adapter(split, blocked)
    with pytest.raises(LoRAStateError, match="the meta device or sharded"):
        load_adapter(split, here)


def check_the_former_fsdp_saves_within_its_context(device: str, folder: Path) -> None:
    model, rank = adapted(device), distributed.get_rank()
    save_adapter(model, folder / f"before-{rank}")
    where = torch.device(device, rank if device == "cuda" else None)
    split = FullyShardedDataParallel(model, use_orig_params=True, device_id=where)
    with FullyShardedDataParallel.summon_full_params(split):
        save_adapter(split.module, folder / f"after-{rank}")
    assert same_files(folder / f"before-{rank}", folder / f"after-{rank}")


def same_files(left: Path, right: Path) -> bool:
    one, other = (safetensors.load_file(folder / WEIGHTS) for folder in (left, right))
    alike = one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)
    return alike and (left / CONFIG).read_bytes() == (right / CONFIG).read_bytes()


def check_checkpoints_resume_bit_for_bit(device: str, folder: Path) -> None:
    for style in STYLES:
        (straight, mesh), (first, _), (second, _) = (STYLES[style](adapted(device), device) for _ in range(3))
        expected = trained(straight, device, range(6), mesh)
        optimizer = adamw(first)
        begun = trained(first, device, range(3), mesh, optimizer=optimizer)
        model_state, optimizer_state = get_state_dict(first, optimizer)
        place = folder / f"checkpoint-{style}"
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=place)
        disturb(second)
        other = adamw(second)
        model_state, optimizer_state = get_state_dict(second, other)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=place)
        set_state_dict(second, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        ended = trained(second, device, range(3, 6), mesh, optimizer=other)
        assert same_bits(torch.cat([begun, ended]), expected), style
        left, right = lora_state_dict(straight), lora_state_dict(second)
        assert all(same_bits(whole(right[name]), whole(tensor)) for name, tensor in left.items()), style


def check_checkpoints_become_adapters(device: str, folder: Path) -> None:
    """By the checkpoint, and by torch's own gathering: the same files as save_adapter's of the sharded model."""
    split, mesh = STYLES["FSDP2"](adapted(device), device)
    trained(split, device, range(2), mesh)
    save_adapter(split, folder / "direct")
    dcp.save(get_model_state_dict(split), checkpoint_id=folder / "to-consolidate")
    full = get_model_state_dict(split, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.get_rank() == 0:
        plain = adapted("cpu")
        state = plain.state_dict()
        dcp.load(state, checkpoint_id=folder / "to-consolidate", no_dist=True)
        save_adapter(plain, folder / "consolidated")
        gathered = adapted("cpu")
        gathered.load_state_dict(full)
        save_adapter(gathered, folder / "gathered")
        for name in ("consolidated", "gathered"):
            assert same_files(folder / name, folder / "direct"), name
    again, _ = STYLES["FSDP2"](disturb(adapted(device)), device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, full, options=options)
    left, right = lora_state_dict(split), lora_state_dict(again)
    assert all(same_bits(whole(right[name]), whole(tensor)) for name, tensor in left.items())


def check_live_peft_models(device: str, folder: Path) -> None:
    """PEFT's own layers, fused: the losses of PEFT's own, and no call by PEFT's own forward."""
    peft = pytest.importorskip("peft")
    from lora_kernels.peft import calls

    mesh = init_device_mesh(device, (world(),))
    torch.manual_seed(3)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["up", "down", "head"], init_lora_weights=False)
    stock = peft.get_peft_model(Net(), config).to(device)
    steps = range(STEPS)
    exact, yardstick = alone(lambda: copy.deepcopy(stock), device, steps, torch.float32)
    for style in ("DDP", "FSDP2"):
        model = copy.deepcopy(stock)
        fuse_peft(model)
        if style == "DDP":
            split: nn.Module = DistributedDataParallel(model)
        else:
            inner = model.base_model.model
            for block in inner.blocks:
                fully_shard([block["up"], block["down"]], mesh=mesh)
            split = fully_shard(model, mesh=mesh)
        losses = trained(split, device, steps, mesh)
        check(style, losses, exact, yardstick, torch.float32)
        counted = calls(model)
        assert counted.fused == 5 * len(steps)
        assert not counted.own
