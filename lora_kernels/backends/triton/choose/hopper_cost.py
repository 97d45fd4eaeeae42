"""What the Gluon plans should take: the same terms as ``cost``'s, for kernels that walk the tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .... import traffic
from . import hardware
from .blocks import Machine
from .hardware import chain_seconds, draw_seconds, flop_rate, idle_seconds, launch_seconds, memory_seconds, read_seconds
from .hidden_operand import HiddenOperand, hidden_operand
from .hopper_blocks import (
    HopperDhDb,
    HopperOuter,
    HopperPlainShrink,
    HopperProduct,
    HopperProductH,
    HopperShrink,
    chunk_of,
    shrink_configs,
)
from .plans import Cell, DxHopper, DxInside, GluonPlan, Hopper, HopperInside

__all__ = ["HopperModel", "hopper_seconds"]


def hopper_seconds(machine: Machine, cell: Cell, plan: GluonPlan) -> float:
    """What ``plan`` should take for ``cell``, from the first kernel's launch to the last one's end, in seconds."""
    model = HopperModel(machine, cell)
    if isinstance(plan, Hopper):
        return model.pack() + model.shrink(plan.shrink) + model.product(plan.product, forward=True)
    if isinstance(plan, HopperInside):
        return model.pack() + model.inside(plan.product, forward=True)
    if isinstance(plan, DxHopper):
        first = model.pack() + model.dh_db(plan.dh_db) + model.sum_of_dh(plan.dh_db)
        large, rest = model.product(plan.dx, forward=False), model.outer(plan.da, cell.k) + model.sum_of_grads(plan)
        return first + (model.beside(plan.dx, large, rest) if plan.beside else large + rest)
    large, db = model.inside(plan.dx, forward=False), model.outer(plan.db, cell.n)
    large = model.beside(plan.dx, large, db) if plan.beside else large + db
    return model.pack() + large + model.outer(plan.da, cell.k) + model.sum_of_grads(plan)


@dataclass(frozen=True, slots=True)
class HopperModel:
    """The Gluon kernels, in seconds, for one cell on one machine."""

    machine: Machine
    cell: Cell

    @property
    def operand(self) -> HiddenOperand:
        found = hidden_operand(getattr(torch, self.cell.dtype), self.cell.r)
        assert found is not None, "candidates.fits says so before"
        return found

    def pack_bytes(self) -> float:
        """A and B read, their operands written."""
        c = self.cell
        return (hardware.ASSUMED.adapter_bytes * c.r + 2 * self.operand.adapter_columns) * (c.k + c.n)

    def pack(self) -> float:
        return memory_seconds(self.machine, self.pack_bytes()) + launch_seconds()

    def shrink_bytes(self) -> float:
        """x and A's operand read; h's operand and, with dropout, the mask's words written."""
        c, operand = self.cell, self.operand
        words = c.tokens * c.k / 8 if c.dropout else 0.0
        return 2 * c.tokens * c.k + 2 * operand.adapter_columns * c.k + 2 * c.tokens * operand.columns + words

    def shrink(self, config: HopperShrink | HopperPlainShrink) -> float:
        c, machine = self.cell, self.machine
        blocks = -(-c.tokens // config.block_m)
        splits = 1 if isinstance(config, HopperPlainShrink) else config.splits(c.tokens, c.k, machine.sm_count)
        steps = -(-c.k // (config.block_k * splits))
        tile = 2 * (config.block_m + config.rank) * config.block_k
        chain = chain_seconds(machine, blocks * splits, steps, tile, config.stages, hardware.ASSUMED.latency)
        parts = 8.0 * c.tokens * config.rank * splits if splits > 1 else 0.0
        seconds = max(memory_seconds(machine, self.shrink_bytes() + parts, blocks * splits), chain)
        if c.dropout:
            seconds += draw_seconds(machine, c.tokens * c.k) + steps * hardware.ASSUMED.draw_step
        return read_seconds(seconds)

    def product_bytes(self, config: HopperProduct | HopperProductH) -> float:
        """x, W, y; and h's halves, which meet in fp32, where it is formed inside."""
        c = self.cell
        exact = isinstance(config, HopperProductH) and config.exact
        halves = 16.0 * c.tokens * config.rank if isinstance(config, HopperProductH) and exact else 0.0
        return float(traffic.large(c.tokens, c.k, c.n, c.itemsize)) + halves

    def product(self, config: HopperProduct, forward: bool) -> float:
        """y or dx with the low-rank term as more steps of K, masked where there is a mask."""
        masked = hardware.ASSUMED.masked_step if config.masked else 0.0
        return self._tiles(config, forward, 1.0, masked)

    def inside(self, config: HopperProductH, forward: bool) -> float:
        """The same with h or dh, formed by the tiles of the first two columns alone.

        What was measured rounds each half of h; ``exact``, whose halves meet in fp32, is that and its bytes.
        """
        columns = self.cell.n if forward else self.cell.k
        share = min(1.0, 2 / -(-columns // config.block_n))
        halves = 16.0 * self.cell.tokens * config.rank if config.exact else 0.0
        large = self._tiles(config, forward, 1.0 + hardware.ASSUMED.inside * share, 0.0)
        return large + memory_seconds(self.machine, halves)

    def waves(self, config: HopperProduct | HopperProductH, forward: bool) -> tuple[int, int]:
        """Tiles of y or dx, and how often every multiprocessor takes one."""
        columns = self.cell.n if forward else self.cell.k
        tiles = -(-self.cell.tokens // config.block_m) * -(-columns // config.block_n)
        return tiles, -(-tiles // self.machine.sm_count)

    def _tiles(self, g: HopperProduct | HopperProductH, forward: bool, factor: float, masked: float) -> float:
        c, machine, assumed = self.cell, self.machine, hardware.ASSUMED
        summed = c.k if forward else c.n
        tiles, waves = self.waves(g, forward)
        efficiency = assumed.gluon if g.block_n >= 256 else assumed.gluon_narrow
        flops = 2.0 * g.block_m * g.block_n * machine.sm_count * (summed + self.operand.adapter_columns)
        arithmetic = waves * (
            factor * flops / (flop_rate(machine, 2, False) * efficiency) + assumed.gluon_step + masked
        )
        steps = waves * -(-summed // g.block_k)
        chain = chain_seconds(machine, 1, steps, 0.0, g.stages, assumed.latency)  # the L2 cache has most of its bytes
        memory = memory_seconds(machine, self.product_bytes(g), tiles)
        return max(arithmetic, memory, chain) + assumed.ramp + launch_seconds()

    def dh_db_bytes(self, config: HopperDhDb) -> float:
        c = self.cell
        _, count = self._chunks(config)
        columns = -(-c.n // config.block_n)
        parts = 4.0 * config.rank * (c.tokens * columns + c.n * count)
        return 2.0 * c.tokens * (c.n + columns * config.rank) + parts

    def _chunks(self, config: HopperDhDb | HopperOuter, columns: int | None = None) -> tuple[int, int]:
        count = -(-(columns or self.cell.n) // config.block_n)
        return chunk_of(self.cell.tokens, config.block_m, count, self.machine.sm_count * config.ctas)

    def dh_db(self, config: HopperDhDb) -> float:
        c, machine = self.cell, self.machine
        chunk, count = self._chunks(config)
        programs = count * -(-c.n // config.block_n)
        tile = 2 * config.block_m * (config.block_n + config.rank)
        chain = chain_seconds(machine, programs, chunk, tile, config.stages, hardware.ASSUMED.latency)
        moved = self.dh_db_bytes(config) / hardware.ASSUMED.joint
        return read_seconds(max(memory_seconds(machine, moved, programs), chain))

    def dh_parts(self, config: HopperDhDb) -> float:
        """Bytes of dh's parts, one for each block of columns."""
        return 4.0 * self.cell.tokens * config.rank * -(-self.cell.n // config.block_n)

    def sum_of_dh(self, config: HopperDhDb) -> float:
        return memory_seconds(self.machine, self.dh_parts(config)) + launch_seconds()

    def outer_bytes(self, config: HopperOuter, columns: int) -> float:
        """x or dy, dh or h, the mask's words; and the parts."""
        c = self.cell
        words = c.tokens * columns / 8 if config.masked else 0.0
        return 2.0 * c.tokens * (columns + self.operand.columns) + words + self.grad_parts(config, columns)

    def grad_parts(self, config: HopperOuter | HopperDhDb, columns: int) -> float:
        """Bytes of the parts of da or db."""
        return 4.0 * config.rank * columns * self._chunks(config, columns)[1]

    def outer(self, config: HopperOuter, columns: int) -> float:
        machine = self.machine
        chunk, count = self._chunks(config, columns)
        programs = count * -(-columns // config.block_n)
        tile = 2 * config.block_m * (config.block_n + config.rank)
        chain = chain_seconds(machine, programs, chunk, tile, config.stages, hardware.ASSUMED.latency)
        share = hardware.ASSUMED.masked_read if config.masked else 1.0
        moved = self.outer_bytes(config, columns) / share
        return read_seconds(max(memory_seconds(machine, moved, programs), chain))

    def sum_of_grads_bytes(self, plan: DxHopper | DxInside) -> float:
        db = plan.dh_db if isinstance(plan, DxHopper) else plan.db
        return self.grad_parts(plan.da, self.cell.k) + self.grad_parts(db, self.cell.n)

    def sum_of_grads(self, plan: DxHopper | DxInside) -> float:
        return memory_seconds(self.machine, self.sum_of_grads_bytes(plan)) + launch_seconds()

    def beside(
        self, large: HopperProduct | HopperProductH, seconds: float, rest: float, share: float | None = None
    ) -> float:
        """``rest`` on a second stream: it runs where the product's last wave leaves multiprocessors idle.

        ``share`` is ``idle_seconds``'s. A profiler's time of ``rest`` counts from that wave on, and is not its cost: of
        2048 tokens on an H200 da took 52.8 us beside a dx of 91.3 in two waves, so 7 us after it.
        """
        tiles, waves = self.waves(large, forward=False)
        saved = idle_seconds(self.machine, tiles, waves, seconds, rest, share)
        return seconds + rest + hardware.ASSUMED.fork - saved

    def dx_alone(self, plan: GluonPlan) -> tuple[int, float]:
        """Launches and seconds where neither da nor db is due: dh by a shrink of its own, if dx does not form it."""
        if isinstance(plan, DxInside):
            return 2, self.pack() + self.inside(plan.dx, forward=False)
        assert isinstance(plan, DxHopper)
        c = self.cell
        turned = HopperModel(self.machine, replace(c, k=c.n, n=c.k, dropout=False))
        config = shrink_configs(self.operand.rank, c.dtype == "float16")[0]
        return 3, self.pack() + turned.shrink(config) + self.product(plan.dx, forward=False)
