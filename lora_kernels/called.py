"""Whether a layer was ever called, and trained: its forward says so once, and what is merged or saved asks.

Some code reads a layer's weight and never calls the layer: a loss in chunks that multiplies by ``lm_head.weight``,
Mamba's CUDA path. The adapter then has no effect and no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["compiled_in_training", "forget", "has_trained", "note", "note_compiled", "tell", "was_called"]

_CALLED, _TRAINED = "_called", "_trained"  # at a layer: True from its first call, and from its first one in training
_TOLD = "_told_of_no_call"
_compiled = False


def note(layer: Any, on: bool) -> None:
    """Has ``layer`` know that it was called, and with its adapter ``on`` in training, that it trained."""
    marks = layer.__dict__
    marks[_CALLED] = True
    lora_b = layer._parameters.get("lora_B")
    if on and layer.training and torch.is_grad_enabled() and (lora_b is None or lora_b.requires_grad):
        marks[_TRAINED] = True


def was_called(layer: Any) -> bool:
    """Whether forward ran, outside of a compiled graph."""
    return bool(layer.__dict__.get(_CALLED, False))


def has_trained(layer: Any) -> bool:
    """Whether it ran in training mode and recorded, with its adapter."""
    return bool(layer.__dict__.get(_TRAINED, False))


def tell(layer: Any) -> bool:
    """Whether it is to be told that ``layer`` was never called: the first time that this is asked."""
    told = layer.__dict__.get(_TOLD, False)
    layer.__dict__[_TOLD] = True
    return not told


def forget(layer: Any) -> None:
    """Has ``layer`` begin anew."""
    for mark in (_CALLED, _TRAINED, _TOLD):
        layer.__dict__.pop(mark, None)


def note_compiled() -> None:
    """What a compiler does once as it records a layer in training: from then on calls are no longer all noted."""
    global _compiled
    _compiled = True


note_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see gate._select_constant


def compiled_in_training() -> bool:
    """Whether a layer was compiled in training mode, in this process."""
    return _compiled
