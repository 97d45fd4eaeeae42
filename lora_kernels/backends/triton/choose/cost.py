"""What a plan should take on a machine: bytes, flops and launches of each kernel, as ``bench``'s roofline counts them.

A kernel takes the longest of its products, its bytes from memory and its bytes from the L2 cache, and a launch. The
large product is computed in whole tiles by whole waves of multiprocessors. It is a model that ranks, for devices that
nobody has tuned on; ``ASSUMED`` is everything in it that was not counted, in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .... import traffic
from .blocks import DhDbConfig, Machine, OuterConfig, ShrinkConfig
from .plans import (
    BackwardPlan,
    Cell,
    DhDb,
    DxBaseFirst,
    DxFused,
    DxLoraFirst,
    FewTokens,
    ForwardPlan,
    Fused,
    LoraFirst,
    Skinny,
)

__all__ = [
    "ASSUMED",
    "Assumptions",
    "BackwardModel",
    "Model",
    "SkinnyModel",
    "backward_seconds",
    "bytes_of_h",
    "forward_seconds",
]


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Assumed, until a GPU run measures them.

    Attributes:
        library: share of the tensor cores' peak that the library's large product reaches.
        pointer, persistent: what the variants of the fused product reach of the library's.
        tiles: what a tile reaches of the best one, by its rows and columns.
        memory: share of the data sheet's bandwidth that a kernel reaches; ``l2`` times that from the L2 cache.
        multiprocessor: how many times its even share of the bandwidth one multiprocessor can draw.
        launch, early_launch: seconds that a launch costs, in order and by programmatic dependent launch.
        overlap: share of the shorter of two pieces that a second stream hides: none, until a clock says otherwise.
        low_rank_step: seconds that one wave of tiles waits for h and B.
        philox: 32-bit operations that drawing and applying the mask takes an element.
        adapter_bytes: bytes of an element of lora_a and lora_b: fp32 over a 16-bit base is the default.
    """

    library: float = 0.71
    pointer: float = 0.85
    persistent: float = 0.93
    tiles: tuple[tuple[int, int, float], ...] = (
        (128, 256, 1.0),
        (128, 128, 0.85),
        (64, 256, 0.85),
        (64, 128, 0.70),
        (64, 64, 0.50),
        (32, 64, 0.30),
    )
    memory: float = 0.88
    l2: float = 2.0
    multiprocessor: float = 2.0
    launch: float = 2e-6
    early_launch: float = 0.7e-6
    overlap: float = 0.0
    low_rank_step: float = 1e-6
    philox: float = 12.0
    adapter_bytes: int = 4


ASSUMED = Assumptions()

# Flops of 16-bit products with fp32 sums, a multiprocessor and cycle, by compute capability (data sheets, dense); TF32
# has half. fp32 on the plain units: 128, or 64 before 8.6 and 10.0's 128, multiply-adds.
_FLOPS_A_CYCLE = ((100, 8192), (90, 4096), (86, 1024), (80, 2048))
_INTEGER_OPERATIONS_A_CYCLE = 64


def forward_seconds(machine: Machine, cell: Cell, plan: ForwardPlan) -> float:
    """What ``plan`` should take for ``cell``, from the first kernel's launch to the last one's end, in seconds."""
    model = Model(machine, cell)
    if isinstance(plan, FewTokens):
        return model.few_tokens(plan)
    parts = plan.shrink.splits
    seconds = SkinnyModel(machine, cell.of_x).shrink(plan.shrink)
    if isinstance(plan, Fused):
        return seconds + model.fused(plan, parts, plan.pdl)
    if isinstance(plan, LoraFirst):
        return seconds + model.expand(parts, 1, plan.pdl) + model.library(accumulate=True)
    base, add = model.library(accumulate=False), model.expand(parts, 2, early=False)
    return (_on_two_streams(base, seconds) if plan.beside else base + seconds) + add


