"""Parameters whose values another owns: FSDP1's flat ones, DeepSpeed ZeRO-3's partitions, accelerate's offloaded.

Such an owner leaves a shard, nothing, or a meta tensor in a module, and puts the values there for a forward or within a
context of its own. This is the one place that tells it: who owns a Parameter, whether its values are here now, and
whether a change of them stays. Each process finds the same without asking the others, so all of them refuse alike.
Nothing of the owners is imported: a model that they manage has loaded them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoRAStateError

__all__ = [
    "FSDP1",
    "OFFLOADED",
    "ZERO3",
    "Part",
    "at_rest",
    "check_free",
    "check_here",
    "check_kept",
    "check_merging",
    "dimensions",
    "forget",
    "is_flat",
    "is_here",
    "onloaded",
    "owner",
    "owns",
    "state_name",
    "value",
    "why_not_free",
]

FSDP1, ZERO3, OFFLOADED = (
    "FullyShardedDataParallel (FSDP1)",
    "DeepSpeed ZeRO-3",
    "accelerate's offloading",
)
_READ = {
    FSDP1: "Call it within FullyShardedDataParallel.summon_full_params(model); with rank0_only=True, in process 0 "
    "alone.",
    ZERO3: "Call it within deepspeed.zero.GatheredParameters(list(model.parameters())).",
    OFFLOADED: "Load the model's weights first.",
}
_WRITE = {
    FSDP1: "Call it, in every process, within FullyShardedDataParallel.summon_full_params(model) with writeback=True.",
    ZERO3: "Call it, in every process, within deepspeed.zero.GatheredParameters(list(model.parameters()), "
    "modifier_rank=0).",
    OFFLOADED: "Call accelerate.hooks.remove_hook_from_submodules(model) first, and dispatch the model afterwards.",
}
_FREE = {
    FSDP1: "Call it on the plain model, then wrap that in FullyShardedDataParallel.",
    ZERO3: "Call it on the plain model, made without deepspeed.zero.Init, before deepspeed.initialize.",
    OFFLOADED: _WRITE[OFFLOADED],
}
_AWAY = "are not gathered in this process"
_UNSHARD = "_unshard_fsdp_state_params"  # the generator behind summon_full_params, one for each unit of FSDP1

Part = tuple[str, nn.Module, Iterable[str]]  # a module's dotted name, the module, names of its own Parameters


def owner(module: nn.Module) -> str | None:
    """Who owns the values of ``module``'s own Parameters, or None: they are ordinary ones, or DTensors."""
    marks = vars(module)
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    if marks.get("_is_fsdp_managed_module", False):  # fully_shard (FSDP2) marks modules alike, not their Parameters
        views = any(getattr(p, "_fsdp_flattened", False) or not isinstance(p, nn.Parameter) for p in own)
        if views or not marks.get("_fsdp_use_orig_params", True):
            return FSDP1
    if any(hasattr(parameter, "ds_id") for parameter in own):
        return ZERO3
    return None if _offload_hook(module) is None else OFFLOADED


def is_flat(module: nn.Module) -> bool:
    """Whether FSDP1 has one Parameter for all of ``module``'s (``use_orig_params=False``), which an optimizer gets."""
    return owner(module) == FSDP1 and not vars(module).get("_fsdp_use_orig_params", True)


def state_name(name: str) -> str:
    """A dotted name as a state dict has it: without the wrappers that take themselves out (FSDP1, checkpointing)."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def owns(module: nn.Module, prefix: str) -> bool:
    """Whether ``module`` has tensors of its own with such names, in its table or, by FSDP1, out of it; or PEFT's."""
    return any(own.startswith(prefix) for own in (*module._parameters, *vars(module), *module._modules))


def is_here(module: nn.Module, *matrices: Tensor) -> bool:
    """Whether the ``matrices`` of ``module`` have values now, outside of its own forward: else each is a flat shard, a
    placeholder or accelerate's meta tensor."""
    if not all(matrix.dim() == 2 and not matrix.is_meta for matrix in matrices):
        return False
    kept = vars(module).get("_fsdp_use_orig_params", True)
    return kept or all(matrix.untyped_storage().size() > 0 for matrix in matrices)


