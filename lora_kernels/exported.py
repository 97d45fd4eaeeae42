"""The operators by name, for a program that another process has saved: it calls them and imports nothing of ours."""

from __future__ import annotations

import torch

from .dispatch import REGISTERING, backend, select
from .weights import known  # noqa: F401  # it registers what reads quantised weights

__all__ = ["register_operators"]


def register_operators(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Registers the operators that a program saved by ``torch.export`` or AOTInductor calls; call it before loading.

    They are those of the backend that would run here on ``device``, as at a layer's first call, and of ``eager``. A
    program of another backend is loaded within ``use_backend`` of its name.

    Returns:
        The backends whose operators are there.

    Raises:
        BackendUnavailableError: a backend was named that cannot run here.

    Example:
        >>> import lora_kernels
        >>> with lora_kernels.use_backend("eager"):
        ...     lora_kernels.register_operators()
        ('eager',)
    """
    device_type = torch.device(device).type
    chosen = select(device_type, torch.float32)
    with REGISTERING:
        backend("eager").register(device_type)
    return tuple(dict.fromkeys((chosen, "eager")))
