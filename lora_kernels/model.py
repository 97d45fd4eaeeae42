"""Where models that were pickled by lora_kernels 0.1.0 look for ``_check_ranks``: see ``models/model.py``."""

from .models.model import _check_ranks

__all__ = ["_check_ranks"]
