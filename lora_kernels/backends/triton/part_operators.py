"""The part operators of ``ops.py`` on top of the kernels: what several layers of one x, an activation and DoRA take.

Launches: ``shrink`` 1; ``product`` 1, or 2 by a composition; ``output_grads`` 2, or 1 without h; ``a_grad`` 1; where K
of a shrink or M of a sum is split, one more each. Where there is a seed, one more draws the mask's words from it; a
state that is the words is read as it is. ``gain_grad`` 2, or 1 where no sum is due; ``row_norms`` 1.

``input_grad`` of one member is its plan's dx. Of n members it is 1 + n launches, and n > 1 joins dh, A and the seeds
before (small copies): all low-rank terms are written in one launch, 2 M K bytes in 16 bits, and each library product
accumulates onto them, 4 M K. The product that begins with its own term would save the first 4 M K bytes and pay for it
with own tiles in the place of the library's; one launch a member, or tensors that are summed, would move 4 M K more for
each further member.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...reference import adapter_dtype
from .choose import blocks
from .choose.blocks import expand_config, gain_grad_config, row_norms_config
from .choose.plans import GLUON_PLANS, BaseFirst, Fused, LoraFirst
from .choose.ranking import plans_for
from .choose.ways import dh_db_for, outer_for, shrink_for
from .kernels.gain import gain_grad_kernel, row_norms_kernel
from .run.call import Call, cdiv, rows_in_one_piece, told
from .run.chosen import launching_on
from .run.forward import ready_product
from .run.launcher import PassRun
from .run.prepared import Cache, Launch, alignment, first_that_runs, matrix, precision_of
from .run.steps import (
    Step,
    da_step,
    db_step,
    dh_db_step,
    dh_step,
    dx_step,
    input_grad_step,
    reduce_launch,
    seeded,
    shrink_step,
)

__all__ = [
    "a_grad",
    "forget",
    "gain_grad",
    "input_grad",
    "output_grads",
    "product",
    "product_plans",
    "row_norms",
    "shrink",
]

_steps: Cache[PassRun] = Cache()


def forget() -> None:
    """Forget what was made ready."""
    _steps.clear()


def shrink(x: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
    m, k = x.shape
    r = lora_a.shape[0]
    if m == 0 or k == 0:
        return torch.zeros((m, r), dtype=torch.float32, device=x.device)
    precision = precision_of(x.dtype)
    key = ("shrink", *matrix(x), *matrix(lora_a), p, told(state), alignment(x, lora_a, state), precision)
    run = _steps.get(key)
    if run is None:
        call = Call.over(x, k=k, r=r, p=p, dropout=state is not None)
        config = shrink_for(call.machine, call.cell("forward").of_x)
        step = shrink_step(config, call, m, k, (x.stride(), lora_a.stride()))
        run = _steps.keep(key, PassRun(seeded(step, state, m, k, p), x.device))
    z: Tensor = run(x, lora_a, 1.0 / (1.0 - p), state)
    return z


def product(
    x: Tensor,
    weight: Tensor,
    lora_b: Tensor,
    h: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    with_linear: bool,
) -> tuple[Tensor, Tensor]:
    size, h = (x.shape[0], weight.shape[0]), rows_in_one_piece(h)
    linear = x.new_empty(size) if gain is not None and with_linear else None
    left = x.new_empty(0) if linear is None else linear
    if 0 in size:
        return x.new_empty(size), left
    precision, tensors = precision_of(x.dtype), (x, weight, lora_b, h)
    vectors = tuple(None if t is None else (t.dtype, t.stride()) for t in (bias, gain))
    aligned = alignment(*tensors, bias, gain)
    key = ("product", *(fact for t in tensors for fact in matrix(t)), *vectors, with_linear, aligned, precision)
    arguments = (x, weight, lora_b, bias, gain, h, None, linear, float(scaling))
    run = _steps.get(key)
    if run is not None:
        return run(*arguments), left
    call = Call.forward(x, weight, None, lora_b, bias, 0.0, None, h, gain)
    runs = [PassRun(ready_product(plan, call), x.device) for plan in product_plans(x.device, call)]
    chosen, y = first_that_runs(runs, lambda run: run(*arguments))
    _steps.keep(key, chosen)
    return y, left


def product_plans(device: torch.device, call: Call) -> list[Any]:
    """The plan for the whole forward pass, and then the others, where h is there and in one part.

    What forms h itself, or by Gluon, is left out. A gain's epilogue, which may store l as well, leaves the widest tiles
    no registers: the next ones are taken.
    """
    found: dict[Any, None] = {}
    for plan in plans_for(device, call.machine, call.cell("forward"), call.by_descriptor, launching_on(device)):
        if not isinstance(plan, (Fused, LoraFirst, BaseFirst)):
            continue
        if call.gain and isinstance(plan, Fused) and _is_wide(plan):
            continue
        whole: Any = replace(plan, shrink=replace(plan.shrink, splits=1))
        if call.gain and not isinstance(plan, Fused) and call.dtype.itemsize == 4:
            whole = replace(whole, expand=replace(whole.expand, block_m=min(whole.expand.block_m, 32)))
        found[replace(whole, pdl=False) if getattr(whole, "pdl", False) else whole] = None
    return list(found)


def _is_wide(plan: Fused) -> bool:
    """More than 128 columns, or than 64 sums a thread."""
    g = plan.gemm
    return g.block_columns > 128 or g.block_rows * g.block_columns > 64 * 32 * g.num_warps


def output_grads(
    dy: Tensor, lora_b: Tensor, h: Tensor | None, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    (m, n), r, device = dy.shape, lora_b.shape[1], dy.device
    db, dbias = lora_b.new_empty(0), dy.new_empty(0)
    if m == 0 or n == 0:
        dh = torch.zeros((m, r), dtype=torch.float32, device=device)
        return dh, db if h is None else torch.zeros_like(lora_b), dbias if bias is None else torch.zeros_like(bias)
    precision, h = precision_of(dy.dtype), None if h is None else rows_in_one_piece(h)
    given = None if h is None else h.stride(0)
    due = None if bias is None else bias.dtype
    key = ("output_grads", *matrix(dy), *matrix(lora_b), given, due, alignment(dy, lora_b, h), precision)
    run = _steps.get(key)
    if run is None:
        strides: dict[str, Any] = {"stride_dy": dy.stride(), "stride_b": lora_b.stride(), "stride_h": given or 0}
        call = Call.over(dy, n=n, r=r, **strides, b_dtype=lora_b.dtype, bias_dtype=due)
        run = _steps.keep(key, PassRun(_output_grads_step(call, h is not None), device))
    dh, found, sums = run(dy, lora_b, h, float(scaling))
    if bias is not None:
        dbias = dy.sum(0, dtype=due) if sums is None else sums
    return dh, db if found is None else found, dbias


def _output_grads_step(c: Call, with_h: bool) -> Step:
    """``step(stream, dy, lora_b, h, scaling)`` -> dh, db or None, dbias or None."""
    way = dh_db_for(c.machine, c.cell("backward").of_dy)
    if with_h and way.joint:
        return dh_db_step(way.dh_db, c)
    dh, db = dh_step(way.shrink, c), db_step(way.db, c) if with_h else None

    def step(stream: int | None, dy: Tensor, lora_b: Tensor, h: Tensor | None, scaling: float) -> Any:
        found = None if db is None else db(stream, dy, h, scaling)
        return dh(stream, dy, lora_b, scaling), found, None

    return step


def input_grad(
    dys: list[Tensor],
    weights: list[Tensor],
    dhs: list[Tensor],
    lora_as: list[Tensor],
    p: float,
    states: list[Tensor],
) -> Tensor:
    m, k = dys[0].shape[0], weights[0].shape[1]
    if m == 0 or k == 0:
        return dys[0].new_empty((m, k))
    dtype, device = dys[0].dtype, dys[0].device
    precision, ranks = precision_of(dtype), tuple(a.shape[0] for a in lora_as)
    dh, lora_a, state = _joined(dhs, lora_as, states, adapter_dtype(dtype))
    dh = rows_in_one_piece(dh)
    members = (*dys, *weights) if len(dys) == 1 else ()  # several go to the library, which takes any
    aligned = alignment(*members, dh, lora_a, state)
    own = (fact for t in (*dys, *weights, dh, lora_a) for fact in matrix(t))  # over fp16, dh and A are fp32, as of fp32
    key = ("input_grad", dtype, *own, ranks, p, told(state), aligned, precision)
    run = _steps.get(key)
    if len(dys) == 1:
        arguments: tuple[Any, ...] = (dys[0], weights[0], dh, lora_a, state)
    else:
        arguments = (dys, weights, dh, lora_a, state)
    dx: Tensor
    if run is not None:
        dx = run(*arguments)
        return dx
    strides = {"stride_dy": dys[0].stride(), "stride_a": lora_a.stride(), "stride_dh": dh.stride(0)}
    sizes = {"n": dys[0].shape[1], "k": k, "r": sum(ranks)}
    call = Call.over(dys[0], weights[0], **sizes, **strides, p=p, dropout=state is not None)
    steps = [seeded(step, state, call.m, k, p) for step in _input_grad_steps(call, ranks, len(dys))]
    chosen, dx = first_that_runs([PassRun(step, device) for step in steps], lambda run: run(*arguments))
    _steps.keep(key, chosen)
    return dx


def _joined(
    dhs: list[Tensor], lora_as: list[Tensor], states: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One dh (M, ΣR), one A (ΣR, K), of several in ``dtype``, and one tensor of the seeds or words."""
    if len(dhs) == 1:
        return dhs[0], lora_as[0], states[0] if states else None
    lora_a = torch.cat([a if a.dtype is dtype else a.to(dtype) for a in lora_as])
    return torch.cat(dhs, 1), lora_a, torch.stack(states) if states else None


