"""Which plans there are for a cell, and in which order: the measured one of a tuned device, then as the model has it.

The plain compositions are always among the candidates, so what is chosen is never predicted to lose to them. A plan
that forks streams takes the host 75 to 105 µs more a call (measured outside of CUDA graphs): where the device takes
less than that, plans on one stream come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from . import hardware
from .blocks import (
    FEW_TOKENS,
    ExpandConfig,
    FewTokensConfig,
    Machine,
    ShrinkConfig,
    expand_config,
    few_tokens_config,
    fits_shared_memory,
    gemm_configs,
    persistent_configs,
)
from .cost import backward_seconds, forward_seconds
from .gluon_candidates import gluon_fits, gluon_plans
from .group_candidates import group_fits, group_plans
from .group_plans import GROUP_KERNELS, Apart, GroupPlan
from .hopper_group_cost import hopper_group_seconds
from .plans import (
    GLUON_PLANS,
    VARIANTS,
    BackwardPlan,
    BaseFirst,
    Cell,
    DxFused,
    DxLoraFirst,
    FewTokens,
    ForwardPlan,
    Fused,
    LoraFirst,
    Plan,
    Ring,
    is_of,
)
from .ring import ring_fault, ring_fits, ring_ways
from .ways import SPLITS, shrink_ways, small_ways, ways_to_dh_db, worth_dividing

__all__ = ["candidates", "fits", "host_bound", "in_order", "order", "predicted_seconds"]

_SHRINKS = 2  # of the ways to compute h, so many of the best predicted enter the plans


def predicted_seconds(machine: Machine, cell: Cell, plan: Any) -> float:
    """What the model holds ``plan``, one of the cell's direction, to take."""
    if cell.others:
        return _apart_seconds(machine, cell) if isinstance(plan, Apart) else hopper_group_seconds(machine, cell, plan)
    seconds = backward_seconds if cell.direction == "backward" else forward_seconds
    return seconds(machine, cell, plan)


def _apart_seconds(machine: Machine, cell: Cell) -> float:
    """Each member by its best plan; in backward their dx are summed, one after the other."""
    seconds = sum(predicted_seconds(machine, member, candidates(machine, member)[0]) for member in cell.members)
    if cell.direction == "forward":
        return seconds
    moved = 3.0 * cell.tokens * cell.k * cell.itemsize
    return seconds + len(cell.others) * (hardware.memory_seconds(machine, moved) + hardware.launch_seconds())


def host_bound(seconds: float, plan: Any) -> bool:
    """Whether a second stream costs the host more than the ``seconds`` that the device takes."""
    return getattr(plan, "beside", False) and seconds < hardware.ASSUMED.second_stream


def order(machine: Machine, cell: Cell, plan: Any) -> float:
    """By what plans are ranked: the predicted seconds, or what the host takes where a second stream binds it."""
    seconds = predicted_seconds(machine, cell, plan)
    return hardware.ASSUMED.second_stream + seconds if host_bound(seconds, plan) else seconds


def in_order(machine: Machine, cell: Cell, measured: Plan | None, descriptors: bool = True) -> tuple[Any, ...]:
    """The plans in the order in which they are tried: the ``measured`` one if it fits, then the best predicted.

    Without ``descriptors``, which TMA reads matrices by, only those that need none.
    """
    plans = candidates(machine, cell)
    if measured is not None and fits(machine, cell, measured):
        plans = tuple(dict.fromkeys([measured, *plans]))
    return tuple(plan for plan in plans if descriptors or not _by_descriptor(plan))


def _by_descriptor(plan: Plan) -> bool:
    return isinstance(plan, (Ring, *GLUON_PLANS, *GROUP_KERNELS)) or getattr(plan, "variant", "pointer") != "pointer"


@lru_cache(maxsize=1024)
def candidates(machine: Machine, cell: Cell) -> tuple[Any, ...]:
    """Every plan that fits the machine, best predicted first; the compositions are always among them.

    The interpreter's come in a fixed order, the fused ones first: there, they are what is to be seen.
    """
    if cell.others:
        plans: list[Any] = list(group_plans(machine, cell))
    else:
        every = _backward(machine, cell) if cell.direction == "backward" else _forward(machine, cell)
        plans = [plan for plan in every if fits(machine, cell, plan)]
        plans += gluon_plans(machine, cell)
    if not machine.interpreter:
        plans.sort(key=lambda plan: order(machine, cell, plan))
    return tuple(plans)


