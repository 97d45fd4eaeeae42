"""``Watch``: how the model that a report is about stands when the report is printed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from .. import storage
from ..config import LoRAConfig, as_tuple
from ..experts.layer import FusedLoRAExperts
from ..shared_input import is_shared
from ..weights import known
from .adapter import Adapter, remembered_within
from .layers import adapter_parameters
from .matching import trained_whole
from .names import plain_modules
from .trained import biases

__all__ = ["Counts", "Watch", "count_parameters"]


class Counts(NamedTuple):
    """How many numbers a model's parameters hold.

    Attributes:
        trainable, total: those that train, and all.
        others: those that train and are no adapter's.
        freezable: of these, what ``mark_only_lora_as_trainable`` would freeze.
    """

    trainable: int
    total: int
    others: int
    freezable: int


class Watch:
    """A report's model, and layers of it by their names, all held weakly; of experts the Parameters that are adapted.

    A copy of a report watches the same model, and one that comes from a pickle none.
    """

    def __init__(self, model: nn.Module | None = None, names: Iterable[str] = ()) -> None:
        self._model = None if model is None else weakref.ref(model)
        modules = {} if model is None else dict(plain_modules(model))
        self._layers: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
        for name in names:
            path, _, own = name.rpartition(".")
            if name in modules:
                self._layers[name] = weakref.ref(modules[name]), ""
            elif path in modules:
                self._layers[name] = weakref.ref(modules[path]), own

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, ()

    @property
    def model(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    @property
    def begun(self) -> bool:
        """Whether there is, or was, a model."""
        return self._model is not None

    def layers(self) -> dict[str, Any]:
        """Those of the layers that are in the model now, wherever they are; of an adapted Parameter its options."""
        model = self.model
        here = set() if model is None else set(model.modules())
        found = ((name, layer(), own) for name, (layer, own) in self._layers.items())
        layers = {name: _adapted(layer, own) for name, layer, own in found if layer is not None and layer in here}
        return {name: layer for name, layer in layers.items() if layer is not None}

    def together(self, groups: Sequence[Sequence[str]]) -> int | None:
        """How many of ``groups`` run together now; None: there is no model to ask."""
        if self.model is None:
            return None
        running = {name for name, layer in self.layers().items() if isinstance(layer, nn.Module) and is_shared(layer)}
        return sum(len(running.intersection(group)) > 1 for group in groups)

    def counts(self) -> Counts | None:
        """The model's parameters now; None: there is none, or another than the model holds them, in shards."""
        model = self.model
        if model is None or any(storage.owner(module) in (storage.FSDP1, storage.ZERO3) for module in model.modules()):
            return None
        return count_parameters(model)


def count_parameters(model: nn.Module) -> Counts:
    """``model``'s parameters; those that have no shape yet do not count."""
    parameters = {parameter for parameter in model.parameters() if not is_lazy(parameter)}
    adapters = adapter_parameters(model)
    trained = {parameter for parameter in parameters if parameter.requires_grad}
    config = (remembered_within(model) or Adapter(LoRAConfig())).config
    whole = (module for _, module in trained_whole(as_tuple(config.modules_to_save), model))
    asked_for = {parameter for module in whole for parameter in module.parameters()}
    asked_for |= {bias for _, _, bias in biases(model, config.bias)}
    others = trained - adapters
    sizes = _packed_sizes(model)
    counted = (trained, parameters, others, others - asked_for)
    return Counts(*(sum(sizes.get(one, one.numel()) for one in each) for each in counted))


def _adapted(layer: nn.Module, own: str) -> Any:
    if not own:
        return layer
    return layer.options.get(own) if isinstance(layer, FusedLoRAExperts) else None


def _packed_sizes(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many numbers each packed weight stands for, which its tensor does not tell."""
    owned = ((module, module._parameters.get("weight")) for module in model.modules())
    ready = ((module, own) for module, own in owned if own is not None and known.is_readable(module, own))
    return {own: known.read(module, own).shape.numel() for module, own in ready}
