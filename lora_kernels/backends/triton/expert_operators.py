"""The operators of a mixture's stacked experts on top of the kernels; ``choose/experts.py`` counts what they move.

The product has the low-rank term inside, with one rounding, and x is gathered as it is read. The host waits for
nothing. Launches: ``experts_forward`` 2; ``experts_backward`` 1 for dh, 1 for each of dx, da, db that is due. Of a
seed, one more launch draws the mask. Empty results launch nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidArgumentError
from .choose import blocks
from .choose.experts import Experts
from .run.experts import ExpertsCall, backward_step, forward_step
from .run.launcher import PassRun
from .run.prepared import Cache, alignment, matrix, precision_of
from .run.steps import seeded

__all__ = ["experts_backward", "experts_forward", "forget"]

_runs: Cache[PassRun] = Cache()


def forget() -> None:
    """Forget what was made ready."""
    _runs.clear()


def experts_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    offsets: Tensor,
    tokens: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    a, b = _both(lora_a, lora_b)
    m, (n, k) = (x if tokens is None else tokens).shape[0], weight.shape[1:]
    if 0 in (m, n, k):
        return x.new_zeros((m, n)), x.new_zeros((m, a.shape[1]), dtype=torch.float32)
    arguments = (x, weight, a, b, offsets, tokens, float(scaling), state)
    tensors = arguments[:-2]
    key = ("forward", *_key(*tensors), p, _shape(state), alignment(*tensors, state), precision_of(x.dtype))
    run = _runs.get(key)
    if run is None:
        call = _call(x, weight, a, b, m, p, state)
        run = _runs.keep(key, PassRun(seeded(forward_step(call), state, m, k, p), x.device))
    y, h = run(*arguments)
    return y, h


def experts_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    offsets: Tensor,
    tokens: Tensor | None,
    h: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = _both(lora_a, lora_b)
    m, n, k = *dy.shape, a.shape[2]
    due = (weight is not None, x is not None, h is not None)
    if 0 in (m, n, k) or not any(due):
        return (
            dy.new_zeros((m, k) if due[0] else 0),
            a.new_zeros(a.shape if due[1] else 0),
            b.new_zeros(b.shape if due[2] else 0),
        )
    state = state if due[0] or due[1] else None
    tensors = (dy, x, weight, a, b, offsets, tokens, None if h is None else h.contiguous())
    key = ("backward", *_key(*tensors), p, _shape(state), alignment(*tensors, state), precision_of(dy.dtype))
    run = _runs.get(key)
    if run is None:
        call = _call(dy if x is None else x, weight, a, b, m, p, state)
        step = seeded(backward_step(call, dy.stride(), due), state, m, k, p)
        with torch.inference_mode(False):
            absent = tuple(torch.empty(0, dtype=own.dtype, device=own.device) for own in (dy, a, b, dy))
        run = _runs.keep(key, PassRun(step, dy.device, absent))
    dx, da, db, _ = run(*tensors, float(scaling), state)
    return dx, da, db


def _both(lora_a: Tensor | None, lora_b: Tensor | None) -> tuple[Tensor, Tensor]:
    if lora_a is None or lora_b is None:
        raise InvalidArgumentError(
            "the triton backend was asked for experts without an adapter: it computes adapted ones only. Run within "
            "use_backend('eager'), or leave the choice automatic."
        )
    return lora_a, lora_b


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _key(*tensors: Tensor | None) -> Iterator[Any]:
    """What launches depend on of them."""
    for tensor in tensors:
        yield None if tensor is None else matrix(tensor)


def _call(
    x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, rows: int, p: float, state: Tensor | None
) -> ExpertsCall:
    """``x``: or dy, where x is not read."""
    precision = precision_of(x.dtype)
    of = Experts(rows, a.shape[0], a.shape[1], x.dtype, precision == "tf32", state is not None)
    return ExpertsCall(
        machine=blocks.machine_of(x.device),
        device=x.device,
        of=of,
        precision=precision,
        k=a.shape[2],
        n=b.shape[1],
        stride_x=x.stride(),
        stride_w=None if weight is None else weight.stride(),
        stride_a=a.stride(),
        stride_b=b.stride(),
        a_dtype=a.dtype,
        b_dtype=b.dtype,
        keep_scale=1.0 / (1.0 - p),
    )
