"""Launch configurations: frozen dataclasses, chosen by what the device is able to do, never by its name.

All functions are pure and remembered. Sizes that vary from call to call (M) enter as their next power of two, so a
model meets a handful of configurations and the kernels are compiled a handful of times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TypeVar

import torch

__all__ = [
    "FEW_TOKENS",
    "FEW_TOKENS_RANK",
    "INTERPRETER",
    "DhDbConfig",
    "ExpandConfig",
    "FewTokensConfig",
    "GainGradConfig",
    "GemmConfig",
    "Machine",
    "OuterConfig",
    "RowNormsConfig",
    "ShrinkConfig",
    "dh_db_config",
    "expand_config",
    "few_tokens_config",
    "fits_shared_memory",
    "gain_grad_config",
    "gated_block",
    "gemm_configs",
    "machine_of",
    "next_power_of_2",
    "outer_config",
    "persistent_configs",
    "row_norms_config",
    "shrink_config",
]

# What is taken for a device that does not tell: about an A100's.
_CLOCK, _BANDWIDTH = 1.4e9, 2.0e12

# Bytes of shared memory that a product's stages leave to the compiler.
_SPARE = 4096

# Up to this many tokens (one tensor-core tile) and this rank, forward is one launch.
FEW_TOKENS = 16
FEW_TOKENS_RANK = 128


@dataclass(frozen=True, slots=True)
class Machine:
    """What the choice rests on. ``shared_memory`` is the most bytes that one program may use, ``clock`` the
    multiprocessors' in 1/s, ``bandwidth`` the memory's by its data sheet in bytes/s."""

    capability: int
    sm_count: int
    shared_memory: int
    interpreter: bool = False
    clock: float = _CLOCK
    bandwidth: float = _BANDWIDTH


# The interpreter pays per block and per element: small blocks, so that small tensors still meet every loop and edge; no
# two of a kernel's are equal, so that exchanged ones are seen.
INTERPRETER = Machine(capability=0, sm_count=4, shared_memory=1 << 30, interpreter=True)


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """The products for y and dx: tiles ``block_rows`` x ``block_columns``, summed in steps of ``block_sum``."""

    block_rows: int
    block_columns: int
    block_sum: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int

    @property
    def stage(self) -> int:
        """Numbers that one stage loads."""
        return (self.block_rows + self.block_columns) * self.block_sum


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """``splits`` programs share the sum over K of each block of h; who reads h adds their parts, in order."""

    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    splits: int = 1


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """``expand_kernel``, ``dx_low_rank_kernel``: tiles of y, of dx."""

    block_m: int
    block_n: int
    block_r: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class FewTokensConfig:
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int

    @property
    def stage(self) -> int:
        """Numbers that one stage loads; A counts twice, for it may come in fp32."""
        return (self.block_m + self.block_n + 2 * self.block_r) * self.block_k


@dataclass(frozen=True, slots=True)
class DhDbConfig:
    """``chunk_m`` rows a program, ``block_m`` at a time; ``block_n`` columns."""

    block_m: int
    block_n: int
    block_r: int
    chunk_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class OuterConfig:
    """``splits`` programs share the sum over M of each block; a second stage adds their parts, in order."""

    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    splits: int = 1


@dataclass(frozen=True, slots=True)
class RowNormsConfig:
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class GainGradConfig:
    """``chunk_m`` rows a program, ``block_m`` at a time; ``block_n`` columns."""

    block_m: int
    block_n: int
    chunk_m: int
    num_warps: int


_Staged = TypeVar("_Staged", GemmConfig, FewTokensConfig)


@cache
def machine_of(device: torch.device) -> Machine:
    """The device's properties; the interpreter's stand-in for a CPU."""
    if device.type != "cuda":
        return INTERPRETER
    from triton.runtime import driver

    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    found = driver.active.utils.get_device_properties(index)
    kilohertz, memory_kilohertz, bus_bits = (
        found.get(name, 0) for name in ("sm_clock_rate", "mem_clock_rate", "mem_bus_width")
    )
    return Machine(
        capability=10 * properties.major + properties.minor,
        sm_count=properties.multi_processor_count,
        shared_memory=found["max_shared_mem"],
        clock=1e3 * kilohertz or _CLOCK,
        bandwidth=2e3 * memory_kilohertz * bus_bits / 8 or _BANDWIDTH,  # two transfers a cycle
    )


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def fits_shared_memory(machine: Machine, config: GemmConfig | FewTokensConfig, itemsize: int, spare: int = 0) -> bool:
    """Whether one program may keep all stages of ``config``, and has ``spare`` bytes left."""
    return config.num_stages * config.stage * itemsize <= machine.shared_memory - spare


def _in_fewer_stages(machine: Machine, config: _Staged, itemsize: int, spare: int) -> _Staged:
    """``config`` with as many of its stages as fit, at least one."""
    while config.num_stages > 1 and not fits_shared_memory(machine, config, itemsize, spare):
        config = replace(config, num_stages=config.num_stages - 1)
    return config


# Tiles in order of preference at equal cost, with the share of the tensor cores' peak that each reaches when all
# multiprocessors are busy (a model, to be replaced by measurements): rows, columns, sum, warps, stages, efficiency.
_TILES_16_BIT = (
    (128, 256, 64, 8, 3, 1.0),
    (128, 128, 64, 8, 3, 0.85),
    (64, 128, 64, 4, 4, 0.70),
    (64, 64, 64, 4, 4, 0.50),
    (32, 64, 64, 4, 4, 0.30),
)
_TILES_TF32 = (
    (128, 128, 32, 8, 3, 1.0),
    (64, 128, 32, 4, 3, 0.80),
    (64, 64, 32, 4, 4, 0.60),
    (32, 64, 32, 4, 4, 0.35),
)
_TILES_IEEE = (
    (128, 64, 16, 8, 3, 1.0),
    (64, 64, 16, 4, 3, 0.90),
    (32, 64, 16, 4, 3, 0.60),
)


def _tiles(itemsize: int, tf32: bool) -> tuple[tuple[int, int, int, int, int, float], ...]:
    if itemsize == 2:
        return _TILES_16_BIT
    return _TILES_TF32 if tf32 else _TILES_IEEE


# Tiles of the persistent variant, for 16-bit products on Hopper and later: rows, columns, sum, warps, stages.
_TILES_PERSISTENT = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (64, 256, 64, 8, 4),
    (64, 128, 64, 4, 4),
)


@lru_cache(maxsize=4096)
def gemm_configs(
    machine: Machine, rows_power: int, columns: int, r: int, itemsize: int, tf32: bool, dropout: bool = False
) -> tuple[GemmConfig, ...]:
    """The tiles that fit, the one that finishes (rows_power, columns) in the least time first: waves of tiles times a
    tile's work."""
    if machine.interpreter:
        return (GemmConfig(16, 32, 64, 16, 2, 4, 1),)
    # What the compiler's report (offline/compile_report.py) allows without spills: a rank that is no multiple of 16
    # takes narrow steps, and the widest tile is Hopper's; on sm_100 its two accumulators would overflow tensor memory.
    block_r = 16 if r % 16 or machine.capability < 90 or dropout else min(next_power_of_2(r), 32)
    wide = 90 <= machine.capability < 100 and not (dropout and r % 16)
    largest = 128 * 256 if wide else 128 * 128
    fitting: list[tuple[float, GemmConfig]] = []
    for rows, width, depth, warps, stages, efficiency in _tiles(itemsize, tf32):
        config = GemmConfig(rows, width, depth, block_r, 8, warps, stages)
        config = _in_fewer_stages(machine, config, itemsize, _SPARE)
        if not fits_shared_memory(machine, config, itemsize) or rows * width > largest:
            continue
        tiles = -(-rows_power // rows) * -(-columns // width)
        cost = -(-tiles // machine.sm_count) * rows * width / efficiency
        fitting.append((cost, config))
    assert fitting, f"no tile fits {machine}"
    return tuple(config for _, config in sorted(fitting, key=lambda found: found[0]))


@lru_cache(maxsize=4096)
def persistent_configs(
    machine: Machine, rows_power: int, columns: int, r: int, itemsize: int, tf32: bool, dropout: bool = False
) -> tuple[GemmConfig, ...]:
    """The persistent variant's tiles; none where there is no TMA, or for fp32.

    With ``dropout`` (dx's) a second step of R leaves the larger tiles no registers; so ranks that can take steps of 32.
    """
    if machine.interpreter:
        return (GemmConfig(64, 16, 32, 16, 2, 4, 1),)
    if machine.capability < 90 or itemsize != 2:
        return ()
    block_r = 32 if dropout and r % 32 == 0 else 16  # without a mask wider steps leave the widest tile no registers
    steps = dropout and r > block_r
    largest = 128 * 256 if machine.capability < 100 else 128 * 128
    configs = (
        GemmConfig(rows, width, depth, block_r, 8, warps, stages)
        for rows, width, depth, warps, stages in _TILES_PERSISTENT
        if rows * width <= largest and not (steps and (width > 128 or rows * width > 64 * 32 * warps))
    )
    return tuple(config for config in configs if fits_shared_memory(machine, config, itemsize, _SPARE))


@lru_cache(maxsize=4096)
def expand_config(machine: Machine, r: int, itemsize: int, tf32: bool) -> ExpandConfig:
    """Tiles of y wide enough for whole lines of memory, with little of h and B a tile."""
    if machine.interpreter:
        return ExpandConfig(32, 64, 16, 4)
    block_r = 16 if r % 16 or itemsize == 4 else min(next_power_of_2(r), 32)
    return ExpandConfig(64, 128 if itemsize == 2 or tf32 else 64, block_r, 4)


@lru_cache(maxsize=4096)
def shrink_config(machine: Machine, rows_power: int, r: int, itemsize: int, tf32: bool) -> ShrinkConfig:
    """Rows enough to give every multiprocessor a program, at most 64."""
    if machine.interpreter:
        return ShrinkConfig(64, 32, min(max(next_power_of_2(r), 16), 64), 4, 1)
    block_r = min(max(next_power_of_2(r), 16), 128)
    block_m = 64
    while block_m > 16 and rows_power // block_m < machine.sm_count // 2:
        block_m //= 2
    if itemsize == 4 and not tf32:
        return ShrinkConfig(min(block_m, 32), 32, min(block_r, 64), 4, 3)
    if block_r == 128:
        block_m = min(block_m, 32)
    block_k = 128 if itemsize == 2 and block_r <= 32 and r % 16 == 0 else 64
    if block_r > 32:
        return ShrinkConfig(block_m, block_k, block_r, 4, 3)
    # Of 90 ways on an H100 five stages of 64 x 128 read x at 2.53 TB/s: 26.5 us for 28.9 with four.
    deep = machine.capability >= 90 and block_k == 128
    return ShrinkConfig(block_m, block_k, block_r, 4, 5 if deep else 4)


@lru_cache(maxsize=4096)
def few_tokens_config(
    machine: Machine, columns: int, r: int, itemsize: int, tf32: bool, block_n: int | None = None
) -> FewTokensConfig | None:
    """``block_n``: the strip's width; by default as wide as still gives every multiprocessor a strip. None where the
    rank is so large that every program reading all of A would cost more than a second launch."""
    if r > FEW_TOKENS_RANK:
        return None
    block_r = max(next_power_of_2(r), 16)
    if machine.interpreter:
        return FewTokensConfig(FEW_TOKENS, 64, 32, block_r, 4, 1)
    if block_n is None:
        block_n = 64
        while block_n > 16 and -(-columns // block_n) < machine.sm_count:
            block_n //= 2
    block_k = (256 if block_r <= 32 else 128) if itemsize == 2 else 64
    if machine.capability < 90 and block_n == 64:
        block_k = min(block_k, 128)  # W's wider strips take the registers
    if itemsize == 4 and not tf32:
        block_n, block_k = min(block_n, 32), 32
    half = machine.shared_memory - machine.shared_memory // 2  # so that two programs share a multiprocessor
    return _in_fewer_stages(machine, FewTokensConfig(FEW_TOKENS, block_n, block_k, block_r, 4, 4), itemsize, half)


@lru_cache(maxsize=4096)
def dh_db_config(machine: Machine, rows_power: int, columns: int, r: int, itemsize: int, tf32: bool) -> DhDbConfig:
    """Wide in N, so that few partial sums of dh are written; then rows enough a program that few of db are."""
    if machine.interpreter:
        return DhDbConfig(16, 64, min(max(next_power_of_2(r), 16), 64), 32, 4, 1)
    block_r = min(max(next_power_of_2(r), 16), 64)
    block_m, block_n, warps, stages = 32, (256 if block_r <= 32 and r % 16 == 0 else 128), 4, 4
    if r > 64 or (block_r == 64 and machine.capability < 90):
        block_n = 64
    if itemsize == 4:
        block_n, stages = min(block_n, 128), 3
        if not tf32:
            block_m, block_n, block_r, stages = 16, 64, min(block_r, 32), 2
    programs_n = -(-columns // block_n) * -(-r // block_r)
    chunks = max(1, 2 * machine.sm_count // max(programs_n, 1))
    chunk_m = max(next_power_of_2(-(-rows_power // chunks)), 4 * block_m)
    return DhDbConfig(block_m, block_n, block_r, chunk_m, warps, stages)


@lru_cache(maxsize=4096)
def outer_config(machine: Machine, columns: int, r: int, itemsize: int, tf32: bool) -> OuterConfig:
    """Columns few enough to give every multiprocessor a program without a split of M."""
    if machine.interpreter:
        return OuterConfig(32, 64, min(max(next_power_of_2(r), 16), 64), 4, 1)
    block_r = min(max(next_power_of_2(r), 16), 64)
    block_k = 64
    while block_k > 16 and -(-columns // block_k) < machine.sm_count // 2 + 1:
        block_k //= 2
    if itemsize == 4 and not tf32:
        return OuterConfig(32, block_k, min(block_r, 32), 4, 3)
    # sm_100 has no registers for taller blocks of a large rank.
    block_m = 32 if block_r > 16 and (r % 16 or block_r == 32 or machine.capability >= 100) else 64
    return OuterConfig(block_m, block_k, block_r, 4, 4 if block_r <= 32 else 3)


@lru_cache(maxsize=4096)
def row_norms_config(machine: Machine, rows: int, columns: int, r: int, itemsize: int) -> RowNormsConfig:
    """As many bytes of W in flight as registers allow, and rows few enough to give every multiprocessor a program."""
    if machine.interpreter:
        return RowNormsConfig(16, 64, 32, 4, 1)
    block_r = min(max(next_power_of_2(r), 16), 64 if itemsize == 2 else 32)
    block_n = 32 if rows >= 64 * machine.sm_count else 16
    block_k = min(128 if itemsize == 2 else 64, max(next_power_of_2(columns), 16))
    return RowNormsConfig(block_n, block_k, block_r, 4, 4 if block_r <= 32 else 3)


@lru_cache(maxsize=4096)
def gain_grad_config(machine: Machine, rows_power: int, columns: int, itemsize: int) -> GainGradConfig:
    """Whole lines of memory a row; rows enough a program that few partial sums are written."""
    if machine.interpreter:
        return GainGradConfig(16, 64, 32, 4)
    block_m, block_n = 16, 128 if itemsize == 2 else 64
    chunks = max(1, 4 * machine.sm_count // -(-columns // block_n))
    return GainGradConfig(block_m, block_n, max(next_power_of_2(-(-rows_power // chunks)), 2 * block_m), 4)


def gated_block(machine: Machine, itemsize: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a gated MLP's product: 16 bytes of each operand a thread, whole lines of memory."""
    if machine.interpreter:
        return 16, 64, 4
    return 4, 512 if itemsize == 2 else 256, 8 if itemsize == 2 else 4
