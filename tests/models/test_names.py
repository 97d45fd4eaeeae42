"""A model within ``torch.compile``, ``checkpoint_wrapper``, DDP and their kind has the names that its author gave."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_kernels
from lora_kernels import LoRAConfig, replace_linear
from lora_kernels.errors import LoRAStateError
from lora_kernels.models.model import lora_layers
from lora_kernels.models.names import parameter_name, plain_modules, plain_name, plain_names, unwrapped
from made_models import TOKENS, disturb, refused
from numerics import same_bits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](self.embed(tokens))))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def blocks(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: Any) -> nn.Module:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model

    return wrapped


def layers(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: Any) -> nn.Module:
        for block in model.blocks:
            for name in ("up", "down"):
                setattr(block, name, wrap(getattr(block, name)))
        return model

    return wrapped


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "compiled blocks": blocks(compiled),
    "checkpointed blocks": blocks(checkpoint_wrapper),
    "checkpointed layers": layers(checkpoint_wrapper),
    "data parallel": nn.DataParallel,
    "data parallel blocks": blocks(nn.DataParallel),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "all of it": lambda model: nn.DataParallel(blocks(compiled)(layers(checkpoint_wrapper)(model))),
}
RULES: list[dict[str, Any]] = [
    {"target_modules": ["up", "down"], "exclude_modules": ["blocks.0.up"]},
    {"target_modules": ["up"], "exclude_modules": r"blocks\.0\..*"},
    {"target_modules": ["blocks.0.up", "head"]},
    {"target_modules": r"blocks\.\d\.up"},
    {"target_modules": "all-linear", "exclude_modules": ["up", "nothing"]},
    {"target_modules": ["up", "down"], "rank_pattern": {"^blocks.0.up": 4}, "alpha_pattern": {r"blocks\.1\..*": 2}},
    {"target_modules": ["up", "down"], "modules_to_save": ["head"], "bias": "all"},
    {"target_modules": ["up", "down"], "modules_to_save": ["blocks.1"]},
    {"target_modules": ["up"], "modules_to_save": ["blocks.1.down"], "bias": "lora_only"},
    {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "blocks"},
]


def told(report: Any) -> tuple[Any, ...]:
    rows = [(row.name, row.places, row.r, row.lora_alpha) for row in report]
    return rows, report.skipped, report.notes, report.groups, report.trainable, report.details()


def trains(model: nn.Module) -> set[str]:
    names = plain_names(model)
    return {parameter_name(names, name) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_rule_means_the_same_within_wrappers(wrapped: str, rule: dict[str, Any]) -> None:
    config = LoRAConfig(r=2, **rule)
    plain, model = Net(), WRAPPED[wrapped](Net())
    expected, found = replace_linear(plain, config), replace_linear(model, config)
    assert told(found)[:4] == told(expected)[:4]
    lora_kernels.mark_only_lora_as_trainable(plain)
    lora_kernels.mark_only_lora_as_trainable(model)
    assert trains(model) == trains(plain)
    assert [name for name, _ in lora_layers(model)] == [name for name, _ in lora_layers(plain)]


@pytest.mark.parametrize("rule", [RULES[0], RULES[5], RULES[6], RULES[8]], ids=str)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_an_adapter_goes_to_a_file_and_back_within_wrappers(wrapped: str, rule: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    config = LoRAConfig(r=2, **rule)
    model, other, third = Net(), WRAPPED[wrapped](Net()), Net()
    replace_linear(model, config)
    lora_kernels.mark_only_lora_as_trainable(model)
    disturb(model)
    lora_kernels.save_adapter(model, tmp_path / "plain")
    report = lora_kernels.load_adapter(other, tmp_path / "plain")
    assert {row.name for row in report} == {name for name, _ in lora_layers(model)}
    lora_kernels.save_adapter(other, tmp_path / "wrapped")
    lora_kernels.load_adapter(third, tmp_path / "wrapped")
    y = model.eval()(TOKENS)
    assert same_bits(other.eval()(TOKENS), y)
    assert same_bits(third.eval()(TOKENS), y)
    load = pytest.importorskip("safetensors.torch").load_file
    left, right = (load(tmp_path / each / "adapter_model.safetensors") for each in ("plain", "wrapped"))
    assert left.keys() == right.keys()
    assert all(same_bits(left[name], right[name]) for name in left)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_state_dict_of_adapters_loads_into_the_wrapped_model(wrapped: str) -> None:
    model, other = WRAPPED[wrapped](Net()), WRAPPED[wrapped](Net())
    for each in (model, other):
        replace_linear(each, LoRAConfig(r=2, target_modules=["up"], modules_to_save=["blocks.1.down"]))
        lora_kernels.mark_only_lora_as_trainable(each)
    disturb(model)
    tensors = lora_kernels.lora_state_dict(model)
    assert tensors.keys() <= model.state_dict().keys()
    result = other.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys
    assert all(same_bits(value, tensors[name]) for name, value in lora_kernels.lora_state_dict(other).items())


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_merging_restoring_and_warnings_name_layers_plainly(wrapped: str) -> None:
    model = WRAPPED[wrapped](Net())
    replace_linear(model, LoRAConfig(r=2, target_modules=["up"]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lora_kernels.lora_state_dict(model)
    names = "'embed.weight', 'blocks.0.down.weight', 'blocks.0.down.bias'"
    assert any(names in str(warning.message) for warning in said)
    lora_kernels.merge_lora(model)
    with pytest.raises(lora_kernels.LoRAKernelsError, match=r"'blocks\.0\.up', 'blocks\.1\.up' is merged already"):
        lora_kernels.merge_lora(model)
    assert [row.places for row in lora_kernels.restore_linear(model)] == [("blocks.0.up",), ("blocks.1.up",)]
    assert not list(lora_layers(model))


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_pefts_layers_are_named_plainly(wrapped: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up"])
    model = WRAPPED[wrapped](peft.inject_adapter_in_model(config, Net()))
    assert [row.name for row in lora_kernels.fuse_peft(model)] == ["blocks.0.up", "blocks.1.up"]
    assert "unfused 2 layers: blocks.0.up, blocks.1.up\n" in str(lora_kernels.unfuse_peft(model))


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_within_ddp_and_compile(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    config = LoRAConfig(r=2, target_modules=["up"], modules_to_save=["head"], exclude_modules=["blocks.0.up"])
    plain = Net()
    replace_linear(plain, config)
    lora_kernels.mark_only_lora_as_trainable(plain)
    with one_process(tmp_path):
        model = compiled(nn.parallel.DistributedDataParallel(plain))
        assert unwrapped(model) is plain
        assert [name for name, _ in lora_layers(model)] == ["blocks.1.up"]
        lora_kernels.save_adapter(model, tmp_path / "wrapped")
        lora_kernels.load_adapter(model, tmp_path / "wrapped")
        assert len(lora_kernels.lora_plus_groups(model, lr=0.1)) == len(lora_kernels.lora_plus_groups(plain, lr=0.1))
    other = Net()
    assert [row.name for row in lora_kernels.load_adapter(other, tmp_path / "wrapped")] == ["blocks.1.up"]


def test_only_a_wrapper_loses_its_part() -> None:
    """A module that its author called "module" keeps the name."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.DataParallel(nn.Sequential(nn.Linear(4, 4)))

    model = Holder()
    assert plain_names(model) == {"": "", "module": "module", "module.module": "module", "module.module.0": "module.0"}
    assert [name for name, _ in plain_modules(model)] == ["", "module", "module.0"]
    assert plain_name("_orig_mod.module.0._checkpoint_wrapped_module") == "module.0"
    assert [row.name for row in replace_linear(model, LoRAConfig(r=2, target_modules=["module.0"]))] == ["module.0"]


def test_a_list_may_hold_the_names_of_named_modules_too() -> None:
    model = blocks(compiled)(Net())
    names = [name for name, module in model.named_modules() if name.endswith("up")]
    config = LoRAConfig(r=2, target_modules=["up"], exclude_modules=names[:1])
    assert [row.name for row in replace_linear(model, config)] == ["blocks.1.up"]


def test_a_layer_that_is_compiled_by_itself_is_left_alone() -> None:
    """The compiled function would go on calling the former layer, and the adapter would never run."""
    model = layers(compiled)(Net())
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert [row.name for row in report] == ["head"]
    assert {row.name for row in report.skipped} == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")}
    assert all("call replace_linear first, then compile" in row.reason for row in report.skipped)
    model.head = compiled(model.head)
    refused(model, lora_kernels.restore_linear, LoRAStateError, "'head'", "by itself")
