"""Checks that several processes run at once (``distributed_worker.py``): FSDP1, whose Parameters are flat.

Within ``summon_full_params`` everything works in place; elsewhere every process refuses, and none waits for another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

from distributed_layers import world
from distributed_training import adapted, same_files, same_losses, tokens, trained
from lora_kernels import (
    fuse_peft,
    load_adapter,
    lora_plus_groups,
    lora_state_dict,
    merge_lora,
    restore_linear,
    save_adapter,
    unmerge_lora,
)
from lora_kernels.errors import InvalidTypeError, LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import Net, replacing
from numerics import check, same_bits

summon: Callable[..., Any] = FullyShardedDataParallel.summon_full_params
KINDS: dict[str, dict[str, Any]] = {"bias of the layers": {"bias": "lora_only"}, "DoRA": {"use_dora": True}}


def flat(
    model: nn.Module, device: str, use_orig_params: bool = True, blocks: bool = False, **options: Any
) -> nn.Module:
    """FSDP1 around ``model``, and with ``blocks`` around each of its LoRA layers first."""
    where = torch.device(device, distributed.get_rank() if device == "cuda" else None)
    options |= {"use_orig_params": use_orig_params, "device_id": where}
    if not use_orig_params:
        model.requires_grad_(True)  # what one flat Parameter needs
    for block in model.blocks if blocks else ():
        for name, layer in list(block.items()):
            block[name] = FullyShardedDataParallel(layer, **options)
    return FullyShardedDataParallel(model, **options)


def outputs(model: nn.Module, device: str) -> Tensor:
    with torch.no_grad():
        return model(tokens(0, device)).clone()


def same_everywhere(tensor: Tensor) -> bool:
    whole = [torch.empty_like(tensor) for _ in range(world())]
    distributed.all_gather(whole, tensor.contiguous())
    return all(same_bits(whole[0], other) for other in whole)


FORMS: list[dict[str, Any]] = [
    {},
    {"blocks": True},
    {"use_orig_params": False},
    {"use_orig_params": False, "blocks": True},
]


def check_fsdp1_merges_in_its_context(device: str, folder: Path) -> None:
    """Merging outlives the context, is the plain model's, and is undone exactly; with ``no writes`` it is refused."""
    for kind, form in zip((*KINDS, *KINDS), FORMS, strict=True):
        plain = adapted(device, **KINDS[kind])
        before = outputs(plain, device)
        split = flat(adapted(device, **KINDS[kind]), device, **form)
        start = outputs(split, device)
        with pytest.raises(LoRAStateError, match="writeback"), summon(split, writeback=False):
            merge_lora(split)
        with torch.no_grad(), summon(split):
            merge_lora(split)
        merge_lora(plain)
        merged = outputs(plain, device)
        assert not same_bits(merged, before)
        assert same_bits(outputs(split, device), merged), (kind, form)
        with summon(split, writeback=False):
            state = {
                name.replace("_fsdp_wrapped_module.", ""): t.clone() for name, t in split.module.state_dict().items()
            }
        assert all(
            same_bits(tensor, plain.state_dict()[name]) for name, tensor in state.items() if name in plain.state_dict()
        )
        for _, layer in (*lora_layers(split), *lora_layers(plain)):
            layer.enable_lora(False)
        assert same_bits(outputs(split, device), outputs(plain, device)), (kind, form)
        for _, layer in lora_layers(split):
            layer.enable_lora(True)
        with summon(split):
            unmerge_lora(split.module)
        assert same_bits(outputs(split, device), start), (kind, form)
        assert same_everywhere(start)


OUTSIDE: dict[str, Callable[[nn.Module, Path], Any]] = {
    "merge_lora": lambda model, folder: merge_lora(model),
    "unmerge_lora": lambda model, folder: unmerge_lora(merged_first(model)),
    "restore_linear": lambda model, folder: restore_linear(model),
    "merge": lambda model, folder: layer_of(model).merge(),
    "reset_lora_parameters": lambda model, folder: layer_of(model).reset_lora_parameters(),
    "lora_state_dict": lambda model, folder: lora_state_dict(model),
    "save_adapter": lambda model, folder: save_adapter(model, folder / "refused"),
    "load_adapter": lambda model, folder: load_adapter(model, folder / "plain"),
}


