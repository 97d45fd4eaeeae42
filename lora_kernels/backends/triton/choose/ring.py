"""The kernels for few tokens in CUDA C++ (``csrc/cuda/few_tokens*.cuh``): configurations, what they take and cost.

Of forward three were measured on an H100 (few_tokens.log) and are the quick ones: ``rg1x16d3`` and ``rg1x8d2`` stream
W through rings in registers, ``cp2x8d2`` through shared memory. Backward has been on no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .... import nvrtc, traffic
from .blocks import FEW_TOKENS, Machine
from .hardware import launch_seconds, memory_seconds

if TYPE_CHECKING:
    from .plans import Cell, Ring, RingGrads

__all__ = [
    "CHUNK",
    "CONFIGS",
    "GRAD_COLUMNS",
    "GRAD_HEADERS",
    "GRAD_THREADS",
    "HEADERS",
    "LAST_COLUMNS",
    "LEAST_CHUNKS",
    "MAX_PRODUCERS",
    "RANK",
    "WORKSPACE_BYTES",
    "RingConfig",
    "grad_defines",
    "grad_shared_memory",
    "grads_bytes",
    "grads_fit",
    "grads_seconds",
    "grads_ways",
    "ring_fault",
    "ring_fits",
    "ring_seconds",
    "ring_ways",
]

HEADERS = ("few_tokens_device.cuh", "few_tokens.cuh")
GRAD_HEADERS = ("few_tokens_device.cuh", "few_tokens_grads.cuh")
# Columns of K that a warp loads at once, and how many of them the smallest block needs; the largest rank; the most
# blocks that form h.
CHUNK, LEAST_CHUNKS, RANK, MAX_PRODUCERS = 64, 8, 64, 32
WORKSPACE_BYTES = 1024 + MAX_PRODUCERS * FEW_TOKENS * RANK * 4
_HELPERS = 4
# Of backward: threads of a block and its warps, the columns of a strip of dx and of a block of the second launch.
GRAD_THREADS, _GRAD_WARPS, GRAD_COLUMNS, LAST_COLUMNS, _GRAD_ROWS = 256, 8, 64, 32, 64


@dataclass(frozen=True, slots=True)
class RingConfig:
    """16 ``row_tiles`` rows of W a tile, ``warps`` that stream them, rings of ``depth`` chunks (``depth_wide`` for more
    than 8 tokens), with ``copies`` in shared memory, else in registers."""

    name: str
    row_tiles: int
    warps: int
    depth: int
    depth_wide: int
    copies: bool

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles

    @property
    def threads(self) -> int:
        return 32 * (self.warps + _HELPERS)

    def shared_memory(self, tokens: int) -> int:
        """Bytes of a block: as ``Config`` in few_tokens.cuh counts them."""
        tiles = _token_tiles(tokens)
        depth = self.depth if tiles == 1 else self.depth_wide
        sums = 8 * tiles * (self.rows + 4)
        ring = self.warps * depth * 512 * (4 * self.row_tiles + 2 * tiles) if self.copies else 0
        body = max(ring + 8 * self.warps * sums, (self.warps + _HELPERS) * 8 * tiles * 80)
        last = body + 8 * tiles * RANK * 4 + self.rows * (RANK + 1) * 4 + 4 * sums
        return -(-last // 16) * 16 + 16

    def blocks(self, machine: Machine, tokens: int) -> int:
        """Blocks that a multiprocessor holds: what registers were limited to, and shared memory has room for."""
        two = self.row_tiles == 1 and self.warps == 8 and tokens <= 8
        return 2 if two and 2 * (self.shared_memory(tokens) + 1024) <= machine.shared_memory else 1

    def defines(self, tokens: int, ragged: bool) -> dict[str, int]:
        """What few_tokens_forward_entry.cuh is compiled with."""
        tiles = _token_tiles(tokens)
        return {
            "LORA_TILES": self.row_tiles,
            "LORA_TOKENS": tiles,
            "LORA_WARPS": self.warps,
            "LORA_DEPTH": self.depth if tiles == 1 else self.depth_wide,
            "LORA_LOAD": int(not self.copies),
            "LORA_RAGGED": int(ragged),
            "LORA_SHARED_BYTES": self.shared_memory(tokens),
            "LORA_THREADS": self.threads,
        }


CONFIGS = (
    RingConfig("rg1x16d3", 1, 16, 3, 2, False),
    RingConfig("rg1x8d2", 1, 8, 2, 2, False),
    RingConfig("cp2x8d2", 2, 8, 2, 2, True),
)
# Share of the bandwidth that other kernels reach, and seconds on top, for up to 8 tokens and for more: lines through
# what was measured for 4096 -> 4096, 4096 -> 14336 and 14336 -> 4096. What counts there is the ratio to the library's
# product, so it is taken of that product's time as the model has it, which is 1.5 µs less than the log's.
_MEASURED = {
    "rg1x16d3": ((0.98, 1.05e-6), (0.955, 1.4e-6)),
    "rg1x8d2": ((0.975, 1.15e-6), (0.77, 0.2e-6)),
    "cp2x8d2": ((1.02, 2.7e-6), (1.02, 4.4e-6)),
}
# What a cluster that splits K adds, in seconds, likewise: 4096 -> 1024 beside Triton's kernel for few tokens.
_CLUSTER = {"rg1x16d3": (4.2e-6, 5.7e-6), "rg1x8d2": (2.6e-6, 4.6e-6), "cp2x8d2": (1.7e-6, 2.1e-6)}


def _token_tiles(tokens: int) -> int:
    return 1 if tokens <= 8 else 2


def ring_fault(machine: Machine, cell: Cell) -> str | None:
    """A sentence where the kernel does not run ``cell`` on ``machine``; None where it does."""
    if machine.interpreter:
        return "it is CUDA C++, which Triton's interpreter does not run."
    if machine.capability < 80:
        return f"it needs compute capability 8.0; this is {machine.capability // 10}.{machine.capability % 10}."
    if cell.tokens > FEW_TOKENS:
        return f"it serves up to {FEW_TOKENS} tokens."
    if cell.r > RANK:
        return f"it serves ranks up to {RANK}."
    if cell.dtype != "bfloat16":
        return f"it is for bfloat16, and this is {cell.dtype}."
    if cell.k % CHUNK or cell.k < CHUNK * LEAST_CHUNKS:
        return f"it takes multiples of {CHUNK} in_features from {CHUNK * LEAST_CHUNKS} on, and K is {cell.k}."
    return nvrtc.why_not()


def ring_fits(machine: Machine, cell: Cell, plan: Ring) -> bool:
    """Whether ``plan`` runs ``cell`` on ``machine``; dependent launch aside."""
    c, chunks = plan.config, cell.k // CHUNK
    if c not in CONFIGS or ring_fault(machine, cell) is not None:
        return False
    if plan.splits > 1 and (machine.capability < 90 or plan.splits > 8):
        return False  # clusters came with compute capability 9.0
    divided = chunks % plan.splits == 0 and chunks // plan.splits >= c.warps and plan.producers % plan.splits == 0
    room = plan.blocks_a_multiprocessor <= c.blocks(machine, cell.tokens)
    room = room and c.shared_memory(cell.tokens) <= machine.shared_memory
    return divided and room and plan.producers <= min(MAX_PRODUCERS, chunks)


def ring_ways(machine: Machine, cell: Cell) -> Iterator[tuple[RingConfig, int, int, int]]:
    """(configuration, splits of K, producers of h, blocks a multiprocessor), as they were measured: K is split where
    one block a tile would leave half of the machine idle."""
    for config in CONFIGS:
        tiles = -(-cell.n // config.rows)
        if machine.capability < 90 or tiles > machine.sm_count // 2 or cell.k // CHUNK < 2 * config.warps:
            yield config, 1, min(4, cell.k // CHUNK), config.blocks(machine, cell.tokens)
        else:
            yield config, 2, 8, 1


def ring_seconds(machine: Machine, cell: Cell, plan: Ring) -> float:
    """What the launch should take, in seconds."""
    share, start = _MEASURED[plan.config.name][cell.tokens > 8]
    tiles = -(-cell.n // plan.config.rows)
    programs = min(tiles * plan.splits, machine.sm_count)
    moved = traffic.large(cell.tokens, cell.k, cell.n, cell.itemsize)
    cluster = _CLUSTER[plan.config.name][cell.tokens > 8] if plan.splits > 1 else 0.0
    return memory_seconds(machine, moved / share, programs) + start + cluster


def grad_shared_memory(tokens: int) -> tuple[int, int]:
    """Bytes of a block of each launch: as few_tokens_grads.cuh counts them."""
    wide = _GRAD_WARPS * 8 * _token_tiles(tokens) * (GRAD_COLUMNS + 1)
    narrow = _GRAD_ROWS * (RANK + 1) + FEW_TOKENS * (_GRAD_ROWS + 1 + RANK)
    last = FEW_TOKENS * RANK + RANK * LAST_COLUMNS + FEW_TOKENS * (LAST_COLUMNS + 1)
    return 4 * max(wide, narrow), 4 * last


def grad_defines(tokens: int) -> dict[str, int]:
    """What few_tokens_grads_entry.cuh is compiled with."""
    first, last = grad_shared_memory(tokens)
    return {
        "LORA_TOKENS": _token_tiles(tokens),
        "LORA_THREADS": GRAD_THREADS,
        "LORA_SHARED_BYTES": first,
        "LORA_LAST_SHARED_BYTES": last,
    }


def grads_fit(machine: Machine, cell: Cell, plan: RingGrads) -> bool:
    """Whether ``plan`` runs ``cell`` on ``machine``; dependent launch aside."""
    if ring_fault(machine, cell) is not None:
        return False
    return 1 <= plan.slices <= cell.n and 1 <= plan.splits <= max(1, cell.n // _GRAD_ROWS)


def grads_ways(machine: Machine, cell: Cell) -> Iterator[tuple[int, int]]:
    """(slices, splits): so many blocks as the machine holds at once, two or four a multiprocessor."""
    strips, most = cell.k // GRAD_COLUMNS, max(1, cell.n // _GRAD_ROWS)
    held = (blocks * machine.sm_count for blocks in (2, 4))
    yield from dict.fromkeys((min(most, max(1, n // 8)), min(most, max(1, n // strips))) for n in held)


def grads_seconds(machine: Machine, cell: Cell, plan: RingGrads) -> float:
    """What both launches should take, in seconds, by the bytes alone: no GPU has measured them."""
    return sum(memory_seconds(machine, moved) + launch_seconds() for moved in grads_bytes(cell, plan))


def grads_bytes(cell: Cell, plan: RingGrads) -> tuple[float, float]:
    """Bytes of each launch, with fp32 adapters."""
    m, k, n, r = cell.tokens, cell.k, cell.n, cell.r
    parts = 4.0 * (plan.splits * m * k + plan.slices * m * r)
    first = cell.itemsize * (n * k + m * n) + 4.0 * (2 * n * r + m * r) + parts
    return first, parts + cell.itemsize * 2 * m * k + 4.0 * 2 * r * k
