"""Warnings that are given once, wherever the same thing is met again."""

from __future__ import annotations

import warnings

from .errors import LoRAKernelsWarning

__all__ = ["forget", "once"]

_told: set[str] = set()


def once(key: str, sentence: str, stacklevel: int = 1) -> None:
    """Warns of ``sentence``, unless that was done for ``key`` in this process; ``stacklevel`` as for ``warnings``."""
    if key not in _told:
        _told.add(key)
        warnings.warn(sentence, LoRAKernelsWarning, stacklevel=stacklevel + 1)


def forget(key: str) -> None:
    """Has :func:`once` warn again."""
    _told.discard(key)
