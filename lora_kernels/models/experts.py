"""A whole model's stacked experts: which Parameters ``target_parameters`` names, adapting them, and back.

Not reachable from the public API yet. Names match as in PEFT: an entry is a Parameter's whole dotted name, or a dotted
suffix of it.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..config import LoRAConfig
from ..errors import InvalidArgumentError, LoRAStateError
from ..experts.layer import FusedLoRAExperts, around_experts
from .matching import listed, name_matches
from .model import _exchange
from .names import joined, plain_modules

__all__ = ["adapt_experts", "restore_experts"]


def adapt_experts(
    model: nn.Module, target_parameters: Collection[str], config: LoRAConfig
) -> dict[str, FusedLoRAExperts]:
    """Puts LoRA on each stacked Parameter that ``target_parameters`` names; the adapted modules by their plain names.

    Rank and alpha patterns are asked about the Parameter's dotted name, as in PEFT.

    Raises:
        InvalidArgumentError: an entry names no Parameter, or one that is not a module's stacked experts.
        LoRAStateError: a module cannot be adapted. Nothing is changed then.
    """
    if isinstance(target_parameters, str):
        raise InvalidArgumentError(
            f"target_parameters={target_parameters!r} was given: it must be a list of names of Parameters."
        )
    names: dict[nn.Module, dict[str, str]] = {}
    places: dict[nn.Module, str] = {}
    unused = set(target_parameters)
    for prefix, module in plain_modules(model):
        for own, _ in module.named_parameters(recurse=False):
            full = joined(prefix, own)
            if matching := {entry for entry in target_parameters if name_matches([entry], full)}:
                unused -= matching
                places.setdefault(module, prefix)
                names.setdefault(module, {}).setdefault(own, full)
    if unused or not names:
        raise InvalidArgumentError(
            f"target_parameters={sorted(target_parameters)} was given, and {listed(sorted(unused)) or 'nothing'} "
            f"matches no Parameter of {type(model).__name__}. Give dotted ends of names, such as "
            "'mlp.experts.gate_up_proj'."
        )
    if model in names:
        raise LoRAStateError("the model given is itself the experts module. Give the model that holds it.")
    trained = [(parameter, parameter.requires_grad) for module in names for parameter in module.parameters()]
    try:
        adapted = {
            module: around_experts(module, {own: config.options_of(full) for own, full in of.items()})
            for module, of in names.items()
        }
    except BaseException:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
    _exchange(model, adapted)
    return {places[module]: layer for module, layer in adapted.items()}


def restore_experts(model: nn.Module) -> list[str]:
    """Puts the modules without adapters back; their plain names. What the adapters learnt is dropped."""
    found = {
        module: name for name, module in plain_modules(model, shared=False) if isinstance(module, FusedLoRAExperts)
    }
    _exchange(model, {module: module.to_plain() for module in found})
    return list(found.values())
