"""What FSDP2 (``fully_shard``) manages: it exchanges Parameters around each forward, so they are changed in place.

Those of FSDP1 and ZeRO-3 are changed in place too; where and when, :mod:`.storage` says.

Nothing of torch.distributed is imported here: a model that is sharded has done so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import storage
from .errors import LoRAStateError
from .sharded import everywhere, is_sharded, put

if TYPE_CHECKING:
    from .layer import LoRALayer

__all__ = [
    "check_own",
    "check_untied",
    "in_place",
    "is_managed",
    "kept_aside",
    "merge_in_place",
    "plain_class",
    "settle",
    "settle_for",
    "unmerge_in_place",
]


def is_managed(layer: nn.Module) -> bool:
    """Whether ``fully_shard`` manages the Parameters of ``layer``: it exchanges them around each forward.

    ``FullyShardedDataParallel``, the former FSDP, marks modules alike: those are :mod:`.storage`'s.
    """
    marked = getattr(layer, "_is_fsdp_managed_module", False) and getattr(layer, "_fsdp_use_orig_params", False)
    return marked and storage.owner(layer) is None


def in_place(layer: nn.Module) -> bool:
    """Whether merged values are written into the Parameters of ``layer``, which FSDP or ZeRO-3 holds on to."""
    return is_managed(layer) or storage.owner(layer) in (storage.FSDP1, storage.ZERO3)


def settle(model: nn.Module) -> None:
    """Has FSDP2 put the sharded Parameters back wherever it holds gathered ones: those may be in a narrower dtype."""
    for module in model.modules():
        if _is_fsdp(module):
            fsdp: Any = module
            fsdp.reshard()


def plain_class(module: nn.Module) -> type:
    """``module``'s class before ``fully_shard`` put one of its own in front of it."""
    kind = type(module)
    return kind.__bases__[-1] if _is_fsdp(module) and kind.__name__.startswith("FSDP") else kind


def check_own(layer: LoRALayer, function: str) -> None:
    """Raises where FSDP2 manages the weight: it may hold a gathered copy now, and a change of that would be lost."""
    if is_managed(layer):
        raise LoRAStateError(
            f"{function} was called on a layer that fully_shard (FSDP2) manages. Call {function}_lora(model) with the "
            "module that was given to fully_shard, which puts the shards in their places first."
        )


def settle_for(model: nn.Module, layers: Iterable[tuple[str, LoRALayer]], function: str) -> None:
    """:func:`settle`, or an error where FSDP2 manages one of the layers from outside of ``model``."""
    within = {part for module in model.modules() if _is_fsdp(module) for part in module.modules()}
    outside = [name for name, layer in layers if is_managed(layer) and layer not in within]
    if outside:
        raise LoRAStateError(
            f"{function} was called on a part of a model, and fully_shard (FSDP2) manages its layer {outside[0]!r} "
            f"from outside. Call {function} with the module that was given to fully_shard."
        )
    settle(model)


def _is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was given ``module``; by what it can do, for the import takes long."""
    return hasattr(module, "reshard") and hasattr(module, "set_reshard_after_forward")


def merge_in_place(layer: LoRALayer, aside: nn.Module, weight: Any, bias: Any) -> None:
    """Writes merged values into the Parameters that are another's; copies of the former ones go into ``aside``."""
    merged = {"weight": weight} | ({"bias": bias} if "bias" in aside._parameters else {})
    if aside._parameters.get("bias", weight) is None:
        raise LoRAStateError(
            f"merging gives a layer without bias one, for its lora_bias, and {_holder(layer)} would not know of it. "
            "Save the adapter, and merge it on the plain model."
        )
    for name, value in merged.items():
        former: Any = getattr(layer, name)
        aside.register_parameter(name, nn.Parameter(former.detach().clone(), requires_grad=former.requires_grad))
        put(former, value)


def _holder(layer: nn.Module) -> str:
    return storage.owner(layer) or "fully_shard (FSDP2)"


def check_untied(name: str, layer: nn.Module, tied: tuple[str, ...]) -> None:
    """Raises where merging in place would change ``tied`` as well."""
    if tied:
        raise LoRAStateError(
            f"the weight of {name!r} is also {tied[0]}, and {_holder(layer)} has one memory for both: merging would "
            "change that one too. Save the adapter, and merge it on the plain model."
        )


def unmerge_in_place(layer: LoRALayer, weight: Any, bias: Any) -> None:
    """Writes the former values back."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value is not getattr(layer, name):
            put(getattr(layer, name), value)


def kept_aside(tensor: Any, now: Any) -> Any:
    """A weight or bias that merging has put aside, as ``now``, the one in its place, was gathered."""
    if isinstance(tensor, torch.Tensor) and not is_sharded(tensor) and not is_sharded(now) and now is not None:
        return tensor.to(now.device, now.dtype)
    if not is_sharded(tensor) or (is_sharded(now) and now.device_mesh == tensor.device_mesh):
        return tensor
    whole = tensor.full_tensor().to(now.dtype)
    if not is_sharded(now):
        return whole
    return everywhere(whole, now.device_mesh).redistribute(placements=now.placements)
