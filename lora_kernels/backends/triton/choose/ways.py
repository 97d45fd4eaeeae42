"""The ways to the small products, with R on one side, and the best predicted: h and dh, da and db.

Both passes share them: h and dh are shrinks (``shrink_ways``), of x's columns and of dy's; da and db are sums over the
rows (``outer_ways``), with x's columns and with dy's. Backward alone takes dh and db together, in one read of dy. Plans
are made of the best of them; a part operator, which computes one of them alone, takes the very best.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .blocks import Machine, OuterConfig, ShrinkConfig, dh_db_config, outer_config, shrink_config
from .cost import SkinnyModel
from .plans import Cell, DhDb, Skinny

__all__ = [
    "SPLITS",
    "dh_db_for",
    "outer_for",
    "outer_ways",
    "shrink_for",
    "shrink_ways",
    "small_ways",
    "ways_to_dh_db",
    "worth_dividing",
]

SPLITS = (1, 2, 4, 8, 16)
_MOST_PROGRAMS = 4  # a multiprocessor: more of them only divide the work further
_SMALL = 2  # of the ways to compute dh, db and da together, so many of the best predicted enter the plans


def worth_dividing(machine: Machine, programs: int) -> bool:
    """Whether ``programs`` are few enough that each of them brings more of the machine to work."""
    return programs <= _MOST_PROGRAMS * machine.sm_count


def shrink_ways(machine: Machine, work: Skinny, most: int) -> list[ShrinkConfig]:
    """Ways to h or dh: without a split of the columns, and split, so that more of the machine is busy."""
    base = shrink_config(machine, work.tokens, work.r, work.itemsize, work.tf32)
    if machine.interpreter:
        return [base, replace(base, splits=3)]
    rows = sorted({base.block_m, *(b for b in (2 * base.block_m, 4 * base.block_m) if b <= 64)})
    kinds = [replace(base, block_m=block_m) for block_m in rows]
    if base.block_r == 128 and work.itemsize == 2:  # every block of rows reads all of A, from L2
        kinds.append(replace(base, block_m=128, block_k=32, num_warps=8, num_stages=4))
    ways = [base]
    for kind in kinds:
        programs = -(-work.tokens // kind.block_m) * -(-work.r // kind.block_r)
        ways += [
            replace(kind, splits=splits)
            for splits in SPLITS[1:]
            if splits <= most
            and worth_dividing(machine, programs * splits)
            and work.columns >= 2 * splits * kind.block_k
        ]
    return ways


def outer_ways(machine: Machine, work: Skinny) -> list[OuterConfig]:
    """Ways to da or db: without a split of the rows, and split with wider blocks of columns."""
    base = outer_config(machine, work.columns, work.r, work.itemsize, work.tf32)
    if machine.interpreter:
        return [base, replace(base, splits=3)]
    widest = 32 if machine.capability >= 100 and base.block_r > 32 else 64  # wider, the mask takes the registers
    if not work.dropout and work.itemsize == 2 and base.block_r <= 32:
        widest = 128  # of 131 ways on an H100 the quickest, in four chunks of rows: 27.7 us for 28.8 with 64 columns
    kinds = [replace(base, block_k=block_k) for block_k in (16, 32, 64, 128) if base.block_k <= block_k <= widest]
    if base.block_r == 64 and work.itemsize == 2:  # every block of columns reads all of dh, from L2
        block_r = 64 if work.r <= 64 else 128
        kinds.append(replace(base, block_m=32, block_k=128, block_r=block_r, num_warps=8))
    ways = [base]
    for kind in kinds:
        programs = -(-work.columns // kind.block_k) * -(-work.r // kind.block_r)
        ways += [
            replace(kind, splits=splits)
            for splits in SPLITS[1:]
            if worth_dividing(machine, programs * splits) and work.tokens >= 4 * splits * kind.block_m
        ]
    return ways


@lru_cache(maxsize=4096)
def shrink_for(machine: Machine, work: Skinny) -> ShrinkConfig:
    """dh, or h by itself: the way that should take least, its second stage counted.

    Between 17 and about 500 tokens rows alone leave multiprocessors idle, and a split of the columns is worth it. The
    mask of h is not counted.
    """
    ways = shrink_ways(machine, work, SPLITS[-1])
    return ways[0] if machine.interpreter else min(ways, key=SkinnyModel(machine, replace(work, dropout=False)).summed)


@lru_cache(maxsize=4096)
def outer_for(machine: Machine, work: Skinny) -> OuterConfig:
    """da or db by itself: the way that should take least."""
    ways = outer_ways(machine, work)
    return ways[0] if machine.interpreter else min(ways, key=SkinnyModel(machine, work).outer)


@lru_cache(maxsize=4096)
def dh_db_for(machine: Machine, work: Skinny) -> DhDb:
    """dh and db: in one read of dy, unless the partial sums should outweigh it."""
    return ways_to_dh_db(machine, work)[0]


def ways_to_dh_db(machine: Machine, work: Skinny) -> list[DhDb]:
    """In one read of dy and in two, the better predicted first."""
    dh_db = dh_db_config(machine, work.tokens, work.columns, work.r, work.itemsize, work.tf32)
    if machine.interpreter:
        (shrink, split), (db, split_db) = shrink_ways(machine, work, 1), outer_ways(machine, work)
        return [DhDb(shrink, db, dh_db, True), DhDb(split, split_db, dh_db, False)]
    shrink, db = shrink_for(machine, work), outer_for(machine, work)
    return sorted((DhDb(shrink, db, dh_db, joint) for joint in (True, False)), key=SkinnyModel(machine, work).both)


def small_ways(machine: Machine, cell: Cell) -> list[tuple[DhDb, OuterConfig]]:
    """dh, db and da, which no choice of dx touches: the best predicted ways."""
    joint, apart = ways_to_dh_db(machine, cell.of_dy)
    das = outer_ways(machine, cell.of_x)
    if machine.interpreter:
        return [(joint, das[0]), (apart, das[1])]
    of_dy, of_x = SkinnyModel(machine, cell.of_dy), SkinnyModel(machine, cell.of_x)
    ways = [(both, da) for da in dict.fromkeys([outer_for(machine, cell.of_x), das[0]]) for both in (joint, apart)]
    ways.sort(key=lambda way: of_dy.both(way[0]) + of_x.outer(way[1]))
    return ways[:_SMALL]
