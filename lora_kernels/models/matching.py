"""Which modules of a model a ``LoRAConfig`` names; PEFT's rules, in our own words.

``exclude_modules`` is asked first, then ``target_modules``. A list names modules by their whole dotted name or by a
dotted suffix of it; a string is a regular expression that matches the whole name, or ``"all-linear"``. Names are plain
ones (:mod:`.names`): what ``torch.compile`` and other wrappers put into them is no part of what is matched.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from ..config import LoRAConfig, as_tuple, layer_expression, whole_expression
from ..errors import InvalidArgumentError
from ..experts import held
from ..layer import LoRALayer
from ..replaceable import is_conv1d
from .names import plain_modules, plain_name, plain_names

__all__ = [
    "Match",
    "close_names",
    "find_matches",
    "is_all_linear",
    "is_linear",
    "listed",
    "name_matches",
    "output_heads",
    "saved_whole",
    "selects",
    "stacked_experts",
    "trained_whole",
]

# How transformers calls the untrained head of a classifier; it has to be trained whole, not adapted.
_CLASSIFIER_HEADS = ("score", "classifier")
_NAMES_SHOWN = 12


@dataclass(frozen=True)
class Match:
    """One module that the configuration names.

    Attributes:
        name: the first plain name that matches; rank and alpha patterns are asked about it.
        places: every plain name that the module has in the model; more than one where it is shared.
        module: the module.
        excluded: one of its names that ``exclude_modules`` matches, or None.
        whole: an entry of ``modules_to_save`` that it is or belongs to, or None.
    """

    name: str
    places: tuple[str, ...]
    module: nn.Module
    excluded: str | None
    whole: str | None = None


def name_matches(selection: str | Collection[str], name: str) -> bool:
    """Whether the dotted ``name`` is selected: a string must match all of it, a list holds it or a dotted suffix of it.

    Example:
        >>> name_matches(["q_proj"], "layers.0.q_proj"), name_matches(["proj"], "layers.0.q_proj")
        (True, False)
        >>> name_matches(r".*[qv]_proj", "layers.0.q_proj")
        True
    """
    if isinstance(selection, str):
        return re.fullmatch(selection, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in map(plain_name, selection))


def selects(config: LoRAConfig, name: str) -> bool:
    """Whether ``config`` gives the module called ``name`` an adapter, ``"all-linear"`` aside.

    Example:
        >>> config = LoRAConfig(target_modules=["q_proj"], layers_to_transform=[1])
        >>> selects(config, "model.layers.1.q_proj"), selects(config, "model.layers.2.q_proj")
        (True, False)
    """
    if name_matches(config.exclude_modules or (), name) or saved_whole(config, name) is not None:
        return False
    return _targets(config, name)


def _targets(config: LoRAConfig, name: str) -> bool:
    """Whether ``target_modules`` with ``layers_to_transform`` and ``layers_pattern`` matches ``name``."""
    target = config.target_modules or ()
    if isinstance(target, str):
        return name_matches(target, name)
    return name in map(plain_name, target) or (name_matches(target, name) and _in_layers(config, name))


def _in_layers(config: LoRAConfig, name: str) -> bool:
    """Whether the first number in ``name``, or after ``layers_pattern``, is in ``layers_to_transform``."""
    wanted = as_tuple(config.layers_to_transform)
    if not wanted:
        return True
    patterns = as_tuple(config.layers_pattern or None)
    expressions = [layer_expression(pattern) for pattern in patterns] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    found = next((match for match in (re.match(expression, name) for expression in expressions) if match), None)
    return found is not None and int(found["index"]) in wanted


def saved_whole(config: LoRAConfig, name: str) -> str | None:
    """The entry of ``modules_to_save`` that ``name`` is, or is within; None if there is none."""
    entries = as_tuple(config.modules_to_save)
    return next((entry for entry in entries if re.match(whole_expression(entry), name)), None)


def trained_whole(names: Collection[str], model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that ``modules_to_save`` means: those whose plain names end with one of ``names``, as in PEFT.

    Each comes with its name in ``model.named_modules()``, which is that of its tensors in a state dict.
    """
    if not names:
        return []
    plain, ends = plain_names(model), tuple(names)
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if plain[name] and plain[name].endswith(ends)]


