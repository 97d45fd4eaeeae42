"""The model and the layer that tests use, and what holds after a refusal: nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_kernels import FusedLoRALinear, LoRAConfig, LoRAKernelsError, replace_linear
from numerics import same_bits


class Net(nn.Module):
    """An embedding, two blocks of two linear layers each, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(x)


TOKENS = torch.arange(6).reshape(2, 3)
UP = LoRAConfig(r=2, lora_alpha=4, target_modules=["up"], init_lora_weights=False)


class Snapshot:
    """All that a failure may not change: modules, Parameters, their values, what trains."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.parameters = list(model.named_parameters(remove_duplicate=False))
        self.trains = [parameter.requires_grad for _, parameter in self.parameters]
        held = [p for _, p in self.parameters if not (is_lazy(p) or p.is_meta)]
        self.values = [parameter.detach().clone() for parameter in held]

    def assert_unchanged(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert [name for name, _ in now.modules] == [name for name, _ in self.modules]
        assert all(a is b for (_, a), (_, b) in zip(now.modules, self.modules, strict=True))
        assert all(a is b for (_, a), (_, b) in zip(now.parameters, self.parameters, strict=True))
        assert now.trains == self.trains
        assert all(same_bits(a, b) for a, b in zip(now.values, self.values, strict=True))


def refused(model: Any, function: Callable[[Any], Any], error: type[Exception], *words: str) -> None:
    """``function(model)`` raises one sentence with all the words, and leaves the model as it was."""
    before = Snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        function(model)
    assert isinstance(caught.value, LoRAKernelsError)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if before is not None:
        before.assert_unchanged(model)


def replacing(**arguments: Any) -> Callable[[Any], Any]:
    return lambda model: replace_linear(model, LoRAConfig(**{"r": 2, **arguments}))


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def tied() -> Net:
    model = Net()
    model.head.weight = model.embed.weight
    return model


def acting(in_features: int = 8, out_features: int = 6, **arguments: Any) -> FusedLoRALinear:
    """A layer whose adapter acts: lora_B is random."""
    return FusedLoRALinear(in_features, out_features, **{"r": 3, "init_lora_weights": False, **arguments})


def formula(layer: Any, dtype: torch.dtype) -> Tensor:
    """W + s B A (N, K), with DoRA its rows rescaled, in ``dtype``."""
    weight, a, b = (t.detach().to(dtype) for t in (layer.matrix(layer.base_weight), layer.lora_A, layer.lora_B))
    adapted = weight + layer.scaling * (b @ a)
    if layer.lora_magnitude_vector is None:
        return adapted
    return adapted * (layer.lora_magnitude_vector.detach().to(dtype) / adapted.norm(dim=1)).unsqueeze(1)


@torch.no_grad()
def disturb(model: nn.Module) -> nn.Module:
    """Moves all that trains, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def layer_state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def layer_refused(layer: FusedLoRALinear, function: Callable[[], Any], error: type[Exception], *words: str) -> None:
    """``function()`` raises one sentence with all the words, and leaves the layer as it was."""
    before, weight, merged = layer_state(layer), layer.weight, layer.merged
    with pytest.raises(error) as caught:
        function()
    assert isinstance(caught.value, LoRAKernelsError)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert layer.weight is weight
    assert layer.merged == merged
    assert same_state(layer_state(layer), before)
