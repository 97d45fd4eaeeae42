"""The one exception family of the package, and its warning.

Every message is a sentence: what was given, what is allowed, what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "LoRAKernelsError",
    "LoRAKernelsWarning",
    "LoRAStateError",
    "MissingExtraError",
    "UnsupportedTransformError",
]


class LoRAKernelsError(Exception):
    """Base of every error that ``lora_kernels`` raises on purpose."""


class InvalidArgumentError(LoRAKernelsError, ValueError):
    """A value that is not allowed: a shape, a rank, a probability, a name that matches nothing."""


class InvalidTypeError(LoRAKernelsError, TypeError):
    """A dtype, device or object kind that is not allowed."""


class BackendUnavailableError(LoRAKernelsError, RuntimeError):
    """The backend that was asked for cannot run this problem here; the message holds every reason."""


class LoRAStateError(LoRAKernelsError, RuntimeError):
    """The layer or model is not in the state that the call needs (merged already, replaced already, ...)."""


class MissingExtraError(LoRAKernelsError, ImportError):
    """A package of one of the extras (``lora-kernels[cli]``, ``[plot]``, ``[bench]``, ...) is not installed."""


class UnsupportedTransformError(LoRAKernelsError, RuntimeError):
    """A derivative that has no correct answer here: ``torch.func``, ``vmap``, forward mode, some second derivatives."""


class LoRAKernelsWarning(UserWarning):
    """What runs, but hardly as it was meant: an adapter is dropped or does not train, a setting has no effect."""
