"""What a group's Gluon plans should take: ``HopperModel``'s terms, x counted once, and the tiles of all members.

The constants are those of one layer, but for ``member_tile`` and ``member_pair``: a group's masked da.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .... import traffic
from . import hardware
from .blocks import Machine
from .group_plans import DxHopperGroup, HopperGroup
from .hardware import chain_seconds, draw_seconds, launch_seconds, memory_seconds, read_seconds
from .hopper_blocks import HopperDhDb, HopperProduct, chunk_of
from .hopper_cost import HopperModel
from .hopper_group_blocks import HopperGroupDa, HopperGroupDx, HopperGroupShrink
from .plans import Cell

__all__ = ["HopperGroupModel", "hopper_group_seconds"]


def hopper_group_seconds(machine: Machine, cell: Cell, plan: HopperGroup | DxHopperGroup) -> float:
    """What ``plan`` should take for a group's ``cell``, in seconds."""
    model = HopperGroupModel(machine, cell)
    if isinstance(plan, HopperGroup):
        return model.pack() + model.shrink(plan.shrink) + model.product(plan.product)
    first = model.pack() + model.dh_db(plan.dh_db) + memory_seconds(machine, model.dh_parts(plan.dh_db))
    rest = model.da(plan.da) + memory_seconds(machine, model.sum_of_grads_bytes(plan)) + launch_seconds()
    dx = model.dx(plan.dx)
    share = 1.0 if model.da_is_arithmetic(plan.da) else None
    together = model.joined_dx.beside(plan.dx.product, dx, rest, share) if plan.beside else dx + rest
    return first + launch_seconds() + together


