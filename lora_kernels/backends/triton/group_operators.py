"""The group operators of ``ops.py``: 2 to 4 layers that read one x, in the Gluon kernels of a group.

Launches: as the plan says (``choose.group_plans``); of each seed that backward is given, one more before them draws its
words. What no plan of theirs takes (few tokens, tensors that TMA cannot read, A and B that are not contiguous, a
backward without db) runs member by member, as ``operators`` runs each by itself, and dx is then their sum. Either way
h, the words and the masks are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...tensors import flatten, resolved, unflatten
from . import operators
from .choose import ranking
from .choose.group_plans import Apart, DxHopperGroup, HopperGroup
from .choose.launching import Launching
from .run.call import kind_of
from .run.chosen import enter, first_run
from .run.group_call import GroupCall, group_backward_key, group_forward_key
from .run.hopper_group_passes import (
    backward_runs,
    flat_backward,
    flat_forward,
    forward_runs,
    group_plan_fault,
    known_backward,
    known_forward,
    ready_group_backward,
    ready_group_forward,
)
from .run.launcher import PassRun
from .run.prepared import precision_of

__all__ = ["group_backward", "group_forward", "known_group", "run_group_backward", "run_group_forward"]

_Tensors = list[Tensor]


def group_forward(
    x: Tensor,
    weights: _Tensors,
    lora_as: _Tensors,
    lora_bs: _Tensors,
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    p: float,
    states: _Tensors,
) -> tuple[_Tensors, _Tensors, _Tensors]:
    """For x (..., K), with every y (..., N_i)."""
    numbers = [float(scaling) for scaling in scalings]
    if (found := known_group(x, weights, lora_as, lora_bs, biases, numbers, p, states)) is not None:
        return found
    arguments = (flatten(x), weights, lora_as, lora_bs, biases, numbers, states)
    ys, hs, words = _group_forward(kind_of(precision_of(x.dtype)), arguments, p)
    return [unflatten(y, x.shape) for y in ys], hs, words


def known_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    p: float,
    states: Sequence[Tensor],
) -> tuple[_Tensors, _Tensors, _Tensors] | None:
    """What ``group_forward`` gives, where C++ finds the pass by the tensors; else None."""
    tensors = [x, *weights, *lora_as, *lora_bs, *biases, *states]
    found, count = known_forward.many(scalings, p, kind_of(precision_of(x.dtype)), tensors), len(weights)
    if not found:
        return None
    return list(found[:count]), list(found[count : 2 * count]), list(found[2 * count :])


def _group_forward(kind: int, arguments: tuple[Any, ...], p: float) -> tuple[_Tensors, _Tensors, _Tensors]:
    x, weights, lora_as, lora_bs, biases, _, states = arguments
    key = group_forward_key(x, weights, lora_as, lora_bs, biases, p, states)
    given: tuple[_Tensors, _Tensors, _Tensors]
    run = forward_runs.get(key)
    if run is not None:
        given = run(*arguments)
        tensors, count = (x, *weights, *lora_as, *lora_bs, *biases, *states), len(weights)
        enter(known_forward, run, p, kind, tensors, lambda: [each for kept in given for each in kept], count)
        return given
    call = GroupCall.of(x, lora_as, lora_bs, biases, p, states, (x, *weights))
    chosen, given = first_run(
        call,
        "forward",
        lambda launching: _plans(call, "forward", launching),
        lambda plan: _forward_of(plan, call),
        lambda run: run(*arguments),
    )
    forward_runs.keep(key, chosen)
    return given


def _plans(call: GroupCall, direction: str, launching: Launching) -> list[Any]:
    """In the order in which they are tried; ``Apart`` alone where the group's kernels do not take the call."""
    if call.fault is not None:
        return [Apart()]
    plans = ranking.plans_for(call.device, call.machine, call.cell(direction), True, launching)
    return [plan for plan in plans if isinstance(plan, Apart) or group_plan_fault(plan, call) is None]


