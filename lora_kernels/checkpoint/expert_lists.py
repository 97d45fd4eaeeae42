"""Adapters of transformers 4's experts, where each had linear layers of its own, as those of stacked experts.

transformers knows which of its former weights make up a stacked Parameter, in which order. Of ``W = [W_1; W_2]`` the
adapter has ``A = [A_1; A_2]`` and a block-diagonal B: the rank is the sum, and alpha grows so that s stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoRAConfig, as_tuple, scaling_of
from ..errors import InvalidArgumentError
from ..experts import held
from ..experts.peft_form import to_peft
from ..models.matching import listed, name_matches

__all__ = ["WITHIN", "stack_lists"]

WITHIN = ".base_layer"  # what PEFT calls the module that a wrapper is around
_OF_ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.\w+$")
_REMEDY = "Load it with peft.PeftModel.from_pretrained, and write it anew with save_pretrained, if that converts it."

Adapters = dict[str, dict[str, Tensor]]  # a file's by their paths: lora_A (R, K) and lora_B (N, R)
_Part = dict[int, str]  # the path of each expert's layer


def stack_lists(
    model: nn.Module, config: LoRAConfig, adapters: Adapters, modules: Mapping[str, nn.Module], where: str
) -> LoRAConfig:
    """Puts stacked adapters into ``adapters`` in the place of those of single experts; what then configures them all.

    Raises:
        InvalidArgumentError: they are of experts that are stacked here, and cannot be.
    """
    old = [path for path in adapters if path not in modules and _OF_ONE_EXPERT.search(path)]
    if not old:
        return config
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    stacked: dict[str, dict[str, dict[str, Tensor]]] = {}
    for full, parts in _parameters(model, old, where).items():
        name, _, own = full.rpartition(".")
        experts = _experts(full, modules.get(name), own, parts, where)
        tensors = [[_plain(adapters, part[e], where) for e in range(experts)] for part in parts]
        rank, alpha = _sizes(config, full, parts, where)
        _check_shapes(full, tensors, rank, where)
        key = f"^{re.escape(full)}"
        ranks[key], alphas[key] = rank * len(parts), alpha
        stacked.setdefault(name, {})[own] = _joined(tensors)
    for path in old:
        del adapters[path]
    for name, of in stacked.items():
        for depth, own in enumerate(reversed([own for own in held.names(modules[name]) if own in of])):
            adapters[name + WITHIN * depth] = of[own]
    return replace(
        config,
        target_modules=_still_there(config.target_modules, modules),
        target_parameters=[
            *as_tuple(config.target_parameters),
            *(f"{n}.{own}" for n, of in stacked.items() for own in of),
        ],
        rank_pattern=ranks | config.rank_pattern,
        alpha_pattern=alphas | config.alpha_pattern,
    )


def _parameters(model: nn.Module, old: Sequence[str], where: str) -> dict[str, list[_Part]]:
    """By the whole name of each stacked Parameter, the former layers that it is made of, in their order."""
    converters, renamings, renamed = _mapping(model)
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, list[_Part]] = {}
    for path in old:
        full, pattern = renamed(f"{path}.weight", renamings, converters)
        converter = of_pattern.get(pattern)
        if converter is None or not _stacks(converter):
            raise InvalidArgumentError(
                f"{where} has an adapter for {path!r}: it was made with transformers 4, whose experts had linear "
                f"layers of their own, and how {type(model).__name__} stacks them is not known. {_REMEDY}"
            )
        parts = found.setdefault(full, [{} for _ in converter.source_patterns])
        part = parts[list(converter.source_patterns).index(pattern)]
        part[int(_OF_ONE_EXPERT.search(path)[1])] = path  # type: ignore[index]
    return found


def _mapping(model: nn.Module) -> tuple[list[Any], list[Any], Any]:
    """transformers' converters and renamings of a checkpoint of ``model``, and what applies them to a name."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        return [], [], lambda name, *_: (name, None)
    every = get_model_conversion_mapping(model)
    converters = [each for each in every if isinstance(each, WeightConverter)]
    return converters, [each for each in every if each not in converters], rename_source_key


