"""The gated MLP's operators of ``ops.py`` on top of the kernels: one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from .choose import blocks
from .choose.blocks import gated_block
from .kernels.gated import gated_grad_kernel, gated_kernel
from .run.prepared import Cache, Launch, alignment, current_stream, matrix, on_device
from .run.steps import cdiv

__all__ = ["forget", "gated", "gated_grad"]

_launches: Cache[Launch] = Cache()


def forget() -> None:
    """Forget what was made ready."""
    _launches.clear()


def gated(gate: Tensor, up: Tensor, number: int) -> Tensor:
    a = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if a.numel() == 0:
        return a
    key = ("gated", *matrix(gate), *matrix(up), number, alignment(gate, up))
    with on_device(gate.device):
        launch = _launches.get(key)
        if launch is None:
            launch = _launches.keep(key, _launch(gated_kernel, gate, (*gate.stride(), *up.stride()), number))
        launch(current_stream(key[1]), gate, up, a)
    return a


def gated_grad(da: Tensor, gate: Tensor, up: Tensor, number: int, joined: bool) -> tuple[Tensor, Tensor]:
    m, f = gate.shape
    dgate, dup = gate.new_empty((m, 2 * f if joined else f)), gate.new_empty(0 if joined else (m, f))
    if m == 0 or f == 0:
        return dgate, dup
    key = ("gated_grad", *matrix(da), *matrix(gate), *matrix(up), number, joined, alignment(da, gate, up))
    with on_device(gate.device):
        launch = _launches.get(key)
        if launch is None:
            strides = (*da.stride(), *gate.stride(), *up.stride(), dgate.stride(0))
            launch = _launches.keep(key, _launch(gated_grad_kernel, gate, strides, number))
        launch(current_stream(key[1]), da, gate, up, dgate, None if joined else dup)
    return dgate, dup


def _launch(kernel: object, gate: Tensor, strides: tuple[int, ...], number: int) -> Launch:
    m, f = gate.shape
    block_m, block_f, num_warps = gated_block(blocks.machine_of(gate.device), gate.itemsize)
    grid = cdiv(m, block_m), cdiv(f, block_f), 1
    return Launch(kernel, grid, (m, f, *strides, number, block_m, block_f), num_warps=num_warps)