def check_here(function: str, parts: Iterable[Part]) -> None:
    """Raises ``LoRAStateError`` unless the values of all ``parts`` can be read in this process."""
    _check(function, parts, _READ, _AWAY, lambda contexts: contexts.here)


def check_kept(function: str, parts: Iterable[Part]) -> None:
    """Raises ``LoRAStateError`` unless what ``function`` writes into the ``parts`` stays there."""
    text = "would not keep what is written to them now"
    _check(function, parts, _WRITE, text, lambda contexts: contexts.kept)


def check_merging(function: str, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises unless the ``layers`` can be merged or unmerged where they are: accelerate's map takes the new values."""
    layers = [(name, layer) for name, layer in layers if owner(layer) not in (None, OFFLOADED)]
    read = ((name, layer, _own_names(layer)) for name, layer in layers)
    _check(function, read, _WRITE, _AWAY, lambda contexts: contexts.here)
    check_kept(function, ((name, layer, ("weight", "bias")) for name, layer in layers))


def _own_names(layer: nn.Module) -> list[str]:
    """Names of Parameters that FSDP1 may have taken out of the layer's table."""
    names = ("weight", "bias", "lora_A", "lora_B", "lora_bias", "lora_magnitude_vector")
    return [own for own in names if getattr(layer, own, None) is not None]


def check_free(function: str, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises ``LoRAStateError`` where another owns a Parameter that ``function`` would exchange for a new one."""
    for name, module in modules:
        if reason := why_not_free(module):
            raise LoRAStateError(f"{function} was called on {_quoted(name)}: {reason}")


def why_not_free(module: nn.Module) -> str | None:
    """Why ``module``'s Parameters cannot be exchanged for others, or None."""
    holder = owner(module)
    if holder is None:
        return None
    return f"{holder} holds the values of its parameters, and would not know of new ones. {_FREE[holder]}"


def _check(function: str, parts: Iterable[Part], advice: dict[str, str], fault: str, how: Any) -> None:
    contexts: dict[str, _Contexts] = {}
    for name, module, names in parts:
        holder = owner(module)
        if holder is None:
            continue
        if holder not in contexts:
            contexts[holder] = _Contexts(holder)
        if bad := [own for own in names if not how(contexts[holder])(module, own)]:
            raise LoRAStateError(
                f"{function} was called on a model where {holder} holds the values of {_quoted(name)}: {bad[0]} "
                f"{'and others ' if len(bad) > 1 else ''}{fault}. {advice[holder]}"
            )


def _quoted(name: str) -> str:
    return repr(state_name(name)) if name else "the layer"


class _Contexts:
    """The contexts of FSDP1 or ZeRO-3 that are open now, in which they have put values into modules.

    Neither owner says so where one could ask, so their open contexts are looked for: FSDP1's are generators that are
    suspended, ZeRO-3's are objects. Whether changes are written back is known there alone.
    """

    def __init__(self, holder: str) -> None:
        self._holder = holder
        self._summoned: dict[tuple[nn.Module, str], bool] = {}
        self._gathered: dict[int, bool] = {}
        if holder == FSDP1:
            for generator in [thing for thing in gc.get_objects() if type(thing) is GeneratorType]:
                if generator.gi_code.co_name == _UNSHARD and generator.gi_frame is not None:
                    self._add_summoned(generator.gi_frame.f_locals)
        elif holder == ZERO3:
            kinds = {kind for kind in object.__subclasses__() if kind.__name__ == "GatheredParameters"}
            for context in [thing for thing in gc.get_objects() if type(thing) in kinds]:
                self._add_gathered(context)

    def _add_gathered(self, context: Any) -> None:
        written = getattr(context, "enabled", False) and getattr(context, "src_rank", None) is not None
        for parameter in getattr(context, "params", ()):
            self._gathered[id(parameter)] = self._gathered.get(id(parameter), False) or written

    def _add_summoned(self, found: dict[str, Any]) -> None:
        handle, state = found.get("handle"), found.get("state")
        if handle is None or (found.get("rank0_only") and getattr(state, "rank", 0) != 0):
            return
        kept = bool(found.get("writeback")) or not handle.uses_sharded_strategy
        flat = handle.flat_param
        for own, module, *_ in (*flat._param_infos, *flat._shared_param_infos):
            self._summoned[module, own] = kept

    def here(self, module: nn.Module, own: str) -> bool:
        holder, parameter = self._holder, module._parameters.get(own)
        if own in module._parameters and parameter is None:
            return True
        if holder == FSDP1:  # Parameters that FSDP1 was told to ignore are ordinary ones
            ignored = isinstance(parameter, nn.Parameter) and not hasattr(parameter, "_fsdp_flattened")
            return ignored or (module, own) in self._summoned
        if holder == ZERO3:
            return getattr(getattr(parameter, "ds_status", None), "name", "AVAILABLE") == "AVAILABLE"
        return not isinstance(parameter, Tensor) or not value(module, own, parameter).is_meta

    def kept(self, module: nn.Module, own: str) -> bool:
        holder, parameter = self._holder, module._parameters.get(own)
        if own in module._parameters and parameter is None:
            return True
        if holder == FSDP1:
            return self._summoned.get((module, own), self.here(module, own))
        if holder == ZERO3 and hasattr(parameter, "ds_id"):
            return self.here(module, own) and self._gathered.get(id(parameter), False)
        return holder == ZERO3


def _offload_hook(module: nn.Module) -> Any:
    """accelerate's hook that takes ``module``'s values away between forwards, if it has one."""
    hook = vars(module).get("_hf_hook")
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "offload", False) and getattr(part, "weights_map", None) is not None:
            return part
    return None


def value(module: nn.Module, own: str, tensor: Tensor) -> Tensor:
    """The values of ``module``'s ``tensor`` called ``own``, detached: where accelerate has them, those."""
    hook = _offload_hook(module) if tensor.is_meta else None
    if hook is None:
        return tensor.detach()
    try:
        found = hook.weights_map[own]
    except KeyError:
        return tensor.detach()
    values: Tensor = found.detach()
    return values


def at_rest(module: nn.Module, own: str) -> Any:
    """``module``'s Parameter called ``own``, or None; one that accelerate takes away as it lies between forwards."""
    parameter, hook = getattr(module, own), _offload_hook(module)
    if parameter is None or hook is None or own not in hook.weights_map:
        return parameter
    return nn.Parameter(hook.weights_map[own].detach(), requires_grad=parameter.requires_grad)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """For the block, ``module`` has its values where accelerate takes them away; Parameters set in it are kept there.

    A new Parameter takes the place of the former one in accelerate's map, whose tensor is not written to: others that
    are tied to it see nothing. Elsewhere nothing is done.
    """
    hook = _offload_hook(module)
    if hook is None:
        yield
        return
    away = any(own is not None and own.is_meta for own in module._parameters.values())
    if away:
        hook.pre_forward(module)
    before = dict(module._parameters)
    try:
        yield
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter is not before.get(own):
                slots, key = _slot(hook.weights_map, own)
                former = slots.get(key)
                slots[key] = parameter.detach().to("cpu" if former is None else former.device)
                hook.original_devices.setdefault(own, torch.device("cpu"))
            elif parameter is None and before.get(own) is not None:
                forget(module, own)
    finally:
        if away:
            hook.post_forward(module, None)


def forget(module: nn.Module, own: str) -> None:
    """Has accelerate not put a tensor called ``own`` back, which ``module`` no longer has."""
    hook = _offload_hook(module)
    if hook is not None:
        hook.original_devices.pop(own, None)
        slots, key = _slot(hook.weights_map, own)
        slots.pop(key, None)


def _slot(weights_map: Any, own: str) -> tuple[MutableMapping[str, Tensor], str]:
    """The dictionary and the key in it, under accelerate's views of it, where a value for ``own`` is found first."""
    while hasattr(weights_map, "dataset"):  # a map that puts a prefix before the names
        weights_map, own = weights_map.dataset, weights_map.prefix + own
    return getattr(weights_map, "state_dict", weights_map), own


def dimensions(model: nn.Module) -> dict[Tensor, int]:
    """How many dimensions each Parameter has, also those that are flat or empty here, where the owner knows it."""
    found: dict[Tensor, int] = {}
    for module in model.modules():
        flat: Any = getattr(vars(module).get("_handle"), "flat_param", None)
        if getattr(flat, "_params", None) is not None:
            found.update({p: len(shape) for p, shape in zip(flat._params, flat._shapes, strict=True)})
        for parameter in module._parameters.values():
            if parameter is not None:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                found.setdefault(parameter, len(shape))
    return found
