"""Parameter groups for optimizers: LoRA+."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from . import storage
from .config import plain_number
from .errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from .models.names import plain_names

__all__ = ["lora_plus_groups"]

_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")  # what PEFT calls the adapters of an nn.Embedding


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 16,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    r"""Parameter groups with which any torch optimizer is LoRA+: lora_B learns ``lr_ratio`` times as fast as lora_A.

    .. math:: \eta_A = \eta, \quad \eta_B = \lambda \eta

    Source: Hayou, Ghosh, Yu, "LoRA+" (2024). The groups are those of ``peft.optimizers.create_loraplus_optimizer``,
    without empty ones: (1) lora_A and other matrices that train, (2) adapters of embeddings, (3) lora_B and vectors,
    (4) vectors that do not decay. The last are biases (``bias`` in the name) and what is in an ``nn.LayerNorm``.

    Only parameters that train are in a group. Make the groups after ``replace_linear`` or ``get_peft_model``;
    ``fuse_peft`` may come before or after. With FSDP and ZeRO-3, give the distributed model. Names tell A from B, and a
    vector is known by the module that holds it, because shards have other shapes.

    Args:
        model: a model with LoRA layers, ours or PEFT's. PEFT need not be installed.
        lr: :math:`\eta`, the learning rate of lora_A. LoRA+ needs a slightly smaller one than LoRA.
        lr_ratio: :math:`\lambda`, at least 1.
        weight_decay: of all groups except that of biases and layer norms.
        embedding_lr: learning rate of PEFT's adapters of embeddings.

    Returns:
        For the optimizer: a list of ``{"params": [...], "weight_decay": ..., "lr": ...}``.

    Raises:
        InvalidArgumentError: a rate is not a positive number, the ratio is below 1, or the decay is negative.
        InvalidTypeError: ``model`` is no module.
        LoRAStateError: no adapter of the model trains; FSDP1 (``use_orig_params=False``) has one Parameter for A and B;
            or accelerate has offloaded them.

    Example:
        >>> import torch
        >>> from lora_kernels import FusedLoRALinear, lora_plus_groups
        >>> from torch import nn
        >>> model = nn.Sequential(FusedLoRALinear(16, 16, r=4), nn.ReLU())
        >>> optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-4, weight_decay=0.01))
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(1, 0.0001), (1, 0.0016)]
    """
    _check(model, lr, lr_ratio, weight_decay, embedding_lr)
    slow: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    fast_no_decay: list[nn.Parameter] = []
    dimensions, modules = storage.dimensions(model), dict(model.named_modules())
    seen: set[nn.Parameter] = set()
    for path, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            name = f"{path}.{own}"
            if _of_embedding(modules, name):
                embedding.append(parameter)
            elif _learns_slowly(module, name, dimensions[parameter]):
                slow.append(parameter)
            elif "bias" in name or _in_layer_norm(modules, name):
                fast_no_decay.append(parameter)
            else:
                fast.append(parameter)
    groups = (
        (slow, weight_decay, lr),
        (embedding, weight_decay, embedding_lr),
        (fast, weight_decay, lr * lr_ratio),
        (fast_no_decay, 0.0, lr * lr_ratio),
    )
    return [{"params": params, "weight_decay": decay, "lr": rate} for params, decay, rate in groups if params]


def _check(model: nn.Module, lr: float, lr_ratio: float, weight_decay: float, embedding_lr: float) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"a model of type {type(model).__name__} was given: it must be a torch.nn.Module.")
    for name, rate in (("lr", lr), ("embedding_lr", embedding_lr)):
        if not _is_finite(rate) or rate <= 0:
            raise InvalidArgumentError(f"{name}={rate!r} was given: it must be a positive number, such as 1e-4.")
    if not _is_finite(lr_ratio) or lr_ratio < 1:
        raise InvalidArgumentError(
            f"lr_ratio={lr_ratio!r} was given: lora_B learns at least as fast as lora_A, so it must be 1 or more; 16 "
            "is usual."
        )
    if not _is_finite(weight_decay) or weight_decay < 0:
        raise InvalidArgumentError(f"weight_decay={weight_decay!r} was given: it must be a number of at least 0.")
    _check_storage(model)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    if not adapters:
        raise LoRAStateError(
            f"lora_plus_groups was called on {type(model).__name__}, which has no LoRA parameters. Call "
            "replace_linear(model, config) first."
        )
    if not any(parameter.requires_grad for parameter in adapters):
        raise LoRAStateError(
            f"lora_plus_groups was called on {type(model).__name__}, whose LoRA parameters are all frozen. Call "
            "mark_only_lora_as_trainable(model) first (PEFT: load with is_trainable=True)."
        )


def _check_storage(model: nn.Module) -> None:
    """Raises where the Parameters that an optimizer would get are not those of A and B."""
    names = plain_names(model)
    for path, module in model.named_modules():
        name = names[path]
        if storage.is_flat(module) and storage.owns(module, "lora_"):
            raise LoRAStateError(
                f"lora_plus_groups was called on a model where FullyShardedDataParallel (FSDP1) has one flat parameter "
                f"for A and B of {name!r}, which learns at one rate. Wrap the model with use_orig_params=True."
            )
        if storage.owner(module) == storage.OFFLOADED and ("lora_" in name or storage.owns(module, "lora_")):
            raise LoRAStateError(
                f"lora_plus_groups was called on a model where accelerate has offloaded {name!r}, whose parameters "
                "take no gradients into an optimizer. Make the groups of a model that lies on its device."
            )


def _is_finite(value: Any) -> bool:
    value = plain_number(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _learns_slowly(module: nn.Module, name: str, dimensions: int) -> bool:
    """Whether ``module``'s parameter called ``name`` has lora_A's rate: by what it is, for FSDP1 makes all flat."""
    parts = name.split(".")
    if "lora_A" in parts or "lora_B" in parts:
        return "lora_A" in parts
    if isinstance(module, (nn.Linear, nn.Embedding)) and not parts[-1].startswith("lora_"):
        return parts[-1] == "weight"
    return dimensions != 1 and not isinstance(module, nn.LayerNorm)


def _of_embedding(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether PEFT's layer around an embedding holds the parameter, itself or in one of its dictionaries."""
    path = name.rsplit(".", 2)[0] if name.count(".") >= 2 else ""
    layer = modules[path] if path else None
    if layer is None or not all(hasattr(layer, own) for own in _EMBEDDING):
        return False
    base = getattr(layer, "base_layer", None)
    while isinstance(inner := getattr(base, "base_layer", None), nn.Module):
        base = inner
    return isinstance(base, nn.Embedding)


def _in_layer_norm(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether an ``nn.LayerNorm`` holds the parameter, itself or further down."""
    path = name.rpartition(".")[0]
    while path:
        if isinstance(modules[path], nn.LayerNorm):
            return True
        path = path.rpartition(".")[0]
    return False
