"""What a backward plan should take on a machine: ``model``'s rules for dh, db, dx and da."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .blocks import DaConfig, DhDbConfig, Machine, ShrinkConfig
from .cost import ASSUMED, Model, beside
from .plans import BackwardPlan, Cell, DxBaseFirst, DxFused, DxLoraFirst, Hidden

__all__ = ["BackwardModel", "backward_seconds"]


def backward_seconds(machine: Machine, cell: Cell, plan: BackwardPlan) -> float:
    """What ``plan`` should take for ``cell`` with dx, da and db due, in seconds."""
    model = BackwardModel(machine, cell)
    first, rest, dx = model.first(plan.hidden), model.rest(plan), model.dx(plan)
    if not plan.beside:
        return first + rest + dx
    if isinstance(plan, DxBaseFirst):
        base = model.turned.library(accumulate=False)
        return beside(base, first + rest) + dx - base
    return first + beside(dx, rest)


@dataclass(frozen=True, slots=True)
class BackwardModel:
    """The parts of backward plans, in seconds."""

    machine: Machine
    cell: Cell

    @property
    def turned(self) -> Model:
        """The products with dy: K and N have changed places."""
        return Model(self.machine, replace(self.cell, k=self.cell.n, n=self.cell.k))

    def hidden(self, way: Hidden) -> float:
        """dh and db."""
        return self.first(way) + self._db(way)

    def first(self, way: Hidden) -> float:
        """What dx waits for."""
        return self.dh_db(way.dh_db) if way.joint else self.dh(way.shrink)

    def rest(self, plan: BackwardPlan) -> float:
        """What waits for nobody but dh."""
        return self._db(plan.hidden) + self.da(plan.da)

    def _db(self, way: Hidden) -> float:
        return 0.0 if way.joint else self.outer(way.db, self.cell.n, dropout=False)

    def dh(self, config: ShrinkConfig) -> float:
        """One read of dy, and the sum of the parts."""
        plain = Model(self.machine, replace(self.turned.cell, dropout=False))
        return plain.shrink(config.block_m, config.splits) + self.sum_of(
            plain.hidden_bytes(config.splits), config.splits
        )

    def dh_db(self, config: DhDbConfig) -> float:
        c, model = self.cell, self.turned
        columns, chunks = -(-c.n // config.block_n), -(-c.tokens // config.chunk_m)
        reads = -(-c.r // config.block_r)
        parts = 4.0 * c.r * (c.tokens * columns + c.n * chunks)
        moved = reads * c.itemsize * c.tokens * c.n + parts
        return model.memory(moved, columns * chunks * reads) + ASSUMED.launch + self.sum_of(parts, 2)

    def da(self, config: DaConfig) -> float:
        return self.outer(config, self.cell.k, self.cell.dropout)

    def outer(self, config: DaConfig, columns: int, dropout: bool) -> float:
        """dhᵀ (x * D) and dyᵀ h: every block of columns walks the rows, or its share of them."""
        c, model = self.cell, Model(self.machine, replace(self.cell, dropout=dropout))
        blocks = -(-columns // config.block_k) * -(-c.r // config.block_r)
        programs = max(1, blocks * min(config.splits, -(-c.tokens // config.block_m)))
        moved = -(-c.r // config.block_r) * c.itemsize * c.tokens * columns + 4.0 * c.r * columns * config.splits
        busy = min(1.0, programs / self.machine.sm_count)
        from_l2 = model.l2(4.0 * c.tokens * config.block_r * blocks) / busy
        seconds = max(model.memory(moved, programs), model.mask(c.tokens * columns) / busy, from_l2)
        return seconds + ASSUMED.launch + self.sum_of(4.0 * c.r * columns * config.splits, config.splits)

    def sum_of(self, moved: float, parts: int) -> float:
        """The second stage: parts, which the L2 cache still holds, are read once."""
        return self.turned.l2(moved) + ASSUMED.launch if parts > 1 else 0.0

    def dx(self, plan: BackwardPlan) -> float:
        c, model = self.cell, self.turned
        mask = model.mask(c.tokens * c.k)
        if isinstance(plan, DxFused):
            g = plan.gemm
            efficiency = ASSUMED.pointer if plan.variant == "pointer" else ASSUMED.persistent
            step = 2 * -(-c.r // g.block_r) * g.block_r
            arithmetic = model.product(g.block_rows, g.block_columns, efficiency, step) + mask
            waves, tiles = model.waves(g.block_rows, g.block_columns), model.tiles(g.block_rows, g.block_columns)
            from_l2 = model.l2(model.hidden_bytes(1) * -(-c.k // g.block_columns))
            low_rank = waves * ASSUMED.low_rank_step + from_l2
            return max(arithmetic, model.memory(model.base_bytes(), tiles)) + low_rank + ASSUMED.launch
        first = isinstance(plan, DxLoraFirst)
        return model.library(accumulate=first) + max(model.expand(1, 1 if first else 2, early=False), mask)
