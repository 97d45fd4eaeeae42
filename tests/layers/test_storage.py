"""Parameters whose values another owns: ZeRO-3's placeholders (a stand-in) and accelerate's offloading (its own hooks).

FSDP1 needs several processes: ``distributed_fsdp1.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import LoRAConfig, lora_plus_groups, lora_state_dict, merge_lora, save_adapter, unmerge_lora
from lora_kernels.checkpoint.files import CONFIG, WEIGHTS
from lora_kernels.errors import LoRAKernelsError, LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import TOKENS, Net, disturb, replacing
from numerics import same_bits
from zero3 import GatheredParameters, partition

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias of the layers": {"bias": "lora_only"},
    "DoRA, a whole module": {"use_dora": True, "modules_to_save": ["embed"]},
    "bias of B": {"lora_bias": True, "target_modules": ["up", "down"]},
    "all biases": {"bias": "all"},
}


def adapted(**arguments: Any) -> nn.Module:
    torch.manual_seed(3)
    model = Net()
    config = LoRAConfig(**{"r": 3, "target_modules": ["up", "down", "head"], **arguments})
    lora_kernels.replace_linear(model, config)
    lora_kernels.mark_only_lora_as_trainable(model)
    return disturb(model)


def layer_of(model: nn.Module) -> Any:
    return next(layer for _, layer in lora_layers(model))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def same_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same_files(left: Path, right: Path) -> bool:
    tensors = [safetensors.load_file(folder / WEIGHTS) for folder in (left, right)]
    return same_states(*tensors) and (left / CONFIG).read_bytes() == (right / CONFIG).read_bytes()


CALLS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "merge_lora": lambda model, folder: merge_lora(model),
    "merge": lambda model, folder: layer_of(model).merge(),
    "restore_linear": lambda model, folder: lora_kernels.restore_linear(model),
    "to_linear": lambda model, folder: layer_of(model).to_linear(),
    "reset_lora_parameters": lambda model, folder: layer_of(model).reset_lora_parameters(),
    "lora_state_dict": lambda model, folder: lora_state_dict(model),
    "save_adapter": lambda model, folder: save_adapter(model, folder / "refused"),
    "load_adapter": lambda model, folder: lora_kernels.load_adapter(model, folder / "plain"),
    "replace_linear": lambda model, folder: replacing(target_modules=["plain"])(model),
}


def refuses(name: str, model: nn.Module, folder: Path, *words: str) -> None:
    with pytest.raises(LoRAKernelsError) as caught:
        CALLS[name](model, folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (folder / "refused").exists()


def with_a_plain_layer(model: nn.Module) -> nn.Module:
    model.plain = nn.Linear(4, 4)
    return model


@pytest.mark.parametrize("name", CALLS)
def test_zero_3_is_refused_outside_of_its_context(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "plain")
    model = partition(with_a_plain_layer(adapted()))
    refuses(name, model, tmp_path, "ZeRO-3")
    assert all(parameter.numel() == 0 for parameter in model.parameters())


@pytest.mark.parametrize("name", ["merge_lora", "merge", "load_adapter"])
def test_zero_3_is_refused_where_a_change_would_be_given_up(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "plain")
    model = partition(adapted())
    with GatheredParameters(model.parameters()):
        refuses(name, model, tmp_path, "ZeRO-3", "modifier_rank=0")
    with GatheredParameters(model.parameters(), modifier_rank=0):
        CALLS[name](model, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_3_gives_its_adapters_in_its_context(kind: str, tmp_path: Path) -> None:
    model = adapted(**KINDS[kind])
    expected = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    save_adapter(model, tmp_path / "whole")
    partition(model)
    with GatheredParameters(model.parameters()):
        assert same_states(lora_state_dict(model), expected)
        save_adapter(model, tmp_path / "gathered")
    assert same_files(tmp_path / "whole", tmp_path / "gathered")


def test_the_adapters_alone_may_be_gathered_to_be_given(tmp_path: Path) -> None:
    model = partition(adapted())
    with GatheredParameters([p for name, p in model.named_parameters() if "lora_" in name]):
        assert all(tensor.numel() for tensor in lora_state_dict(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_3_merges_in_its_context_and_back(kind: str) -> None:
    plain, model = adapted(**KINDS[kind]), partition(adapted(**KINDS[kind]))
    before, parameters = outputs(plain), list(model.parameters())
    with GatheredParameters(model.parameters(), modifier_rank=0):
        merge_lora(model)
    assert all(one is other and one.numel() == 0 for one, other in zip(model.parameters(), parameters, strict=True))
    merge_lora(plain)
    with GatheredParameters(model.parameters()):
        assert same_bits(outputs(model), outputs(plain))
    with GatheredParameters(model.parameters()), pytest.raises(LoRAStateError, match="modifier_rank=0"):
        unmerge_lora(model)
    with GatheredParameters(model.parameters(), modifier_rank=0):
        unmerge_lora(model)
    with GatheredParameters(model.parameters()):
        assert same_bits(outputs(model), before)


def test_groups_of_zero_3_are_those_of_the_plain_model() -> None:
    arguments: dict[str, Any] = {"bias": "all", "use_dora": True, "modules_to_save": ["embed"]}
    plain, model = adapted(**arguments), partition(adapted(**arguments))
    names = [{p: name for name, p in each.named_parameters()} for each in (plain, model)]
    groups = [lora_plus_groups(each, 1e-3, weight_decay=0.1) for each in (plain, model)]
    told = [
        [([of[p] for p in group["params"]], group["lr"], group["weight_decay"]) for group in each]
        for of, each in zip(names, groups, strict=True)
    ]
    assert told[0] == told[1]


def offloaded(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    if kind == "disk":
        return accelerate.disk_offload(model, str(folder / "offloaded"), execution_device=torch.device("cpu"))
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


PLACES = ["cpu", "disk"]


def aligned(model: nn.Module) -> ExitStack:
    from accelerate.utils import align_module_device

    stack = ExitStack()
    for module in model.modules():
        stack.enter_context(align_module_device(module))
    return stack


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_adapters_are_given_with_their_values(kind: str, place: str, tmp_path: Path) -> None:
    model = adapted(**KINDS[kind])
    expected = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    save_adapter(model, tmp_path / "whole")
    offloaded(model, place, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    for context in (nullcontext, lambda: aligned(model)):
        with context():
            assert same_states(lora_state_dict(model), expected)
            save_adapter(model, tmp_path / "given")
        assert same_files(tmp_path / "whole", tmp_path / "given")


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_layers_merge_and_back(kind: str, place: str, within: bool, tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    plain, model = adapted(**KINDS[kind]), offloaded(adapted(**KINDS[kind]), place, tmp_path)
    before = outputs(plain)
    with aligned(model) if within else nullcontext():
        merge_lora(model)
    merge_lora(plain)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert same_bits(outputs(model), outputs(plain))
    for _, layer in (*lora_layers(model), *lora_layers(plain)):
        layer.enable_lora(False)
    assert same_bits(outputs(model), outputs(plain))
    for _, layer in lora_layers(model):
        layer.enable_lora(True)
    with aligned(model) if within else nullcontext():
        unmerge_lora(model)
    assert same_bits(outputs(model), before)
    merge_lora(model)
    remove_hook_from_submodules(model)
    assert same_bits(outputs(model), outputs_enabled(plain))


def outputs_enabled(model: nn.Module) -> Tensor:
    for _, layer in lora_layers(model):
        layer.enable_lora(True)
    return outputs(model)


def test_what_is_tied_to_an_offloaded_weight_keeps_its_values(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "head": nn.Linear(8, 8, bias=False)})
    model["embed"].weight = model["head"].weight
    model.requires_grad_(False)
    lora_kernels.replace_linear(model, LoRAConfig(r=2, target_modules=["head"], init_lora_weights=False))
    before = model["embed"].weight.detach().clone()
    offloaded(model, "cpu", tmp_path)
    merge_lora(model)
    assert same_bits(model["embed"](torch.arange(8)), before)


@pytest.mark.parametrize(
    "name", ["restore_linear", "to_linear", "reset_lora_parameters", "load_adapter", "replace_linear"]
)
def test_offloaded_layers_are_not_exchanged(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "plain")
    model = offloaded(with_a_plain_layer(adapted()), "cpu", tmp_path)
    for context in (nullcontext, lambda: aligned(model)):
        with context():
            refuses(name, model, tmp_path, "accelerate", "remove_hook_from_submodules")


def test_groups_of_offloaded_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoRAStateError, match="offloaded"):
        lora_plus_groups(offloaded(adapted(), "cpu", tmp_path), 1e-3)


def test_layers_of_one_input_run_alone_where_accelerate_holds_the_others(tmp_path: Path) -> None:
    plain = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj")})
    lora_kernels.replace_linear(plain, LoRAConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    lora_kernels.share_inputs(plain, [["q_proj", "k_proj"]])
    model, x = offloaded(copy.deepcopy(plain), "cpu", tmp_path), torch.randn(3, 8)
    lora_kernels.unshare_inputs(plain)
    with torch.no_grad():
        assert all(same_bits(model[name](x), plain[name](x)) for name in ("q_proj", "k_proj"))