def is_all_linear(selection: str | Collection[str] | None) -> bool:
    """Whether ``selection`` is the word "all-linear", in upper or lower case."""
    return isinstance(selection, str) and selection.lower() == "all-linear"


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The modules that "all-linear" leaves out.

    The outermost module that has transformers' ``get_output_embeddings`` is asked for its head; where it has none, its
    child ``score`` or ``classifier`` is the head. A model without that method has no head that could be told from its
    other layers.
    """
    owners = (module for module in model.modules() if callable(getattr(module, "get_output_embeddings", None)))
    owner = next(owners, None)
    if owner is None:
        return set()
    head = owner.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        children = dict(owner.named_children())
        head = next((children[name] for name in _CLASSIFIER_HEADS if name in children), None)
    return set() if head is None else set(head.modules())


def find_matches(model: nn.Module, config: LoRAConfig) -> list[Match]:
    """Every module that the configuration names, the excluded ones included, in the model's order.

    The model itself is never matched. "all-linear" names each ``nn.Linear``, subclasses included, so that a report can
    say why those are left alone, transformers' ``Conv1D``, and a mixture's stacked experts, likewise for the report.

    Raises:
        InvalidArgumentError: ``target_modules`` is None or empty, and there are no ``target_parameters``.
    """
    target = config.target_modules
    if not target and config.target_parameters:
        return []
    if not target:
        raise InvalidArgumentError(
            f"target_modules={target!r} was given: replace_linear has no default for a model's architecture. Give "
            'names such as ["q_proj", "v_proj"], a regular expression, or "all-linear"; target_parameters for experts.'
        )
    heads = output_heads(model) if is_all_linear(target) else set()

    def wanted(name: str, module: nn.Module) -> bool:
        if is_all_linear(target):
            return (is_linear(module) and module not in heads) or bool(
                stacked_experts(module) and not hasattr(module, "lora_A")
            )
        return _targets(config, name)

    matches = []
    for module, places in _places(model):
        name = next((place for place in places if wanted(place, module)), None)
        if name is not None:
            excluded = next((place for place in places if name_matches(config.exclude_modules or (), place)), None)
            whole = next((entry for place in places if (entry := saved_whole(config, place)) is not None), None)
            matches.append(Match(name, places, module, excluded, whole))
    return matches


def unmatched_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The entries of a ``target_modules`` list that name no module of the model."""
    target = config.target_modules
    if target is None or isinstance(target, str):
        return []
    names = [name for name, _ in plain_modules(model)]
    return [entry for entry in target if not any(name_matches([entry], name) for name in names)]


def close_names(wanted: str, model: nn.Module, count: int = 3) -> list[str]:
    """Names of the model's linear layers that resemble ``wanted``: whole names if it has a dot, else last parts."""
    names = [name for name, module in plain_modules(model) if name and is_linear(module)]
    known = dict.fromkeys(names if "." in wanted else (name.rpartition(".")[2] for name in names))
    by_lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(wanted.lower(), by_lower_case, count, cutoff=0.5)
    return [by_lower_case[name] for name in close]


def linear_names(model: nn.Module) -> list[str]:
    """The distinct last parts of the names of the model's linear layers, in order."""
    names = (name for name, module in plain_modules(model) if name and is_linear(module))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Each module below ``model``, once, with all of its plain names."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in plain_modules(model):
        if name:
            places.setdefault(module, []).append(name)
    return ((module, tuple(names)) for module, names in places.items())


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.Linear``, subclasses included, or transformers' ``Conv1D``, replaced or not."""
    return isinstance(module, (nn.Linear, LoRALayer)) or is_conv1d(module)


def stacked_experts(module: nn.Module) -> list[str]:
    """The names of ``module``'s own Parameters that hold the matrices of all experts of a mixture, (E, N, K)."""
    if "expert" not in type(module).__name__.lower():
        return []
    return [name for name in held.names(module) if len(held.shape(module, name)) == 3]


def listed(names: list[str]) -> str:
    """The names in quotes, the first of them where there are many."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(repr(name) for name in names[:_NAMES_SHOWN]) + more