def layer_of(model: nn.Module) -> Any:
    return next(layer for _, layer in lora_layers(model))


def merged_first(model: nn.Module) -> nn.Module:
    with summon(model):
        merge_lora(model)
    return model


def check_fsdp1_is_refused_outside_its_context(device: str, folder: Path) -> None:
    """The same sentence in every process, also where one holds all of a tensor; nothing is written, nobody waits."""
    if distributed.get_rank() == 0:
        save_adapter(adapted(device), folder / "plain")
    distributed.barrier()
    for name, form in ((name, form) for name in OUTSIDE for form in FORMS[::3]):
        split = flat(adapted(device), device, **form)
        for model in (split, split.module) if name != "unmerge_lora" else (split,):
            outputs(split, device)
            with pytest.raises(LoRAStateError, match="FSDP1"):
                OUTSIDE[name](model, folder)
    for gathered in (False, True):
        split = flat(Net().to(device), device)
        with summon(split) if gathered else nullcontext(), pytest.raises(InvalidTypeError, match="FSDP1"):
            replacing(target_modules=["up"])(split)
    assert not (folder / "refused").exists()


def check_fsdp1_gives_and_takes_adapters_in_its_context(device: str, folder: Path) -> None:
    rank = distributed.get_rank()
    for number, form in enumerate(FORMS[1:3]):
        arguments: dict[str, Any] = {"bias": "all", "modules_to_save": ["embed"]}
        model = adapted(device, **arguments)
        here, there = folder / f"plain-{number}-{rank}", folder / f"flat-{number}-{rank}"
        save_adapter(model, here)
        expected = lora_state_dict(model)
        split = flat(adapted(device, **arguments), device, **form)
        with summon(split, writeback=False):
            save_adapter(split, there)
            given = lora_state_dict(split)
            assert given.keys() == expected.keys()
            assert all(same_bits(given[name], tensor) for name, tensor in expected.items())
        assert same_files(here, there), form
        fresh = adapted(device, **arguments)
        for parameter in fresh.parameters():
            parameter.data.zero_()
        wrapped = flat(fresh, device, **form)
        with pytest.raises(LoRAStateError, match="writeback"), summon(wrapped, writeback=False):
            load_adapter(wrapped, here)
        with summon(wrapped):
            load_adapter(wrapped, here)
        with summon(wrapped, writeback=False):
            loaded = lora_state_dict(wrapped)
            assert all(same_bits(loaded[name], tensor) for name, tensor in expected.items())
    with summon(split, writeback=False, rank0_only=True):
        if rank == 0:
            save_adapter(split, folder / "first")
        else:
            with pytest.raises(LoRAStateError, match="rank0_only"):
                save_adapter(split, folder / "other")
        with pytest.raises(LoRAStateError, match="FSDP1"):
            merge_lora(split)
    assert rank or same_files(folder / "first", here)
    assert not (folder / "other").exists()


def check_fsdp1_trains_like_one_process(device: str, folder: Path) -> None:
    mesh = init_device_mesh(device, (world(),))
    strategies = ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP
    for (kind, arguments), strategy in zip(KINDS.items(), strategies, strict=True):
        split = flat(adapted(device, **arguments), device, blocks=True, sharding_strategy=strategy)
        same_losses(kind, trained(split, device, mesh=mesh), device, **arguments)
    narrow = MixedPrecision(param_dtype=torch.bfloat16)
    split = flat(adapted(device), device, mixed_precision=narrow)
    start = outputs(split, device)
    merged_first(split)
    for enabled in (True, False):
        layer_of(split).enable_lora(enabled)
        assert outputs(split, device).isfinite().all()
    with summon(split):
        unmerge_lora(split)
    layer_of(split).enable_lora(True)
    assert same_bits(outputs(split, device), start)


