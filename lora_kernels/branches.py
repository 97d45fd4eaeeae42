"""What the plain layer does not have: an activation between A and B, a gain of y's columns, several layers of one x.

A :class:`Branch` is one output y = g * (x Wᵀ + s σ(drop(x) Aᵀ) Bᵀ) + b; :func:`apply_branches` computes the y of each
branch of one x, and in backward one dx. Plain LoRA by itself keeps its own, shorter way (``functional.py``), and so do
several plain branches of few tokens on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import functional
from .activations import check_activation
from .autograd import apply_function
from .autograd import forward_only as plain_forward_only
from .branches_autograd import BranchesFunction, apply_branches_function, forward_only
from .errors import InvalidArgumentError

__all__ = ["Branch", "apply_branches"]

# Up to this many tokens on a CPU the host's time decides, of which the plain layer's way takes least: one read of x for
# all branches saves less than it costs there.
_FEW_TOKENS = 16


@dataclass(frozen=True)
class Branch:
    """weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,) or None, s, gain (N,) or None, σ's name.

    ``state``: dropout's, where it was drawn already.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    gain: Tensor | None = None
    activation: str = "identity"
    state: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As ``BranchesFunction`` takes them."""
        return self.weight, self.lora_a, self.lora_b, self.bias, self.gain

    @property
    def is_plain(self) -> bool:
        """Whether it is what ``lora_linear`` computes."""
        return self.gain is None and self.activation == "identity"


def apply_branches(x: Tensor, branches: Sequence[Branch], p: float, backend_name: str | None = None) -> list[Tensor]:
    """Each branch's y (..., N_i) for x (..., K); a p above 0 draws a mask for each branch, in their order,
    but where its state is there.

    Dtypes, autocast, backends and errors are ``lora_linear``'s; p is known to be valid, 0 where dropout does not act.
    """
    device_type = functional.device_type_of(x)
    if torch._C._is_any_autocast_enabled() and functional.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _run(functional.autocast_input(x, device_type), branches, p, backend_name, autocast=True)
    return _run(x, branches, p, backend_name, autocast=False)


def _run(x: Tensor, branches: Sequence[Branch], p: float, backend_name: str | None, autocast: bool) -> list[Tensor]:
    for branch in branches:
        _check(x, branch, autocast)
    if forward_ad._current_level >= 0:
        functional.refuse_tangents(x, *(tensor for branch in branches for tensor in branch.tensors))
    x, name = functional.prepare(x, backend_name)
    states = [functional.draw_state(x, p, name) if b.state is None else b.state for b in branches] if p != 0.0 else []
    if not torch.compiler.is_compiling() and _are_apart(x, branches):
        return [_run_plain(x, b, p, states[i] if states else None, name) for i, b in enumerate(branches)]
    tensors = [tensor for branch in branches for tensor in branch.tensors]
    scalings = tuple(float(functional.number(branch.scaling)) for branch in branches)
    activations = tuple(branch.activation for branch in branches)
    if torch.is_grad_enabled() and _any_requires_grad(x, *tensors):
        record = BranchesFunction.apply if torch.compiler.is_compiling() else apply_branches_function
        return list(record(x, name, p, scalings, activations, *tensors, *states))
    keeps = (False,) * len(branches)
    return forward_only(x, name, p, scalings, activations, keeps, *tensors, *states)[0]


def _are_apart(x: Tensor, branches: Sequence[Branch]) -> bool:
    """Whether each branch runs as the plain layer that it is."""
    few = x.is_cpu and x.numel() <= _FEW_TOKENS * x.shape[-1]
    return (few or len(branches) == 1) and all(branch.is_plain for branch in branches)


def _run_plain(x: Tensor, branch: Branch, p: float, state: Tensor | None, name: str) -> Tensor:
    b = branch
    run = plain_forward_only
    if torch.is_grad_enabled() and _any_requires_grad(x, *b.tensors):
        run = apply_function
    return run(x, b.weight, b.lora_a, b.lora_b, b.bias, float(functional.number(b.scaling)), p, state, name)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(x: Tensor, branch: Branch, autocast: bool) -> None:
    functional.check(x, branch.weight, branch.lora_a, branch.lora_b, branch.bias, autocast)
    check_activation(branch.activation)
    gain = branch.gain
    if gain is not None and (gain.shape != branch.weight.shape[:1] or gain.device != x.device):
        raise InvalidArgumentError(
            f"a gain {tuple(gain.shape)} on {gain.device} was given for a weight {tuple(branch.weight.shape)} and x on "
            f"{x.device}: it must be (N,), one factor for each row of the weight, on x's device."
        )
