"""Which plan a device takes for a cell, remembered. ``LORA_KERNELS_EXPLAIN`` has it told when it is first chosen."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch

from .... import env
from . import tuned, why
from .blocks import Machine
from .candidates import in_order, of_row
from .launching import GRAPH, PREPARED, Launching
from .plans import Cell

__all__ = ["forget", "plan_for", "plans_for"]


def plan_for(
    device: torch.device, machine: Machine, cell: Cell, descriptors: bool = True, launching: Launching = PREPARED
) -> Any:
    """The first of :func:`plans_for`."""
    return plans_for(device, machine, cell, descriptors, launching)[0]


@lru_cache(maxsize=4096)
def plans_for(
    device: torch.device, machine: Machine, cell: Cell, descriptors: bool = True, launching: Launching = PREPARED
) -> tuple[Any, ...]:
    """The plans that ``device`` tries for ``cell``, in this order: the measured one first, if it fits.

    Without ``descriptors`` (TMA cannot read x or W) only those that need none. ``launching``: how they are launched.
    """
    row = tuned.lookup(device, cell)
    measured = None if row is None else of_row(machine, cell, row, launching)
    plans = in_order(machine, cell, measured, descriptors, launching)
    if env.explain_requested() and launching is not GRAPH:
        told = why.pass_plan(machine, cell, tuned.of(device), str(device), descriptors, launching=launching)
        print(f"lora_kernels: {cell}: {told.plan} ({told.cost}). {told.why}", file=sys.stderr, flush=True)
    return plans


def forget() -> None:
    """Lets the next call choose, and tell, anew."""
    plans_for.cache_clear()
