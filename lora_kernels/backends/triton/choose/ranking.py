"""Which plan a device takes for a cell, remembered. ``LORA_KERNELS_EXPLAIN`` has it told when it is first chosen."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch

from .... import env
from . import tuned, why
from .blocks import Machine
from .candidates import in_order
from .plans import Cell

__all__ = ["forget", "plan_for", "plans_for"]


def plan_for(device: torch.device, machine: Machine, cell: Cell, descriptors: bool = True) -> Any:
    """The first of :func:`plans_for`."""
    return plans_for(device, machine, cell, descriptors)[0]


@lru_cache(maxsize=4096)
def plans_for(device: torch.device, machine: Machine, cell: Cell, descriptors: bool = True) -> tuple[Any, ...]:
    """The plans that ``device`` tries for ``cell``, in this order: the measured one first, if it fits.

    Without ``descriptors`` (TMA cannot read x or W) only those that need none.
    """
    plans = in_order(machine, cell, tuned.lookup(device, cell), descriptors)
    if env.explain_requested():
        told = why.pass_plan(machine, cell, tuned.of(device), str(device), descriptors)
        print(f"lora_kernels: {cell}: {told.plan} ({told.cost}). {told.why}", file=sys.stderr, flush=True)
    return plans


def forget() -> None:
    """Lets the next call choose, and tell, anew."""
    plans_for.cache_clear()
