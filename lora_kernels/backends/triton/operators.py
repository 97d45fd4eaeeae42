"""The operators of ``ops.py`` for whole layers, on top of the kernels; the others are in ``part_operators.py``.

Launches: ``forward`` and ``backward`` as their plans say (``choose.plans``); ``mask`` 1. Of a seed, one more before
them draws the mask: its words are what ``forward`` gives for ``backward``, which takes them or the seed. Empty results
launch nothing. All outputs come from ``torch.empty`` and are written in full. What depends on sizes, strides, dtypes
and alignments alone is made ready once for each of them and kept (``prepared``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...checks import check
from ...kept import no_words
from ...tensors import flatten, resolved, unflatten
from . import code_operators, combine_operators, expert_operators, gated_operators, part_operators
from .choose import ranking
from .choose.launching import Launching
from .choose.plans import (
    GLUON_PLANS,
    BackwardPlan,
    DxHopper,
    DxInside,
    ForwardPlan,
    Hopper,
    HopperInside,
    Ring,
    RingGrads,
)
from .kernels.packed import mask_kernel
from .run import hopper_group_passes
from .run.backward import BackwardRun, ready_backward
from .run.call import Call, backward_key, cdiv, forward_key, kind_of
from .run.chosen import enter, first_run
from .run.forward import ready
from .run.hopper_backward import ready_hopper_backward
from .run.hopper_call import plan_fault
from .run.hopper_forward import ready_hopper
from .run.launcher import KnownPasses, PassRun, launched
from .run.prepared import Cache, Launch, precision_of
from .run.ring import ready_ring, ring_call_fault
from .run.ring_grads import grads_call_fault, ready_ring_grads
from .run.steps import Step, draw_step, seeded

__all__ = ["backward", "forget", "forward", "mask", "run_backward", "run_plan"]

_MASK_BLOCK_M, _MASK_BLOCK_K = 32, 128

_runs: Cache[Callable[..., Any]] = Cache()
_backward_runs: Cache[Callable[..., Any]] = Cache()
_known, _known_backward = KnownPasses(), KnownPasses()


def forget() -> None:
    """Forget what was made ready and which plans were chosen: for after a device was tuned, and for tests."""
    _runs.clear()
    _backward_runs.clear()
    _known.clear()
    _known_backward.clear()
    part_operators.forget()
    hopper_group_passes.forget()
    gated_operators.forget()
    code_operators.forget()
    expert_operators.forget()
    combine_operators.forget()
    ranking.forget()


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For x (..., K), with y (..., N)."""
    kind = kind_of(precision_of(x.dtype))
    scaling = float(scaling)  # an int of 1 would be compiled in
    if found := _known(scaling, p, kind, x, weight, lora_a, lora_b, bias, state):
        y, h, words = found
        return y, h, words
    check(x, weight, lora_a, lora_b, bias, False)
    rows, weight, lora_a, lora_b, bias = flatten(x), *map(resolved, (weight, lora_a, lora_b, bias))
    key = forward_key(rows, weight, lora_a, lora_b, bias, p, state)
    run = _runs.get(key)
    if run is None:
        y, h, words = _first_forward(key, rows, weight, lora_a, lora_b, bias, scaling, p, state)
    else:
        y, h, words = run(rows, weight, lora_a, lora_b, bias, scaling, state)
        absent = (y, h, words)  # the words alone may be
        enter(_known, run, p, kind, (rows, weight, lora_a, lora_b, bias, state), lambda: absent)
    return unflatten(y, x.shape), h, words


def _plans(call: Call, direction: str, descriptors: bool, launching: Launching) -> list[Any]:
    """Without those that do not take the call: TMA, or a load of 16 bytes, reads no matrix of any strides and
    address."""
    plans = ranking.plans_for(call.device, call.machine, call.cell(direction), descriptors, launching)
    return [plan for plan in plans if _fault(plan, call) is None]


def _fault(plan: Any, call: Call) -> str | None:
    if isinstance(plan, Ring):
        return ring_call_fault(plan, call)
    if isinstance(plan, RingGrads):
        return grads_call_fault(call)
    return plan_fault(plan, call) if isinstance(plan, GLUON_PLANS) else None


