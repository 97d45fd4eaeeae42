"""What a model remembers of the adapter that it was given: the configuration, for :func:`lora_kernels.save_adapter`.

The layers themselves say what an adapter computes. This is what they cannot say: by what rule they were chosen, which
biases and modules train with them, and what else stood in the ``adapter_config.json`` that they were loaded from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..config import LoRAConfig, as_tuple
from .matching import trained_whole
from .names import joined, plain_modules, plain_names, unwrapped

__all__ = ["Adapter", "forget", "remember", "remember_bias", "remembered", "remembered_within"]

_ATTRIBUTE = "_lora_adapter"
_WIDER = ("none", "lora_only", "all")  # bias, each training more than the one before


@dataclass(frozen=True)
class Adapter:
    """What is remembered.

    Attributes:
        config: the configuration by which layers were replaced or loaded.
        kept: the fields of ``adapter_config.json`` that ``LoRAConfig`` has no place for, written back on saving.
    """

    config: LoRAConfig
    kept: Mapping[str, Any] = field(default_factory=dict)


def remember(model: nn.Module, config: LoRAConfig, kept: Mapping[str, Any] | None = None) -> None:
    """Remembers ``config`` and ``kept``; biases and modules that an earlier one trains keep training: they are joined.

    None for ``kept`` leaves what was kept before.
    """
    before = remembered(model)
    if before is not None:
        modules = (*as_tuple(before.config.modules_to_save), *as_tuple(config.modules_to_save))
        config = replace(
            config,
            bias=max(before.config.bias, config.bias, key=_WIDER.index),
            modules_to_save=list(dict.fromkeys(modules)) or None,
        )
        kept = before.kept if kept is None else kept
    setattr(unwrapped(model), _ATTRIBUTE, Adapter(config, dict(kept or {})))


def remember_bias(model: nn.Module, bias: str) -> None:
    """Remembers that the biases ``bias`` train, so that they are saved, beside those that were to train before."""
    before = remembered(model)
    if bias != "none" and (before is None or before.config.bias != bias):
        remember(model, replace(before.config if before else LoRAConfig(), bias=bias))


def remembered(model: nn.Module) -> Adapter | None:
    """What :func:`remember` was last told of ``model``."""
    found = vars(unwrapped(model)).get(_ATTRIBUTE)
    return found if isinstance(found, Adapter) else None


def remembered_within(model: nn.Module) -> Adapter | None:
    """What was remembered of ``model``, or where its layers were replaced in parts, of all of these together.

    Biases and modules that one part trains are those of the whole: modules by their names in ``model``. Its rule is
    the model's own, if there is one.
    """
    inner = unwrapped(model)
    found = [(name, part, it) for name, part in plain_modules(inner, shared=False) if (it := remembered(part))]
    if not found:
        return None
    whole: list[str] = []
    for prefix, part, adapter in found:
        entries = as_tuple(adapter.config.modules_to_save)
        plain = plain_names(part)
        names = [plain[name] for name, _ in trained_whole(entries, part)]
        whole += [joined(prefix, name) for name in names] if prefix else list(entries)
    own = next((adapter.config for prefix, _, adapter in found if not prefix), LoRAConfig())
    bias = max((adapter.config.bias for _, _, adapter in found), key=_WIDER.index)
    kept = {key: value for _, _, adapter in reversed(found) for key, value in adapter.kept.items()}
    return Adapter(replace(own, bias=bias, modules_to_save=list(dict.fromkeys(whole)) or None), kept)


def forget(model: nn.Module) -> None:
    """Forgets what was remembered of ``model`` and of its parts."""
    for part in unwrapped(model).modules():
        vars(part).pop(_ATTRIBUTE, None)
