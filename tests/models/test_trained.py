"""What trains and what is saved are one list: each Parameter that requires grad is written, or named in a warning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import (
    FusedLoRALinear,
    LoRAConfig,
    load_adapter,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    replace_linear,
    save_adapter,
)
from made_models import TOKENS, Net
from numerics import check, same_bits


class Headed(Net):
    """With biases inside and outside of the layers that are adapted, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.classes = nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classes(super().forward(tokens))


def plain() -> nn.Module:
    torch.manual_seed(5)
    return Headed()


def replaced(**arguments: Any) -> nn.Module:
    model = plain()
    replace_linear(model, LoRAConfig(**{"r": 2, "target_modules": ["up"], **arguments}))
    return model


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        optimizer.step()
    return model.eval()


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


UPS = {f"blocks.{i}.up.bias" for i in (0, 1)}
BIASES = UPS | {f"blocks.{i}.down.bias" for i in (0, 1)} | {"norm.bias", "classes.bias"}
OUT = {"classes.weight", "classes.bias"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {  # of the configuration, of marking, what trains
    "nothing": ({}, {}, set()),
    "the configuration's biases": ({"bias": "lora_only"}, {}, UPS),
    "all of the configuration's biases": ({"bias": "all"}, {}, BIASES),
    "biases by marking": ({}, {"bias": "lora_only"}, UPS),
    "all biases by marking": ({}, {"bias": "all"}, BIASES),
    "none by marking": ({"bias": "all"}, {"bias": "none"}, set()),
    "a head": ({"modules_to_save": ["classes"]}, {}, OUT),
    "a head and biases": ({"modules_to_save": ["classes"], "bias": "lora_only"}, {}, UPS | OUT),
}


def no_warning(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


@pytest.mark.parametrize("case", CASES)
def test_what_trains_is_saved_and_loaded(case: str, tmp_path: Path) -> None:
    config, marked, expected = CASES[case]
    model = replaced(**config)
    mark_only_lora_as_trainable(model, **marked)
    assert trains(model) == expected
    trained(model)
    no_warning(lambda: save_adapter(model, tmp_path))
    loaded = plain().eval()
    load_adapter(loaded, tmp_path)
    assert same_bits(loaded(TOKENS), model(TOKENS))
    mark_only_lora_as_trainable(loaded)
    assert expected <= trains(loaded)


@pytest.mark.parametrize("case", CASES)
def test_what_trains_is_in_the_state_dict(case: str) -> None:
    config, marked, expected = CASES[case]
    model = replaced(**config)
    mark_only_lora_as_trainable(model, **marked)
    trained(model)
    tensors = no_warning(lambda: lora_state_dict(model))
    assert expected <= set(tensors) <= set(model.state_dict())
    other = replaced(**config).eval()
    other.load_state_dict(tensors, strict=False)
    assert same_bits(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_what_has_trained(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config, marked, _ = CASES[case]
    model = replaced(**config)
    mark_only_lora_as_trainable(model, **marked)
    save_adapter(trained(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain(), str(tmp_path)).eval()
    exact = partial(copy.deepcopy(model).double(), TOKENS)
    check(case, theirs(TOKENS), exact, model(TOKENS), torch.float32)


LEFT: dict[str, tuple[Callable[[nn.Module], Any], set[str]]] = {  # what is made to train, and what is left out
    "a head": (lambda model: model.classes.requires_grad_(True), OUT),
    "an embedding": (lambda model: model.embed.requires_grad_(True), {"embed.weight"}),
    "a layer norm": (lambda model: model.norm.requires_grad_(True), {"norm.weight", "norm.bias"}),
    "a base weight": (lambda model: model.blocks[0]["up"].weight.requires_grad_(True), {"blocks.0.up.weight"}),
    "a bias": (lambda model: model.blocks[0]["up"].bias.requires_grad_(True), {"blocks.0.up.bias"}),
    "under a merged weight": (
        lambda model: (model.blocks[0]["up"].weight.requires_grad_(True), merge_lora(model)),
        {"blocks.0.up.weight"},
    ),
}
GIVES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save_adapter": save_adapter,
    "lora_state_dict": lambda model, folder: lora_state_dict(model),
}


@pytest.mark.parametrize("name", GIVES)
@pytest.mark.parametrize("case", LEFT)
def test_what_trains_and_is_not_saved_is_named(case: str, name: str, tmp_path: Path) -> None:
    let, expected = LEFT[case]
    model = replaced()
    mark_only_lora_as_trainable(model)
    let(model)
    with pytest.warns(UserWarning, match=f"^{name} leaves out ") as told:
        GIVES[name](model, tmp_path)
    (text,) = [str(each.message) for each in told]
    assert {word for word in text.split("'") if word in dict(model.named_parameters())} == expected
    assert told[0].filename == __file__


@pytest.mark.parametrize("name", GIVES)
def test_biases_that_are_not_asked_for_are_named(name: str, tmp_path: Path) -> None:
    model = replaced(bias="lora_only")
    mark_only_lora_as_trainable(model)
    calls = {"save_adapter": lambda: save_adapter(model, tmp_path, bias="none")}
    calls["lora_state_dict"] = lambda: lora_state_dict(model, bias="none")
    with pytest.warns(UserWarning, match=r"blocks\.0\.up\.bias"):
        calls[name]()


def test_a_tied_parameter_that_is_saved_under_one_name_is_saved(tmp_path: Path) -> None:
    model = replaced(modules_to_save=["embed", "head"])
    model.head.weight = model.embed.weight
    mark_only_lora_as_trainable(model)
    no_warning(lambda: save_adapter(model, tmp_path))


def test_layers_that_were_made_by_hand_are_marked_without_a_configuration() -> None:
    model = nn.Sequential(FusedLoRALinear(4, 4, r=2), nn.Linear(4, 1))
    mark_only_lora_as_trainable(model)
    assert trains(model) == set()
    mark_only_lora_as_trainable(model, "lora_only")
    assert set(no_warning(lambda: lora_state_dict(model))) == {"0.lora_A", "0.lora_B", "0.bias"}


def test_parts_that_were_replaced_are_marked_as_each_was_told() -> None:
    model = nn.ModuleDict({"a": replaced(bias="lora_only"), "b": replaced(modules_to_save=["classes"])})
    mark_only_lora_as_trainable(model)
    assert {f"b.{name}" for name in OUT} | {f"a.{name}" for name in UPS} <= trains(model)
    assert set(no_warning(lambda: lora_state_dict(model))) >= trains(model)
