"""What a plan should take on a machine: bytes, flops and launches of each kernel, as ``bench``'s roofline counts them.

A kernel takes the longest of its products, its bytes from memory and its bytes from the L2 cache, and a launch. The
large product is computed in whole tiles by whole waves of multiprocessors. It is a model that ranks, for devices that
nobody has tuned on; ``ASSUMED`` is everything in it that was not counted, in one place.
"""

from __future__ import annotations

from dataclasses import dataclass

from .blocks import Machine
from .plans import Cell, FewTokens, ForwardPlan, Fused, LoraFirst

__all__ = ["ASSUMED", "Assumptions", "Model", "beside", "forward_seconds"]


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
    seconds = model.shrink(plan.shrink.block_m, parts)
    if isinstance(plan, Fused):
        return seconds + model.fused(plan, parts)
    if isinstance(plan, LoraFirst):
        return seconds + model.expand(parts, 1, plan.pdl) + model.library(accumulate=True)
    base, add = model.library(accumulate=False), model.expand(parts, 2, early=False)
    return (beside(base, seconds) if plan.beside else base + seconds) + add


def beside(left: float, right: float) -> float:
    """Two pieces on two streams, and what forking and joining them takes."""
    return left + right - ASSUMED.overlap * min(left, right) + ASSUMED.launch


@dataclass(frozen=True, slots=True)
class Model:
    """The parts that plans are made of, in seconds, for one cell on one machine."""

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

    def memory(self, moved: float, programs: float = float("inf")) -> float:
        """Seconds to move ``moved`` bytes; few programs cannot draw the whole bandwidth."""
        share = min(1.0, ASSUMED.multiprocessor * programs / self.machine.sm_count)
        return moved / (ASSUMED.memory * self.machine.bandwidth * share)

    def l2(self, moved: float) -> float:
        return self.memory(moved) / ASSUMED.l2

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
        return float(c.itemsize * (c.tokens * c.k + c.n * c.k + c.tokens * c.n))

    def hidden_bytes(self, parts: int) -> float:
        return 4.0 * self.cell.tokens * self.cell.r * parts

    def mask(self, elements: float) -> float:
        """Seconds of the arithmetic that draws the mask of ``elements``."""
        operations = _INTEGER_OPERATIONS_A_CYCLE * self.machine.sm_count * self.machine.clock
        return ASSUMED.philox * elements / operations if self.cell.dropout else 0.0

    def shrink(self, block_m: int, parts: int) -> float:
        c = self.cell
        programs = -(-c.tokens // block_m) * parts
        moved = c.itemsize * c.tokens * c.k + ASSUMED.adapter_bytes * c.r * c.k + self.hidden_bytes(parts)
        busy = min(1.0, programs / self.machine.sm_count)
        from_l2 = self.l2(ASSUMED.adapter_bytes * c.r * c.k * -(-c.tokens // block_m))
        return max(self.memory(moved, programs), self.mask(c.tokens * c.k) / busy, from_l2) + ASSUMED.launch

    def fused(self, plan: Fused, parts: int) -> float:
        g = plan.gemm
        efficiency = ASSUMED.pointer if plan.variant == "pointer" else ASSUMED.persistent
        step = 2 * -(-self.cell.r // g.block_r) * g.block_r
        arithmetic = self.product(g.block_rows, g.block_columns, efficiency, step)
        tiles = self.tiles(g.block_rows, g.block_columns)
        from_l2 = self.l2(self.hidden_bytes(parts) * -(-self.cell.n // g.block_columns))
        low_rank = self.waves(g.block_rows, g.block_columns) * ASSUMED.low_rank_step + from_l2
        launch = ASSUMED.early_launch if plan.pdl else ASSUMED.launch
        return max(arithmetic, self.memory(self.base_bytes(), tiles)) + low_rank + launch

    def library(self, accumulate: bool) -> float:
        """The library's product, with the tile that suits it best, as if it split K wherever that helps."""
        c = self.cell
        moved = self.base_bytes() + (c.itemsize * c.tokens * c.n if accumulate else 0)
        flops = min(self.product(rows, columns, 1.0) for rows, columns, _ in ASSUMED.tiles)
        split = 2.0 * c.tokens * c.n * c.k / (0.5 * self.rate)
        return max(min(flops, split), self.memory(moved)) + ASSUMED.launch

    def expand(self, parts: int, passes: int, early: bool) -> float:
        """``passes`` over y (written, or read and written)."""
        c = self.cell
        moved = passes * c.itemsize * c.tokens * c.n + self.hidden_bytes(parts)
        return self.memory(moved) + (ASSUMED.early_launch if early else ASSUMED.launch)

    def few_tokens(self, plan: FewTokens) -> float:
        c, config = self.cell, plan.config
        strips = -(-c.n // config.block_n)
        adapter = float(ASSUMED.adapter_bytes * c.r * c.k * strips)  # every strip reads all of A
        first = max(
            self.memory(self.base_bytes(), strips * plan.splits),
            self.l2(adapter + c.itemsize * (strips * c.tokens * c.k + c.n * c.k)),
            self.mask(strips * config.block_m * c.k),
        )
        first += ASSUMED.launch
        if plan.splits == 1:
            return first
        parts = 4.0 * plan.splits * c.tokens * (c.n + c.r)
        return first + 2 * self.l2(parts) + (ASSUMED.early_launch if plan.pdl else ASSUMED.launch)


def _tile_efficiency(rows: int, columns: int) -> float:
    """What the largest tile of the table that this one covers reaches."""
    return max((share for r, c, share in ASSUMED.tiles if r <= rows and c <= columns), default=0.2)