def _input_grad_steps(c: Call, ranks: Sequence[int], members: int) -> list[Step]:
    if members == 1 and c.n:
        plans = plans_for(c.device, c.machine, c.cell("backward"), True, launching_on(c.device))
        return [dx_step(plan, c) for plan in plans if not isinstance(plan, GLUON_PLANS)]
    starts = [0]
    for rank in ranks if c.dropout else (c.r,):  # without masks all terms are one product
        starts.append(starts[-1] + rank)
    config = expand_config(c.machine, c.r, c.dtype.itemsize, c.precision == "tf32")
    if len(starts) > 2:  # every member has a mask and an accumulator of its own: less of them at once
        config = replace(config, block_m=32, block_n=config.block_n // 2, block_r=16)
    step = input_grad_step(config, c, tuple(starts))
    if members == 1:  # of no columns: nobody has a plan for that
        return [lambda stream, dy, weight, *others: step(stream, [dy], [weight], *others)]
    return [step]


def a_grad(dh: Tensor, x: Tensor, p: float, state: Tensor | None) -> Tensor:
    (m, k), r = x.shape, dh.shape[1]
    if m == 0 or k == 0:
        return torch.zeros((r, k), dtype=torch.float32, device=x.device)
    precision, dh = precision_of(x.dtype), rows_in_one_piece(dh)
    key = ("a_grad", *matrix(x), *matrix(dh), p, told(state), alignment(x, dh, state), precision)
    run = _steps.get(key)
    if run is None:
        strides: dict[str, Any] = {"stride_x": x.stride(), "stride_dh": dh.stride(0)}
        call = Call.over(x, k=k, r=r, **strides, p=p, dropout=state is not None)
        step = da_step(outer_for(call.machine, call.cell("backward").of_x), call)
        run = _steps.keep(key, PassRun(seeded(step, state, m, k, p), x.device))
    da: Tensor = run(dh, x, state)
    return da


def gain_grad(dy: Tensor, linear: Tensor | None, gain: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    (m, n), due = dy.shape, None if bias is None else bias.dtype
    if m == 0 or n == 0:
        dgain = gain.new_empty(0) if linear is None else gain.new_zeros(n, dtype=torch.float32)
        return dy.new_empty((m, n)), dgain, dy.new_empty(0) if bias is None else dy.new_zeros(n, dtype=due)
    own = None if linear is None else matrix(linear)
    key = ("gain_grad", *matrix(dy), own, *matrix(gain), due, alignment(dy, linear, gain))
    run = _steps.get(key)
    if run is None:
        run = _steps.keep(key, PassRun(_gain_grad_step(dy, linear, gain, due), dy.device))
    dlinear, sums, dbias = run(dy, linear, gain)
    return dlinear, gain.new_empty(0) if sums is None else sums, dy.new_empty(0) if dbias is None else dbias


def _gain_grad_step(dy: Tensor, linear: Tensor | None, gain: Tensor, due: torch.dtype | None) -> Step:
    """``step(stream, dy, linear, gain)`` -> dlinear, dgain or None, dbias of the dtype ``due`` or None."""
    (m, n), device, with_linear = dy.shape, dy.device, linear is not None
    dtype, (first, second, count) = dy.dtype, _gain_grad_launches(dy, linear, gain, due is not None)

    def parts(wanted: bool) -> Tensor | None:
        return torch.empty((count, n), dtype=torch.float32, device=device) if wanted else None

    def step(stream: int | None, dy: Tensor, linear: Tensor | None, gain: Tensor) -> tuple[Tensor | None, ...]:
        dlinear = torch.empty((m, n), dtype=dtype, device=device)
        dgain = torch.empty(n, dtype=torch.float32, device=device) if with_linear else None
        dbias = None if due is None else torch.empty(n, dtype=due, device=device)
        dgain_parts, dbias_parts = parts(with_linear), parts(due is not None)
        first(stream, dy, linear, gain, dlinear, dgain_parts, dbias_parts)
        if second is not None:
            second(stream, None, dgain_parts, dbias_parts, None, dgain, dbias, 1.0)
        return dlinear, dgain, dbias

    return step


def _gain_grad_launches(
    dy: Tensor, linear: Tensor | None, gain: Tensor, with_bias: bool
) -> tuple[Launch, Launch | None, int]:
    """``first(stream, dy, linear, gain, dlinear, dgain_parts, dbias_parts)``, the second stage, the number of parts."""
    m, n = dy.shape
    config = gain_grad_config(blocks.machine_of(dy.device), blocks.next_power_of_2(m), n, dy.itemsize)
    count = cdiv(m, config.chunk_m)
    strides = (*dy.stride(), *((0, 0) if linear is None else linear.stride()), gain.stride(0))
    first = Launch(
        gain_grad_kernel,
        (cdiv(n, config.block_n), count, 1),
        (m, n, config.chunk_m, *strides, config.block_m, config.block_n),
        num_warps=config.num_warps,
    )
    sizes = (0 if linear is None else n, n if with_bias else 0)
    return first, reduce_launch(0, *sizes, 0, count) if any(sizes) else None, count


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    n, k = weight.shape
    if n == 0 or k == 0:
        return torch.zeros(n, dtype=torch.float32, device=weight.device)
    key = ("row_norms", *matrix(weight), *matrix(lora_a), *matrix(lora_b), alignment(weight, lora_a, lora_b))
    run = _steps.get(key)
    if run is None:
        run = _steps.keep(key, PassRun(_row_norms_step(weight, lora_a, lora_b), weight.device))
    norms: Tensor = run(weight, lora_a, lora_b, float(scaling))
    return norms


def _row_norms_step(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Step:
    """``step(stream, weight, lora_a, lora_b, scaling)`` -> the norms."""
    (n, k), r, device = weight.shape, lora_a.shape[0], weight.device
    config = row_norms_config(blocks.machine_of(device), n, k, r, weight.itemsize)
    tile = (config.block_n, config.block_k, config.block_r, k % config.block_k == 0)
    launch = Launch(
        row_norms_kernel,
        (cdiv(n, config.block_n), 1, 1),
        (n, k, r, *weight.stride(), *lora_a.stride(), *lora_b.stride(), *tile),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

    def step(stream: int | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        norms = torch.empty(n, dtype=torch.float32, device=device)
        launch(stream, weight, lora_a, lora_b, norms, scaling)
        return norms

    return step