def check_fsdp1_has_the_groups_of_the_plain_model(device: str, folder: Path) -> None:
    """lora_A and lora_B by their names: flat views are vectors, all of them."""
    arguments: dict[str, Any] = {
        "bias": "all",
        "use_dora": True,
        "modules_to_save": ["head", "embed"],
        "target_modules": ["up"],
    }
    expected = seen(adapted(device, **arguments))
    for blocks in (False, True):
        split = flat(adapted(device, **arguments), device, blocks=blocks)
        assert seen(split) == expected
        with summon(split):
            assert seen(split) == expected
        split = flat(adapted(device, **arguments), device, use_orig_params=False, blocks=blocks)
        for context in (nullcontext, lambda split=split: summon(split)):
            with context(), pytest.raises(LoRAStateError, match="use_orig_params=True"):
                lora_plus_groups(split, 1e-3)


def seen(model: nn.Module) -> list[Any]:
    names = {p: name.replace("_fsdp_wrapped_module.", "") for name, p in model.named_parameters()}
    groups = lora_plus_groups(model, 1e-3, weight_decay=0.1)
    return [([names[p] for p in group["params"]], group["weight_decay"], group["lr"]) for group in groups]


class Attention(nn.Module):
    """q and k read one x; FSDP1 gathers each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.q_proj(hidden_states) * self.k_proj(hidden_states)


def check_fsdp1_gathers_layers_of_one_input_apart(device: str, folder: Path) -> None:
    """Where the base is ignored it is there, and the adapters alone are not."""
    kinds = (False, True) if find_spec("peft") else (False,)
    for use_orig_params, ignored, of_peft in product((True, False), (False, True), kinds):
        torch.manual_seed(3)
        model, x = Attention().to(device), torch.randn(4, 8, device=device)
        holder: Any = model
        if of_peft:
            import peft

            config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, config)
            fuse_peft(model)
        else:
            replacing(target_modules=["q_proj", "k_proj"], init_lora_weights=False)(model)
        assert holder.q_proj._shared is not None
        model.requires_grad_(True)
        exact, expected = copy.deepcopy(model).double()(x.double()).detach(), model(x).detach()
        bases = [p for name, p in model.named_parameters() if ignored and "lora_" not in name]
        flatten: Any = partial(
            FullyShardedDataParallel, use_orig_params=use_orig_params, ignored_states=bases, device_id=x.device
        )
        for name, layer in list(holder.named_children()):
            setattr(holder, name, flatten(layer))
        split = flatten(model)
        for _ in range(2):
            y = split(x)
            y.sum().backward()
            check("y", y.detach(), exact, expected, torch.float32)


def check_fsdp1_has_trainers_callback_save_once(device: str, folder: Path) -> None:
    """What ``Trainer`` calls in every process, outside of any context: the first one writes, and none waits."""
    if not find_spec("transformers"):
        return
    from lora_kernels.trainer import SaveAdapterCallback

    rank = distributed.get_rank()
    for number, (kind, form) in enumerate(zip((*KINDS, *KINDS), FORMS, strict=True)):
        plain, split = adapted(device, **KINDS[kind]), flat(adapted(device, **KINDS[kind]), device, **form)
        save_adapter(plain, folder / f"plain-{number}-{rank}")
        place = folder / f"own-{rank}"  # as on machines without a common disk
        arguments = SimpleNamespace(output_dir=str(place), should_save=rank == 0, fsdp=True, deepspeed=None)
        SaveAdapterCallback().on_save(arguments, SimpleNamespace(global_step=number), None, model=split)
        written = place / f"checkpoint-{number}"
        assert written.exists() == (rank == 0)
        assert rank or same_files(written, folder / f"plain-{number}-{rank}"), (kind, form)
        outputs(split, device)
        distributed.barrier()
