"""Where models that were pickled by lora_kernels 0.1.0 look for ``FusedLoRAGroup``: see ``models/grouping.py``."""

from .models.grouping import FusedLoRAGroup

__all__ = ["FusedLoRAGroup"]
