"""What is saved goes with the untouched model: residuals, scalings of any sign, models that were replaced in parts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    load_adapter,
    mark_only_lora_as_trainable,
    merge_lora,
    replace_linear,
    restore_linear,
    save_adapter,
)
from lora_kernels.checkpoint.files import CONFIG, WEIGHTS
from lora_kernels.errors import InvalidArgumentError, LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import Net, disturb, refused
from numerics import check

safetensors = pytest.importorskip("safetensors.torch")

TOKENS = torch.arange(10).reshape(2, 5)


def fields_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return fields


def trained(plain: nn.Module, **arguments: Any) -> nn.Module:
    model = copy.deepcopy(plain)
    replace_linear(model, LoRAConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["up", "head"], **arguments}))
    mark_only_lora_as_trainable(model, arguments.get("bias", "none"))
    return disturb(model)


def scaled(*scalings: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for (_, layer), scaling in zip(lora_layers(model), scalings, strict=True):
            layer.scaling = scaling

    return change


CASES: dict[str, tuple[dict[str, Any], Callable[[nn.Module], None]]] = {
    "pissa": ({"init_lora_weights": "pissa"}, lambda model: None),
    "pissa, niter": ({"init_lora_weights": "pissa_niter_2"}, lambda model: None),
    "olora, rsLoRA": ({"init_lora_weights": "olora", "use_rslora": True}, lambda model: None),
    "pissa, DoRA": ({"init_lora_weights": "pissa", "use_dora": True}, lambda model: None),
    "olora, DoRA, rsLoRA": ({"init_lora_weights": "olora", "use_dora": True, "use_rslora": True}, lambda model: None),
    "pissa, patterns": (
        {"init_lora_weights": "pissa", "rank_pattern": {"1.up": 3}, "alpha_pattern": {"head": 5}},
        lambda model: None,
    ),
    "pissa, merged": ({"init_lora_weights": "pissa"}, merge_lora),
    "pissa, another scaling": ({"init_lora_weights": "pissa"}, scaled(0.7, -2.0, 0.0)),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, lambda model: None),
    "zero": ({"init_lora_weights": "zero"}, lambda model: None),
    "negative": ({"init_lora_weights": False}, scaled(-1.0, 0.5, -0.25)),
    "negative, bias of B": ({"init_lora_weights": False, "lora_bias": True, "bias": "all"}, scaled(-1.0, 0.5, 0.0)),
    "negative, DoRA, rsLoRA": (
        {"init_lora_weights": False, "use_dora": True, "use_rslora": True},
        scaled(-1.0, -0.5, 2.0),
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", CASES)
def test_peft_and_we_load_it_onto_the_untouched_model(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    arguments, change = CASES[case]
    plain = Net()
    plain.head = nn.Linear(8, 10)  # PEFT wants a bias beside lora_bias
    model = trained(plain, **arguments)
    exact = copy.deepcopy(model).double()
    change(model)
    change(exact)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    load_adapter(plain, tmp_path)
    check("ours", plain(TOKENS), partial(exact, TOKENS), theirs(TOKENS), torch.float32)
    check("theirs", theirs(TOKENS), partial(exact, TOKENS), plain(TOKENS), torch.float32)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_fields_of_a_split_layer_are_those_of_plain_lora(rslora: bool, tmp_path: Path) -> None:
    model = trained(Net(), r=2, lora_alpha=3, use_rslora=rslora, init_lora_weights="pissa")
    save_adapter(model, tmp_path)
    fields = fields_of(tmp_path)
    assert (fields["r"], fields["rank_pattern"], fields["init_lora_weights"]) == (4, {}, True)
    assert fields["lora_alpha"] == (model.head.scaling * 2 if rslora else 6)
    shapes = {name: tuple(t.shape) for name, t in safetensors.load_file(tmp_path / WEIGHTS).items() if "head" in name}
    assert shapes == {
        "base_model.model.head.lora_A.weight": (4, 8),
        "base_model.model.head.lora_B.weight": (10, 4),
    }


def test_an_adapter_of_the_untouched_model_does_not_go_onto_a_residual(tmp_path: Path) -> None:
    save_adapter(trained(Net()), tmp_path)
    model = trained(Net(), init_lora_weights="pissa")
    refused(model, lambda m: load_adapter(m, tmp_path), LoRAStateError, "'pissa'", "residual", "restore_linear")


@pytest.mark.parametrize("scaling", [float("inf"), float("nan")])
def test_a_scaling_that_is_not_finite_is_a_sentence(scaling: float, tmp_path: Path) -> None:
    model = trained(Net())
    model.head.scaling = scaling
    refused(model, lambda m: save_adapter(m, tmp_path / "adapter"), LoRAStateError, "'head'", str(scaling))
    assert not (tmp_path / "adapter").exists()


class Whole(nn.Module):
    """A body that is replaced by itself, and a head of the same name as one in the body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Net(), nn.Linear(8, 3)


