"""PEFT's adapter files, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

``files.py`` reads and writes the pair, ``peft_config.py`` knows the fields of the one, ``saving.py`` and ``loading.py``
the tensors of the other. PEFT itself is not needed; safetensors is.
"""

from __future__ import annotations

from .loading import load_adapter
from .saving import save_adapter

__all__ = ["load_adapter", "save_adapter"]
