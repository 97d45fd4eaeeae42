r"""``autograd.Function`` of all of a mixture's experts: gate_up_proj, σ(gate) * up, down_proj and the sum over experts.

Rows i are the slots sorted by expert, t(i) their tokens, w_i their weights; U_e and D_e are the projections of expert
e(i) with their adapters, as ``autograd.py`` has them::

    g_i, u_i = U_e x_t(i)                    (M, 2 I)
    a_i      = σ(g_i) * u_i                  (M, I)
    y_t      = Σ w_i D_e a_i                 (T, H), over the rows i of token t

    d_i      = D_eᵀ dy_t(i)                  (M, I)
    dw_i     = <a_i, d_i>                    that is <D_e a_i, dy_t(i)>, and what D_e gave need not be kept
    dg, du   = w d * u * σ'(g), w d * σ(g)   (M, I)
    dx_t     = Σ U_eᵀ (dg_i, du_i)           (T, H)

Saved: x, g and u, the parameters, the adapters' h, and with dropout the seeds. One expert's rows are in memory of all
else. So it takes a backend whose operators go from expert to expert: ``native``, on CPUs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import operators
from ..surrounded import is_surrounded, run_outside
from ..tensors import as_dtype
from .autograd import draw_state, refuse_second_derivatives
from .problem import Adapter
from .routing import Routing

__all__ = ["Stack", "run_mlp"]


class Stack(NamedTuple):
    """A projection of all experts: W (E, N, K), frozen; its adapter; and dropout's p, 0 where it does not act."""

    weight: Tensor
    adapter: Adapter
    p: float


def run_mlp(
    x: Tensor, up: Stack, down: Stack, weights: Tensor, routing: Routing, number: int, dtype: torch.dtype, name: str
) -> Tensor:
    """y (T, H) in ``dtype`` of x (T, H), by the operators of the backend ``name``; σ's ``number`` is of ``GATES``."""
    states = [
        None if stack.p == 0.0 else draw_state(x, routing, stack.weight.shape[2], stack.p, name) for stack in (up, down)
    ]
    settings = (up.adapter.scaling, down.adapter.scaling, up.p, down.p, *states, number)
    y: Tensor = _MLP.apply(
        x, up.weight, up.adapter.a, up.adapter.b, down.weight, down.adapter.a, down.adapter.b, routing.offsets,
        routing.slots, weights, *settings, dtype is not x.dtype, name,
    )  # fmt: skip
    return as_dtype(y, dtype)


class _MLP(torch.autograd.Function):
    """Its arguments are the operator's (``ops.py``), and the backend's name."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up_weight: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_weight: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        offsets: Tensor,
        slots: Tensor,
        weights: Tensor,
        up_scaling: float,
        down_scaling: float,
        up_p: float,
        down_p: float,
        up_state: Tensor | None,
        down_state: Tensor | None,
        number: int,
        wide: bool,
        name: str,
    ) -> Tensor:
        stacks = up_weight, up_a, up_b, down_weight, down_a, down_b, offsets, slots, weights
        numbers, states = (up_scaling, down_scaling, up_p, down_p), (up_state, down_state)
        own: Any = operators(name)
        y: Tensor
        y, joined, *hs = own.experts_mlp_forward(x, *stacks, *numbers, *states, number, wide)
        ctx.save_for_backward(x, joined, *stacks, *hs, *states)
        ctx.settings = numbers, number, name
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and is_surrounded(grad_outputs):
            return run_outside(_MLP.backward, ctx, grad_outputs)
        refuse_second_derivatives()
        x, joined, *rest, up_state, down_state = ctx.saved_tensors
        numbers, number, name = ctx.settings
        dy = as_dtype(grad_outputs[0], x.dtype)
        needs = ctx.needs_input_grad
        need_up_a, need_up_b, need_down_a, need_down_b = needs[2], needs[3], needs[5], needs[6]
        due = needs[0], needs[9], need_up_a or need_up_b, need_down_a or need_down_b
        own: Any = operators(name)
        dx, d_weights, up_a, up_b, down_a, down_b = own.experts_mlp_backward(
            dy, x, joined, *rest, *numbers, up_state, down_state, number, *due
        )
        return (
            dx if needs[0] else None,
            None,
            up_a if need_up_a else None,
            up_b if need_up_b else None,
            None,
            down_a if need_down_a else None,
            down_b if need_down_b else None,
            None,
            None,
            d_weights if needs[9] else None,
            *[None] * 9,
        )
