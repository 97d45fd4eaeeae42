"""Where models that were pickled by lora_kernels 0.1.0 look for ``Adapter``: see ``models/adapter.py``."""

from .models.adapter import Adapter

__all__ = ["Adapter"]
