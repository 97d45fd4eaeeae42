"""Which backward plans there are for a cell, and the steps that part operators take by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from .backward_cost import BackwardModel
from .blocks import (
    DaConfig,
    Machine,
    ShrinkConfig,
    da_config,
    dh_db_config,
    expand_config,
    gemm_configs,
    persistent_configs,
    shrink_config,
)
from .plans import BackwardPlan, Cell, DxBaseFirst, DxFused, DxLoraFirst, Hidden

__all__ = [
    "backward_fits",
    "backward_plans",
    "da_for",
    "hidden_for",
    "outer_ways",
    "persistent_runs",
    "shrink_for",
    "shrink_ways",
]

_SPLITS = (1, 2, 4, 8, 16)
_MOST_PROGRAMS = 4  # a multiprocessor: more of them only divide the work further
_SMALL = 2  # of the ways to compute dh, db and da together, so many of the best predicted enter the plans


def shrink_ways(machine: Machine, cell: Cell, columns: int, most: int) -> list[ShrinkConfig]:
    """Ways to compute h or dh from ``columns`` columns: without a split of them, and split so that more of the machine
    is busy."""
    base = shrink_config(machine, cell.tokens, cell.r, cell.itemsize, cell.tf32)
    if machine.interpreter:
        return [base, replace(base, splits=3)]
    rows = sorted({base.block_m, *(b for b in (2 * base.block_m, 4 * base.block_m) if b <= 64)})
    kinds = [replace(base, block_m=block_m) for block_m in rows]
    if base.block_r == 128 and cell.itemsize == 2:  # every block of rows reads all of A, from L2
        kinds.append(replace(base, block_m=128, block_k=32, num_warps=8, num_stages=4))
    ways = [base]
    for kind in kinds:
        programs = -(-cell.tokens // kind.block_m) * -(-cell.r // kind.block_r)
        ways += [
            replace(kind, splits=splits)
            for splits in _SPLITS[1:]
            if splits <= most
            and programs * splits <= _MOST_PROGRAMS * machine.sm_count
            and columns >= 2 * splits * kind.block_k
        ]
    return ways


def outer_ways(machine: Machine, cell: Cell, columns: int) -> list[DaConfig]:
    """Ways to sum over the rows, for da or db: without a split of them, and split with wider blocks of columns."""
    base = da_config(machine, columns, cell.r, cell.itemsize, cell.tf32)
    if machine.interpreter:
        return [base, replace(base, splits=3)]
    widest = 32 if machine.capability >= 100 and base.block_r > 32 else 64  # wider, the mask takes the registers
    kinds = [replace(base, block_k=block_k) for block_k in (16, 32, 64) if base.block_k <= block_k <= widest]
    if base.block_r == 64 and cell.itemsize == 2:  # every block of columns reads all of dh, from L2
        block_r = 64 if cell.r <= 64 else 128
        kinds.append(replace(base, block_m=32, block_k=128, block_r=block_r, num_warps=8))
    ways = [base]
    for kind in kinds:
        programs = -(-columns // kind.block_k) * -(-cell.r // kind.block_r)
        ways += [
            replace(kind, splits=splits)
            for splits in _SPLITS[1:]
            if programs * splits <= _MOST_PROGRAMS * machine.sm_count and cell.tokens >= 4 * splits * kind.block_m
        ]
    return ways


def backward_plans(machine: Machine, cell: Cell) -> Iterator[BackwardPlan]:
    """Every plan; the interpreter's are four in which each way to each result is met, the fused ones first."""
    sizes = (cell.k, cell.r, cell.itemsize, cell.tf32)
    small = _small_ways(machine, cell)
    gemms = {
        "pointer": gemm_configs(machine, cell.tokens, *sizes, dropout=cell.dropout),
        "persistent": persistent_configs(machine, cell.tokens, *sizes, dropout=cell.dropout),
    }
    expand = expand_config(machine, cell.r, cell.itemsize, cell.tf32)
    if machine.interpreter:
        (joint, apart), (gemm,) = small, gemms["pointer"]
        yield from (DxFused(*joint, gemm), DxFused(*apart, gemm, "persistent"))
        yield from (DxLoraFirst(*apart, expand), DxBaseFirst(*joint, expand))
        return
    for hidden, da in small:
        for variant, configs in gemms.items():
            yield from (DxFused(hidden, da, gemm, variant) for gemm in configs)
        yield from (DxLoraFirst(hidden, da, expand), DxBaseFirst(hidden, da, expand))
    da = small[0][1]
    for hidden in _hiddens(machine, cell):  # dx waits for dh alone, or for one read of dy that makes db as well
        for variant, configs in gemms.items():
            yield from (DxFused(hidden, da, gemm, variant, beside=True) for gemm in configs)
        yield DxLoraFirst(hidden, da, expand, beside=True)
    yield DxBaseFirst(*small[0], expand, beside=True)


