"""Configurations of the Gluon kernels of a group: 2 to 4 layers that read one x. See ``hopper_blocks``.

They are those of one layer, with what several members need of shared memory and of registers. None was measured beside
its rivals yet. ``group_da_configs`` tells what a profile of masked da says of the order.
An empty list says that a kernel has no room for the group; its members then run one by one, by a layer's own steps,
which read and write the same operands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from .hopper_blocks import SHARED_MEMORY, HopperDhDb, HopperProduct, dh_db_configs, dx_configs, forward_configs

__all__ = [
    "MEMBERS",
    "HopperGroupDa",
    "HopperGroupDx",
    "HopperGroupShrink",
    "group_da_configs",
    "group_dh_db_configs",
    "group_dx_configs",
    "group_forward_configs",
    "group_shrink_configs",
]

MEMBERS = (2, 3, 4)
Ranks = tuple[int, ...]  # padded, a number a member

_ON_MULTIPROCESSOR = 233472
_SLACK = 1024
_REGISTERS = 65536
_LOADING_REGISTERS = 24
_MASKED_COLUMNS = (
    128  # of dx's tile: the members' terms, which the compiler keeps apart until the last, have no room for more
)
_MASKED_MEMBERS = 3  # a fourth term spills


@dataclass(frozen=True, slots=True)
class HopperGroupShrink:
    """All members' h in one read of x; ``ctas`` programs a multiprocessor."""

    name: str
    ranks: Ranks
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
        rows = self.block_m + (2 if self.wide else 1) * len(self.ranks) * max(self.ranks)
        return self.stages * rows * self.block_k * 2 + words + _SLACK

    @property
    def accumulators(self) -> int:
        """Registers a thread: the members' sums."""
        return self.block_m * sum(self.ranks) // (32 * self.warps)

    def splits(self, m: int, k: int, sm_count: int) -> int:
        """Programs that share the sum over K of a block of rows."""
        split = sm_count * self.ctas // -(-m // self.block_m)
        return max(1, min(split, -(-k // self.block_k), 16))

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": _max_registers(self.warps, self.ctas)}


@dataclass(frozen=True, slots=True)
class HopperGroupDx:
    """dx over all members: ``product``'s tiles, and room for each member's masks."""

    product: HopperProduct
    members: int

    @property
    def name(self) -> str:
        return self.product.name

    @property
    def shared_memory(self) -> int:
        more = self.members - 1 if self.product.masked else 0
        return self.product.shared_memory + more * self.product.block_m * self.product.block_n // 8

    def takes(self, summed: tuple[int, ...], extra: tuple[int, ...]) -> bool:
        """Whether a tile has steps enough that each mask is read before its buffer is loaded again.

        Args:
            summed: each member's N.
            extra: each member's low-rank steps.
        """
        if not self.product.masked:
            return True
        steps = sum(-(-n // self.product.block_k) for n in summed) + sum(extra)
        return steps - max(extra) + 1 >= self.product.stages


@dataclass(frozen=True, slots=True)
class HopperGroupDa:
    """All members' da in one read of x; ``masked``: with room for the words."""

    name: str
    ranks: Ranks
    block_n: int
    stages: int
    block_m: int = 64
    warps: int = 4
    ctas: int = 2
    masked: bool = False
    wide: bool = False

    @property
    def shared_memory(self) -> int:
        a_member = 4 * max(self.ranks) + (self.block_n // 8 if self.masked else 0)
        return self.stages * self.block_m * (2 * self.block_n + len(self.ranks) * a_member) + _SLACK

    @property
    def accumulators(self) -> int:
        return self.block_n * sum(self.ranks) // (32 * self.warps)

    @property
    def consumer_registers(self) -> int:
        """Registers a thread that sums may hold: the loading warp and those that fill it up to 4 keep 24 each."""
        every = self.options["maxnreg"] * (self.warps + 4) - _LOADING_REGISTERS * 4
        return min(every // self.warps // 8 * 8, 240)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "maxnreg": _max_registers(self.warps, self.ctas)}


def _max_registers(warps: int, ctas: int) -> int:
    return min(_REGISTERS // (ctas * (warps + 4) * 32) // 8 * 8, 255 // 8 * 8)


def group_forward_configs() -> tuple[HopperProduct, ...]:
    """For y of all members: a layer's own."""
    return forward_configs()


@cache
def group_dx_configs(members: int, masked: bool) -> tuple[HopperGroupDx, ...]:
    if masked and members > _MASKED_MEMBERS:
        return ()
    products = [g for g in dx_configs(masked) if not masked or g.block_n <= _MASKED_COLUMNS]
    wanted = [HopperGroupDx(product, members) for product in products]
    return tuple(c for c in wanted if c.shared_memory <= SHARED_MEMORY)


@cache
def group_shrink_configs(ranks: Ranks, masked: bool, wide: bool = False) -> tuple[HopperGroupShrink, ...]:
    """``wide``: for fp16, whose x is split in registers."""
    wanted = [
        HopperGroupShrink("t128x1", ranks, 128, 8, ctas=1),
        HopperGroupShrink("t128", ranks, 128, 5),
        HopperGroupShrink("t256", ranks, 256, 2),
    ]
    wanted = [replace(c, wide=True) for c in wanted if c.ctas == 1] if wide else wanted
    # beside the sums: x's numbers where they are masked or split, as they are and once more, and the members' words
    held = 2 if masked or wide else 0
    kept = [c for c in wanted if c.accumulators + held * c.block_k // 4 <= c.options["maxnreg"] - 36]
    return tuple(_with_room(kept, 2))


@cache
def group_dh_db_configs(ranks: Ranks, wide: bool = False) -> tuple[HopperDhDb, ...]:
    """A layer's own, for the largest rank."""
    return dh_db_configs(max(ranks), wide)


@cache
def group_da_configs(ranks: Ranks, masked: bool, wide: bool = False) -> tuple[HopperGroupDa, ...]:
    """Two programs a multiprocessor where they fit, masked too.

    Under masks a program works member by member: it masks x in registers, stores it, and waits for the product. Alone
    on its multiprocessor, as "c128" is, it leaves the tensor cores idle while it masks (``hardware.Assumptions``). Two
    programs could fill each other's waits. Masked "c128x2" has the machine code of "c128", without spills, for its
    consumers have 232 registers. It has not been measured yet, so it comes second, and the tuner tries it. Of one layer
    (hopper_step.json, masked) two programs took 31.7 and 32.3 us, one program 32.8; one of 8 warps took 35.2.
    """
    two = HopperGroupDa("c128x2", ranks, 128, 5, masked=masked)
    one = HopperGroupDa("c128", ranks, 128, 5, ctas=1, masked=masked)
    wanted = [
        *((one, two) if masked else (two, one)),
        HopperGroupDa("c128w8", ranks, 128, 5, warps=8, ctas=1, masked=masked),
    ]
    wanted = [replace(c, wide=True) for c in wanted if c.ctas == 1] if wide else wanted
    held = 64 * 128 // 128 if masked or wide else 0  # x's tile in registers, and masked or split
    room = {c: c.consumer_registers if masked and c.ctas > 1 else c.options["maxnreg"] for c in wanted}
    kept = [c for c in wanted if c.accumulators + held * 4 // c.warps <= room[c] - 40]
    return tuple(_with_room(kept, 2))


Config = TypeVar("Config", HopperGroupShrink, HopperGroupDa)


def _with_room(configs: Iterable[Config], least: int) -> Iterable[Config]:
    """Each with as many stages as fit; those that have no room for ``least`` are left out."""
    for config in configs:
        for stages in range(config.stages, least - 1, -1):
            fitted = replace(config, stages=stages)
            if config.ctas * (fitted.shared_memory + 1024) <= _ON_MULTIPROCESSOR:
                yield fitted
                break
