"""The ``autograd.Function`` of plain layers that read one x and run by the backend's group operators.

Formulas and gradients are those of ``autograd``, for each layer; dx is the sum of the layers'. Saved: the parameters as
they are, x, each h as the backend keeps it (``kept.Kept.h``), and with dropout the states or the masks' words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .branches_autograd import Needs, Saved, differentiable_gradients, saved_tensors
from .ops import operators
from .surrounded import is_surrounded, run_outside
from .tensors import as_dtype, flatten, multiply

__all__ = ["GroupFunction", "Made", "apply_group_function", "forward_only"]

# Every y and h of a group, and every mask's words.
Made: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor]]
_SETTINGS = 4  # backend_name, p, scalings, made


def forward_only(
    x: Tensor, backend_name: str, p: float, scalings: tuple[float, ...], made: Made | None, *tensors: Any
) -> Made:
    """Every y (..., N_i) and h, and every mask's words; the arguments are ``GroupFunction``'s."""
    if made is not None:
        return made
    weights, lora_as, lora_bs, biases, states = _by_kind(tensors, len(scalings))
    weights = [as_dtype(weight, x.dtype) for weight in weights]
    given: Made = operators(backend_name).group_forward(
        x, weights, list(lora_as), list(lora_bs), list(biases), list(scalings), p, list(states)
    )
    return given


def _by_kind(tensors: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Four of each of ``count`` layers, the layers' first ones first; then what follows them."""
    second, third, fourth, rest = count, 2 * count, 3 * count, 4 * count
    return [tensors[:second], tensors[second:third], tensors[third:fourth], tensors[fourth:rest], tensors[rest:]]


class GroupFunction(torch.autograd.Function):
    """(y_1, ..., y_n), each (..., N_i), of x (..., K) and n layers.

    ``made``: what the group operator has made of them already, or None. ``tensors``: every weight (N_i, K), every
    lora_a (R_i, K), every lora_b (N_i, R_i), every bias (N_i,) or None; then no dropout state, or one for each layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        backend_name: str,
        p: float,
        scalings: tuple[float, ...],
        made: Made | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(scalings)
        if not is_compiling():
            ctx.set_materialize_grads(False)  # an output that nobody used gives no gradients, not zeros
        ys, hs, words = forward_only(x, backend_name, p, scalings, made, *tensors)
        weights, lora_as, lora_bs, biases, states = _by_kind(tensors, count)
        if states and (kept := operators(backend_name).kept).packs_mask:
            pairs = zip(weights, states, words, strict=True)
            states = [own if kept.prefers_words(weight.shape[0]) else state for weight, state, own in pairs]
        need_x, (need_weights, need_as, need_bs, need_biases, _) = _needs(ctx, count)
        keep_x, nothing = True in need_as or True in need_weights, (None,) * count
        ctx.save_for_backward(
            x if keep_x else None,
            *(weights if need_x else nothing),
            *lora_as,
            *lora_bs,
            *[bias if need else None for bias, need in zip(biases, need_biases, strict=True)],
            *(hs if True in need_bs else nothing),  # every db is due, or none
            *(states if need_x or keep_x else ()),
        )
        ctx.settings = tuple(weight.dtype for weight in weights), backend_name, p, scalings
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        if not is_compiling():
            ctx.has_run = True  # what was saved may be gone: an output that waits for its layer is worth nothing now
            if is_surrounded(dys):
                return run_outside(GroupFunction.backward, ctx, dys, saved_tensors(ctx, dys))
            if torch.is_grad_enabled():
                return _differentiable_backward(ctx, dys)
        weight_dtypes, backend_name, p, scalings = ctx.settings
        count, ops = len(scalings), operators(backend_name)
        used = [i for i, dy in enumerate(dys) if dy is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        need_x, (need_weights, need_as, need_bs, need_biases, others) = _needs(ctx, count)
        x, kinds, states = _unpack(saved_tensors(ctx, dys), count)
        if len(used) < count:
            kinds, states = [[own[i] for i in used] for own in kinds], [states[i] for i in used] if states else []
        weights, lora_as, lora_bs, biases, hs = kinds
        given, scalings = [dys[i] for i in used], [scalings[i] for i in used]
        weights = [as_dtype(weight, given[0].dtype) for weight in weights] if need_x else []
        due_x = x if any(need_as[i] for i in used) else None
        hs = hs if any(need_bs[i] for i in used) else []
        if len(used) == 1:
            own = (each[0] if each else None for each in (weights, lora_as, lora_bs, biases, hs))
            dx, *found = ops.backward(given[0], due_x, *own, scalings[0], p, states[0] if states else None)
            das, dbs, dbiases = ([gradient] for gradient in found)
        else:
            of = given, due_x, weights, lora_as, lora_bs, biases, hs, scalings, p, states
            dx, das, dbs, dbiases = ops.group_backward(*of)
        dweights: list[Any] = [None] * count
        for i in used:
            if need_weights[i]:
                dweights[i] = as_dtype(multiply(flatten(dys[i]).t(), flatten(x)), weight_dtypes[i])
        grads = *_due(das, need_as, used), *_due(dbs, need_bs, used), *_due(dbiases, need_biases, used)
        return (dx if need_x else None, *[None] * _SETTINGS, *dweights, *grads, *[None] * len(others))


# As ``autograd.apply_function``: ``apply`` where no functorch transform is active, in less host time.
apply_group_function: Callable[..., Any] = super(torch.autograd.Function, GroupFunction).apply


def _needs(ctx: Any, count: int) -> tuple[bool, list[Sequence[bool]]]:
    """Whether dx is due; which of the other gradients are, ``_by_kind``."""
    return ctx.needs_input_grad[0], _by_kind(ctx.needs_input_grad[1 + _SETTINGS :], count)


def _unpack(saved: Sequence[Any], count: int) -> tuple[Any, list[list[Any]], list[Any]]:
    """x; every weight, lora_a, lora_b, bias and h; dropout's states; of what was saved."""
    kinds = [list(saved[start : start + count]) for start in range(1, 1 + 5 * count, count)]
    return saved[0], kinds, list(saved[1 + 5 * count :])


def _due(gradients: Sequence[Any], needs: Sequence[bool], used: Sequence[int]) -> list[Any]:
    """Each layer's, where it is due; ``gradients`` are those of the layers ``used``."""
    due: list[Any] = [None] * len(needs)
    for i, gradient in zip(used, gradients, strict=True):
        if needs[i]:
            due[i] = gradient
    return due


def _differentiable_backward(ctx: Any, dys: Sequence[Any]) -> Any:
    _, backend_name, p, scalings = ctx.settings
    count = len(scalings)
    x, kinds, states = _unpack(saved_tensors(ctx, dys), count)
    need_x, needs = _needs(ctx, count)
    all_needs = [Needs(w, a, b, bias, False) for w, a, b, bias in zip(*needs[:4], strict=True)]

    def of(i: int, x: Tensor) -> tuple[Saved, Tensor | None]:
        weight, lora_a, lora_b, bias, _ = (own[i] for own in kinds)
        mask = operators(backend_name).mask(states[i], *x.shape, p) if states else None
        return Saved(weight, lora_a, lora_b, bias, None, None, None), mask

    of_all = all_needs, need_x, p, scalings, ("identity",) * count
    dx, grads = differentiable_gradients(x, dys, of, *of_all)
    by_kind = list(zip(*grads, strict=True))[:4]
    return (dx, *[None] * _SETTINGS, *(gradient for own in by_kind for gradient in own), *[None] * len(needs[4]))
