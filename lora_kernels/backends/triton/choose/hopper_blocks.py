"""Configurations of the Gluon kernels, for compute capability 9.0: frozen dataclasses, with checks of what fits.

The names are those of the measurements (hopper_step.json): a table or a cost model may be fitted to them. Each list
is in order of preference, best measured first, and holds only what fits the rank; stages are taken away where a
larger rank needs their room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

__all__ = [
    "SHARED_MEMORY",
    "HopperDhDb",
    "HopperOuter",
    "HopperPlainShrink",
    "HopperProduct",
    "HopperProductH",
    "HopperShrink",
    "chunk_of",
    "dh_db_configs",
    "dx_configs",
    "forward_configs",
    "outer_configs",
    "plain_shrink_configs",
    "product_h_configs",
    "shrink_configs",
]

SHARED_MEMORY = 232448  # bytes that one program may use
_ON_MULTIPROCESSOR = 233472  # bytes that all programs of one share, 1024 of each reserved
_SLACK = 1024  # barriers and what a layout's conversion takes
_REGISTERS = 65536


def _fits(shared: int, ctas: int = 1) -> bool:
    return shared <= SHARED_MEMORY and ctas * (shared + 1024) <= _ON_MULTIPROCESSOR


def _max_registers(warps: int, ctas: int) -> int:
    """Registers a thread: consumers and the loading warp (filled up to 4) of ``ctas`` programs share them."""
    return min(_REGISTERS // (ctas * (warps + 4) * 32) // 8 * 8, 255 // 8 * 8)


@dataclass(frozen=True, slots=True)
class HopperProduct:
    """y or dx with the low-rank term as more K steps; ``masked``: those come first, and are masked."""

    name: str
    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    group_m: int = 16
    epilogue_n: int = 64
    buffers: int = 2
    masked: bool = False
    mode: str = "split"

    @property
    def parts(self) -> int:
        return 2 if self.mode == "split" else 1

    @property
    def rows(self) -> int:
        """Rows of one consumer."""
        return self.block_m // self.parts

    @property
    def shared_memory(self) -> int:
        ring = self.stages * (self.block_m + self.block_n) * self.block_k * 2
        mask = self.block_m * self.block_n // 8 if self.masked else 0
        return ring + self.block_m * self.buffers * self.epilogue_n * 2 + mask + _SLACK

    def takes(self, summed: int) -> bool:
        """Whether a sum over ``summed`` is long enough: the mask has one buffer, free after a ring of steps."""
        return not self.masked or -(-summed // self.block_k) >= self.stages - 1

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": 4 if self.mode == "split" else 8, "maxnreg": 168}


@dataclass(frozen=True, slots=True)
class HopperProductH:
    """y with h, or dx with dh, in one launch. ``exact``: h's halves meet in fp32."""

    name: str
    rank: int
    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    group_m: int = 16
    epilogue_n: int = 32
    buffers: int = 3
    exact: bool = True

    @property
    def shared_memory(self) -> int:
        ring = self.stages * (self.block_m + self.block_n + self.rank) * self.block_k * 2
        return ring + self.block_m * self.buffers * self.epilogue_n * 2 + _SLACK

    def takes(self, columns: int, summed: int) -> bool:
        """Whether y (M, columns) has two tiles of columns, and the sum K steps for both halves of h."""
        return columns > self.block_n and summed >= 4 * self.block_k

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": 4, "maxnreg": 168, "launch_cooperative_grid": True}