def _stacks(converter: Any) -> bool:
    """Whether it stacks the experts' weights as they are, or these one above the other."""
    done = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    joins = [("MergeModulelist", 0), ("Concatenate", 1)]
    return done == joins[: 1 if len(converter.source_patterns) == 1 else 2]


def _experts(full: str, module: Any, own: str, parts: Sequence[_Part], where: str) -> int:
    shape = torch.Size() if module is None else held.shape(module, own)
    if len(shape) != 3 or getattr(module, "is_transposed", False):
        raise InvalidArgumentError(
            f"{where} has adapters of single experts for {full!r}, and the model has no such stacked Parameter "
            f"(experts, rows, columns). The adapter is of another model. {_REMEDY}"
        )
    experts = shape[0]
    lacking = [e for part in parts for e in range(experts) if e not in part]
    if lacking or any(len(part) != experts for part in parts):
        counts = " and ".join(str(len(part)) for part in parts)
        raise InvalidArgumentError(
            f"{where} has adapters of {counts} single experts for {full!r}, which stacks {experts} experts of "
            f"{len(parts)} layers each: all of them must have an adapter. The file is not whole, or adapts only some."
        )
    return experts


def _plain(adapters: Adapters, path: str, where: str) -> tuple[Tensor, Tensor]:
    given = adapters[path]
    if given.keys() != {"lora_A", "lora_B"}:
        raise InvalidArgumentError(
            f"{where} has {listed(sorted(given))} for {path!r}, and of stacked experts only plain LoRA is computed: "
            f"lora_A and lora_B. {_REMEDY}"
        )
    return given["lora_A"], given["lora_B"]


def _sizes(config: LoRAConfig, full: str, parts: Sequence[_Part], where: str) -> tuple[int, float]:
    """The rank of each layer, and the alpha that gives the stacked ones their s."""
    options = [config.options_of(path) for part in parts for path in part.values()]
    given = {(of.r, of.lora_alpha) for of in options}
    if len(given) > 1:
        raise InvalidArgumentError(
            f"{where} has adapters of single experts for {full!r} whose ranks and alphas differ, {sorted(given)}, and "
            "stacked ones have one of each. Train it anew on the stacked experts, or use transformers 4."
        )
    ((rank, alpha),) = given
    kept = scaling_of(rank, alpha, config.use_rslora) / scaling_of(rank * len(parts), 1.0, config.use_rslora)
    return rank, kept


def _check_shapes(full: str, tensors: Sequence[Sequence[tuple[Tensor, Tensor]]], rank: int, where: str) -> None:
    columns = {a.shape[1:] for part in tensors for a, _ in part}
    shapes = [{(*a.shape[:1], *b.shape) for a, b in part} for part in tensors]
    dtypes = {tensor.dtype for part in tensors for pair in part for tensor in pair}
    fits = len(columns) == len(dtypes) == 1 and all(len(each) == 1 for each in shapes)
    if not fits or any((each[0], each[-1]) != (rank, rank) or len(each) != 3 for (each, *_) in map(list, shapes)):
        raise InvalidArgumentError(
            f"{where} has adapters of single experts for {full!r} that differ in shape or dtype, or are not of r="
            f"{rank}, as the configuration says. The two files do not belong together; save the adapter again."
        )


def _joined(tensors: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """PEFT's lora_A and lora_B of all experts, of those of each expert by layers."""
    of_experts = list(zip(*tensors, strict=True))
    a = torch.stack([torch.cat([a for a, _ in layers]) for layers in of_experts])
    b = torch.stack([torch.block_diag(*(b for _, b in layers)) for layers in of_experts])
    return dict(zip(("lora_A", "lora_B"), to_peft(a, b), strict=True))


def _still_there(target: Any, modules: Mapping[str, nn.Module]) -> Any:
    """Without the names that mean nothing any more: PEFT would convert them once more."""
    if target is None or isinstance(target, str):
        return target
    return [entry for entry in target if any(name_matches([entry], name) for name in modules)]
