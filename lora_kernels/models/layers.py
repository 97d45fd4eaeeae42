"""The layers of a model that have adapters of ours: linear ones, and a mixture's stacked experts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..experts.layer import FusedLoRAExperts
from ..layer import LoRALayer
from .names import plain_modules

__all__ = ["adapter_of", "adapter_parameters", "expert_layers", "lora_layers"]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """``(plain name, layer)`` of each ``FusedLoRALinear`` in ``model``. A shared layer comes once, by its first name.

    Example:
        >>> from lora_kernels import FusedLoRALinear
        >>> [name for name, _ in lora_layers(nn.Sequential(FusedLoRALinear(4, 4, r=2), nn.ReLU()))]
        ['0']
    """
    modules = plain_modules(model, shared=False)
    return ((name, module) for name, module in modules if isinstance(module, LoRALayer))


def expert_layers(model: nn.Module) -> Iterator[tuple[str, FusedLoRAExperts]]:
    """Likewise of each ``FusedLoRAExperts``."""
    modules = plain_modules(model, shared=False)
    return ((name, module) for name, module in modules if isinstance(module, FusedLoRAExperts))


def adapter_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's Parameters of a layer by their names in it; of another module nothing."""
    return module.adapter if isinstance(module, (LoRALayer, FusedLoRAExperts)) else {}


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The Parameters of all adapters of ours in ``model``."""
    return {parameter for module in model.modules() for parameter in adapter_of(module).values()}
