"""Blocks of the kernels that combine a token's expert rows: data in, data out. Not measured on a GPU.

They multiply no matrices, so their time is that of their bytes. Of Qwen3-30B-A3B's layer (8192 tokens, top-8: M = 65536
rows; H = 2048; bf16) at 4.8 TB/s, beside PyTorch's own calls for the same:

================== ==================================== ===== ====== ============================================
kernel             elements                             GB    ms     PyTorch's calls, GB
================== ==================================== ===== ====== ============================================
combine            M H read, T H written                0.30  0.063  a product, a gather and a sum: 1.4
combine_grad       M H + T H read, M H written          0.57  0.119  a gather, two products and a sum: 1.9
combine of dx      M H read, T H written                0.30  0.063  a gather and a sum: 0.84
================== ==================================== ===== ====== ============================================
"""

from __future__ import annotations

from .blocks import Machine, next_power_of_2

__all__ = ["combine_block", "combine_grad_block"]

_THREADS = 128
_SLOTS = 8  # whose rows a program asks for at a time: 16 bytes a thread of each


def combine_block(machine: Machine, columns: int, k: int, itemsize: int) -> tuple[int, int, int]:
    """Slots at a time, columns and warps of a program of one token: 16 bytes of each row a thread."""
    if machine.interpreter:
        return 2, 32, 4
    wide = _THREADS * 16 // itemsize
    return min(next_power_of_2(k), _SLOTS), max(min(next_power_of_2(columns), wide), 32), 4


def combine_grad_block(machine: Machine, columns: int, itemsize: int) -> tuple[int, int, int]:
    """Slots, columns and warps: 32 bytes of rows a thread, and of one slot up to 2048 columns.

    Where rows lie apart by no multiple of 16 bytes, numbers come one by one, and addresses take registers: half of it.
    """
    if machine.interpreter:
        return 4, 32, 4
    elements = 2 * _THREADS * (16 if columns * itemsize % 16 else 32) // itemsize
    wide = max(min(next_power_of_2(columns), 2048, elements), 32)
    return min(elements // wide, 16), wide, 8