def backward_fits(machine: Machine, cell: Cell, plan: BackwardPlan) -> bool:
    """Whether the machine has what ``plan`` needs."""
    if not isinstance(plan, DxFused):
        return True
    if plan.variant == "flattened":
        return False
    if plan.variant == "persistent" and not persistent_runs(machine, cell):
        return False
    g = plan.gemm
    stage = (g.block_rows + g.block_columns) * g.block_sum * cell.itemsize
    return g.num_stages * stage <= machine.shared_memory


def persistent_runs(machine: Machine, cell: Cell) -> bool:
    """Whether the persistent kernels run, forward's and dx's. TMA came with 9.0, and they are for 16 bits.

    On 10.0 not over fp16. There the high and low parts overflow tensor memory under wide tiles, and Triton 3.7 then
    compiles the whole kernel to a trap. The pointer variant and the compositions remain.
    """
    if machine.interpreter:
        return True
    return machine.capability >= 90 and cell.itemsize == 2 and (machine.capability < 100 or cell.dtype != "float16")


@lru_cache(maxsize=4096)
def shrink_for(machine: Machine, cell: Cell) -> ShrinkConfig:
    """dh, or h by itself, from N columns: the way that should take least, its second stage counted.

    Between 17 and about 500 tokens rows alone leave multiprocessors idle, and a split of the columns is worth it.
    """
    ways = shrink_ways(machine, cell, cell.n, 16)
    return ways[0] if machine.interpreter else min(ways, key=BackwardModel(machine, cell).dh)


@lru_cache(maxsize=4096)
def da_for(machine: Machine, cell: Cell) -> DaConfig:
    """da: the way that should take least."""
    ways = outer_ways(machine, cell, cell.k)
    return ways[0] if machine.interpreter else min(ways, key=BackwardModel(machine, cell).da)


@lru_cache(maxsize=4096)
def hidden_for(machine: Machine, cell: Cell) -> Hidden:
    """dh and db: in one read of dy, unless the partial sums should outweigh it."""
    return _hiddens(machine, cell)[0]


def _hiddens(machine: Machine, cell: Cell) -> list[Hidden]:
    """In one read of dy and in two, the better predicted first."""
    dh_db = dh_db_config(machine, cell.tokens, cell.n, cell.r, cell.itemsize, cell.tf32)
    dbs = outer_ways(machine, cell, cell.n)
    if machine.interpreter:
        split = shrink_ways(machine, cell, cell.n, 1)[1]
        return [Hidden(shrink_for(machine, cell), dbs[0], dh_db, True), Hidden(split, dbs[1], dh_db, False)]
    model = BackwardModel(machine, cell)
    db = min(dbs, key=lambda way: model.outer(way, cell.n, dropout=False))
    shrink = shrink_for(machine, cell)
    return sorted((Hidden(shrink, db, dh_db, joint) for joint in (True, False)), key=model.hidden)


def _small_ways(machine: Machine, cell: Cell) -> list[tuple[Hidden, DaConfig]]:
    """dh, db and da, which no choice of dx touches: the best predicted ways."""
    joint, apart = _hiddens(machine, cell)
    das = outer_ways(machine, cell, cell.k)
    if machine.interpreter:
        return [(joint, das[0]), (apart, das[1])]
    model = BackwardModel(machine, cell)
    ways = [(hidden, da) for da in dict.fromkeys([da_for(machine, cell), das[0]]) for hidden in (joint, apart)]
    ways.sort(key=lambda way: model.hidden(way[0]) + model.da(way[1]))
    return ways[:_SMALL]