def backward_seconds(machine: Machine, cell: Cell, plan: BackwardPlan) -> float:
    """What ``plan`` should take for ``cell`` with dx, da and db due, in seconds."""
    model = BackwardModel(machine, cell)
    first, rest, dx = model.first(plan.hidden), model.rest(plan), model.dx(plan)
    if not plan.beside:
        return first + rest + dx
    if isinstance(plan, DxBaseFirst):
        base = model.turned.library(accumulate=False)
        return _on_two_streams(base, first + rest) + dx - base
    return first + _on_two_streams(dx, rest)


def _on_two_streams(left: float, right: float) -> float:
    """Two pieces, and what forking and joining the streams takes."""
    return left + right - ASSUMED.overlap * min(left, right) + ASSUMED.launch


def _memory(machine: Machine, moved: float, programs: float = float("inf")) -> float:
    """Seconds to move ``moved`` bytes; few programs cannot draw the whole bandwidth."""
    share = min(1.0, ASSUMED.multiprocessor * programs / machine.sm_count)
    return moved / (ASSUMED.memory * machine.bandwidth * share)


def _l2(machine: Machine, moved: float) -> float:
    return _memory(machine, moved) / ASSUMED.l2


def _mask(machine: Machine, elements: float) -> float:
    """Seconds of the arithmetic that draws the mask of ``elements``."""
    return ASSUMED.philox * elements / (_INTEGER_OPERATIONS_A_CYCLE * machine.sm_count * machine.clock)


