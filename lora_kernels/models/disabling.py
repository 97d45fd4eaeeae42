"""``adapters_disabled``: a whole model without its adapters, for the block of a ``with``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .. import pissa, telling
from ..config import as_tuple
from ..errors import InvalidTypeError, LoRAStateError
from ..layer import LoRALayer
from ..switching import is_switch, switched
from .adapter import remembered_within
from .layers import expert_layers
from .matching import listed

__all__ = ["adapters_disabled"]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    r"""Within the ``with`` block the whole model runs without its adapters, as for the reference pass of DPO.

    .. math:: y = x W^\top + b

    It takes own layers, and in PEFT models what PEFT's ``disable_adapter`` switches off: layers of any kind, fused or
    not, modules to save, and prompts. Merged layers run their base weight too. Nothing is copied, and ``requires_grad``
    stays as it is. Blocks can be nested. When a block ends, also by an exception, each layer is as it was before: what
    was off stays off. It holds in all threads.

    **Checkpointing.** What a checkpoint runs again in backward acts as in its forward, whichever block backward is
    called in. That holds for own and fused layers. PEFT's own layers run again as they are set then, as with PEFT's
    context. So does a region that ``torch.compile`` has compiled inside of the checkpoint, and a reentrant checkpoint
    within another one.

    **Compiling.** A compiled model has one more graph, for the block. Later switches compile nothing.

    Biases and whole modules that were trained beside own layers stay as trained; a warning says so once. So it is
    with layers that PiSSA or OLoRA initialised, which run the residual weight, as in PEFT.

    Args:
        model: a module with ``FusedLoRALinear`` layers, or a PEFT model.

    Raises:
        InvalidTypeError: ``model`` is no module.
        LoRAStateError: nothing of it can be switched off.

    Example:
        >>> import torch
        >>> from lora_kernels import LoRAConfig, adapters_disabled, replace_linear
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
        >>> base = model(x)
        >>> report = replace_linear(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> with adapters_disabled(model):
        ...     reference = model(x)
        >>> torch.equal(reference, base), torch.allclose(model(x), base)
        (True, False)
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"a model of type {type(model).__name__} was given: it must be a torch.nn.Module.")
    layers = [module for module in model.modules() if is_switch(module)]
    prompts: list[Any] = [module for module in model.modules() if _has_prompt(module)]
    if not layers and not prompts:
        raise LoRAStateError(
            f"adapters_disabled was called on {type(model).__name__}, which holds no adapter. Call "
            "replace_linear(model, config) first, or give a PEFT model."
        )
    _tell_what_stays(model)
    with ExitStack() as stack:
        for prompt in prompts:
            stack.enter_context(prompt.disable_adapter())
        stack.enter_context(switched(layers, False))
        yield


def _has_prompt(module: Any) -> bool:
    """Whether ``module`` is a ``PeftModel`` whose active adapter is a prompt, which it adds itself, by no layer."""
    if "_adapters_disabled" not in vars(module) or not callable(getattr(module, "disable_adapter", None)):
        return False
    config = module.peft_config[module.active_adapter]
    return bool(config.is_prompt_learning or config.is_adaption_prompt)


def _tell_what_stays(model: nn.Module) -> None:
    """Warns once of what makes the block's output another than the base model's."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer)]
    adapter = remembered_within(model) if layers or any(expert_layers(model)) else None
    if adapter is not None and (adapter.config.bias != "none" or as_tuple(adapter.config.modules_to_save)):
        telling.once(
            "adapters_disabled with others",
            "adapters_disabled switches adapters off; the biases and modules_to_save that train beside them stay as "
            "trained. So the output is not the base model's. Keep a copy of them for a reference.",
            stacklevel=4,
        )
    if residual := [name for name, layer in layers if pissa.is_residual(layer)]:
        telling.once(
            "adapters_disabled over residuals",
            f"adapters_disabled leaves {listed(residual)} with the weight that PiSSA or OLoRA took a part of. So the "
            "output is not the base model's. Use another init_lora_weights where you need it.",
            stacklevel=4,
        )
