"""Which plans there are for a cell, and which one is taken: the measured one on a tuned device, else the model's.

The plain compositions are always among the candidates, so what is chosen is never predicted to lose to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from .backward_candidates import backward_fits, backward_plans, persistent_runs, shrink_ways
from .backward_cost import backward_seconds
from .blocks import (
    FEW_TOKENS,
    ExpandConfig,
    FewTokensConfig,
    Machine,
    ShrinkConfig,
    expand_config,
    few_tokens_config,
    gemm_configs,
    persistent_configs,
)
from .cost import forward_seconds
from .plans import (
    VARIANTS,
    BackwardPlan,
    BaseFirst,
    Cell,
    DxBaseFirst,
    DxFused,
    DxLoraFirst,
    FewTokens,
    ForwardPlan,
    Fused,
    LoraFirst,
    Plan,
    is_of,
    plan_from_json,
    plan_to_json,
)

__all__ = [
    "BackwardPlan",
    "BaseFirst",
    "Cell",
    "DxBaseFirst",
    "DxFused",
    "DxLoraFirst",
    "FewTokens",
    "ForwardPlan",
    "Fused",
    "LoraFirst",
    "Plan",
    "candidates",
    "fits",
    "plan_for",
    "plan_from_json",
    "plan_to_json",
    "predicted_seconds",
]

_SPLITS = (1, 2, 4, 8, 16)
_FLATTENED_RANK = 64
_SHRINKS = 2  # of the ways to compute h, so many of the best predicted enter the plans


def predicted_seconds(machine: Machine, cell: Cell, plan: Any) -> float:
    """What the model holds ``plan``, one of the cell's direction, to take."""
    seconds = backward_seconds if cell.direction == "backward" else forward_seconds
    return seconds(machine, cell, plan)


@lru_cache(maxsize=4096)
def plan_for(device: torch.device, machine: Machine, cell: Cell) -> Any:
    """The plan measured on ``device`` for ``cell`` if there is one that fits, else the best predicted one."""
    from .tuned import lookup

    found = lookup(device, cell)
    return found if found is not None and fits(machine, cell, found) else candidates(machine, cell)[0]


@lru_cache(maxsize=1024)
def candidates(machine: Machine, cell: Cell) -> tuple[Any, ...]:
    """Every plan that fits the machine, best predicted first; the compositions are always among them.

    The interpreter's come in a fixed order, the fused ones first: there, they are what is to be seen.
    """
    every = backward_plans(machine, cell) if cell.direction == "backward" else _all(machine, cell)
    plans: list[Any] = [plan for plan in every if fits(machine, cell, plan)]
    if not machine.interpreter:
        plans.sort(key=lambda plan: predicted_seconds(machine, cell, plan))
    return tuple(plans)


def fits(machine: Machine, cell: Cell, plan: Plan) -> bool:
    """Whether the machine has what ``plan`` needs, and the plan covers the cell."""
    if not is_of(plan, cell.direction):
        return False
    if isinstance(plan, (DxFused, DxLoraFirst, DxBaseFirst)):
        return backward_fits(machine, cell, plan)
    if isinstance(plan, FewTokens):
        c = plan.config
        covers = cell.tokens <= c.block_m and cell.r <= c.block_r
        stage = (c.block_m + c.block_n + 2 * c.block_r) * c.block_k * cell.itemsize
        return covers and c.num_stages * stage <= machine.shared_memory and _early(machine, plan.pdl)
    if isinstance(plan, BaseFirst):
        return True
    if isinstance(plan, LoraFirst):
        return _early(machine, plan.pdl)
    g = plan.gemm
    if not _variant_runs(machine, cell, plan.variant):
        return False
    stage = (g.block_rows + g.block_columns) * g.block_sum * cell.itemsize
    return g.num_stages * stage <= machine.shared_memory and _early(machine, plan.pdl)


def _variant_runs(machine: Machine, cell: Cell, variant: str) -> bool:
    """For 10.0 Triton 3.7 fails on the flattened loop: it cannot place the accumulator; and it takes the low-rank step
    without a loop. The interpreter knows no flattening."""
    if variant == "pointer" or machine.interpreter:
        return variant != "flattened"
    flattened = machine.capability < 100 and cell.r <= _FLATTENED_RANK
    return persistent_runs(machine, cell) and (variant == "persistent" or flattened)


def _early(machine: Machine, pdl: bool) -> bool:
    """Programmatic dependent launch came with compute capability 9.0."""
    return not pdl or machine.capability >= 90


def _all(machine: Machine, cell: Cell) -> Iterator[ForwardPlan]:
    sizes = (cell.n, cell.r, cell.itemsize, cell.tf32)
    early = (False,) if machine.capability < 90 else (False, True)
    if cell.tokens <= FEW_TOKENS:
        for config, splits in _few_tokens(machine, cell):
            yield from (FewTokens(config, splits, pdl) for pdl in (early if splits > 1 else (False,)))
    shrinks = _shrinks(machine, cell)
    for variant, gemms in zip(VARIANTS, (gemm_configs, persistent_configs, persistent_configs), strict=True):
        for gemm in gemms(machine, cell.tokens, *sizes):
            for shrink in shrinks:
                yield from (Fused(shrink, gemm, variant, pdl) for pdl in early)
    expand = expand_config(machine, cell.r, cell.itemsize, cell.tf32)
    for shrink in shrinks:
        yield from (LoraFirst(shrink, expand, pdl) for pdl in early)
        yield from (
            BaseFirst(shrink, expand, beside) for beside in ((False,) if machine.interpreter else (False, True))
        )


def _few_tokens(machine: Machine, cell: Cell) -> Iterator[tuple[FewTokensConfig, int]]:
    """Strips of y and parts of K; about as many programs as the machine holds."""
    sizes = (cell.n, cell.r, cell.itemsize, cell.tf32)
    configs = dict.fromkeys(few_tokens_config(machine, *sizes, block_n) for block_n in (16, 32, 64))
    for config in filter(None, configs):
        for splits in (1, 3) if machine.interpreter else _SPLITS:
            programs = -(-cell.n // config.block_n) * splits
            busy = programs <= 4 * machine.sm_count and cell.k >= 2 * splits * config.block_k
            if splits == 1 or machine.interpreter or busy:
                yield config, splits


def _shrinks(machine: Machine, cell: Cell) -> list[ShrinkConfig]:
    """Ways to compute h; who reads it holds all of its parts in registers."""
    ways = shrink_ways(machine, cell, cell.k, 16 if machine.capability >= 90 else 8)
    if not machine.interpreter:
        ways.sort(key=lambda way: forward_seconds(machine, cell, BaseFirst(way, ExpandConfig(64, 128, 16, 4))))
    return ways[:_SHRINKS]
