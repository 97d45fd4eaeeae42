"""An adapter in memory: its tensors by the model's names or by PEFT's, and PEFT's configuration of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InvalidArgumentError
from ..models.model import state_of_adapters
from .plain_form import whole
from .saving import collect

__all__ = ["adapter_config", "lora_state_dict"]


def lora_state_dict(model: nn.Module, bias: str | None = None, format: str | None = None) -> dict[str, Tensor]:
    """The adapters' tensors by their names in ``model.state_dict()``; a shared layer's once, under its first name.

    The biases that train and the modules of ``modules_to_save`` are in it too. A warning names what else may have been
    trained.

    ``model.load_state_dict(tensors, strict=False)`` loads them back. As in ``state_dict()`` the tensors are detached,
    on their device, and no copies. Clone them to keep their values while training continues. Layers that PiSSA or OLoRA
    initialised add their initial values. Loading these into a model with the same base also sets its weights to match.
    Where accelerate has offloaded a tensor, its values come from accelerate.

    **For an inference engine.** ``format="peft"`` gives what :func:`save_adapter` writes, by PEFT's names
    (``base_model.model.….lora_A.weight``), in memory. vLLM's and SGLang's loaders take these, with
    :func:`adapter_config`. Sharded tensors (DTensor) are gathered, which every process of their mesh must do.

    Args:
        model: a module that holds ``FusedLoRALinear`` layers.
        bias: which biases are added: ``"none"``, ``"lora_only"`` (those of the LoRA layers) or ``"all"``. None is what
            ``LoRAConfig.bias`` or :func:`mark_only_lora_as_trainable` said.
        format: None for the model's own names, or ``"peft"``.

    Raises:
        InvalidArgumentError: ``bias`` or ``format`` has another value.
        LoRAStateError: the model holds no ``FusedLoRALinear``, or values that FSDP1 or ZeRO-3 holds are not gathered;
            with ``"peft"`` also whatever keeps :func:`save_adapter` from writing.

    Example:
        >>> from lora_kernels import FusedLoRALinear, lora_state_dict
        >>> from torch import nn
        >>> list(lora_state_dict(nn.Sequential(FusedLoRALinear(4, 4, r=2))))
        ['0.lora_A', '0.lora_B']
    """
    if format not in (None, "peft"):
        raise InvalidArgumentError(
            f"format={format!r} was given: it must be 'peft', or None for the model's own names."
        )
    if format is None:
        return state_of_adapters(model, bias, stacklevel=2)
    tensors = collect("lora_state_dict", model, bias, stacklevel=2).tensors
    return {name: whole(name, tensor) for name, tensor in tensors.items()}


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The fields of PEFT's ``adapter_config.json`` for the model's adapter, as :func:`save_adapter` writes them.

    ``peft.LoraConfig(**fields)`` takes them, vLLM's ``PEFTHelper.from_dict`` and SGLang's ``config_dict``. They go with
    ``lora_state_dict(model, format="peft")``.

    Raises:
        LoRAStateError: whatever keeps :func:`save_adapter` from writing.

    Example:
        >>> from lora_kernels import FusedLoRALinear, adapter_config
        >>> from torch import nn
        >>> fields = adapter_config(nn.Sequential(FusedLoRALinear(4, 4, r=2, lora_alpha=8)))
        >>> fields["peft_type"], fields["r"], fields["lora_alpha"], fields["target_modules"]
        ('LORA', 2, 8, ['0'])
    """
    return collect("adapter_config", model, stacklevel=2).fields
