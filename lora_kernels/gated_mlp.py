"""A gated MLP's call: checks, autocast, dropout's states, and whether it is recorded; see ``mlp_autograd.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .activations import GATES
from .branches import Branch
from .checks import check
from .gate import (
    autocast_input,
    device_type_of,
    draw_state,
    is_autocast_enabled,
    number,
    prepare,
    refuse_tangents,
)
from .mlp_autograd import GatedMLPFunction, apply_mlp_function, forward_only

__all__ = ["run_mlp"]


def run_mlp(
    x: Tensor,
    heads: Sequence[Branch],
    down: Branch,
    p: float,
    down_p: float,
    activation: str,
    recompute: bool = False,
    backend_name: str | None = None,
) -> Tensor:
    """y (..., N) = down(σ(gate(x)) * up(x)) for x (..., K).

    Args:
        heads: gate and up, each (F, K); or one branch (2F, K) whose first F outputs are the gate's.
        down: (N, F).
        p, down_p: dropout's probabilities, 0 where it does not act. States are drawn as the layers would draw them.
        activation: σ, one of ``activations.GATES``.
        recompute: whether gate's and up's outputs are computed again in backward, rather than kept.

    Dtypes, autocast, backends and errors are ``lora_linear``'s; the weights train nothing.
    """
    device_type = device_type_of(x)
    settings = p, down_p, activation, recompute, backend_name
    if torch._C._is_any_autocast_enabled() and is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _run(autocast_input(x, device_type), heads, down, *settings, autocast=True)
    return _run(x, heads, down, *settings, autocast=False)


def _run(
    x: Tensor,
    heads: Sequence[Branch],
    down: Branch,
    p: float,
    down_p: float,
    activation: str,
    recompute: bool,
    backend_name: str | None,
    autocast: bool,
) -> Tensor:
    branches = (*heads, down)
    inner = x.new_empty(1).expand(*x.shape[:-1], down.weight.shape[-1])  # what down reads, without its values
    for branch in branches:
        read = inner if branch is down else x
        check(read, branch.weight, branch.lora_a, branch.lora_b, branch.bias, autocast)
        branch.check(read)
    branches = tuple([branch.resolved() for branch in branches])
    tensors = [tensor for branch in branches for tensor in branch.tensors]
    if forward_ad._current_level >= 0:
        refuse_tangents(x, *tensors)
    x, name = prepare(x, backend_name)
    states = [draw_state(x, p, name) for _ in heads] if p != 0.0 else []
    if down_p != 0.0:
        states.append(draw_state(inner, down_p, name))
    scalings = tuple(float(number(branch.scaling)) for branch in branches)
    activations = tuple(branch.activation for branch in branches)
    of_all = scalings, activations, GATES.index(activation)
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    if not records:
        return forward_only(x, name, (p, down_p), *of_all, *tensors, *states)
    record = GatedMLPFunction.apply if torch.compiler.is_compiling() else apply_mlp_function
    y: Tensor = record(x, name, p, down_p, *of_all, recompute, *tensors, *states)
    return y
