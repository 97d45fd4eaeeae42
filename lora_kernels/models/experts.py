"""A whole model's stacked experts: which Parameters ``target_parameters`` names, and the layers around them.

Names match as in PEFT: an entry is a Parameter's whole dotted name, or a dotted suffix of it. Rank and alpha patterns
are asked about the Parameter's dotted name. ``exclude_modules`` and ``layers_to_transform`` are about modules.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from .. import storage
from ..config import LoRAConfig, as_tuple
from ..errors import LoRAStateError
from ..experts import held
from ..experts.layer import FusedLoRAExperts, around_experts
from ..experts.suitable import targets, why_not_experts
from .layers import expert_layers
from .matching import listed, name_matches, saved_whole, stacked_experts
from .names import compiled_alone, joined, plain_modules
from .report import ReplacedLayer, SkippedLayer

__all__ = [
    "ExpertMatch",
    "build_experts",
    "decide_experts",
    "expert_rows",
    "find_experts",
    "notes_of_experts",
    "parameter_matches",
    "parameters_of",
    "stacked_names",
    "why_not_by_modules",
]


@dataclass(frozen=True)
class ExpertMatch:
    """A module of which ``target_parameters`` names Parameters.

    Attributes:
        name: its first plain name.
        places: all of them.
        module: the module.
        parameters: the whole plain name of each Parameter by its own, in the module's order.
    """

    name: str
    places: tuple[str, ...]
    module: nn.Module
    parameters: dict[str, str] = field(default_factory=dict)


def parameter_matches(config: LoRAConfig, name: str) -> bool:
    """Whether ``target_parameters`` names the Parameter of this dotted name."""
    return name_matches(as_tuple(config.target_parameters), name)


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """``(plain name of its module, module, own name)`` of each Parameter, at each of its places.

    Experts' adapters are left out: they stand in dictionaries by the very names of the Parameters.
    """
    own = {factor for _, layer in expert_layers(model) for factor in (layer.lora_A, layer.lora_B)}
    for prefix, module in plain_modules(model):
        for name in held.names(module) if module not in own else ():
            yield prefix, module, name


def find_experts(model: nn.Module, config: LoRAConfig) -> list[ExpertMatch]:
    """The modules with Parameters that ``target_parameters`` names, in the model's order."""
    named: dict[nn.Module, dict[str, str]] = {}
    for prefix, module, own in parameters_of(model) if config.target_parameters else ():
        if parameter_matches(config, joined(prefix, own)):
            named.setdefault(module, {}).setdefault(own, joined(prefix, own))
    places: dict[nn.Module, list[str]] = {module: [] for module in named}
    for prefix, module in plain_modules(model):
        if module in named:
            places[module].append(prefix)
    return [ExpertMatch(prefixes[0], tuple(prefixes), module, named[module]) for module, prefixes in places.items()]


def decide_experts(
    model: nn.Module, config: LoRAConfig, matches: Sequence[ExpertMatch]
) -> tuple[list[ExpertMatch], list[SkippedLayer]]:
    """The matches to adapt, and the Parameters to leave alone, with the reasons.

    Raises:
        LoRAStateError: a module has adapters already, or the model is itself the experts module.
    """
    if adapted := [match.name for match in matches if isinstance(match.module, FusedLoRAExperts)]:
        raise LoRAStateError(
            f"{listed(adapted)} has adapters on its experts already, and no module takes a second one. Name other "
            "Parameters in target_parameters, or call restore_linear(model) first."
        )
    if any(match.module is model for match in matches):
        raise LoRAStateError(
            "the model given to replace_linear is itself what target_parameters names, and nothing can take its "
            "place. Give the model that holds it."
        )
    chosen, skipped, alone = [], [], compiled_alone(model)
    for match in matches:
        reasons = {own: _why_left(match, own, config, alone) for own in match.parameters}
        wanted = {own: full for own, full in match.parameters.items() if reasons[own] is None}
        skipped += [SkippedLayer(match.parameters[own], reason) for own, reason in reasons.items() if reason]
        if wanted:
            chosen.append(ExpertMatch(match.name, match.places, match.module, wanted))
    return chosen, skipped


