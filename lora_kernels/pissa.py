"""Layers whose adapter started as a part of the weight (PiSSA, OLoRA): the residual, and the way back.

Such a layer's ``weight`` is the residual ``W - s B0 A0`` in a Parameter of its own, so modules that are tied to W see
nothing. The initial values stay in two buffers, ``lora_initial_A`` (R, K) and ``lora_initial_B`` (N, R), which are in
the state dict, so that training can go on from it: they tell what W was, for saving an adapter of the untouched model.
They cost R (K + N) numbers, as much as the adapter.
``_initial_scaling`` is s at that time, and None while ``weight`` is W itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import dora, sharded
from .errors import LoRAStateError
from .initialisation import check_weight, split, splits

if TYPE_CHECKING:
    from .layer import LoRALayer

__all__ = ["add_slots", "after_loading", "before_loading", "initial_scaling", "is_residual", "plain_weight", "start"]

NAMES = ("lora_initial_A", "lora_initial_B")


def add_slots(layer: LoRALayer) -> None:
    """The buffers for the initial values, without values yet; None where the initialisation needs none."""
    wanted = splits(layer.init_lora_weights)
    for name, parameter in zip(NAMES, (layer.lora_A, layer.lora_B), strict=True):
        layer.register_buffer(name, torch.empty_like(parameter, requires_grad=False) if wanted else None)
    layer._initial_scaling = None


def initial_scaling(layer: LoRALayer) -> float | None:
    """s of when a part of the weight was taken; None where ``weight`` is W itself."""
    return layer._initial_scaling


def is_residual(layer: LoRALayer) -> bool:
    """Whether a part of the weight was taken."""
    return layer._initial_scaling is not None


def plain_weight(layer: LoRALayer) -> nn.Parameter:
    """The base weight W as it is stored; of a residual, a new Parameter with what was taken put back, rounded once."""
    if layer._initial_scaling is None:
        return layer.base_weight
    return _moved(layer, layer.base_weight, layer._initial_scaling)


@torch.no_grad()
def start(layer: LoRALayer) -> None:
    """Sets lora_A and lora_B to the part of W that they start with, and ``weight`` to the rest.

    Where that was done before, only the initial values are put back: nothing is taken twice.
    """
    if layer.scaling <= 0:
        raise LoRAStateError(
            f"the layer's scaling is {layer.scaling}, and init_lora_weights={layer.init_lora_weights!r} needs a "
            "positive one. Set layer.scaling first."
        )
    first, second = _initial(layer)
    if layer._initial_scaling is not None:
        sharded.put(layer.lora_A, first)
        sharded.put(layer.lora_B, second * (layer._initial_scaling / layer.scaling))
        return
    init, weight = layer.init_lora_weights, layer.weight
    check_weight(init, layer.r, layer.in_features, layer.out_features, weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        a, b = split(init, layer.matrix(weight).to(wide), layer.r, layer.scaling)
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(b)
    _set_initial(layer, layer.lora_A, layer.lora_B)
    layer.register_parameter("weight", _moved(layer, weight, -layer.scaling))
    layer._initial_scaling = layer.scaling


def before_loading(layer: LoRALayer, state_dict: Mapping[str, Any], prefix: str) -> nn.Parameter | None:
    """W, if ``state_dict`` brings other initial values and no weight that goes with them."""
    if not splits(layer.init_lora_weights) or prefix + "weight" in state_dict or layer.weight.is_meta:
        return None
    initial = zip(NAMES, _initial(layer), strict=True)
    changed = [name for name, held in initial if not _same(state_dict.get(prefix + name, held), held)]
    if changed and sharded.is_sharded(layer.weight):
        raise LoRAStateError(
            f"a state dict with {changed[0]} and without the weight that goes with it was given to a layer whose "
            "weight is sharded. Load it onto the plain model first, then distribute it; or load the weight too."
        )
    return plain_weight(layer) if changed else None


@torch.no_grad()
def after_loading(layer: LoRALayer, state_dict: Mapping[str, Any], prefix: str, plain: nn.Parameter | None) -> None:
    """Makes ``weight`` and the initial values agree again.

    A weight that comes with initial values is a residual. One with an adapter and none is W, of which nothing was
    taken. One alone is W, and the adapter starts anew. Initial values alone are taken from ``plain``.
    """
    if not splits(layer.init_lora_weights):
        return
    weight, initial, adapter = (prefix + name in state_dict for name in ("weight", NAMES[0], "lora_A"))
    if plain is not None:
        scaling = layer._initial_scaling or layer.scaling
        layer.register_parameter("weight", _moved(layer, plain, -scaling))
        layer._initial_scaling = scaling
    elif weight and not initial and not adapter:
        layer._initial_scaling = None
        layer.reset_lora_parameters()
    elif weight:
        layer._initial_scaling = layer._initial_scaling or layer.scaling
        if not initial:
            for value in _initial(layer):
                value.zero_()


@torch.no_grad()
def _moved(layer: LoRALayer, weight: nn.Parameter, scaling: float) -> nn.Parameter:
    """``weight`` + scaling B0 A0 as it is stored, computed in fp32 or wider and rounded once."""
    if sharded.is_sharded(weight):
        stored = sharded.moved_weight(layer, weight, *_initial(layer), scaling)
    else:
        moved = dora.merged(layer.matrix(weight), *_initial(layer), scaling, None, None)
        stored = layer.matrix(moved).contiguous()
    return nn.Parameter(stored, requires_grad=weight.requires_grad)


def _initial(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    first, second = (layer._buffers[name] for name in NAMES)
    assert first is not None
    assert second is not None
    return first, second


def _set_initial(layer: LoRALayer, a: Tensor, b: Tensor) -> None:
    for held, value in zip(_initial(layer), (a, b), strict=True):
        held.copy_(value)


def _same(given: Any, held: Tensor) -> bool:
    return isinstance(given, Tensor) and (given is held or torch.equal(given.to(held), held))
