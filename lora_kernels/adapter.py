"""What a model remembers of the adapter that it was given: the configuration, for :func:`lora_kernels.save_adapter`.

The layers themselves say what an adapter computes. This is what they cannot say: by what rule they were chosen, which
biases and modules train with them, and what else stood in the ``adapter_config.json`` that they were loaded from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .config import LoRAConfig, as_tuple

__all__ = ["Adapter", "forget", "plain_name", "remember", "remembered", "unwrapped"]

_ATTRIBUTE = "_lora_adapter"
_WIDER = ("none", "lora_only", "all")  # bias, each training more than the one before
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Adapter:
    """What is remembered.

    Attributes:
        config: the configuration by which layers were replaced or loaded.
        kept: the fields of ``adapter_config.json`` that ``LoRAConfig`` has no place for, written back on saving.
    """

    config: LoRAConfig
    kept: Mapping[str, Any] = field(default_factory=dict)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and isinstance(
            inner := model._modules.get("_orig_mod"), nn.Module
        ):
            model = inner
        else:
            return model


def plain_name(name: str) -> str:
    """A dotted name without the parts that ``torch.compile`` and wrappers of blocks put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


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


def remembered(model: nn.Module) -> Adapter | None:
    """What :func:`remember` was last told of ``model``."""
    found = vars(unwrapped(model)).get(_ATTRIBUTE)
    return found if isinstance(found, Adapter) else None


def forget(model: nn.Module) -> None:
    vars(unwrapped(model)).pop(_ATTRIBUTE, None)
