"""Adapters off and on for a ``with`` block, own layers and PEFT's: each keeps a flag, which its forward reads.

What a checkpoint runs again acts as in its forward, wherever backward is called: see :mod:`.rerun`. A compiled graph is
guarded by the flag alone, so there are two of them, with the adapter and without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .rerun import Blocks

__all__ = ["is_on", "is_switch", "switched"]

_OWN, _PEFTS = "_lora_enabled", "_disable_adapters"  # PEFT's tuner layers and what it wraps, such as modules_to_save
_ASKS = "_asks"  # at a layer whose flag does not tell what a checkpoint's forward did
_QUIET = "_left_off"  # what an own layer in training warns of; a block is meant


class _Switches(NamedTuple):
    """What a block does: the state of each of its layers within, and before it."""

    within: Mapping[nn.Module, bool]
    before: Mapping[nn.Module, bool]


_blocks: Blocks[_Switches] = Blocks()


def is_switch(module: nn.Module) -> bool:
    """Whether ``module`` is a layer whose adapter can be switched."""
    return isinstance(getattr(module, _OWN, None), bool) or isinstance(getattr(module, _PEFTS, None), bool)


def _flag(layer: Any) -> bool:
    return bool(layer._lora_enabled) if hasattr(layer, _OWN) else not layer._disable_adapters


def _set(layer: Any, on: bool) -> None:
    if hasattr(layer, _OWN):
        layer._lora_enabled = on
    else:
        layer._disable_adapters = not on


def is_on(layer: nn.Module, flag: bool) -> bool:
    """Whether the adapter acts in this call; ``flag`` is the layer's own answer, which a rerun may contradict.

    A layer need not ask while its flag is on and it has no ``_asks``.
    """
    if torch.compiler.is_compiling() or not _blocks:
        return flag
    holding = [block for block in list(_blocks) if block.holds and layer in block.value.within]
    around = _blocks.of_forward(holding[-1].task if holding else None)
    if around is None:
        return flag
    found = next((switches.within[layer] for switches in around if layer in switches.within), None)
    if found is None:  # its forward was outside of any block
        found = holding[0].value.before[layer] if holding else flag
    return found


@contextmanager
def switched(layers: Iterable[nn.Module], on: bool, before: bool | None = None) -> Iterator[None]:
    """Within the block the adapters of ``layers`` are ``on``; then each is as it was, or as ``before`` says."""
    layers = list(layers)
    former = {layer: _flag(layer) if before is None else before for layer in layers}
    quiet = {layer: layer.__dict__[_QUIET] for layer in layers if _QUIET in layer.__dict__}
    block = _blocks.begin(_Switches(WeakKeyDictionary(dict.fromkeys(layers, on)), WeakKeyDictionary(former)))
    try:
        for layer in layers:
            _set(layer, on)
            if on and not former[layer]:
                layer.__dict__[_ASKS] = True
            if layer in quiet:
                layer.__dict__[_QUIET] = False
        yield
    finally:
        recorded = _blocks.end(block)
        for layer in layers:
            _set(layer, former[layer])
            layer.__dict__.update({_ASKS: True} if recorded else {})
        for layer, value in quiet.items():
            layer.__dict__[_QUIET] = value
