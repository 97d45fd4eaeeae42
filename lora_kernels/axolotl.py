"""Axolotl's plug-in: ``plugins: [lora_kernels.axolotl.FusePlugin]`` in its YAML."""

from __future__ import annotations

from typing import Any

from .errors import InvalidArgumentError
from .peft import fuse_peft

__all__ = ["FusePlugin"]

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:  # only Axolotl makes one; what reads the class without it needs no base
    BasePlugin = object

_THEIRS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class FusePlugin(BasePlugin):  # type: ignore[misc]
    """Has the LoRA layers of the model that Axolotl loads run fused, by :func:`lora_kernels.fuse_peft`.

    Axolotl has LoRA kernels of its own, and turns them on by itself. They replace the forward of the modules that hold
    the layers. The plug-in keeps them off.

    Raises:
        InvalidArgumentError: the YAML turns one of Axolotl's own kernels on.
    """

    def register(self, cfg: Any) -> None:
        """Called with the YAML as it was read."""
        if on := [name for name in _THEIRS if cfg.get(name)]:
            raise InvalidArgumentError(
                f"the YAML has {on[0]}: true beside lora_kernels.axolotl.FusePlugin, and both would run the same "
                "layers. Take one of the two out."
            )
        for name in _THEIRS:
            cfg[name] = False

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Called when the model and its adapter are there."""
        if cfg.get("adapter") in ("lora", "qlora"):
            print(fuse_peft(model))