@dataclass(frozen=True, slots=True)
class HopperGroupModel:
    """The group's kernels, in seconds, for one cell on one machine."""

    machine: Machine
    cell: Cell

    @property
    def members(self) -> tuple[HopperModel, ...]:
        return tuple(HopperModel(self.machine, member) for member in self.cell.members)

    def _joined(self, n: int) -> HopperModel:
        """One layer as wide as all of them, of the largest rank."""
        return HopperModel(self.machine, replace(self.cell, n=n, r=max(self.cell.rs), others=()))

    def _blocks(self, block_n: int) -> int:
        return sum(-(-n // block_n) for n in self.cell.ns)

    @property
    def joined_dx(self) -> HopperModel:
        """dx sums over all N, and over every member's low-rank columns but one's, which a layer counts itself."""
        columns = [model.operand.adapter_columns for model in self.members]
        return self._joined(sum(self.cell.ns) + sum(columns) - max(columns))

    def pack_bytes(self) -> float:
        return sum(model.pack_bytes() for model in self.members)

    def pack(self) -> float:
        return memory_seconds(self.machine, self.pack_bytes()) + launch_seconds()

    def shrink_bytes(self) -> float:
        """x once; each member's A, h and words."""
        c = self.cell
        return sum(model.shrink_bytes() for model in self.members) - 2.0 * c.tokens * c.k * (len(c.ns) - 1)

    def shrink(self, config: HopperGroupShrink) -> float:
        c, machine = self.cell, self.machine
        blocks, splits = -(-c.tokens // config.block_m), config.splits(c.tokens, c.k, machine.sm_count)
        steps, total = -(-c.k // (config.block_k * splits)), sum(config.ranks)
        tile = 2 * (config.block_m + total) * config.block_k
        chain = chain_seconds(machine, blocks * splits, steps, tile, config.stages, hardware.ASSUMED.latency)
        parts = 8.0 * c.tokens * total * splits if splits > 1 else 0.0
        seconds = max(memory_seconds(machine, self.shrink_bytes() + parts, blocks * splits), chain)
        if c.dropout:
            drawn = draw_seconds(machine, c.tokens * c.k) + steps * hardware.ASSUMED.draw_step
            seconds += len(c.ns) * drawn
        return read_seconds(seconds)

    def product_bytes(self) -> float:
        """x once, all W and all y; of dx all dy, all W and one dx."""
        c = self.cell
        return float(traffic.large(c.tokens, c.k, sum(c.ns), c.itemsize))

    def product(self, config: HopperProduct) -> float:
        return self._joined(self._blocks(config.block_n) * config.block_n).product(config, forward=True)

    def dx(self, config: HopperGroupDx) -> float:
        joined = self.joined_dx
        _, waves = joined.waves(config.product, forward=False)
        masks = (len(self.cell.ns) - 1) * waves * hardware.ASSUMED.masked_step if config.product.masked else 0.0
        return joined.product(config.product, forward=False) + masks

    def dh_db_bytes(self, config: HopperDhDb) -> float:
        return self._of_dy(config).dh_db_bytes(config)

    def dh_db(self, config: HopperDhDb) -> float:
        return self._of_dy(config).dh_db(config)

    def dh_parts(self, config: HopperDhDb) -> float:
        return self._of_dy(config).dh_parts(config)

    def _of_dy(self, config: HopperDhDb) -> HopperModel:
        return self._joined(self._blocks(config.block_n) * config.block_n)

    def _chunks(self, config: HopperGroupDa) -> tuple[int, int]:
        columns = -(-self.cell.k // config.block_n)
        return chunk_of(self.cell.tokens, config.block_m, columns, self.machine.sm_count * config.ctas)

    def da_bytes(self, config: HopperGroupDa) -> float:
        """x once; each member's dh, words and parts."""
        c = self.cell
        words = c.tokens * c.k / 8 if config.masked else 0.0
        own = sum(2.0 * c.tokens * model.operand.columns + words for model in self.members)
        return 2.0 * c.tokens * c.k + own + self.da_parts(config)

    def da_parts(self, config: HopperGroupDa) -> float:
        return 4.0 * sum(config.ranks) * self.cell.k * self._chunks(config)[1]

    def da(self, config: HopperGroupDa) -> float:
        return read_seconds(max(self._da_reads(config), self._da_arithmetic(config)))

    def da_is_arithmetic(self, config: HopperGroupDa) -> bool:
        """Whether masking x and its products, not its bytes, are what da takes."""
        return self._da_arithmetic(config) > self._da_reads(config)

    def _da_programs(self, config: HopperGroupDa) -> int:
        return self._chunks(config)[1] * -(-self.cell.k // config.block_n)

    def _da_arithmetic(self, config: HopperGroupDa) -> float:
        """Masks and products, which no load hides: of the programs that share a multiprocessor, one after the other.

        8 warps take what 4 do: they share the units that mask.
        """
        if not config.masked:
            return 0.0
        assumed, multiprocessors = hardware.ASSUMED, self.machine.sm_count
        programs, tiles = self._da_programs(config), config.block_m * config.block_n / (64 * 128)
        together = min(config.ctas, -(-programs // multiprocessors))
        waves = -(-programs // (multiprocessors * together))
        one = self._chunks(config)[0] * len(self.cell.ns) * tiles * assumed.member_tile
        return waves * one * (together * assumed.member_pair if together > 1 else 1.0)

    def _da_reads(self, config: HopperGroupDa) -> float:
        machine, programs, chunk = self.machine, self._da_programs(config), self._chunks(config)[0]
        tile = 2 * config.block_m * (config.block_n + sum(config.ranks))
        chain = chain_seconds(machine, programs, chunk, tile, config.stages, hardware.ASSUMED.latency)
        moved = self.da_bytes(config) / (hardware.ASSUMED.masked_read if config.masked else 1.0)
        return max(memory_seconds(machine, moved, programs), chain)

    def sum_of_grads_bytes(self, plan: DxHopperGroup) -> float:
        joint, count = plan.dh_db, self._blocks(plan.dh_db.block_n)
        chunks = chunk_of(self.cell.tokens, joint.block_m, count, self.machine.sm_count * joint.ctas)[1]
        dbs = sum(4.0 * model.operand.rank * model.cell.n * chunks for model in self.members)
        return self.da_parts(plan.da) + dbs
