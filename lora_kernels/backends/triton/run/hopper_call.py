"""One call of a whole layer as the Gluon kernels see it, and what they, or a plan of theirs, do not take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ....errors import InvalidArgumentError
from ....reference import dropout_threshold
from ..choose.blocks import Machine
from ..choose.hidden_operand import HiddenOperand, hidden_operand, operand_fault
from ..choose.hopper_blocks import HopperPlainShrink
from ..choose.plans import DxHopper, DxInside, Hopper, HopperInside
from .call import Call

__all__ = ["HopperCall", "HopperPlan", "call_fault", "hopper_call", "plan_fault"]

HopperPlan: TypeAlias = Hopper | HopperInside | DxHopper | DxInside


@dataclass(frozen=True, slots=True)
class HopperCall:
    """What a step is made ready for: x (M, K), weight (N, K), rank R; ``p`` counts where ``dropout``."""

    machine: Machine
    device: torch.device
    dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    p: float = 0.0
    dropout: bool = False

    @staticmethod
    def of(call: Call) -> HopperCall:
        c = call
        return HopperCall(c.machine, c.device, c.dtype, c.m, c.n, c.k, c.r, c.p, c.dropout)

    @property
    def operand(self) -> HiddenOperand:
        found = hidden_operand(self.dtype, self.r)
        assert found is not None, "call_fault says so before"
        return found

    @property
    def masked(self) -> bool:
        """Whether a mask is drawn at all: a p that rounds to 0 keeps everything."""
        return self.dropout and dropout_threshold(self.p) > 0

    @property
    def wide(self) -> bool:
        """Whether x and dy are split in two bf16 parts: the configurations of shrink, dh with db, and da are others."""
        return self.dtype is torch.float16

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p) if self.dropout else 1.0


def call_fault(c: HopperCall) -> str | None:
    """The end of a sentence "the Gluon kernels do not run: ..." where they do not take the call; tensors aside."""
    return operand_fault(c.dtype, c.m, c.k, c.n, c.r)


def plan_fault(plan: HopperPlan, call: Call) -> str | None:
    """The end of a sentence "the plan ... does not run: ..." where it does not take the call."""
    c = HopperCall.of(call)
    if fault := call_fault(c):
        return fault
    if not call.by_tma:
        return "TMA cannot read one of x, dy, weight, h and the mask's words: see its strides and its address"
    return next(_faults(plan, c), None)


def _faults(plan: HopperPlan, c: HopperCall) -> Iterator[str]:
    """What only this plan does not take."""
    configs = [getattr(plan, name) for name in plan.__dataclass_fields__]
    if others := {config.rank for config in configs if hasattr(config, "rank")} - {c.operand.rank}:
        yield f"it is for ranks that are filled up to {others.pop()}, and rank {c.r} is to {c.operand.rank}"
    inside = isinstance(plan, (HopperInside, DxInside))
    by_pointers = isinstance(plan, Hopper) and isinstance(plan.shrink, HopperPlainShrink)
    if c.masked and (inside or by_pointers or (isinstance(plan, DxHopper) and not (plan.dx.masked and plan.da.masked))):
        yield f"it draws or reads no mask, and dropout is {c.p}"
    if c.wide and (inside or by_pointers):
        yield "it is for torch.bfloat16"
    if isinstance(plan, Hopper):
        if isinstance(plan.shrink, HopperPlainShrink) and not plan.shrink.takes(c.k):
            yield f"in_features {c.k} is no multiple of {plan.shrink.block_k}"
        if plan.product.masked:
            yield "forward's product takes no mask"
    elif isinstance(plan, HopperInside):
        if not plan.product.takes(c.n, c.k):
            yield f"in_features {c.k} or out_features {c.n} is too small for h inside of the product"
    elif isinstance(plan, DxInside):
        if not plan.dx.takes(c.k, c.n):
            yield f"in_features {c.k} or out_features {c.n} is too small for dh inside of the product"
    elif c.masked and not plan.dx.takes(c.n):
        yield f"out_features {c.n} is too small for its masked product"


def hopper_call(plan: HopperPlan, call: Call) -> HopperCall:
    """``call`` for ``plan``.

    Raises:
        InvalidArgumentError: the plan does not take it.
    """
    if fault := plan_fault(plan, call):
        raise InvalidArgumentError(f"the plan {plan} does not run: {fault}.")
    return HopperCall.of(call)
