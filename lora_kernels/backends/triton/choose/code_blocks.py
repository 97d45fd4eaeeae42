"""Launch configurations of the kernels that read a quantised weight as it is stored."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .blocks import FEW_TOKENS, FewTokensConfig, Machine, fits_shared_memory, next_power_of_2

__all__ = [
    "CODES_RANK",
    "FOUR_BITS_PROGRAMS",
    "eight_bit_block",
    "few_codes_config",
    "few_codes_splits",
    "few_four_bits_config",
    "four_bit_block",
    "sum_run",
]

# Up to this rank the launch that reads the codes forms h as well: every program of it reads all of A.
CODES_RANK = 64

FOUR_BITS_PROGRAMS = 2  # of a multiprocessor, where codes look their numbers up: more of them add more parts
_SHARES = 4  # of K, as many as these programs take where W is square and large
_LARGE = 2**25  # numbers of W
_STEPS = 2  # of BLOCK_K columns, at least, in each share of K


def four_bit_block(machine: Machine, itemsize: int) -> tuple[int, int]:
    """Bytes of codes and warps of a program that makes a weight's values: each thread stores 16 bytes at once."""
    if machine.interpreter:
        return 128, 4
    return 1024 if itemsize == 2 else 512, 8


def eight_bit_block(machine: Machine) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that makes a weight's values of bytes."""
    if machine.interpreter:
        return 16, 64, 4
    return 16, 256, 8


@lru_cache(maxsize=4096)
def few_codes_config(machine: Machine, r: int, itemsize: int, exact: bool, with_a: bool) -> FewTokensConfig:
    """A strip of W's rows, and how deep its steps are.

    ``exact``: fp32 products in IEEE arithmetic; ``with_a``: whether h is formed as well. A strip of 32 rows reads 64
    or 128 bytes of each row's 4-bit codes at once, and its numbers fit the registers of 128 threads.
    """
    block_r = max(next_power_of_2(r), 16) if with_a else 16
    if machine.interpreter:
        return FewTokensConfig(FEW_TOKENS, 32, 64, block_r, 4, 1)
    wide = machine.capability >= 90 and not with_a  # A's part leaves no registers for it
    block_k = 32 if exact else 64 if itemsize == 4 or block_r > 32 else 256 if wide else 128
    config = FewTokensConfig(FEW_TOKENS, 32, block_k, block_r, 4, 3)
    while config.num_stages > 1 and not fits_shared_memory(machine, config, itemsize):
        config = replace(config, num_stages=config.num_stages - 1)
    return config


@lru_cache(maxsize=4096)
def few_four_bits_config(machine: Machine, m: int, k: int, n: int, r: int, unit: int) -> FewTokensConfig:
    """A strip of W's rows whose codes look their numbers up, in steps of 4 units of ``unit`` columns, 32 or 64.

    Tokens are the narrow side of the tensor core's tile, and 8 of them will do. Strips are of 64 rows. They are of 32
    where 4 shares of K would give two multiprocessors fewer than 3 programs, but from 9 tokens on that reads too much
    of x. A large weight takes 4 warps, which from 9 tokens on is wgmma. Measured on an H200 (``few-codes.json``).
    """
    few, block_r = m <= FEW_TOKENS // 2, max(next_power_of_2(r), 16)
    block_m = FEW_TOKENS // 2 if few else FEW_TOKENS
    if machine.interpreter:
        return FewTokensConfig(block_m, 32, 4 * unit, block_r, 4, 1)
    idle = 2 * _SHARES * -(-n // 64) < 3 * machine.sm_count
    warps = 4 if k * n > _LARGE and not idle and 90 <= machine.capability < 100 else 2
    return FewTokensConfig(block_m, 32 if few and idle else 64, 4 * unit, block_r, warps, 3)


def sum_run(machine: Machine, config: FewTokensConfig, nested: bool) -> int:
    """How many columns of a unit are summed before the next unit's: as a thread has them of the left operand.

    wgmma, which takes 64 rows and 4 warps, wants 2. For mma.sync the compiler tells it by the narrowest number that
    an operand is made of, and halves that for ``tl.join``: 4, with nested statistics, which are bytes, 8. What else is
    summed right, but by way of shared memory.
    """
    if 90 <= machine.capability < 100 and min(config.block_n, 4 * config.block_m) >= 64 and config.num_warps % 4 == 0:
        return 2
    return 8 if nested else 4


def few_codes_splits(machine: Machine, k: int, n: int, config: FewTokensConfig, programs: int = 4) -> int:
    """How many programs share K: the codes of a layer are few bytes, and more programs have more of them in flight.

    ``programs``: of a multiprocessor, at which a further split ends.
    """
    splits = 1
    most = 16 if machine.interpreter else programs * machine.sm_count
    while -(-n // config.block_n) * splits * 2 <= most and k >= 2 * splits * _STEPS * config.block_k:
        splits *= 2
    return splits
