"""Backward by the CUDA C++ kernels for few tokens (``csrc/cuda/few_tokens_grads.cuh``), in two launches.

The first reads W once: parts of dy W and of dh, and db and dbias whole. The second sums the parts. What is not due is
left out of both, and the second launch where neither dx nor da is due.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ....errors import InvalidArgumentError
from ....kept import row_words
from ..choose.plans import RingGrads
from ..choose.ring import (
    CHUNK,
    GRAD_COLUMNS,
    GRAD_HEADERS,
    GRAD_THREADS,
    LAST_COLUMNS,
    RANK,
    grad_defines,
    grad_shared_memory,
)
from .backward import BackwardRun
from .call import Call
from .cuda_kernels import CudaLaunch, Source

__all__ = ["grads_call_fault", "ready_ring_grads"]

_ENTRY = "few_tokens_grads_entry.cuh"
_FIRST = (*("*",) * 8, "fp32", *("i32",) * 10)
_LAST = (*("*",) * 7, "fp32", "fp32", *("i32",) * 9)
_GRADIENTS = {torch.bfloat16, torch.float32, None}  # dtypes that they are written in; None: not due


def grads_call_fault(c: Call) -> str | None:
    """The end of a sentence "the plan ... does not run: ..." where it does not take the call."""
    if c.dtype is not torch.bfloat16 or not 0 < c.m <= 16 or c.r > RANK or c.k % CHUNK or c.n == 0:
        return f"it is for up to 16 tokens of bfloat16, rank {RANK}, and multiples of {CHUNK} in_features"
    if not {c.a_dtype, c.b_dtype, c.bias_dtype} <= _GRADIENTS:
        return "it writes gradients of bfloat16 and float32 alone"
    read = c.stride_w != (0, 0)  # W is, where dx is due
    if c.stride_dy[1] != 1 or (read and not (c.by_descriptor and (c.n == 1 or c.stride_w == (c.k, 1)))):
        return "dy or W is not stored in rows of one piece, on 16-byte boundaries"
    if (c.r > 1 and c.stride_a[0] != c.k) or c.stride_a[1] != 1 or c.stride_x[1] not in (0, 1):
        return "A or x is not stored in rows of one piece"
    if (c.n > 1 and c.stride_b[0] != c.r) or (c.r > 1 and c.stride_b[1] != 1):
        return "B is not in one piece"
    return None


def ready_ring_grads(plan: RingGrads, c: Call, need_x: bool, need_a: bool, need_b: bool) -> BackwardRun:
    """The run of ``plan`` for what is due; compiled at its first use.

    Raises:
        InvalidArgumentError: the plan does not take the call.
    """
    if fault := grads_call_fault(c):
        raise InvalidArgumentError(f"the plan {plan} does not run: {fault}.")
    first, last = _launches(plan, c, need_x)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=c.device)

    def run(
        stream: int | None,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        h: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        dx_parts = empty(plan.splits, c.m, c.k) if need_x else None
        dh_parts = empty(plan.slices, c.m, c.r)
        db = empty(c.n, c.r, dtype=c.b_dtype) if need_b else None
        dbias = None if c.bias_dtype is None else empty(c.n, dtype=c.bias_dtype)
        first(stream, dy, weight, lora_b, h, dx_parts, dh_parts, db, dbias, scaling)
        dx = empty(c.m, c.k, dtype=c.dtype) if need_x else None
        da = empty(c.r, c.k, dtype=c.a_dtype) if need_a else None
        if need_x or need_a:
            last(stream, dx_parts, dh_parts, lora_a, x if need_a else None, words, dx, da, scaling)
        return dx, da, db, dbias

    return run


def _launches(plan: RingGrads, c: Call, need_x: bool) -> tuple[CudaLaunch, CudaLaunch]:
    source = Source(_ENTRY, GRAD_HEADERS, tuple(grad_defines(c.m).items()))
    of_first, of_last = grad_shared_memory(c.m)

    made = partial(CudaLaunch, source, capability=c.machine.capability, threads=GRAD_THREADS)
    a_is_fp32, b_is_fp32, bias_is_fp32 = (int(d is torch.float32) for d in (c.a_dtype, c.b_dtype, c.bias_dtype))
    stride_dy, stride_x = (stride[0] if c.m > 1 else size for stride, size in ((c.stride_dy, c.n), (c.stride_x, c.k)))
    shares = plan.slices, plan.splits
    sizes = c.m, c.n, c.k, c.r, stride_dy, c.padded_rank, b_is_fp32, bias_is_fp32, *shares
    strips = c.k // GRAD_COLUMNS * plan.splits if need_x else 0
    first = made("few_tokens_first_grads", _FIRST, plan.slices + strips, sizes, shared_bytes=of_first)
    keep = c.keep_scale if c.dropout else 1.0
    static = keep, c.m, c.k, c.r, stride_x, row_words(c.k), a_is_fp32, *shares, int(plan.pdl)
    blocks = c.k // LAST_COLUMNS
    last = made("few_tokens_last_grads", _LAST, blocks, static, shared_bytes=of_last, dependent=plan.pdl)
    return first, last
