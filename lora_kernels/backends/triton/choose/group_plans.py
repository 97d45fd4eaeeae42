"""The ways to run a pass of 2 to 4 layers that read one x, as data; ``plans`` has a single layer's.

============= ========================================================================================== ========
plan          what runs                                                                                  launches
============= ========================================================================================== ========
Apart         each member by its own best plan; in backward dx is their sum                              theirs
HopperGroup   in Gluon: A and B as operands, every h in one read of x, every y in one persistent product 3
DxHopperGroup in Gluon: the operands, dh with db of all and the sums of dh, one dx, every da in one read 6
              of x, the sums of da and db
============= ========================================================================================== ========

``Apart`` is always there. h and the mask's words are those of a layer by itself, so both passes choose apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from .hopper_blocks import HopperDhDb, HopperProduct
from .hopper_group_blocks import HopperGroupDa, HopperGroupDx, HopperGroupShrink

__all__ = ["GROUP_KERNELS", "Apart", "DxHopperGroup", "GroupPlan", "HopperGroup"]


@dataclass(frozen=True, slots=True)
class Apart:
    kind: ClassVar[str] = "apart"
    is_composition: ClassVar[bool] = False

    def __str__(self) -> str:
        return "apart"


@dataclass(frozen=True, slots=True)
class HopperGroup:
    kind: ClassVar[str] = "hopper_group"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 3
    shrink: HopperGroupShrink
    product: HopperProduct

    def __str__(self) -> str:
        return f"hopper_group {self.product.name} shrink {self.shrink.name}"


@dataclass(frozen=True, slots=True)
class DxHopperGroup:
    """``beside``: dx on a stream of high priority, and da with the sums beside it."""

    kind: ClassVar[str] = "dx_hopper_group"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 6
    dh_db: HopperDhDb
    dx: HopperGroupDx
    da: HopperGroupDa
    beside: bool = False

    def __str__(self) -> str:
        beside = " beside" if self.beside else ""
        return f"dx_hopper_group {self.dx.name} dh+db {self.dh_db.name} da {self.da.name}{beside}"


GroupPlan: TypeAlias = Apart | HopperGroup | DxHopperGroup
GROUP_KERNELS = (HopperGroup, DxHopperGroup)