def _kept_run(plan: ForwardPlan | Hopper | HopperInside, c: Call) -> PassRun:
    """``run(x, weight, lora_a, lora_b, bias, scaling, state)`` -> y, h, words."""
    if isinstance(plan, Ring):
        return ready_ring(plan, c)
    return PassRun(_whole(plan, c), c.device, (None, None, no_words(c.device)))


def _whole(plan: ForwardPlan | Hopper | HopperInside, c: Call) -> Step:
    """``whole(stream, x, weight, lora_a, lora_b, bias, scaling, state)`` -> y, h, words or None."""
    if isinstance(plan, (Hopper, HopperInside)):
        return _whole_hopper(plan, c)
    run = ready(plan, c)
    if not c.dropout:
        return lambda stream, *arguments: (*run(stream, *arguments), None)
    draw = draw_step(c.m, c.k, c.p)

    def whole(stream: int | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        words = draw(stream, arguments[-1])
        return *run(stream, *arguments[:-1], words), words

    return whole


def _whole_hopper(plan: Hopper | HopperInside, c: Call) -> Step:
    """The same by a Gluon plan, which draws the mask itself where it reads one."""
    run, draw = ready_hopper(plan, c), draw_step(c.m, c.k, c.p) if c.dropout else None

    def whole(stream: int | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        y, h, words = run(stream, *arguments)
        if words is None and draw is not None:
            words = draw(stream, arguments[-1])
        return y, h, words

    return whole


def run_plan(
    plan: ForwardPlan | Hopper | HopperInside,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``forward`` by ``plan``. Where x or weight is no operand for TMA, the variant that loads by pointers runs.

    Raises:
        InvalidArgumentError: the plan does not cover so many tokens or so large a rank, or is Gluon's and does not take
            the call.
    """
    if x.shape[0] == 0 or weight.shape[0] == 0:
        y, h, _ = forward(x, weight, lora_a, lora_b, bias, scaling, p, state)
        return y, h
    key = (*forward_key(x, weight, lora_a, lora_b, bias, p, state), plan)
    run = _runs.get(key)
    if run is None:
        run = _runs.keep(key, _kept_run(plan, Call.forward(x, weight, lora_a, lora_b, bias, p, state)))
    y, h, _ = run(x, weight, lora_a, lora_b, bias, float(scaling), state)
    return y, h


def _first_forward(
    key: tuple[Any, ...],
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the plan, makes it ready and runs it; a plan that turns out not to fit the device is stepped over."""
    m, n, r = x.shape[0], weight.shape[0], lora_a.shape[0]
    call = Call.forward(x, weight, lora_a, lora_b, bias, p, state)
    if m == 0 or n == 0:
        words = no_words(x.device)
        if state is not None:
            words = launched(draw_step(m, x.shape[1], p), key[0], state)
        if call.operand is not None:  # None where n is 0
            h = x.new_empty((0, call.operand.columns), dtype=torch.bfloat16)
        else:
            h = x.new_empty((0, r), dtype=torch.float32) if m == 0 else part_operators.shrink(x, lora_a, p, state)
        return x.new_empty((m, n)), h, words
    arguments = (x, weight, lora_a, lora_b, bias, scaling, state)
    result: tuple[Tensor, Tensor, Tensor]
    run, result = first_run(
        call,
        "forward",
        lambda launching: _plans(call, "forward", call.by_descriptor, launching),
        lambda plan: _kept_run(plan, call),
        lambda run: run(*arguments),
    )
    _runs.keep(key, run)
    return result


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For dy (..., N) and x (..., K), with dx (..., K)."""
    kind = kind_of(precision_of(dy.dtype), (bias,))
    scaling = float(scaling)
    if found := _known_backward(scaling, p, kind, dy, x, weight, lora_a, lora_b, h, state):
        dx, da, db, dbias = found
        return dx, da, db, dbias
    rows, x = flatten(dy), None if x is None else flatten(x)
    weight, lora_a, lora_b = map(resolved, (weight, lora_a, lora_b))
    arguments = (rows, x, weight, lora_a, lora_b, h, scaling, state)
    dx, da, db, dbias = _backward(kind, arguments, bias, p)
    return dx if weight is None else unflatten(dx, dy.shape), da, db, dbias


def _backward(
    kind: int, given: tuple[Any, ...], bias: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, x, weight, lora_a, lora_b, h, scaling, state = given
    m, n = dy.shape
    k = lora_a.shape[1]
    if m == 0 or n == 0 or k == 0:
        return _backward_of_nothing(dy, x, weight, lora_a, lora_b, bias, h, scaling)
    h = None if h is None else h.contiguous()
    key = backward_key(dy, x, weight, lora_a, lora_b, bias, h, p, state)
    arguments = (dy, x, weight, lora_a, lora_b, h, scaling, state)
    results: tuple[Tensor, Tensor, Tensor, Tensor]
    found = _backward_runs.get(key)
    if found is not None:
        results = found(*arguments)
        enter(_known_backward, found, p, kind, (dy, x, weight, lora_a, lora_b, h, state), lambda: results)
        return results
    call = Call.backward(dy, x, weight, lora_a, lora_b, bias, h, p, state)
    descriptors = call.by_tma if weight is None else call.by_descriptor
    due = (weight is not None, x is not None, h is not None)
    absent = _not_due(call)
    run, results = first_run(
        call,
        "backward",
        lambda launching: _plans(call, "backward", descriptors, launching),
        lambda plan: PassRun(_whole_backward(plan, call, due, state), call.device, absent),
        lambda run: run(*arguments),
    )
    _backward_runs.keep(key, run)
    return results


def _not_due(c: Call) -> tuple[Tensor, ...]:
    """What stands for dx, da, db and dbias: made once for all calls, for to make it takes host time."""
    with torch.inference_mode(False):
        return tuple(torch.empty(0, dtype=dtype, device=c.device) for dtype in (c.dtype, c.a_dtype, c.b_dtype, c.dtype))


def _whole_backward(
    plan: BackwardPlan | RingGrads | DxHopper | DxInside, c: Call, due: tuple[bool, bool, bool], state: Tensor | None
) -> BackwardRun:
    """The run of ``plan`` with the state in the place of the words; ``due``: dx, da, db."""
    if isinstance(plan, (DxHopper, DxInside)):
        run = ready_hopper_backward(plan, c, *due)
    elif isinstance(plan, RingGrads):
        run = ready_ring_grads(plan, c, *due)
    else:
        run = ready_backward(plan, c, *due)
    return seeded(run, state if due[0] or due[1] else None, c.m, c.k, c.p)


def run_backward(
    plan: BackwardPlan | RingGrads | DxHopper | DxInside,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``backward`` by ``plan``, None for what is not due; sizes above 0. Where dy or weight is no operand for TMA, the
    variant that loads by pointers runs."""
    key = (*backward_key(dy, x, weight, lora_a, lora_b, bias, h, p, state), plan)
    run = _backward_runs.get(key)
    if run is None:
        call = Call.backward(dy, x, weight, lora_a, lora_b, bias, h, p, state)
        due = (weight is not None, x is not None, h is not None)
        run = _backward_runs.keep(key, PassRun(_whole_backward(plan, call, due, state), call.device))
    results: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    results = run(dy, x, weight, lora_a, lora_b, h, float(scaling), state)
    return results


def _backward_of_nothing(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over nothing are zero; without x's columns there are still db and dbias."""
    dh_db = part_operators.output_grads(dy, lora_b, h, bias, scaling)
    return (
        dy.new_empty(0) if weight is None else dy.new_zeros((dy.shape[0], lora_a.shape[1])),
        lora_a.new_empty(0) if x is None else torch.zeros_like(lora_a, memory_format=torch.contiguous_format),
        dh_db[1],
        dh_db[2],
    )


def mask(state: Tensor, rows: int, columns: int, p: float) -> Tensor:
    out = torch.empty((rows, columns), dtype=torch.bool, device=state.device)
    if out.numel() == 0:
        return out
    unpack = Launch(
        mask_kernel,
        (cdiv(rows, _MASK_BLOCK_M), cdiv(columns, _MASK_BLOCK_K), 1),
        (rows, columns, _MASK_BLOCK_M, _MASK_BLOCK_K),
        num_warps=4,
    )
    write = seeded(lambda stream, words: unpack(stream, words, out), state, rows, columns, p)
    launched(write, state.get_device(), state)
    return out
