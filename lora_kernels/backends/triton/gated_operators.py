"""The gated MLP's operators of ``ops.py`` on top of the kernels: one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from .choose import blocks
from .choose.blocks import gated_block
from .kernels.gated import gated_grad_kernel, gated_kernel
from .run.call import cdiv
from .run.launcher import PassRun
from .run.prepared import Cache, Launch, alignment, matrix
from .run.steps import Step

__all__ = ["forget", "gated", "gated_grad"]

_runs: Cache[PassRun] = Cache()


def forget() -> None:
    """Forget what was made ready."""
    _runs.clear()


def gated(gate: Tensor, up: Tensor, number: int) -> Tensor:
    if gate.numel() == 0:
        return gate.new_empty(gate.shape)
    key = ("gated", *matrix(gate), *matrix(up), number, alignment(gate, up))
    run = _runs.get(key)
    if run is None:
        run = _runs.keep(key, PassRun(_gated_step(gate, up, number), gate.device))
    a: Tensor = run(gate, up)
    return a


def _gated_step(gate: Tensor, up: Tensor, number: int) -> Step:
    """``step(stream, gate, up)`` -> a."""
    shape, dtype, device = gate.shape, gate.dtype, gate.device
    launch = _launch(gated_kernel, gate, (*gate.stride(), *up.stride()), number)

    def step(stream: int | None, gate: Tensor, up: Tensor) -> Tensor:
        a = torch.empty(shape, dtype=dtype, device=device)
        launch(stream, gate, up, a)
        return a

    return step


def gated_grad(da: Tensor, gate: Tensor, up: Tensor, number: int, joined: bool) -> tuple[Tensor, Tensor]:
    m, f = gate.shape
    if m == 0 or f == 0:
        return gate.new_empty((m, 2 * f if joined else f)), gate.new_empty(0 if joined else (m, f))
    key = ("gated_grad", *matrix(da), *matrix(gate), *matrix(up), number, joined, alignment(da, gate, up))
    run = _runs.get(key)
    if run is None:
        run = _runs.keep(key, PassRun(_gated_grad_step(da, gate, up, number, joined), gate.device))
    dgate, dup = run(da, gate, up)
    return dgate, gate.new_empty(0) if dup is None else dup


def _gated_grad_step(da: Tensor, gate: Tensor, up: Tensor, number: int, joined: bool) -> Step:
    """``step(stream, da, gate, up)`` -> dgate, and dup or None where dgate holds both."""
    (m, f), dtype, device = gate.shape, gate.dtype, gate.device
    columns = 2 * f if joined else f
    launch = _launch(gated_grad_kernel, gate, (*da.stride(), *gate.stride(), *up.stride(), columns), number)

    def step(stream: int | None, da: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor | None, ...]:
        dgate = torch.empty((m, columns), dtype=dtype, device=device)
        dup = None if joined else torch.empty((m, f), dtype=dtype, device=device)
        launch(stream, da, gate, up, dgate, dup)
        return dgate, dup

    return step


def _launch(kernel: object, gate: Tensor, strides: tuple[int, ...], number: int) -> Launch:
    m, f = gate.shape
    block_m, block_f, num_warps = gated_block(blocks.machine_of(gate.device), gate.itemsize)
    grid = cdiv(m, block_m), cdiv(f, block_f), 1
    return Launch(kernel, grid, (m, f, *strides, number, block_m, block_f), num_warps=num_warps)
