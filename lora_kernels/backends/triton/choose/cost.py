"""What a plan should take on a machine: bytes, flops and launches of each kernel, as ``bench``'s roofline counts them.

A kernel takes the longest of its products, its bytes from memory, its bytes from the L2 cache and its chain of loads,
and a launch. The large product is computed in whole tiles by whole waves of multiprocessors. It is a model that ranks,
for devices that nobody has tuned on: its terms are counted, its constants (``hardware.ASSUMED``) were fitted on an
H100, and a GPU of the same generation inherits them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .... import traffic
from . import hardware
from .blocks import DhDbConfig, Machine, OuterConfig, ShrinkConfig
from .hardware import (
    Tile,
    chain_seconds,
    draw_seconds,
    flop_rate,
    idle_seconds,
    l2_seconds,
    launch_seconds,
    memory_seconds,
    read_seconds,
)
from .hopper_cost import hopper_seconds
from .plans import (
    GLUON_PLANS,
    BackwardPlan,
    Cell,
    DhDb,
    DxFused,
    FewTokens,
    ForwardPlan,
    Fused,
    GluonPlan,
    LoraFirst,
    Ring,
    RingGrads,
    Skinny,
)
from .ring import grads_seconds, ring_seconds

__all__ = [
    "BackwardModel",
    "Model",
    "SkinnyModel",
    "backward_seconds",
    "bytes_of_h",
    "forward_seconds",
]


def forward_seconds(machine: Machine, cell: Cell, plan: ForwardPlan | GluonPlan) -> float:
    """What ``plan`` should take for ``cell``, from the first kernel's launch to the last one's end, in seconds."""
    if isinstance(plan, GLUON_PLANS):
        return hopper_seconds(machine, cell, plan)
    model, skinny = Model(machine, cell), SkinnyModel(machine, cell.of_x)
    if isinstance(plan, Ring):
        return skinny.draw() + ring_seconds(machine, cell, plan)
    if isinstance(plan, FewTokens):
        return skinny.draw() + model.few_tokens(plan)
    parts = plan.shrink.splits
    drawn, seconds = skinny.draw(), skinny.shrink(plan.shrink)
    if isinstance(plan, Fused):
        return drawn + seconds + model.fused(plan, parts, plan.pdl)
    if isinstance(plan, LoraFirst):
        return drawn + seconds + model.expand(parts, 1, plan.pdl) + model.library(accumulate=True)
    base, add = model.library(accumulate=False), model.expand(parts, 2, early=False)
    return drawn + base + seconds - (model.hidden(base, seconds) if plan.beside else 0.0) + add


def backward_seconds(machine: Machine, cell: Cell, plan: BackwardPlan | RingGrads | GluonPlan) -> float:
    """What ``plan`` should take for ``cell`` with dx, da and db due, in seconds."""
    if isinstance(plan, GLUON_PLANS):
        return hopper_seconds(machine, cell, plan)
    if isinstance(plan, RingGrads):
        return grads_seconds(machine, cell, plan)
    model = BackwardModel(machine, cell)
    first, rest, dx = model.first(plan.hidden), model.rest(plan), model.dx(plan)
    return first + rest + dx + (hardware.ASSUMED.fork if plan.beside else 0.0)


@dataclass(frozen=True, slots=True)
class SkinnyModel:
    """The small products, in seconds, over one side's columns: x's, or dy's."""

    machine: Machine
    work: Skinny

    def draw(self) -> float:
        """The mask, packed, by a kernel of its own; nothing without dropout."""
        if not self.work.dropout:
            return 0.0
        arithmetic = draw_seconds(self.machine, self.work.tokens * self.work.columns)
        return max(arithmetic, memory_seconds(self.machine, self._mask_bytes())) + launch_seconds()

    def shrink(self, config: ShrinkConfig) -> float:
        """h or dh, in parts where it is split."""
        w, machine, parts = self.work, self.machine, config.splits
        blocks = -(-w.tokens // config.block_m)
        programs = blocks * parts * -(-w.r // config.block_r)
        steps = -(-w.columns // (config.block_k * parts))
        tile = (w.itemsize * config.block_m + hardware.ASSUMED.adapter_bytes * config.block_r) * config.block_k
        chain = chain_seconds(machine, programs, steps, tile, config.num_stages, hardware.ASSUMED.latency)
        from_l2 = l2_seconds(machine, hardware.ASSUMED.adapter_bytes * w.r * w.columns * blocks)
        memory = memory_seconds(machine, self.shrink_bytes(parts), programs)
        return read_seconds(max(memory, chain, from_l2))

    def shrink_bytes(self, parts: int) -> float:
        w = self.work
        read = w.itemsize * w.tokens * w.columns + hardware.ASSUMED.adapter_bytes * w.r * w.columns
        return read + bytes_of_h(w, parts) + self._mask_bytes()

    def summed(self, config: ShrinkConfig) -> float:
        """h or dh, and the sum of the parts."""
        return self.shrink(config) + self._sum_of(bytes_of_h(self.work, config.splits), config.splits)

    def outer(self, config: OuterConfig) -> float:
        """dhᵀ (x * D) or dyᵀ h: every block of columns walks the rows, or its share of them."""
        w, machine = self.work, self.machine
        splits = min(config.splits, -(-w.tokens // config.block_m))
        blocks = -(-w.columns // config.block_k) * -(-w.r // config.block_r)
        programs, parts = blocks * splits, self.outer_parts(config)
        steps = -(-w.tokens // (config.block_m * splits))
        tile = config.block_m * (w.itemsize * config.block_k + 4 * config.block_r)
        chain = chain_seconds(machine, programs, steps, tile, config.num_stages, hardware.ASSUMED.outer_latency)
        busy = min(1.0, programs / machine.sm_count)
        from_l2 = l2_seconds(machine, 4.0 * w.tokens * config.block_r * blocks) / busy
        seconds = max(memory_seconds(machine, self.outer_bytes(config), programs), chain, from_l2)
        return read_seconds(seconds) + self._sum_of(parts, config.splits)

    def outer_bytes(self, config: OuterConfig) -> float:
        w = self.work
        read = -(-w.r // config.block_r) * (w.itemsize * w.tokens * w.columns + self._mask_bytes())
        return read + self.outer_parts(config)

    def outer_parts(self, config: OuterConfig) -> float:
        """Bytes of the result, in parts where the rows are split."""
        return 4.0 * self.work.r * self.work.columns * config.splits

    def dh_db(self, config: DhDbConfig) -> float:
        """Both in one read of dy."""
        w = self.work
        columns, chunks = -(-w.columns // config.block_n), -(-w.tokens // config.chunk_m)
        programs = columns * chunks * -(-w.r // config.block_r)
        moved = self.dh_db_bytes(config) / hardware.ASSUMED.joint
        tile = config.block_m * (w.itemsize * config.block_n + 4 * config.block_r)
        steps = -(-min(config.chunk_m, w.tokens) // config.block_m)
        latency = hardware.ASSUMED.outer_latency
        chain = chain_seconds(self.machine, programs, steps, tile, config.num_stages, latency)
        seconds = max(memory_seconds(self.machine, moved, programs), chain)
        return read_seconds(seconds) + self._sum_of(self.dh_db_parts(config), 2)

    def dh_db_bytes(self, config: DhDbConfig) -> float:
        w = self.work
        return -(-w.r // config.block_r) * w.itemsize * w.tokens * w.columns + self.dh_db_parts(config)

    def dh_db_parts(self, config: DhDbConfig) -> float:
        """Bytes of the parts of dh and db."""
        w = self.work
        columns, chunks = -(-w.columns // config.block_n), -(-w.tokens // config.chunk_m)
        return 4.0 * w.r * (w.tokens * columns + w.columns * chunks)

    def both(self, way: DhDb) -> float:
        """dh and db."""
        return self.dh_db(way.dh_db) if way.joint else self.summed(way.shrink) + self.outer(way.db)

    def _mask_bytes(self) -> float:
        """A bit an element."""
        return self.work.tokens * self.work.columns / 8 if self.work.dropout else 0.0

    def _sum_of(self, moved: float, parts: int) -> float:
        """The second stage: parts, which the L2 cache still holds, are read once."""
        return l2_seconds(self.machine, moved) + launch_seconds() if parts > 1 else 0.0


def bytes_of_h(work: Cell | Skinny, parts: int) -> float:
    """h or dh, in so many parts."""
    return 4.0 * work.tokens * work.r * parts


@dataclass(frozen=True, slots=True)
class Model:
    """The large product and what follows it, in seconds, for one cell on one machine."""

    machine: Machine
    cell: Cell

    @property
    def rate(self) -> float:
        """Flop/s of the library's large product."""
        return flop_rate(self.machine, self.cell.itemsize, self.cell.tf32)

    def product(self, rows: int, columns: int, efficiency: float, extra: float = 0.0) -> float:
        """Seconds of arithmetic of y's tiles; ``extra`` more steps of K."""
        flops = 2.0 * rows * columns * self.machine.sm_count * (self.cell.k + extra)
        return self.waves(rows, columns) * flops / (self.rate * efficiency)

    def waves(self, rows: int, columns: int) -> int:
        return -(-self.tiles(rows, columns) // self.machine.sm_count)

    def tiles(self, rows: int, columns: int) -> int:
        return -(-self.cell.tokens // rows) * -(-self.cell.n // columns)

    def base_bytes(self) -> float:
        c = self.cell
        return float(traffic.large(c.tokens, c.k, c.n, c.itemsize))

    def library_bytes(self, accumulate: bool) -> float:
        c = self.cell
        return self.base_bytes() + (c.itemsize * c.tokens * c.n if accumulate else 0)

    def expand_bytes(self, parts: int, passes: int) -> float:
        """``passes`` over y (written, or read and written)."""
        c = self.cell
        return passes * c.itemsize * c.tokens * c.n + bytes_of_h(c, parts)

    def few_tokens_bytes(self, splits: int) -> float:
        """What the splits of K hand to the second stage."""
        return 4.0 * splits * self.cell.tokens * (self.cell.n + self.cell.r)

    def fused(self, plan: Fused | DxFused, parts: int, early: bool) -> float:
        """The product that takes the low-rank term."""
        g, c, assumed = plan.gemm, self.cell, hardware.ASSUMED
        forward = isinstance(plan, Fused)
        efficiency = _tile_efficiency(g.block_rows, g.block_columns, plan.variant if forward else f"dx_{plan.variant}")
        step = 2 * -(-c.r // g.block_r) * g.block_r
        arithmetic = self.product(g.block_rows, g.block_columns, efficiency, step)
        tiles, waves = self.tiles(g.block_rows, g.block_columns), self.waves(g.block_rows, g.block_columns)
        from_l2 = l2_seconds(self.machine, bytes_of_h(c, parts) * -(-c.n // g.block_columns))
        masked = assumed.masked_step if c.dropout and not forward else 0.0
        low_rank = waves * (masked + (assumed.low_rank_step if forward else assumed.dx_low_rank_step)) + from_l2
        steps = waves * -(-c.k // g.block_sum)
        chain = chain_seconds(self.machine, 1, steps, 0.0, g.num_stages, assumed.latency)  # L2 has most of its bytes
        memory = memory_seconds(self.machine, self.base_bytes(), tiles)
        return max(arithmetic, memory, chain) + low_rank + assumed.ramp + launch_seconds(early)

    def library(self, accumulate: bool) -> float:
        """The library's product, with the tile that suits it best, as if it split K wherever that helps.

        What it accumulates onto is read in the epilogues, which the next tile's loads hide but in the last wave.
        """
        c, assumed = self.cell, hardware.ASSUMED
        tile = self._library_tile()
        flops = self.product(tile.rows, tile.columns, tile.library)
        late = c.itemsize * c.tokens * c.n / self.waves(tile.rows, tile.columns) if accumulate else 0.0
        split = 2.0 * c.tokens * c.n * c.k / (0.5 * self.rate)
        memory = memory_seconds(self.machine, self.library_bytes(accumulate))
        return max(min(flops, split), memory) + memory_seconds(self.machine, late) + assumed.ramp + assumed.launch

    def _library_tile(self) -> Tile:
        return min(hardware.ASSUMED.tiles, key=lambda t: self.product(t.rows, t.columns, t.library))

    def hidden(self, base: float, rest: float) -> float:
        """Of ``rest`` on a second stream, what runs where the library's last wave leaves multiprocessors idle."""
        t = self._library_tile()
        waves = self.waves(t.rows, t.columns)
        idle = idle_seconds(self.machine, self.tiles(t.rows, t.columns), waves, base, rest)
        return hardware.ASSUMED.overlap * idle - hardware.ASSUMED.fork

    def expand(self, parts: int, passes: int, early: bool) -> float:
        return memory_seconds(self.machine, self.expand_bytes(parts, passes)) + launch_seconds(early)

    def few_tokens(self, plan: FewTokens) -> float:
        c, config, machine, assumed = self.cell, plan.config, self.machine, hardware.ASSUMED
        strips = -(-c.n // config.block_n)
        adapter = float(assumed.adapter_bytes * c.r * c.k * strips)  # every strip reads all of A
        tile = (
            c.itemsize * (config.block_n + config.block_m) + assumed.adapter_bytes * config.block_r
        ) * config.block_k
        steps = -(-c.k // (config.block_k * plan.splits))
        first = max(
            memory_seconds(machine, self.base_bytes(), strips * plan.splits),
            l2_seconds(machine, adapter + c.itemsize * (strips * c.tokens * c.k + c.n * c.k)),
            chain_seconds(machine, strips * plan.splits, steps, tile, config.num_stages, assumed.latency),
        )
        first += assumed.ramp + launch_seconds()
        if plan.splits == 1:
            return first
        parts = self.few_tokens_bytes(plan.splits)
        return first + 2 * l2_seconds(machine, parts) + launch_seconds(plan.pdl)


@dataclass(frozen=True, slots=True)
class BackwardModel:
    """What backward plans are made of, in seconds."""

    machine: Machine
    cell: Cell

    @property
    def turned(self) -> Model:
        """The product with dy: K and N have changed places."""
        return Model(self.machine, replace(self.cell, k=self.cell.n, n=self.cell.k))

    @property
    def of_dy(self) -> SkinnyModel:
        return SkinnyModel(self.machine, self.cell.of_dy)

    def first(self, way: DhDb) -> float:
        """What dx waits for."""
        return self.of_dy.dh_db(way.dh_db) if way.joint else self.of_dy.summed(way.shrink)

    def rest(self, plan: BackwardPlan) -> float:
        """What waits for nobody but dh."""
        db = 0.0 if plan.hidden.joint else self.of_dy.outer(plan.hidden.db)
        return db + SkinnyModel(self.machine, self.cell.of_x).outer(plan.da)

    def dx(self, plan: BackwardPlan) -> float:
        """dx, once dh is there."""
        c, model = self.cell, self.turned
        if isinstance(plan, DxFused):
            return model.fused(plan, 1, early=False)
        mask = c.tokens * c.k / 8 if c.dropout else 0.0
        moved = (model.expand_bytes(1, 1) + mask) / hardware.ASSUMED.dx_expand
        return memory_seconds(self.machine, moved) + launch_seconds() + model.library(accumulate=True)


def _tile_efficiency(rows: int, columns: int, kernel: str) -> float:
    """What the largest tile of the table that this one covers reaches."""
    tiles = (t for t in hardware.ASSUMED.tiles if t.rows <= rows and t.columns <= columns)
    return max((getattr(tile, kernel) for tile in tiles), default=0.2)
