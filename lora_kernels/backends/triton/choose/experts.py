"""By which blocks the experts of a mixture run: data in, data out.

The product has the low-rank term inside. The alternative, which adds the term to ``grouped_mm``'s product, was measured
on an H200 and removed: it took 0.71 of the frozen experts' time for 0.64 on Qwen3-30B-A3B's layer, and the same 0.82 on
Mixtral's, with twice the memory (``bench/results/nvidia-h200/moe.json``, ``moe-mixtral.json``). Beyond the base
products' own, in bytes an element of x, y, dy and dx: the term inside moves 4, 0, 4 and 0; added, 4, 4, 4 and 4.

gate_up's x counts as the tokens' own 34 MB, of which L2 keeps what the other experts of a token read again. h and dh
are 4 r bytes a row and a mask K / 8: small beside the rest. dy is read twice beside the product, for dh and for db: one
read of both would write parts of dh, and save 0.2 GB of Qwen3's 1.2. Launches: 2 forward and 4 backward; dropout draws
its mask by one more in each pass.

An expert's da and db are summed by one program for each block of columns, so few programs work where one expert has
all rows: then they take up to the time of the base product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .blocks import (
    GemmConfig,
    Machine,
    OuterConfig,
    ShrinkConfig,
    gemm_configs,
    next_power_of_2,
    outer_config,
    shrink_config,
)

__all__ = ["Experts", "experts_outer_config", "experts_shrink_config", "product_config"]


@dataclass(frozen=True, slots=True)
class Experts:
    """``rows`` of all ``experts``, the rank, and how products are taken."""

    rows: int
    experts: int
    r: int
    dtype: torch.dtype
    tf32: bool
    dropout: bool

    @property
    def each(self) -> int:
        """Rows of an expert, were all alike: more of them are no use in a block."""
        return max(next_power_of_2(-(-self.rows // self.experts)), 16)

    @property
    def power(self) -> int:
        return next_power_of_2(self.rows)

    @property
    def parts(self) -> bool:
        """Whether operands come as a high and a low number each, which takes registers."""
        return self.dtype is torch.float16


@lru_cache(maxsize=4096)
def experts_shrink_config(machine: Machine, of: Experts) -> ShrinkConfig:
    """h or dh of ``experts_shrink_kernel``; Qwen3's passes took 1 to 4 % less in steps of 64 columns than of 128."""
    if machine.interpreter:
        return ShrinkConfig(8, 32, 16, 4, 1)
    config = shrink_config(machine, of.power, of.r, of.dtype.itemsize, of.tf32)
    config = replace(config, block_m=min(config.block_m, of.each), block_k=min(config.block_k, 64))
    if of.parts:
        wide = config.block_r > 32
        config = replace(config, block_m=min(config.block_m, 32), block_k=min(config.block_k, 32 if wide else 64))
    return config


@lru_cache(maxsize=4096)
def product_config(machine: Machine, of: Experts, columns: int) -> GemmConfig:
    """Tiles of y or dx with the base product inside: the widest that an expert's rows fill."""
    if machine.interpreter:
        return GemmConfig(8, 64, 32, 16, 2, 4, 1)
    configs = gemm_configs(machine, of.power, columns, of.r, of.dtype.itemsize, of.tf32, of.dropout)
    config = next((config for config in configs if config.block_rows <= of.each), _shortest(configs))
    return replace(config, block_r=min(config.block_r, 16)) if of.parts else config


def _shortest(configs: tuple[GemmConfig, ...]) -> GemmConfig:
    return min(configs, key=lambda config: (config.block_rows, config.block_columns))


@lru_cache(maxsize=4096)
def experts_outer_config(machine: Machine, of: Experts, columns: int) -> OuterConfig:
    """Columns of da or db a program: wide where the experts are many, which give programs enough.

    Of 16-bit rows and up to 16 ranks 128 columns in steps of 32 rows took 2 to 4 % less of a pass than 64 by 64.
    """
    if machine.interpreter:
        return OuterConfig(8, 64, 16, 4, 1)
    config = outer_config(machine, columns * of.experts, of.r, of.dtype.itemsize, of.tf32)
    if of.dtype is torch.bfloat16 and of.r <= 16:
        config = replace(config, block_m=32, block_k=128)
    config = replace(config, block_m=min(config.block_m, of.each))
    return replace(config, block_m=min(config.block_m, 32)) if of.parts else config