def _forward_of(plan: Apart | HopperGroup, call: GroupCall) -> Callable[..., tuple[_Tensors, _Tensors, _Tensors]]:
    """``run(x, weights, lora_as, lora_bs, biases, scalings, states)`` -> every y, every h, every mask's words."""
    if not isinstance(plan, Apart):
        return _ByPasses(flat_forward(ready_group_forward(plan, call)), call)
    p = call.p

    def run(x: Tensor, *of_members: Any) -> tuple[_Tensors, _Tensors, _Tensors]:
        *tensors, states = of_members
        forward: Any = operators.forward
        found = [forward(x, *own, p, states[i] if states else None) for i, own in enumerate(zip(*tensors, strict=True))]
        ys, hs, words = ([result[place] for result in found] for place in range(3))
        return ys, hs, words if states else []

    return run


class _ByPasses:
    """``flat`` in one call into C++, its results by kind again: ``group_forward``'s of ``count`` layers."""

    __slots__ = ("count", "passes")

    def __init__(self, flat: Callable[..., Any], call: GroupCall) -> None:
        self.passes, self.count = PassRun(flat, call.device), len(call.group)

    def __call__(self, *arguments: Any) -> tuple[_Tensors, _Tensors, _Tensors]:
        found, count = self.passes(*arguments), self.count
        return list(found[:count]), list(found[count : 2 * count]), list(found[2 * count :])


class _BackwardByPasses:
    """The same of ``group_backward``'s, None for what is not due; each dbias is known by its bias."""

    __slots__ = ("count", "passes")

    def __init__(self, flat: Callable[..., Any], call: GroupCall) -> None:
        self.passes, self.count = PassRun(flat, call.device), len(call.group)

    def __call__(
        self,
        dys: _Tensors,
        x: Tensor | None,
        weights: _Tensors,
        lora_as: _Tensors,
        lora_bs: _Tensors,
        biases: Sequence[Tensor | None],
        *others: Any,
    ) -> tuple[Any, ...]:
        dx, *found = self.passes(dys, x, weights, lora_as, lora_bs, *others)
        return dx, *(found[i * self.count : (i + 1) * self.count] for i in range(3))


def run_group_forward(
    plan: Apart | HopperGroup,
    x: Tensor,
    weights: _Tensors,
    lora_as: _Tensors,
    lora_bs: _Tensors,
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    p: float,
    states: _Tensors,
) -> tuple[_Tensors, _Tensors, _Tensors]:
    """``group_forward`` by ``plan``.

    Raises:
        InvalidArgumentError: the plan does not take the call.
    """
    key = (*group_forward_key(x, weights, lora_as, lora_bs, biases, p, states), plan)
    run = forward_runs.get(key)
    if run is None:
        call = GroupCall.of(x, lora_as, lora_bs, biases, p, states, (x, *weights))
        run = forward_runs.keep(key, _forward_of(plan, call))
    given: tuple[_Tensors, _Tensors, _Tensors]
    given = run(x, weights, lora_as, lora_bs, biases, [float(s) for s in scalings], states)
    return given


def group_backward(
    dys: _Tensors,
    x: Tensor | None,
    weights: _Tensors,
    lora_as: _Tensors,
    lora_bs: _Tensors,
    biases: Sequence[Tensor | None],
    hs: _Tensors,
    scalings: Sequence[float],
    p: float,
    states: _Tensors,
) -> tuple[Tensor, _Tensors, _Tensors, _Tensors]:
    """For every dy (..., N_i) and x (..., K), with dx (..., K)."""
    count, kind, numbers = len(dys), kind_of(precision_of(dys[0].dtype), biases), [float(each) for each in scalings]
    tensors = [*dys, x, *weights, *lora_as, *lora_bs, *hs, *states]
    if found := known_backward.many(numbers, p, kind, tensors):
        dx, *others = found
        return dx, others[:count], others[count : 2 * count], others[2 * count :]
    shape, dys, x = dys[0].shape, [flatten(dy) for dy in dys], None if x is None else flatten(x)
    weights, lora_as, lora_bs = ([resolved(own) for own in each] for each in (weights, lora_as, lora_bs))
    arguments = (dys, x, weights, lora_as, lora_bs, biases, [h.contiguous() for h in hs], numbers, states)
    dx, das, dbs, dbiases = _group_backward(kind, arguments, p)
    return unflatten(dx, shape) if weights else dx, das, dbs, dbiases


