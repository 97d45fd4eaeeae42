"""The environment variables that the package reads, each in one place."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "BACKEND_VARIABLE",
    "BUILD_VARIABLE",
    "CACHE_VARIABLE",
    "CPU_CHOICES",
    "DROPOUT_KEEPS_VARIABLE",
    "EXPLAIN_VARIABLE",
    "GPU_QUANTIZED_VARIABLE",
    "backend_from_environment",
    "cache_folder",
    "dropout_keeps",
    "explain_requested",
    "gpu_quantized",
    "triton_interpreter_requested",
    "unknown_choice",
]

BACKEND_VARIABLE = "LORA_KERNELS_BACKEND"
CACHE_VARIABLE = "LORA_KERNELS_CACHE"
# Which native libraries may be compiled: cpu, cuda, all or off. By pip into the package (unset: none), or at the first
# use into the cache (unset: all). backends/native/build.py reads it, for setup.py cannot import this file.
BUILD_VARIABLE = "LORA_KERNELS_BUILD"
# 1: the Triton backend tells on stderr which plan it takes for a size, and why, when it first meets that size.
EXPLAIN_VARIABLE = "LORA_KERNELS_EXPLAIN"
# What of dropout's mask is kept for backward where a backend can do either: mask (its words) or seed (drawn again).
DROPOUT_KEEPS_VARIABLE = "LORA_KERNELS_DROPOUT_KEEPS"
# Whose kernels read a quantised weight on a GPU: package (its own ones make the values) or own (those in Triton).
GPU_QUANTIZED_VARIABLE = "LORA_KERNELS_GPU_QUANTIZED"
# What the CPU library reads (csrc/cpu/capability.cpp and choice.cpp), and the words that it knows.
CPU_CHOICES = {
    "LORA_KERNELS_CPU_CAPABILITY": ("portable", "avx2", "avx512", "avx512_bf16", "amx"),
    "LORA_KERNELS_CPU_PRODUCT": ("own", "library"),
}


def backend_from_environment() -> str | None:
    """The backend named by ``LORA_KERNELS_BACKEND``, or None where it is unset or empty."""
    return os.environ.get(BACKEND_VARIABLE) or None


def unknown_choice() -> str | None:
    """A sentence on the first variable of ``CPU_CHOICES`` that has a word which the CPU library does not know."""
    for variable, known in CPU_CHOICES.items():
        if (named := os.environ.get(variable)) and named not in known:
            return f"{variable}={named} was given: it must be one of {', '.join(known)}. Set one of them, or unset it."
    return None


def dropout_keeps() -> str | None:
    """``LORA_KERNELS_DROPOUT_KEEPS``, or None where it is unset or empty: then the layer's width decides."""
    return os.environ.get(DROPOUT_KEEPS_VARIABLE) or None


def gpu_quantized() -> str | None:
    """``LORA_KERNELS_GPU_QUANTIZED``, or None where it is unset or empty."""
    return os.environ.get(GPU_QUANTIZED_VARIABLE) or None


def cache_folder() -> Path | None:
    """``LORA_KERNELS_CACHE``, by default ``lora_kernels`` in the user's cache; None where there is no home folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(named)).absolute()  # a user that there is not stays as it is written
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "lora_kernels"
    try:
        return Path.home() / ".cache" / "lora_kernels"
    except RuntimeError:
        return None


def explain_requested() -> bool:
    """Whether ``LORA_KERNELS_EXPLAIN`` is on. It is read where a plan is first chosen, never on a warm call."""
    return _is_on(EXPLAIN_VARIABLE)


def triton_interpreter_requested() -> bool:
    """Whether ``TRITON_INTERPRET`` is on, as Triton reads it: its kernels then run in Python, on CPU tensors."""
    return _is_on("TRITON_INTERPRET")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "on", "yes", "y")
