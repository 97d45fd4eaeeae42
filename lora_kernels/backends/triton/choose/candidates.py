"""Which plans there are for a cell, and in which order: the measured one of a tuned device, then as the model has it.

The plain compositions are always among the candidates, so what is chosen is never predicted to lose to them. The order
depends on how the plan is launched (``launching``): outside of a graph the host's time counts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
from .launching import GRAPH, PREPARED, Launching
from .plans import (
    GLUON_PLANS,
    UNMEASURED,
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
    RingGrads,
    is_of,
)
from .ring import grads_fit, grads_ways, ring_fault, ring_fits, ring_ways
from .table import Row, Timed
from .ways import SPLITS, shrink_ways, small_ways, ways_to_dh_db, worth_dividing

__all__ = [
    "candidates",
    "fits",
    "host_seconds",
    "in_order",
    "of_row",
    "on_one_stream",
    "order",
    "predicted",
    "predicted_seconds",
]

_SHRINKS = 2  # of the ways to compute h, so many of the best predicted enter the plans
_MICRO = 1e6
_NOISE = 0.01  # of a clock: a measured plan gives way only to what costs less by more


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


def host_seconds(machine: Machine, cell: Cell, plan: Any, launching: Launching) -> float:
    """What the model holds a call by ``plan`` to take the host."""
    if not isinstance(plan, Apart):
        drawn = cell.dropout and cell.direction == "forward" and not isinstance(plan, (*GLUON_PLANS, *GROUP_KERNELS))
        return launching.host(plan.launches + drawn, _beside(plan))
    members = [(member, candidates(machine, member, launching)[0]) for member in cell.members]
    each = sum(host_seconds(machine, member, own, launching) - launching.layer for member, own in members)
    sums = len(cell.others) if cell.direction == "backward" else 0
    return launching.layer + each + sums * launching.launch


def order(machine: Machine, cell: Cell, plan: Any, launching: Launching = PREPARED) -> float:
    """By what plans are ranked: seconds of the device and of the host, as both are predicted."""
    device, host = predicted_seconds(machine, cell, plan), host_seconds(machine, cell, plan, launching)
    return launching.cost(device, host, _beside(plan))


def on_one_stream(plan: Any) -> Any:
    """The same kernels one after the other."""
    return replace(plan, beside=False) if _beside(plan) else plan


def _beside(plan: Any) -> bool:
    return bool(getattr(plan, "beside", False))


def of_row(machine: Machine, cell: Cell, row: Row, launching: Launching) -> Plan:
    """The plan of ``row``, measured for ``cell`` or near it, that costs least as it is launched.

    What the row lacks is the model's: the host's time, where it was not measured; and of a row without such figures,
    what the same kernels take on one stream.
    """
    if launching is GRAPH:
        return row.plan
    grown = cell.tokens / row.cell.tokens if min(cell.tokens, row.cell.tokens) > FEW_TOKENS else 1.0
    costs: dict[Plan, float] = {}
    for timed in row.timed or _as_timed(machine, row):
        if fits(machine, cell, timed.plan):
            device = grown * timed.ratio * row.floor_us / _MICRO
            host = host_seconds(machine, cell, timed.plan, launching)
            if launching.name in timed.host_us:
                host = launching.layer + timed.host_us[launching.name] / _MICRO
            costs[timed.plan] = launching.cost(device, host, _beside(timed.plan))
    best = min(costs, key=costs.__getitem__, default=row.plan)
    return row.plan if row.plan in costs and costs[row.plan] <= (1.0 + _NOISE) * costs[best] else best


def _as_timed(machine: Machine, row: Row) -> list[Timed]:
    """Of a row without such figures: its plan, and the same on one stream, by the model's ratio of the two."""
    one = on_one_stream(row.plan)
    found = [Timed(row.plan, row.ratio)]
    if one != row.plan and fits(machine, row.cell, one):
        slower = predicted_seconds(machine, row.cell, one) / predicted_seconds(machine, row.cell, row.plan)
        found.append(Timed(one, slower * row.ratio))
    return found


def in_order(
    machine: Machine,
    cell: Cell,
    measured: Plan | None,
    descriptors: bool = True,
    launching: Launching = PREPARED,
) -> tuple[Any, ...]:
    """The plans in the order in which they are tried: the ``measured`` one if it fits, then the best predicted.

    Without ``descriptors``, which TMA reads matrices by, only those that need none.
    """
    plans = candidates(machine, cell, launching)
    if measured is not None and fits(machine, cell, measured):
        plans = tuple(dict.fromkeys([measured, *plans]))
    return tuple(plan for plan in plans if descriptors or not _by_descriptor(plan))


def _by_descriptor(plan: Plan) -> bool:
    reads = (Ring, RingGrads, *GLUON_PLANS, *GROUP_KERNELS)
    return isinstance(plan, reads) or getattr(plan, "variant", "pointer") != "pointer"


@lru_cache(maxsize=4096)
def candidates(machine: Machine, cell: Cell, launching: Launching = PREPARED) -> tuple[Any, ...]:
    """Every plan that fits the machine, best predicted first; the compositions are always among them.

    What was measured nowhere comes last: no prediction has it chosen. The interpreter's come in a fixed order, the
    fused ones first: there, they are what is to be seen.
    """
    found = list(predicted(machine, cell))
    if not machine.interpreter:
        costs = {
            plan: launching.cost(seconds, host_seconds(machine, cell, plan, launching), _beside(plan))
            for plan, seconds in found
        }
        found.sort(key=lambda pair: (isinstance(pair[0], UNMEASURED), costs[pair[0]], pair[1]))
    return tuple(plan for plan, _ in found)


@lru_cache(maxsize=4096)
def predicted(machine: Machine, cell: Cell) -> tuple[tuple[Any, float], ...]:
    """Every plan that fits the machine, with the seconds of :func:`predicted_seconds`; of the interpreter's, none."""
    plans = _every(machine, cell)
    return tuple((plan, 0.0 if machine.interpreter else predicted_seconds(machine, cell, plan)) for plan in plans)


def _every(machine: Machine, cell: Cell) -> Iterator[Any]:
    if cell.others:
        yield from group_plans(machine, cell)
        return
    every = _backward(machine, cell) if cell.direction == "backward" else _forward(machine, cell)
    yield from (plan for plan in every if fits(machine, cell, plan))
    yield from gluon_plans(machine, cell)


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
    if isinstance(plan, RingGrads):
        return grads_fit(machine, cell, plan)
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


def _backward(machine: Machine, cell: Cell) -> Iterator[BackwardPlan | RingGrads]:
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
    if ring_fault(machine, cell) is None:
        for way in grads_ways(machine, cell):
            yield from (RingGrads(*way, pdl) for pdl in ((False,) if machine.capability < 90 else (False, True)))
    for dh_db, da in small:
        for variant, configs in gemms.items():
            yield from (DxFused(dh_db, da, gemm, variant) for gemm in configs)
        yield DxLoraFirst(dh_db, da, expand)
    da = small[0][1]
    for dh_db in ways_to_dh_db(machine, cell.of_dy):  # dx waits for dh alone, or for the one read that makes db as well
        for variant, configs in gemms.items():
            yield from (DxFused(dh_db, da, gemm, variant, beside=True) for gemm in configs)
        yield DxLoraFirst(dh_db, da, expand, beside=True)
