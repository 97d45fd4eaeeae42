"""LoRA layers at nearly the cost of the frozen ``nn.Linear``: fused kernels, a drop-in module, checked gradients.

``import lora_kernels`` loads no PyTorch, no Triton and no CUDA, and writes nothing; the names load what they need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "FusedLoRAGroup": "models.grouping",
    "FusedLoRAExperts": "experts.layer",
    "FusedLoRALinear": "nn",
    "FusedLoRAMLP": "models.gated",
    "LoRAConfig": "config",
    "LoRAKernelsError": "errors",
    "adapter_config": "checkpoint",
    "adapters_disabled": "models.disabling",
    "explain": "dispatch",
    "fuse_peft": "peft",
    "load_adapter": "checkpoint",
    "lora_linear": "functional",
    "lora_plus_groups": "optim",
    "lora_state_dict": "checkpoint",
    "mark_only_lora_as_trainable": "models.model",
    "merge_lora": "models.model",
    "register_operators": "exported",
    "replace_linear": "models.model",
    "restore_linear": "models.model",
    "save_adapter": "checkpoint",
    "share_inputs": "models.grouping",
    "unfuse_peft": "peft",
    "unmerge_lora": "models.model",
    "unshare_inputs": "models.grouping",
    "use_backend": "dispatch",
}

__all__ = sorted([*_PLACES, "__version__"])

if TYPE_CHECKING:
    from .checkpoint import adapter_config as adapter_config
    from .checkpoint import load_adapter as load_adapter
    from .checkpoint import lora_state_dict as lora_state_dict
    from .checkpoint import save_adapter as save_adapter
    from .config import LoRAConfig as LoRAConfig
    from .dispatch import explain as explain
    from .dispatch import use_backend as use_backend
    from .errors import LoRAKernelsError as LoRAKernelsError
    from .experts.layer import FusedLoRAExperts as FusedLoRAExperts
    from .exported import register_operators as register_operators
    from .functional import lora_linear as lora_linear
    from .models.disabling import adapters_disabled as adapters_disabled
    from .models.gated import FusedLoRAMLP as FusedLoRAMLP
    from .models.grouping import FusedLoRAGroup as FusedLoRAGroup
    from .models.grouping import share_inputs as share_inputs
    from .models.grouping import unshare_inputs as unshare_inputs
    from .models.model import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from .models.model import merge_lora as merge_lora
    from .models.model import replace_linear as replace_linear
    from .models.model import restore_linear as restore_linear
    from .models.model import unmerge_lora as unmerge_lora
    from .nn import FusedLoRALinear as FusedLoRALinear
    from .optim import lora_plus_groups as lora_plus_groups
    from .peft import fuse_peft as fuse_peft
    from .peft import unfuse_peft as unfuse_peft


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
