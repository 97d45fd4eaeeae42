"""An adapter that nothing calls: merging and saving name it, and nothing else."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    FusedLoRAGroup,
    LoRAConfig,
    called,
    load_adapter,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    replace_linear,
    save_adapter,
    unmerge_lora,
)
from lora_kernels.errors import InvalidTypeError, LoRAKernelsWarning
from lora_kernels.models.model import lora_layers
from lora_kernels.models.trained import never_called

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
ASKED: dict[str, Callable[[nn.Module, Path], Any]] = {
    "merge_lora": lambda model, folder: merge_lora(model),
    "lora_state_dict": lambda model, folder: lora_state_dict(model),
    "save_adapter": lambda model, folder: save_adapter(model, folder),
}


class Head(nn.Module):
    """A body and a head; ``way`` says how the head is computed."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.lm_head, self.way = nn.Linear(16, 16), nn.Linear(16, 8), way
        self.listed = [self.body, self.lm_head]  # no ModuleList: what replaces a layer does not come here

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        if self.way == "weight":
            return F.linear(h, self.lm_head.weight, self.lm_head.bias)
        if self.way == "list":
            return self.listed[1](h)
        if self.way == "checkpoint":
            return checkpoint(self.lm_head, h, use_reentrant=True)
        return self.lm_head(h)


def adapted(way: str = "called", target_modules: Any = ("body", "lm_head"), **settings: Any) -> Head:
    model = Head(way)
    replace_linear(model, LoRAConfig(r=2, target_modules=list(target_modules), **settings))
    mark_only_lora_as_trainable(model)
    return model


def trained(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """After two steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model if call is None else call)(X).square().sum().backward()
        optimizer.step()
    return model


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in never_called(list(lora_layers(model)))]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(called, "_compiled", False)


@pytest.mark.parametrize("function", ASKED)
@pytest.mark.parametrize("way", ["weight", "list"])
def test_an_adapter_that_nothing_calls_is_named_once(way: str, function: str, tmp_path: Path) -> None:
    model = trained(adapted(way))
    with pytest.warns(LoRAKernelsWarning, match=f"{function} finds that 'lm_head' was never called") as caught:
        ASKED[function](model, tmp_path)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)


def test_the_warning_stands_at_the_users_line(tmp_path: Path) -> None:
    for function in (merge_lora, lora_state_dict, lambda model: save_adapter(model, tmp_path)):
        model = trained(adapted("weight"))
        with pytest.warns(LoRAKernelsWarning) as caught:
            function(model)
        assert [warning.filename for warning in caught] == [__file__]


def second(model: Head) -> Head:
    """More layers, after training; saved at once."""
    trained(model)
    replace_linear(model, LoRAConfig(r=2, target_modules=["lm_head"]))
    return model


def frozen(model: Head) -> Head:
    model.lm_head.requires_grad_(False)
    return trained(model)


def by_parts(model: Head) -> Head:
    """Each layer in a graph of its own, but for the body."""
    head = torch.compile(model.lm_head, backend="aot_eager")
    return trained(model, lambda x: head(torch.relu(model.body(x))))


def compiled_group() -> nn.Module:
    group = FusedLoRAGroup([nn.Linear(16, 16), nn.Linear(16, 16)])
    model = nn.ModuleDict({"first": nn.Linear(16, 16), "group": group})
    replace_linear(model, LoRAConfig(r=2, target_modules=["first", "0", "1"]))
    mark_only_lora_as_trainable(model)
    rest = torch.compile(model["group"], backend="aot_eager")
    return trained(model, lambda x: torch.cat(rest(model["first"](x))))


QUIET: dict[str, Callable[[Path], nn.Module]] = {
    "all ran": lambda folder: trained(adapted()),
    "checkpointed": lambda folder: trained(adapted("checkpoint")),
    "not yet run": lambda folder: adapted("weight"),
    "evaluated": lambda folder: _evaluated(adapted("weight")),
    "frozen": lambda folder: frozen(adapted("weight")),
    "compiled": lambda folder: (lambda model: trained(model, torch.compile(model, backend="aot_eager")))(adapted()),
    "compiled by parts": lambda folder: by_parts(adapted()),
    "a compiled group": lambda folder: compiled_group(),
    "replaced after training": lambda folder: second(adapted(target_modules=["body"])),
    "loaded": lambda folder: _loaded_for_inference(folder),
    "merged and back": lambda folder: _merged_and_back(trained(adapted())),
    "copied": lambda folder: copy.deepcopy(trained(adapted())),
}


def _evaluated(model: Head) -> Head:
    model.eval()(X)
    return model


def _merged_and_back(model: Head) -> Head:
    merge_lora(model)
    unmerge_lora(model)
    return model


def _loaded_for_inference(folder: Path) -> Head:
    save_adapter(trained(adapted()), folder)
    model = Head("weight").eval()
    load_adapter(model, folder)
    model(X)
    with torch.no_grad():
        model.train()(X)
    return model


@pytest.mark.parametrize("case", QUIET)
def test_there_is_no_false_alarm(case: str, tmp_path: Path) -> None:
    model = QUIET[case](tmp_path / "before")
    assert names(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_state_dict(model)


def test_it_is_seen_in_a_compiled_model_too() -> None:
    model = adapted("weight")
    assert names(trained(model, torch.compile(model, backend="aot_eager"))) == ["lm_head"]


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_know_it(carry: Callable[[nn.Module], nn.Module]) -> None:
    assert names(carry(trained(adapted("weight")))) == ["lm_head"]


# Mamba


def mamba(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    if kind == "mamba2":
        sizes |= {"num_heads": 4, "head_dim": 8, "n_groups": 1}
    name = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}[kind]
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))


@pytest.mark.parametrize("target", [["in_proj", "out_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_mambas_out_proj_is_left_alone(kind: str, target: Any) -> None:
    model = mamba(kind)
    report = replace_linear(model, LoRAConfig(r=1, target_modules=target))
    assert [layer.name for layer in report.skipped] == ["backbone.layers.0.mixer.out_proj"]
    assert all(word in report.skipped[0].reason for word in (kind, "never call"))
    assert "backbone.layers.0.mixer.in_proj" in [layer.name for layer in report]


def test_alone_it_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match="never call"):
        replace_linear(mamba("mamba"), LoRAConfig(r=2, target_modules=["out_proj"]))