@dataclass(frozen=True, slots=True)
class SkinnyModel:
    """The small products, in seconds, over one side's columns: x's, or dy's."""

    machine: Machine
    work: Skinny

    def shrink(self, config: ShrinkConfig) -> float:
        """h or dh, in parts where it is split."""
        w, machine, parts = self.work, self.machine, config.splits
        blocks = -(-w.tokens // config.block_m)
        programs = blocks * parts
        moved = self.shrink_bytes(parts)
        busy = min(1.0, programs / machine.sm_count)
        from_l2 = _l2(machine, ASSUMED.adapter_bytes * w.r * w.columns * blocks)
        return max(_memory(machine, moved, programs), self._mask() / busy, from_l2) + ASSUMED.launch

    def shrink_bytes(self, parts: int) -> float:
        w = self.work
        read = w.itemsize * w.tokens * w.columns + ASSUMED.adapter_bytes * w.r * w.columns
        return read + bytes_of_h(w, parts)

    def summed(self, config: ShrinkConfig) -> float:
        """h or dh, and the sum of the parts."""
        return self.shrink(config) + self._sum_of(bytes_of_h(self.work, config.splits), config.splits)

    def outer(self, config: OuterConfig) -> float:
        """dhᵀ (x * D) or dyᵀ h: every block of columns walks the rows, or its share of them."""
        w, machine = self.work, self.machine
        blocks = -(-w.columns // config.block_k) * -(-w.r // config.block_r)
        programs = max(1, blocks * min(config.splits, -(-w.tokens // config.block_m)))
        parts, moved = self.outer_parts(config), self.outer_bytes(config)
        busy = min(1.0, programs / machine.sm_count)
        from_l2 = _l2(machine, 4.0 * w.tokens * config.block_r * blocks) / busy
        seconds = max(_memory(machine, moved, programs), self._mask() / busy, from_l2)
        return seconds + ASSUMED.launch + self._sum_of(parts, config.splits)

    def outer_bytes(self, config: OuterConfig) -> float:
        w = self.work
        return -(-w.r // config.block_r) * w.itemsize * w.tokens * w.columns + self.outer_parts(config)

    def outer_parts(self, config: OuterConfig) -> float:
        """Bytes of the result, in parts where the rows are split."""
        return 4.0 * self.work.r * self.work.columns * config.splits

    def dh_db(self, config: DhDbConfig) -> float:
        """Both in one read of dy."""
        w = self.work
        columns, chunks = -(-w.columns // config.block_n), -(-w.tokens // config.chunk_m)
        reads = -(-w.r // config.block_r)
        parts, moved = self.dh_db_parts(config), self.dh_db_bytes(config)
        return _memory(self.machine, moved, columns * chunks * reads) + ASSUMED.launch + self._sum_of(parts, 2)

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

    def _mask(self) -> float:
        return _mask(self.machine, self.work.tokens * self.work.columns) if self.work.dropout else 0.0

    def _sum_of(self, moved: float, parts: int) -> float:
        """The second stage: parts, which the L2 cache still holds, are read once."""
        return _l2(self.machine, moved) + ASSUMED.launch if parts > 1 else 0.0


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
        machine, cell = self.machine, self.cell
        flops = next((flops for capability, flops in _FLOPS_A_CYCLE if machine.capability >= capability), 1024)
        if cell.itemsize == 4:
            flops = flops // 2 if cell.tf32 else (128 if machine.capability == 80 else 256)
        return ASSUMED.library * flops * machine.sm_count * machine.clock

    def product(self, rows: int, columns: int, efficiency: float, extra: float = 0.0) -> float:
        """Seconds of arithmetic of y's tiles; ``extra`` more steps of K."""
        c = self.cell
        waves = self.waves(rows, columns)
        flops = 2.0 * rows * columns * self.machine.sm_count * (c.k + extra)
        return waves * flops / (self.rate * efficiency * _tile_efficiency(rows, columns))

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

    def fused(self, plan: Fused | DxFused, parts: int, early: bool, mask: float = 0.0) -> float:
        """The product that takes the low-rank term; ``mask``: seconds of arithmetic that its epilogue adds."""
        g = plan.gemm
        efficiency = ASSUMED.pointer if plan.variant == "pointer" else ASSUMED.persistent
        step = 2 * -(-self.cell.r // g.block_r) * g.block_r
        arithmetic = self.product(g.block_rows, g.block_columns, efficiency, step) + mask
        tiles, waves = self.tiles(g.block_rows, g.block_columns), self.waves(g.block_rows, g.block_columns)
        from_l2 = _l2(self.machine, bytes_of_h(self.cell, parts) * -(-self.cell.n // g.block_columns))
        low_rank = waves * ASSUMED.low_rank_step + from_l2
        return max(arithmetic, _memory(self.machine, self.base_bytes(), tiles)) + low_rank + _launch(early)

    def library(self, accumulate: bool) -> float:
        """The library's product, with the tile that suits it best, as if it split K wherever that helps."""
        c = self.cell
        moved = self.library_bytes(accumulate)
        flops = min(self.product(rows, columns, 1.0) for rows, columns, _ in ASSUMED.tiles)
        split = 2.0 * c.tokens * c.n * c.k / (0.5 * self.rate)
        return max(min(flops, split), _memory(self.machine, moved)) + ASSUMED.launch

    def expand(self, parts: int, passes: int, early: bool) -> float:
        return _memory(self.machine, self.expand_bytes(parts, passes)) + _launch(early)

    def few_tokens(self, plan: FewTokens) -> float:
        c, config, machine = self.cell, plan.config, self.machine
        strips = -(-c.n // config.block_n)
        adapter = float(ASSUMED.adapter_bytes * c.r * c.k * strips)  # every strip reads all of A
        first = max(
            _memory(machine, self.base_bytes(), strips * plan.splits),
            _l2(machine, adapter + c.itemsize * (strips * c.tokens * c.k + c.n * c.k)),
            _mask(machine, strips * config.block_m * c.k) if c.dropout else 0.0,
        )
        first += ASSUMED.launch
        if plan.splits == 1:
            return first
        parts = self.few_tokens_bytes(plan.splits)
        return first + 2 * _l2(machine, parts) + _launch(plan.pdl)


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
        mask = _mask(self.machine, c.tokens * c.k) if c.dropout else 0.0
        if isinstance(plan, DxFused):
            return model.fused(plan, 1, early=False, mask=mask)
        first = isinstance(plan, DxLoraFirst)
        return model.library(accumulate=first) + max(model.expand(1, 1 if first else 2, early=False), mask)


def _launch(early: bool) -> float:
    return ASSUMED.early_launch if early else ASSUMED.launch


def _tile_efficiency(rows: int, columns: int) -> float:
    """What the largest tile of the table that this one covers reaches."""
    return max((share for r, c, share in ASSUMED.tiles if r <= rows and c <= columns), default=0.2)