def _why_left(match: ExpertMatch, own: str, config: LoRAConfig, alone: set[nn.Module]) -> str | None:
    module = match.module
    kind, shape = type(module).__name__, held.shape(module, own)
    whole = next((entry for place in match.places if (entry := saved_whole(config, place)) is not None), None)
    if whole is not None:
        return f"modules_to_save names its module ({whole!r}), so it trains whole."
    if isinstance(module, nn.Linear):
        return f"it is the {own} of a {kind}: name the module in target_modules, which means the same."
    if reason := storage.why_not_free(module):
        return f"{kind} cannot be adapted: {reason}"
    if shape and len(shape) != 3:
        return (
            f"{kind}.{own} is {tuple(shape)}: only experts that are stacked to (experts, rows, columns) are "
            "adapted here. peft.LoraConfig(target_parameters=...) adapts it, or modules_to_save trains its module."
        )
    if reason := why_not_experts(module):
        return reason
    if own not in targets(module):
        return f"{kind} computes with {own} in a way that is not known: only {' and '.join(targets(module))} can be."
    if module in alone:
        return "torch.compile was called on its module by itself: call replace_linear first, then compile."
    return None


def build_experts(matches: Sequence[ExpertMatch], config: LoRAConfig, draw: bool = True) -> list[FusedLoRAExperts]:
    """The layers for ``matches``, in their order; ``draw=False`` leaves the adapters' values unset."""
    return [
        around_experts(
            match.module, {own: config.options_of(full) for own, full in match.parameters.items()}, draw=draw
        )
        for match in matches
    ]


def expert_rows(matches: Sequence[ExpertMatch], layers: Sequence[FusedLoRAExperts]) -> Iterator[ReplacedLayer]:
    """A row for each adapted Parameter, for a report."""
    for match, layer in zip(matches, layers, strict=True):
        for own, full in match.parameters.items():
            a, b, of = layer.lora_A[own], layer.lora_B[own], layer.options[own]
            places = tuple(joined(place, own) for place in match.places)
            sizes = a.shape[2], b.shape[1], of.r, of.lora_alpha, layer.scaling(own), a.numel() + b.numel()
            yield ReplacedLayer(full, places, *sizes, experts=a.shape[0])


def why_not_by_modules(name: str, module: nn.Module, own: Sequence[str]) -> str:
    """What is said of experts that were named as if they were linear layers, and how they are named."""
    shapes = " and ".join(f"{each} {tuple(held.shape(module, each))}" for each in own)
    stacked = f"{type(module).__name__} keeps its experts stacked in {shapes}, and target_modules names linear layers."
    if isinstance(module, FusedLoRAExperts) or why_not_experts(module) is None:
        entries = ", ".join(repr(joined(_suffix(name), each)) for each in own)
        return f"{stacked} LoRAConfig(target_parameters=[{entries}]) adapts them."
    return f"{stacked} peft.LoraConfig has target_parameters for them; fuse_peft then leaves these as PEFT's own."


def _suffix(name: str) -> str:
    """The end of a module's name that those of all blocks have."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[last + 1 :])


def notes_of_experts(model: nn.Module, config: LoRAConfig, matches: Sequence[ExpertMatch]) -> Iterator[str]:
    """Sentences about entries of ``target_parameters`` that have no effect, or have one that may surprise."""
    names = [full for match in matches for full in match.parameters.values()]
    for entry in as_tuple(config.target_parameters):
        if not any(name_matches([entry], name) for name in names):
            close = difflib.get_close_matches(entry, stacked_names(model), cutoff=0.5)
            hint = f" (close: {listed(close)})" if close else ""
            yield f"target_parameters names {entry!r}, which matches no Parameter{hint}."
    excluded = [m.name for m in matches if any(name_matches(config.exclude_modules or (), p) for p in m.places)]
    if excluded:
        yield f"exclude_modules matches {listed(excluded)}; as in PEFT, target_parameters counts there."
    biased = [match.name for match in matches if getattr(match.module, "has_bias", False)]
    if biased and config.bias == "all":
        yield f"bias='all' does not train the biases of stacked experts, as in {biased[0]!r}."


def stacked_names(model: nn.Module) -> list[str]:
    """How ``target_parameters`` may name the stacked Parameters of ``model``, without the numbers of blocks."""
    found = ((name, own) for name, module in plain_modules(model) for own in stacked_experts(module))
    return list(dict.fromkeys(joined(_suffix(name), own) for name, own in found))