def test_parts_that_were_replaced_bring_their_biases_and_whole_modules(tmp_path: Path) -> None:
    model, other = Whole(), Whole()
    config = LoRAConfig(r=2, target_modules=["up"], bias="lora_only", modules_to_save=["head"])
    replace_linear(model.body, config)
    save_adapter(disturb(model), tmp_path)
    mark_only_lora_as_trainable(model, "lora_only")
    assert model.body.head.weight.requires_grad
    assert not model.head.weight.requires_grad
    fields = fields_of(tmp_path)
    assert (fields["bias"], fields["modules_to_save"]) == ("lora_only", ["body.head"])
    load_adapter(other, tmp_path)
    expected, found = model.state_dict(), other.state_dict()
    saved = [name for name in expected if "lora_" in name or "up.bias" in name or name == "body.head.weight"]
    assert len(saved) == 7
    assert all(torch.equal(found[name], expected[name]) for name in saved)


def test_several_parts_are_joined(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": Net(), "b": torch.compile(Net(), backend="eager"), "c": nn.Linear(4, 4)})
    replace_linear(model["a"], LoRAConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    replace_linear(model["b"], LoRAConfig(r=3, target_modules=["down"], bias="all", modules_to_save=["embed"]))
    replace_linear(model, LoRAConfig(r=4, target_modules=["c"]))
    save_adapter(model, tmp_path)
    fields = fields_of(tmp_path)
    assert (fields["bias"], set(fields["modules_to_save"])) == ("all", {"a.head", "b.embed"})
    assert {f"base_model.model.{name}.weight" for name in ("a.head", "b.embed")} < safetensors.load_file(
        tmp_path / WEIGHTS
    ).keys()
    save_adapter(model, tmp_path, bias="none", modules_to_save=[])
    assert (fields_of(tmp_path)["bias"], fields_of(tmp_path)["modules_to_save"]) == ("none", None)


def test_restoring_forgets_what_the_parts_were_told(tmp_path: Path) -> None:
    model = Whole()
    replace_linear(model.body, LoRAConfig(r=2, target_modules=["up"], bias="all", modules_to_save=["head"]))
    restore_linear(model)
    replace_linear(model, LoRAConfig(r=2, target_modules=["up"]))
    save_adapter(model, tmp_path)
    assert (fields_of(tmp_path)["bias"], fields_of(tmp_path)["modules_to_save"]) == ("none", None)


@pytest.mark.parametrize("key", ["blocks.0.up.base_layer.lora_magnitude_vector", "nowhere.lora_magnitude_vector"])
def test_a_malformed_key_of_dora_is_a_sentence(key: str, tmp_path: Path) -> None:
    model = trained(Net(), use_dora=True)
    save_adapter(model, tmp_path)
    tensors = safetensors.load_file(tmp_path / WEIGHTS)
    tensors[f"base_model.model.{key}"] = torch.ones(12)
    safetensors.save_file(tensors, tmp_path / WEIGHTS)
    refused(model, lambda m: load_adapter(m, tmp_path), InvalidArgumentError, repr(key.rpartition(".")[0]), "no such")
