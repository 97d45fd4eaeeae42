"""Which groups of layers the Gluon kernels take, and the plans of a group's cell."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from . import gluon
from .blocks import FEW_TOKENS, Machine
from .group_plans import Apart, DxHopperGroup, GroupPlan, HopperGroup
from .hidden_operand import HiddenOperand, hidden_operand, operand_fault
from .hopper_group_blocks import (
    MEMBERS,
    HopperGroupDx,
    group_da_configs,
    group_dh_db_configs,
    group_dx_configs,
    group_forward_configs,
    group_shrink_configs,
)
from .plans import Cell

__all__ = ["group_fits", "group_plans", "static_fault", "tokens_fault"]

_SMALL = 2  # of the ways to h and to da, so many enter the plans
_MASKED = 3  # members whose masked terms dx holds in registers
_DIRECTIONS = ("forward", "backward")
Sizes = tuple[tuple[int, int], ...]  # of each member: N, rank


@lru_cache(maxsize=1024)
def static_fault(machine: Machine, dtype: torch.dtype, k: int, sizes: Sizes, dropout: bool) -> str | None:
    """The end of a sentence "The group kernels do not run: ..." where no plan of theirs takes such layers of one x.

    Static facts alone: whether a group is one operator never depends on M, on alignment or on what is tuned.
    """
    if machine.interpreter:
        return "Triton's interpreter does not run Gluon"
    if why := gluon.why_not(machine.capability):
        told = why.partition(": ")[0].removesuffix(".")
        return told[0].lower() + told[1:]
    if len(sizes) not in MEMBERS:
        return f"there are {len(sizes)} layers and they are for {MEMBERS[0]} to {MEMBERS[-1]}"
    for number, (n, r) in enumerate(sizes):
        if fault := operand_fault(dtype, 1, k, n, r):
            return f"of layer {number + 1}, {fault}"
    if dropout and len(sizes) > _MASKED:
        return f"there is dropout, and dx holds the masked terms of {_MASKED} layers at most"
    first, *others = sizes
    for direction in _DIRECTIONS:
        cell = Cell(direction, 2 * FEW_TOKENS, k, *first, str(dtype).removeprefix("torch."), dropout, tuple(others))
        if next(_kernel_plans(cell), None) is None:
            return f"{direction} has no tile with room for ranks {', '.join(str(r) for _, r in sizes)}, or N is short"
    return None


def tokens_fault(cell: Cell) -> str | None:
    """The end of the same sentence where so many tokens have no plan of theirs."""
    if cell.tokens <= FEW_TOKENS:
        return f"their tiles have 128 rows, and they are for more than {FEW_TOKENS} tokens"
    faults = (operand_fault(_dtype(cell), cell.tokens, cell.k, n, r) for n, r in cell.sizes)
    return next((fault for fault in faults if fault), None)


def group_plans(machine: Machine, cell: Cell) -> Iterator[GroupPlan]:
    """Every plan that is tried for a group's ``cell``: ``Apart``, and the Gluon ones that run it."""
    yield Apart()
    taken = static_fault(machine, _dtype(cell), cell.k, cell.sizes, cell.dropout) is None
    if taken and tokens_fault(cell) is None:
        yield from _kernel_plans(cell)


def group_fits(machine: Machine, cell: Cell, plan: GroupPlan) -> bool:
    """Whether ``plan``, of the cell's direction, runs ``cell`` on ``machine``; for one of a table."""
    if isinstance(plan, Apart):
        return True
    taken = static_fault(machine, _dtype(cell), cell.k, cell.sizes, cell.dropout) is None
    if not taken or tokens_fault(cell) is not None:
        return False
    ranks, wide = _ranks(cell), cell.dtype == "float16"
    if isinstance(plan, HopperGroup):
        return plan.shrink.ranks == ranks and plan.shrink.wide == wide and not plan.product.masked
    small = plan.dh_db.rank == max(ranks) and plan.dh_db.wide == wide
    same = plan.da.ranks == ranks and plan.da.wide == wide and plan.da.masked == cell.dropout
    return small and same and _takes(plan.dx, cell)


def _kernel_plans(cell: Cell) -> Iterator[GroupPlan]:
    ranks, wide = _ranks(cell), cell.dtype == "float16"
    if cell.direction == "forward":
        for product in group_forward_configs():
            for shrink in group_shrink_configs(ranks, cell.dropout, wide)[:_SMALL]:
                yield HopperGroup(shrink, product)
        return
    das = group_da_configs(ranks, cell.dropout, wide)[:_SMALL]
    dxs = [dx for dx in group_dx_configs(len(ranks), cell.dropout) if _takes(dx, cell)]
    for beside in (False, True):
        for dh_db in group_dh_db_configs(ranks, wide)[:1]:
            yield from (DxHopperGroup(dh_db, dx, da, beside) for dx in dxs for da in das)


def _takes(dx: HopperGroupDx, cell: Cell) -> bool:
    operands = _operands(cell)
    extra = tuple(operand.adapter_columns // operand.step for operand in operands)
    return dx.members == len(operands) and dx.product.masked == cell.dropout and dx.takes(cell.ns, extra)


def _operands(cell: Cell) -> list[HiddenOperand]:
    found = [hidden_operand(_dtype(cell), r) for r in cell.rs]
    return [operand for operand in found if operand is not None]


def _ranks(cell: Cell) -> tuple[int, ...]:
    return tuple(operand.rank for operand in _operands(cell))


def _dtype(cell: Cell) -> torch.dtype:
    found: torch.dtype = torch.float32 if cell.tf32 else getattr(torch, cell.dtype)
    return found
