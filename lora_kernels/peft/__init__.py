"""Live PEFT models on the fused operators: :func:`fuse_peft`, and what belongs to it.

``import lora_kernels.peft`` loads no PEFT; its functions do. ``FusedLoraLinear`` is the class that fused layers have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .fusing import _layer_module, fuse_peft, unfuse_peft, with_fused_layers
from .report import Calls, FusedLayer, FuseReport, UnfuseReport, calls

if TYPE_CHECKING:
    from .layer import FusedLoraLinear as FusedLoraLinear

__all__ = [
    "Calls",
    "FuseReport",
    "FusedLayer",
    "FusedLoraLinear",
    "UnfuseReport",
    "calls",
    "fuse_peft",
    "unfuse_peft",
    "with_fused_layers",
]


def __getattr__(name: str) -> Any:
    if name != "FusedLoraLinear":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return _layer_module(f"{__name__}.{name}").FusedLoraLinear
