"""PEFT's adapter files, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

``files.py`` reads and writes the pair, ``peft_config.py`` knows the fields of the one, ``saving.py`` and ``loading.py``
the tensors of the other; ``memory.py`` gives both without files. PEFT itself is not needed; safetensors is.
"""

from __future__ import annotations

from .loading import load_adapter
from .memory import adapter_config, lora_state_dict
from .saving import save_adapter

__all__ = ["adapter_config", "load_adapter", "lora_state_dict", "save_adapter"]
