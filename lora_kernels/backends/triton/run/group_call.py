"""One call of the group operators, by all that a run of it depends on; and the keys that a run is kept by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..choose import blocks
from ..choose.blocks import Machine, next_power_of_2
from ..choose.group_candidates import static_fault, tokens_fault
from ..choose.plans import Cell
from .descriptors import operand_fault
from .hopper_call import HopperCall
from .prepared import alignment, matrix, precision_of

__all__ = ["GroupCall", "group_backward_key", "group_forward_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCall:
    """What a run is made ready for: sizes by member, x's K, and what the kernels ask of the tensors.

    Attributes:
        adapters_fault: the end of a sentence where A and B are not as one launch packs them.
        by_tma: whether TMA can read x, every dy, W, h and words that are there.
    """

    machine: Machine
    device: torch.device
    dtype: torch.dtype
    m: int
    k: int
    sizes: tuple[tuple[int, int], ...]
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    bias_dtypes: tuple[torch.dtype | None, ...]
    p: float
    dropout: bool
    adapters_fault: str | None
    by_tma: bool

    @staticmethod
    def of(
        left: Tensor,
        lora_as: Sequence[Tensor],
        lora_bs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        p: float,
        states: Sequence[Tensor],
        matrices: Sequence[Tensor],
    ) -> GroupCall:
        """``left``: x or a dy; ``matrices``: what TMA is to read."""
        return GroupCall(
            machine=blocks.machine_of(left.device),
            device=left.device,
            dtype=left.dtype,
            m=left.shape[0],
            k=lora_as[0].shape[1],
            sizes=tuple((b.shape[0], b.shape[1]) for b in lora_bs),
            a_dtype=lora_as[0].dtype,
            b_dtype=lora_bs[0].dtype,
            bias_dtypes=tuple(None if bias is None else bias.dtype for bias in biases),
            p=p,
            dropout=bool(states),
            adapters_fault=_adapters_fault(lora_as, "A") or _adapters_fault(lora_bs, "B"),
            by_tma=all(operand_fault("", t) is None for t in matrices),
        )

    @property
    def group(self) -> tuple[HopperCall, ...]:
        """Each member as the Gluon kernels see it."""
        own = self.machine, self.device, self.dtype, self.m
        return tuple(HopperCall(*own, n, self.k, r, self.p, self.dropout) for n, r in self.sizes)

    def cell(self, direction: str) -> Cell:
        """What the choice of a plan for ``direction`` depends on."""
        (n, r), *others = self.sizes
        dtype = "tf32" if precision_of(self.dtype) == "tf32" else str(self.dtype).removeprefix("torch.")
        return Cell(direction, next_power_of_2(self.m), self.k, n, r, dtype, self.dropout, tuple(others))

    @property
    def fault(self) -> str | None:
        """The end of a sentence "The group kernels do not run: ..." where no plan of theirs takes the call."""
        if fault := static_fault(self.machine, self.dtype, self.k, self.sizes, self.dropout):
            return fault
        if fault := self.adapters_fault or tokens_fault(self.cell("forward")):
            return fault
        return None if self.by_tma else "TMA cannot read one of x, dy, W, h and the masks: see strides and addresses"


def _adapters_fault(adapters: Sequence[Tensor], name: str) -> str | None:
    """One launch makes the operands of all: they are contiguous and of one dtype."""
    if not all(adapter.is_contiguous() for adapter in adapters):
        return f"an {name} is not contiguous" if name == "A" else f"a {name} is not contiguous"
    if any(adapter.dtype is not adapters[0].dtype for adapter in adapters):
        return f"the layers' {name} have several dtypes"
    return None


def group_forward_key(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    p: float,
    states: Sequence[Tensor],
) -> tuple[Any, ...]:
    """All that a run depends on; the device's index comes first."""
    matrices = (x, *weights, *lora_as, *lora_bs)
    return (
        *(fact for t in matrices for fact in matrix(t)),
        *(None if bias is None else (bias.dtype, bias.stride()) for bias in biases),
        p,
        len(states),
        alignment(*matrices, *biases, *states),
    )


def group_backward_key(
    dys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    hs: Sequence[Tensor],
    p: float,
    states: Sequence[Tensor],
) -> tuple[Any, ...]:
    """All that a run depends on; the device's index comes first."""
    matrices = (*dys, *lora_as, *lora_bs, *weights)
    return (
        *(fact for t in matrices for fact in matrix(t)),
        None if x is None else x.stride(),
        *(None if bias is None else bias.dtype for bias in biases),
        len(weights),
        len(hs),
        p,
        *(state.shape for state in states),  # tells a seed from the words
        alignment(*matrices, x, *hs, *states),
    )
