"""Where models that were pickled by lora_kernels 0.1.0 look for ``tell_of_saving``: see ``models/pretrained.py``."""

from .models.pretrained import tell_of_saving

__all__ = ["tell_of_saving"]