@dataclass(frozen=True, slots=True)
class HopperShrink:
    """h in one read of x; ``ctas`` programs a multiprocessor."""

    name: str
    rank: int
    block_k: int
    stages: int
    warps: int = 4
    ctas: int = 2
    wide: bool = False

    @property
    def block_m(self) -> int:
        return 16 * self.warps

    @property
    def shared_memory(self) -> int:
        words = self.block_m * self.block_k // 8  # what the words' conversion to x's layout takes
        rows = self.block_m + (2 if self.wide else 1) * self.rank
        return self.stages * rows * self.block_k * 2 + words + _SLACK

    def splits(self, m: int, k: int, sm_count: int) -> int:
        """Programs that share the sum over K of a block of rows."""
        split = sm_count * self.ctas // -(-m // self.block_m)
        return max(1, min(split, -(-k // self.block_k), 16))

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": _max_registers(self.warps, self.ctas)}


@dataclass(frozen=True, slots=True)
class HopperPlainShrink:
    """h without dropout, in plain Triton; K is a multiple of ``block_k``."""

    name: str
    rank: int
    block_m: int
    block_k: int
    stages: int
    warps: int = 4

    def takes(self, k: int) -> bool:
        return k % self.block_k == 0

    @property
    def shared_memory(self) -> int:
        return self.stages * (self.block_m + self.rank) * self.block_k * 2 + _SLACK

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True, slots=True)
class HopperDhDb:
    """dh and db in one read of dy."""

    name: str
    rank: int
    block_n: int
    stages: int
    warps: int = 4
    ctas: int = 1
    wide: bool = False

    @property
    def block_m(self) -> int:
        return 16 * self.warps

    @property
    def shared_memory(self) -> int:
        adapter = (4 if self.wide else 2) * self.block_n * self.rank
        return 2 * self.stages * self.block_m * (self.block_n + 2 * self.rank) + adapter + _SLACK

    @property
    def accumulators(self) -> int:
        """Registers a thread: db's block and dh's."""
        return (self.block_n + self.block_m) * self.rank // (32 * self.warps)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": _max_registers(self.warps, self.ctas)}


@dataclass(frozen=True, slots=True)
class HopperOuter:
    """da (or db) in one read of x (dy); ``masked``: with room for the words."""

    name: str
    rank: int
    block_n: int
    stages: int
    block_m: int = 64
    warps: int = 4
    ctas: int = 2
    masked: bool = False
    wide: bool = False

    @property
    def shared_memory(self) -> int:
        bits = self.block_n // 8 if self.masked else 0
        return self.stages * self.block_m * (2 * self.block_n + 4 * self.rank + bits) + _SLACK

    @property
    def accumulators(self) -> int:
        return self.block_n * self.rank // (32 * self.warps)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": _max_registers(self.warps, self.ctas)}


def chunk_of(m: int, block_m: int, columns: int, programs: int) -> tuple[int, int]:
    """(blocks of rows a program takes, row chunks): column chunks times row chunks is about the number of programs."""
    blocks = -(-m // block_m)
    chunk = -(-blocks // max(1, min(blocks, programs // columns)))
    return chunk, -(-blocks // chunk)


def forward_configs() -> tuple[HopperProduct, ...]:
    """For y; "small" is for few tokens."""
    return (HopperProduct("big"), HopperProduct("small", block_n=128, stages=6))


def dx_configs(masked: bool) -> tuple[HopperProduct, ...]:
    """For dx."""
    if not masked:
        big = HopperProduct("big", group_m=8)
        return (big, replace(big, name="g16", group_m=16), HopperProduct("small", block_n=128, stages=6))
    big = HopperProduct("big", group_m=8, epilogue_n=32, buffers=3, masked=True)
    small = HopperProduct("small", block_n=128, stages=6, epilogue_n=32, buffers=2, masked=True)
    short = replace(small, name="short", stages=2)  # not measured: for sums that the others' mask is too slow for
    return (big, replace(big, name="g16", group_m=16), small, short)


@cache
def product_h_configs(rank: int) -> tuple[HopperProductH, ...]:
    """For y with h and dx with dh; the rounded form, whose error is larger, is no candidate."""
    fused = HopperProductH("fused", rank, buffers=3 if rank <= 16 else 2)
    if rank > 64:  # y's and h's sums together are more than a consumer's registers
        fused = replace(fused, block_n=128)
    return tuple(_with_room([fused], 3))


@cache
def shrink_configs(rank: int, wide: bool = False) -> tuple[HopperShrink, ...]:
    """``wide``: for fp16, whose x is split in registers."""
    wanted = [
        HopperShrink("t128x1", rank, 128, 8, ctas=1),
        HopperShrink("t128", rank, 128, 5),
        HopperShrink("t256", rank, 256, 2),
        HopperShrink("t128x3", rank, 128, 3, ctas=3),
    ]
    # 64 x rank sums and 64 x block_k numbers of x in registers: what a multiprocessor's third has no room for
    kept = [c for c in wanted if c.rank // 2 + c.block_k // 4 <= c.options["maxnreg"] - 36]
    kept = [replace(c, wide=True) for c in kept if c.ctas == 1] if wide else kept
    return tuple(_with_room(kept, 2))


@cache
def plain_shrink_configs(rank: int) -> tuple[HopperPlainShrink, ...]:
    wanted = [
        HopperPlainShrink("p64", rank, 64, 128, 5),
        HopperPlainShrink("p32", rank, 32, 256, 4),
        HopperPlainShrink("p16", rank, 16, 256, 4),
    ]
    return tuple(_with_room(wanted, 2))


@cache
def dh_db_configs(rank: int, wide: bool = False) -> tuple[HopperDhDb, ...]:
    """Above rank 32 the parts of dh cost as much as a second read of dy: a shrink and an outer may be quicker."""
    wanted = [
        HopperDhDb("c256", rank, 256, 5),
        HopperDhDb("c512", rank, 512, 2),
        HopperDhDb("c256w8", rank, 256, 2, warps=8),
        HopperDhDb("c128x2", rank, 128, 5, ctas=2),
        HopperDhDb("c128", rank, 128, 5),
    ]
    kept = [c for c in wanted if c.accumulators <= c.options["maxnreg"] - 40 and (c.name != "c128" or rank > 32)]
    if wide:  # dy's tile lies in registers too
        kept = [
            HopperDhDb("c128", rank, 128, 5, wide=True) if rank <= 32 else HopperDhDb("c64", rank, 64, 5, wide=True)
        ]
    return tuple(_with_room(kept, 2))


@cache
def outer_configs(rank: int, masked: bool, wide: bool = False) -> tuple[HopperOuter, ...]:
    wanted = [
        HopperOuter("c128r128", rank, 128, 2, block_m=128, masked=masked),
        HopperOuter("c128x2", rank, 128, 5, masked=masked),
        HopperOuter("c256x2", rank, 256, 2, masked=masked),
        HopperOuter("c256", rank, 256, 5, ctas=1, masked=masked),
        HopperOuter("c128", rank, 128, 5, ctas=1, masked=masked),
    ]
    kept = [c for c in wanted if c.accumulators <= c.options["maxnreg"] - 48 and (c.name != "c128" or rank > 32)]
    if wide:  # x's tile lies in registers too
        warps = 4 if rank <= 64 else 8
        kept = [HopperOuter(f"c128w{warps}", rank, 128, 5, warps=warps, ctas=1, masked=masked, wide=True)]
    return tuple(_with_room(kept, 2))


def _with_room(configs: Iterable, least: int) -> Iterable:  # type: ignore[type-arg]
    """Each with as many stages as fit; those that have no room for ``least`` are left out."""
    for config in configs:
        ctas = getattr(config, "ctas", 1)
        for stages in range(config.stages, least - 1, -1):
            fitted = replace(config, stages=stages)
            if _fits(fitted.shared_memory, ctas):
                yield fitted
                break
