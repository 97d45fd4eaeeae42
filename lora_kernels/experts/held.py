"""What an experts module holds: the names and shapes of its stacked weights, quantised ones too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import LoRAStateError
from ..weights import stacked
from ..weights.stacked import PackedExperts

__all__ = ["is_quantised", "names", "packed", "shape"]


def names(module: nn.Module) -> list[str]:
    """The names of ``module``'s own Parameters in their order, with those whose values are quantised."""
    quantised = [name for name in stacked.packed_names(module) if stacked.is_known(module, name)]
    if not quantised:
        return list(module._parameters)
    order = ("gate_up_proj", "up_proj", "down_proj")  # as all classes have them
    every = [*quantised, *(name for name in module._parameters if name not in quantised)]
    return sorted(every, key=lambda name: order.index(name) if name in order else len(order))


def is_quantised(module: nn.Module, *names: str) -> bool:
    """Whether a weight of one of these names is; it is not read for that."""
    return any(stacked.is_known(module, name) for name in names)


def packed(module: nn.Module, name: str) -> PackedExperts | None:
    """The weight of this name where it is quantised."""
    if not stacked.is_known(module, name):
        return None
    return stacked.read(module, name, bool(getattr(module, "is_transposed", False)))


def shape(module: nn.Module, name: str) -> torch.Size:
    """The shape of the Parameter of this name, as it is stored; () where there is none, or it cannot be read."""
    try:
        quantised = packed(module, name)
    except LoRAStateError:
        return torch.Size()
    held: Tensor | None = module._parameters.get(name)
    if quantised is not None:
        return quantised.stored_shape
    return torch.Size() if held is None else held.shape
