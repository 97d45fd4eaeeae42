"""The environment variables that the package reads, each in one place."""

from __future__ import annotations

import os

__all__ = ["BACKEND_VARIABLE", "backend_from_environment", "triton_interpreter_requested"]

BACKEND_VARIABLE = "LORA_KERNELS_BACKEND"


def backend_from_environment() -> str | None:
    """The backend named by ``LORA_KERNELS_BACKEND``, or None where it is unset or empty."""
    return os.environ.get(BACKEND_VARIABLE) or None


def triton_interpreter_requested() -> bool:
    """Whether ``TRITON_INTERPRET`` is on, as Triton reads it: its kernels then run in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
