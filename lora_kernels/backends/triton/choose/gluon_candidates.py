"""The Gluon plans of a cell, for compute capability 9.0: which there are, and whether one of a table fits.

Few enough that a clock can try them: of the small kernels the best ones, of the products every one. A plan
that was measured and lost everywhere (a product by one consumer of all warps) is none of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import gluon
from .blocks import FEW_TOKENS, Machine
from .hidden_operand import HiddenOperand, hidden_operand, operand_fault
from .hopper_blocks import (
    HopperPlainShrink,
    HopperShrink,
    dh_db_configs,
    dx_configs,
    forward_configs,
    outer_configs,
    plain_shrink_configs,
    product_h_configs,
    shrink_configs,
)
from .hopper_cost import HopperModel
from .plans import Cell, DxHopper, DxInside, GluonPlan, Hopper, HopperInside

__all__ = ["gluon_fault", "gluon_fits", "gluon_plans"]

_SMALL = 2  # of the ways to h the best predicted, and of those to da the best measured, that enter the plans


def gluon_fault(machine: Machine, cell: Cell) -> str | None:
    """A sentence where no Gluon plan runs ``cell`` on ``machine``; None where there are some."""
    if machine.interpreter:
        return "Triton's interpreter does not run Gluon."
    if why := gluon.why_not(machine.capability):
        return why
    dtype = torch.float32 if cell.tf32 else getattr(torch, cell.dtype)
    if fault := operand_fault(dtype, cell.tokens, cell.k, cell.n, cell.r):
        return f"The Gluon kernels do not run: {fault}."
    if cell.tokens <= FEW_TOKENS:
        return f"The Gluon kernels' tiles have 128 rows: they are for more than {FEW_TOKENS} tokens."
    return None


def gluon_fits(machine: Machine, cell: Cell, plan: GluonPlan) -> bool:
    """Whether ``plan``, of the cell's direction, runs ``cell`` on ``machine``."""
    if gluon_fault(machine, cell) is not None:
        return False
    rank, wide = _operand(cell).rank, cell.dtype == "float16"
    if isinstance(plan, Hopper):
        if isinstance(plan.shrink, HopperPlainShrink):
            taken = not (cell.dropout or wide) and plan.shrink.takes(cell.k)
        else:
            taken = plan.shrink.wide == wide
        return taken and plan.shrink.rank == rank and not plan.product.masked
    if isinstance(plan, HopperInside):
        return not (cell.dropout or wide) and plan.product.rank == rank and plan.product.takes(cell.n, cell.k)
    small = (plan.da, plan.dh_db if isinstance(plan, DxHopper) else plan.db)
    if any(config.rank != rank or config.wide != wide for config in small) or plan.da.masked != cell.dropout:
        return False
    if isinstance(plan, DxHopper):
        return plan.dx.masked == cell.dropout and plan.dx.takes(cell.n)
    inside = not (cell.dropout or wide or plan.db.masked)
    return inside and plan.dx.rank == rank and plan.dx.takes(cell.k, cell.n)


def gluon_plans(machine: Machine, cell: Cell) -> Iterator[GluonPlan]:
    """Every Gluon plan that is tried for ``cell``; none where ``gluon_fault`` says so."""
    if gluon_fault(machine, cell) is not None:
        return
    every = _backward(machine, cell) if cell.direction == "backward" else _forward(machine, cell)
    yield from (plan for plan in every if gluon_fits(machine, cell, plan))


def _operand(cell: Cell) -> HiddenOperand:
    found = hidden_operand(getattr(torch, cell.dtype), cell.r)
    assert found is not None, "gluon_fault says so before"
    return found


def _forward(machine: Machine, cell: Cell) -> Iterator[GluonPlan]:
    rank, model = _operand(cell).rank, HopperModel(machine, cell)
    ways = sorted(shrink_configs(rank, cell.dtype == "float16"), key=model.shrink)[:_SMALL]
    shrinks: list[HopperShrink | HopperPlainShrink] = [*ways, *plain_shrink_configs(rank)[:1]]
    for product in forward_configs():
        yield from (Hopper(shrink, product) for shrink in shrinks)
    yield from map(HopperInside, product_h_configs(rank))


def _backward(machine: Machine, cell: Cell) -> Iterator[GluonPlan]:
    rank, wide = _operand(cell).rank, cell.dtype == "float16"
    das, dbs = outer_configs(rank, cell.dropout, wide)[:_SMALL], outer_configs(rank, False, wide)[:1]
    for beside in (False, True):
        for dh_db in dh_db_configs(rank, wide)[:1]:
            yield from (DxHopper(dh_db, dx, da, beside) for dx in dx_configs(cell.dropout) for da in das)
        for dx in product_h_configs(rank):
            yield from (DxInside(dx, db, da, beside) for db in dbs for da in das[:1])
