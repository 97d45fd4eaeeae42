"""What transformers' ``save_pretrained`` is told: its files and a model's LoRA layers do not go together."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

from ..errors import LoRAKernelsWarning

__all__ = ["tell_of_saving"]

_OF_TRANSFORMERS = (
    "save_pretrained writes the base weights and the adapters of LoRA layers apart, merged or not, and from_pretrained "
    "reads the base weights alone. Call save_adapter(model, folder) for the adapters; or merge_lora(model) and "
    "restore_linear(model) first, and the merged weights are written."
)
_OF_PEFT = (
    "the save_pretrained of a PEFT model writes PEFT's own adapter, such as a prompt, and no LoRA layer that "
    "replace_linear made. Call save_adapter(model, folder) for these, with a folder of its own."
)


def tell_of_saving(model: Any, prefix: str, keep_vars: bool) -> None:
    """A hook before ``state_dict()``: warns where ``save_pretrained`` asks for it.

    ``from_pretrained`` makes the plain model and reads no ``lora_A``, so what was saved would come back without its
    adapters, without a word from the one that writes.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_name != "save_pretrained":
        frame, level = frame.f_back, level + 1
    if frame is not None:
        of_peft = str(frame.f_globals.get("__name__", "")).startswith("peft.")
        warnings.warn(_OF_PEFT if of_peft else _OF_TRANSFORMERS, LoRAKernelsWarning, stacklevel=level + 1)
