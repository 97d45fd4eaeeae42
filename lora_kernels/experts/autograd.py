r"""``autograd.Function`` of one projection of all experts: what is saved, and which gradients are due.

For the rows of expert e, with ``D = mask / (1 - p)`` (or 1), s the scaling::

    h_e  = (x_e * D) A_eᵀ                   (M_e, R)
    y_e  = x_e W_eᵀ + s h_e B_eᵀ            (M_e, N)
    dh_e = s dy_e B_e                       (M_e, R)
    dx_e = dy_e W_e + D * (dh_e A_e)        (M_e, K)
    da_e = dh_eᵀ (x_e * D)                  (R, K)
    db_e = s dy_eᵀ h_e                      (N, R)

W is frozen. Saved: x before it is spread over its experts, the parameters, h, and with dropout the seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import backend
from ..errors import InvalidTypeError, UnsupportedTransformError
from ..gate import chosen, may_have_tangents
from ..ops import operators
from ..surrounded import is_surrounded, run_outside
from ..tensors import resolved
from ..weights.stacked import PackedExperts
from . import grouped
from .problem import Adapter, Drop
from .routing import Routing, spread_grad

__all__ = ["check", "draw_state", "project", "refuse_second_derivatives"]

_GROUPED = "grouped"  # by torch's grouped_mm, whose mask eager draws


def project(
    x: Tensor,
    weight: Tensor | PackedExperts,
    adapter: Adapter | None,
    routing: Routing,
    p: float = 0.0,
    spread: bool = False,
    way: str | None = None,
) -> Tensor:
    """y (M, N) in x's dtype, rows sorted by expert; those of sentinels are zero.

    Args:
        x: (M, K) in sorted order, or with ``spread`` the tokens themselves, (T, K).
        weight: (E, N, K), a view where it is stored transposed, or quantised; frozen.
        adapter: its A (E, R, K), B (E, N, R) and s; None where there is none.
        p: dropout's probability, 0 where it does not act. A mask is drawn for each slot, from one seed.
        way: "eager", "native" or "triton", whose operators run, or "grouped"; None is what suits the device.

    Raises:
        InvalidTypeError: ``weight`` requires a gradient.
        UnsupportedTransformError: within ``torch.func`` or ``vmap``, of a dual tensor, or within a double backward.
    """
    check(weight, x, *(() if adapter is None else (adapter.a, adapter.b)))
    x, weight = resolved(x), resolved(weight)
    if adapter is not None:
        adapter = Adapter(resolved(adapter.a), resolved(adapter.b), adapter.scaling)
    if way is None:
        way = _way_for(x, weight, adapter)
    drawn = "eager" if way == _GROUPED else way
    chosen(x, drawn)
    if isinstance(weight, PackedExperts):
        from .packed_autograd import project_packed  # loads the compiler, which no import of the package does

        found: Tensor = project_packed(x if spread else x.contiguous(), weight, adapter, routing, p, spread, drawn)
        return found
    state = None
    if p != 0.0 and adapter is not None:
        state = draw_state(x, routing, weight.shape[2], p, drawn)
    a, b, scaling = (None, None, 0.0) if adapter is None else adapter
    tokens, places = (routing.tokens, routing.places) if spread else (None, None)
    x = x if spread else x.contiguous()
    y: Tensor = _Project.apply(
        x, weight, a, b, state, routing.offsets, routing.present, tokens, places, scaling, p, routing.k, way
    )
    return y


def check(weight: Tensor | PackedExperts, *tensors: Tensor) -> None:
    """Raises as :func:`project` does."""
    if may_have_tangents(*tensors) or torch._C._are_functorch_transforms_active():
        raise UnsupportedTransformError(
            "LoRA on stacked experts was called under torch.func, vmap or torch.autograd.forward_ad, which are not "
            "supported. Call the model on the whole batch, and differentiate backward."
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise InvalidTypeError(
            f"a stacked expert weight {tuple(weight.shape)} requires a gradient, and beside an adapter it is frozen: a "
            "gradient of its size is never made. Call requires_grad_(False) on it, or train it without an adapter."
        )


def refuse_second_derivatives() -> None:
    """Raises within a double backward."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UnsupportedTransformError(
            "a double backward (create_graph=True) was asked for through LoRA on stacked experts, which has first "
            "derivatives alone. Differentiate once, or merge the adapter into the weights first."
        )


def draw_state(x: Tensor, routing: Routing, columns: int, p: float, name: str) -> Tensor:
    """What the backend ``name`` regenerates the mask of the sorted rows (M, ``columns``) from, on x's device."""
    state: Tensor = backend(name).dropout_state(x.new_empty(()).expand(routing.slots.shape[0], columns), p)
    return state


def _way_for(x: Tensor, weight: Tensor | PackedExperts, adapter: Adapter | None) -> str:
    name = "eager" if adapter is None else chosen(x)
    if isinstance(weight, PackedExperts):  # an expert after the other, by the composition where there is a GPU
        return "native" if name == "native" else "eager"
    if name == "triton":
        return name
    if grouped.runs(x, weight):
        return _GROUPED
    return name if x.is_cpu else "eager"


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        state: Tensor | None,
        offsets: Tensor,
        present: Tensor | None,
        tokens: Tensor | None,
        places: Tensor | None,
        scaling: float,
        p: float,
        k: int,
        way: str,
    ) -> Tensor:
        if way == _GROUPED:
            rows = x if tokens is None else x.index_select(0, tokens)
            adapter = None if a is None or b is None else Adapter(a, b, scaling)
            y, h = grouped.forward(rows, weight, adapter, _drop(state, rows.shape, p), offsets, present)
        else:
            y, h = operators(way).experts_forward(x, weight, a, b, offsets, tokens, scaling, p, state)
        need_x, _, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x if need_a else None,
            weight if need_x else None,
            a,
            b,
            h if need_b else None,
            state if need_x or need_a else None,
            offsets,
            present,
            tokens,
            places,
        )
        ctx.settings = scaling, p, k, way, weight.shape[2]
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and is_surrounded(grad_outputs):
            return run_outside(_Project.backward, ctx, grad_outputs)
        refuse_second_derivatives()
        (dy,) = grad_outputs
        dy = resolved(dy).contiguous()
        x, weight, a, b, h, state, offsets, present, tokens, places = ctx.saved_tensors
        scaling, p, k, way, columns = ctx.settings
        if way == _GROUPED:
            rows = x if x is None or tokens is None else x.index_select(0, tokens)
            adapter = None if a is None else Adapter(a, b, scaling)
            drop = _drop(state, torch.Size((dy.shape[0], columns)), p)
            dx, da, db = grouped.backward(dy, rows, weight, adapter, h, drop, offsets, present)
        else:
            run = operators(way).experts_backward
            dx, da, db = run(dy, x, weight, a, b, offsets, tokens, h, scaling, p, state)
        need_x, _, need_a, need_b = ctx.needs_input_grad[:4]
        if dx is not None and need_x and places is not None:
            dx = spread_grad(dx, places, offsets, k, "eager" if way == _GROUPED else way)
        due = (dx if need_x else None, None, da if need_a else None, db if need_b else None)
        return *due, *[None] * 9


def _drop(state: Tensor | None, shape: torch.Size, p: float) -> Drop | None:
    return None if state is None else Drop(operators("eager").mask(state, *shape, p), 1.0 / (1.0 - p))
