"""Which kernels run the experts of a mixture, and by which blocks: data in, data out. Nothing of it was measured yet.

The base product is ``grouped_mm``'s where that runs on the device only, and the low-rank term is added in place. Else
the product has the term inside. What the adapters of Qwen3-30B-A3B's layer (8192 tokens, top-8: M = 65536 rows; H =
2048, I = 768; r = 16, bf16) move to and from memory beyond the base products of sorted rows, and their time at 3.35
TB/s. The base products of both passes take about 1.9 ms at 650 Tflop/s:

======================= ============================================================== ======== =======
way                     bytes an element of x, y, dy, dx                               GB       ms
======================= ============================================================== ======== =======
grouped_mm for all      4 (gate_up's x 6), 8, 4, 8: a term of y's, of dx's size is     5.3      1.6
                        written, and added by another read of both
in place                4, 4, 4, 4                                                     2.9      0.86
inside                  4, 0, 4, 0; and x is not copied in sorted order: 0.3 GB less   1.2      0.36
======================= ============================================================== ======== =======

gate_up's x counts as the tokens' own 34 MB, of which L2 keeps what the other experts of a token read again. h and dh
are 4 r bytes a row and a mask K / 8: small beside the rest. In place and inside each read dy twice, for dh and for db:
one read of both would write parts of dh, and save 0.2 GB. Launches beside the base product's: in place 2 and 4, inside
1 and 3; dropout draws its mask by one more in each pass. ``grouped_mm`` for all takes 3 and about 15.

An expert's da and db are summed by one program for each block of columns, so few programs work where one expert has
all rows: then they take up to the time of the base product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .blocks import (
    ExpandConfig,
    GemmConfig,
    Machine,
    OuterConfig,
    ShrinkConfig,
    expand_config,
    gemm_configs,
    next_power_of_2,
    outer_config,
    shrink_config,
)

__all__ = ["Experts", "add_config", "experts_outer_config", "experts_shrink_config", "product_config"]


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
    """h or dh of ``experts_shrink_kernel``."""
    if machine.interpreter:
        return ShrinkConfig(8, 32, 16, 4, 1)
    config = shrink_config(machine, of.power, of.r, of.dtype.itemsize, of.tf32)
    config = replace(config, block_m=min(config.block_m, of.each))
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
def add_config(machine: Machine, of: Experts) -> ExpandConfig:
    """Tiles of y or dx that the low-rank term is added to."""
    if machine.interpreter:
        return ExpandConfig(8, 64, 16, 4)
    config = expand_config(machine, of.r, of.dtype.itemsize, of.tf32)
    config = replace(config, block_m=min(config.block_m, of.each))
    return replace(config, block_r=min(config.block_r, 16)) if of.parts else config


@lru_cache(maxsize=4096)
def experts_outer_config(machine: Machine, of: Experts, columns: int) -> OuterConfig:
    """Columns of da or db a program: wide where the experts are many, which give programs enough."""
    if machine.interpreter:
        return OuterConfig(8, 64, 16, 4, 1)
    config = outer_config(machine, columns * of.experts, of.r, of.dtype.itemsize, of.tf32)
    config = replace(config, block_m=min(config.block_m, of.each))
    return replace(config, block_m=min(config.block_m, 32)) if of.parts else config