def _group_backward(kind: int, arguments: tuple[Any, ...], p: float) -> tuple[Tensor, _Tensors, _Tensors, _Tensors]:
    dys, x, weights, lora_as, lora_bs, biases, hs, _, states = arguments
    key = group_backward_key(dys, x, weights, lora_as, lora_bs, biases, hs, p, states)
    run = backward_runs.get(key)
    if run is None:
        call = _backward_call(dys, x, weights, lora_as, lora_bs, biases, hs, p, states)
        # Without db, or with nothing that waits for dh, the joint read of dy would make what nobody asks for.
        whole, due = bool(hs) and (bool(weights) or x is not None), (bool(weights), x is not None)
        chosen, results = first_run(
            call,
            "backward",
            lambda launching: _plans(call, "backward", launching) if whole else [Apart()],
            lambda plan: _backward_of(plan, call, due, states),
            lambda run: run(*arguments),
        )
        backward_runs.keep(key, chosen)
    else:
        results = run(*arguments)
    dx, das, dbs, dbiases = results
    dx = dys[0].new_empty(0) if dx is None else dx
    filled = _filled(das, lora_as), _filled(dbs, lora_bs), _filled(dbiases, dys)
    if run is not None:
        tensors = (*dys, x, *weights, *lora_as, *lora_bs, *hs, *states)
        enter(known_backward, run, p, kind, tensors, lambda: [dx, *(each for kept in filled for each in kept)])
    return dx, *filled


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> _Tensors:
    """Empty ones, of shape (0,), where they are not due."""
    return [own.new_empty(0) if found is None else found for found, own in zip(gradients, like, strict=True)]


def _backward_call(
    dys: _Tensors,
    x: Tensor | None,
    weights: _Tensors,
    lora_as: _Tensors,
    lora_bs: _Tensors,
    biases: Sequence[Tensor | None],
    hs: _Tensors,
    p: float,
    states: _Tensors,
) -> GroupCall:
    words = [state for state in states if state.dtype is torch.int32]
    read = (*dys, *weights, *hs, *words, *(() if x is None else (x,)))
    return GroupCall.of(dys[0], lora_as, lora_bs, biases, p, states, read)


def _backward_of(plan: Apart | DxHopperGroup, call: GroupCall, due: tuple[bool, bool], states: _Tensors) -> Any:
    """``run(dys, x, weights, lora_as, lora_bs, biases, hs, scalings, states)`` -> what is due, else None."""
    if not isinstance(plan, Apart):
        flat = flat_backward(ready_group_backward(plan, call, *due, states), len(call.group))
        return _BackwardByPasses(flat, call)
    p = call.p

    def run_apart(
        dys: _Tensors,
        x: Tensor | None,
        weights: _Tensors,
        lora_as: _Tensors,
        lora_bs: _Tensors,
        biases: Sequence[Tensor | None],
        hs: _Tensors,
        scalings: Sequence[float],
        states: _Tensors,
    ) -> tuple[Tensor | None, _Tensors, _Tensors, _Tensors]:
        dx, found = None, []
        for i, dy in enumerate(dys):
            weight, h, state = (own[i] if own else None for own in (weights, hs, states))
            own_dx, *others = operators.backward(
                dy, x, weight, lora_as[i], lora_bs[i], biases[i], h, scalings[i], p, state
            )
            found.append(others)
            if weights:
                dx = own_dx if dx is None else dx.add_(own_dx)
        das, dbs, dbiases = ([others[place] for others in found] for place in range(3))
        return dx, das, dbs, dbiases

    return run_apart


def run_group_backward(
    plan: Apart | DxHopperGroup,
    dys: _Tensors,
    x: Tensor | None,
    weights: _Tensors,
    lora_as: _Tensors,
    lora_bs: _Tensors,
    biases: Sequence[Tensor | None],
    hs: _Tensors,
    scalings: Sequence[float],
    p: float,
    states: _Tensors,
) -> tuple[Any, ...]:
    """``group_backward`` by ``plan``, None for what is not due.

    Raises:
        InvalidArgumentError: the plan does not take the call.
    """
    key = (*group_backward_key(dys, x, weights, lora_as, lora_bs, biases, hs, p, states), plan)
    run = backward_runs.get(key)
    if run is None:
        call = _backward_call(dys, x, weights, lora_as, lora_bs, biases, hs, p, states)
        run = backward_runs.keep(key, _backward_of(plan, call, (bool(weights), x is not None), states))
    found: tuple[Any, ...]
    found = run(dys, x, weights, lora_as, lora_bs, biases, hs, [float(s) for s in scalings], states)
    return found