def fits(machine: Machine, cell: Cell, plan: Plan) -> bool:
    """Whether the machine has what ``plan`` needs, and the plan covers the cell."""
    if not is_of(plan, cell.direction) or (getattr(plan, "pdl", False) and machine.capability < 90):
        return False  # programmatic dependent launch came with compute capability 9.0
    if isinstance(plan, (Apart, *GROUP_KERNELS)) or cell.others:
        of_group: GroupPlan | None = plan if isinstance(plan, (Apart, *GROUP_KERNELS)) and cell.others else None
        return of_group is not None and group_fits(machine, cell, of_group)
    if isinstance(plan, GLUON_PLANS):
        return gluon_fits(machine, cell, plan)
    if isinstance(plan, Ring):
        return ring_fits(machine, cell, plan)
    if isinstance(plan, FewTokens):
        covers = cell.tokens <= plan.config.block_m and cell.r <= plan.config.block_r
        return covers and fits_shared_memory(machine, plan.config, cell.itemsize)
    if isinstance(plan, (Fused, DxFused)):
        runs = plan.variant == "pointer" or _persistent_runs(machine, cell)
        return runs and fits_shared_memory(machine, plan.gemm, cell.itemsize)
    return True


def _persistent_runs(machine: Machine, cell: Cell) -> bool:
    """Whether the persistent kernels run, forward's and dx's. TMA came with 9.0, and they are for 16 bits.

    On 10.0 not over fp16. There the high and low numbers overflow tensor memory under wide tiles, and Triton 3.7 then
    compiles the whole kernel to a trap. The pointer variant and the compositions remain.
    """
    if machine.interpreter:
        return True
    return machine.capability >= 90 and cell.itemsize == 2 and (machine.capability < 100 or cell.dtype != "float16")


def _forward(machine: Machine, cell: Cell) -> Iterator[ForwardPlan]:
    """Every forward plan."""
    sizes = (cell.n, cell.r, cell.itemsize, cell.tf32)
    early = (False,) if machine.capability < 90 else (False, True)
    if ring_fault(machine, cell) is None:
        for way in ring_ways(machine, cell):
            first = early if way[1] > 1 else tuple(reversed(early))  # a cluster gains nothing by an early launch
            yield from (Ring(*way, pdl) for pdl in ((False,) if way[0].copies else first))
    if cell.tokens <= FEW_TOKENS:
        for config, splits in _few_tokens(machine, cell):
            yield from (FewTokens(config, splits, pdl) for pdl in (early if splits > 1 else (False,)))
    shrinks = _shrinks(machine, cell)
    for variant, gemms in zip(VARIANTS, (gemm_configs, persistent_configs), strict=True):
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
    """Strips of y, and splits of K; about as many programs as the machine holds.

    Without a split it lost wherever it was measured (tune.json), so only where K is too short for one, or W too wide.
    """
    sizes = (cell.n, cell.r, cell.itemsize, cell.tf32)
    configs = dict.fromkeys(few_tokens_config(machine, *sizes, block_n) for block_n in (16, 32, 64))
    if machine.interpreter:
        yield from ((config, splits) for config in filter(None, configs) for splits in (1, 3))
        return
    split = [
        (config, splits)
        for config in filter(None, configs)
        for splits in SPLITS[1:]
        if worth_dividing(machine, -(-cell.n // config.block_n) * splits) and cell.k >= 2 * splits * config.block_k
    ]
    yield from split or ((config, 1) for config in filter(None, configs))


def _shrinks(machine: Machine, cell: Cell) -> list[ShrinkConfig]:
    """Ways to compute h; who reads it holds all of its parts in registers."""
    ways = shrink_ways(machine, cell.of_x, 16 if machine.capability >= 90 else 8)
    if not machine.interpreter:
        ways.sort(key=lambda way: forward_seconds(machine, cell, BaseFirst(way, ExpandConfig(64, 128, 16, 4))))
    return ways[:_SHRINKS]


def _backward(machine: Machine, cell: Cell) -> Iterator[BackwardPlan]:
    """Every backward plan; the interpreter's are four in which each way to each result is met, the fused ones first."""
    sizes = (cell.k, cell.r, cell.itemsize, cell.tf32)
    small = small_ways(machine, cell)
    gemms = {
        "pointer": gemm_configs(machine, cell.tokens, *sizes, dropout=cell.dropout),
        "persistent": persistent_configs(machine, cell.tokens, *sizes, dropout=cell.dropout),
    }
    expand = expand_config(machine, cell.r, cell.itemsize, cell.tf32)
    if machine.interpreter:
        (joint, apart), (gemm,) = small, gemms["pointer"]
        yield from (DxFused(*joint, gemm), DxFused(*apart, gemm, "persistent"))
        yield from (DxLoraFirst(*apart, expand), DxLoraFirst(*joint, expand))
        return
    for dh_db, da in small:
        for variant, configs in gemms.items():
            yield from (DxFused(dh_db, da, gemm, variant) for gemm in configs)
        yield DxLoraFirst(dh_db, da, expand)
    da = small[0][1]
    for dh_db in ways_to_dh_db(machine, cell.of_dy):  # dx waits for dh alone, or for the one read that makes db as well
        for variant, configs in gemms.items():
            yield from (DxFused(dh_db, da, gemm, variant, beside=True) for gemm in configs)
        yield DxLoraFirst(dh_db, da, expand, beside=True)
