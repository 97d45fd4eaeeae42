"""Merging, and where a merged layer keeps what: the base Parameters stay registered, the merged values act for them.

``state_dict()``, ``named_parameters()``, an optimizer and a module that is tied to the weight see the base, merged or
not. The merged values are buffers that no state dict has, ``merged_weight`` and ``merged_bias``, so that they move,
compile and are exported with the layer. Parameters around their memory stand in the layer's ``__dict__``, where
``layer.weight`` finds them before the registered ones.

The merged values of a quantised weight are quantised again. What copies, moves or loads such a layer merges it anew, so
that each package's statistics need not be followed.

FSDP, ZeRO-3 and accelerate exchange registered Parameters around each forward. What they manage holds the merged values
in them, and copies of the base's stand aside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from . import dora, fsdp, sharded, storage, telling
from .errors import LoRAStateError
from .graph_numbers import is_fixed
from .tensors import PLAIN_TENSORS
from .weights import known

if TYPE_CHECKING:
    from .layer import LoRALayer

__all__ = [
    "AGAIN",
    "BUFFERS",
    "Base",
    "acting",
    "adopt",
    "aside",
    "base_of",
    "follow",
    "merge",
    "show",
    "to_merge_again",
    "unmerge",
    "with_offset",
]

BUFFERS = {"weight": "merged_weight", "bias": "merged_bias"}
AGAIN = "_merge_again"  # in the state of a copy of a layer whose merged weight is quantised
TRAINING = "training"  # the key of what is told of training that cannot be; merging and switching off ask for it anew


class Base(nn.Module):
    """The base Parameters of a merged layer, in no registered module: the layer's own, or if ``in_place`` copies."""

    def __init__(self, layer: LoRALayer, names: tuple[str, ...], in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.error: float | None = None  # of quantising the merged weight again
        for name in names:
            self.register_parameter(name, storage.at_rest(layer, name))


@torch.no_grad()
def merge(layer: LoRALayer, quantize: bool = False) -> None:
    """What :meth:`LoRALayer.merge` says; the caller has checked that the Parameters may be changed here."""
    with storage.onloaded(layer):
        _merge_here(layer, quantize)


def _merge_here(layer: LoRALayer, quantize: bool) -> None:
    if layer.merged:
        raise LoRAStateError("merge was called on a layer that is merged already. Call unmerge() first.")
    if layer.weight.is_meta:
        raise LoRAStateError("merge was called on a layer on the meta device. Load its weights first.")
    layer.check_is_lora("merge")
    packed = known.is_packed(layer.weight) or known.is_of_package(type(layer))  # FSDP2's shards of one are plain
    if packed and (reason := _why_not_packed(layer, quantize)):
        raise LoRAStateError(reason)
    if "weight" not in layer._parameters or "bias" not in layer._parameters:
        raise LoRAStateError(
            "merge was called on a layer whose weight or bias is parametrized or pruned, so nothing can be put in "
            "its place. Call torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove "
            "first."
        )
    error = None
    if packed:
        weight, error = _merged_packed(layer)
    else:
        weight = _merged_weight(layer)
        _check_finite("weight", weight, layer.weight)
    bias = _merged_bias(layer)
    if bias is not None:
        _check_finite("bias", bias, layer.bias)
    names = ("weight",) if bias is layer.bias else ("weight", "bias")
    offloaded = storage.owner(layer) == storage.OFFLOADED
    base = Base(layer, names, in_place=offloaded or fsdp.in_place(layer))
    base.error = error
    if offloaded:  # accelerate's map takes the merged Parameters in the place of these
        exchange(layer, weight, bias)
    elif base.in_place:
        fsdp.merge_in_place(layer, base, weight, bias)
    else:
        beside(layer, base, {"weight": weight, "bias": bias})
    object.__setattr__(layer, "_base", base)
    show(layer)
    telling.forget(TRAINING)


def _why_not_packed(layer: LoRALayer, quantize: bool) -> str | None:
    """Why a layer with a quantised weight cannot be merged, in a sentence."""
    if not quantize:
        return (
            "merge was called on a layer with a quantized weight, which cannot hold W + s B A: quantizing that again "
            "may lose a small adapter. Call it with quantize=True to do that, and read merge_error; or save the "
            "adapter with save_adapter(model, folder), load it onto the model in 16 bits, and merge there."
        )
    if storage.owner(layer) is not None or fsdp.is_managed(layer):
        holder = storage.owner(layer) or "fully_shard (FSDP2)"
        return (
            f"merge was called on a layer with a quantized weight that {holder} holds, and would not know of another. "
            "Save the adapter, and merge it on the plain model."
        )
    return None


def _merged_packed(layer: LoRALayer) -> tuple[Tensor, float]:
    """The merged weight in the form of the base's, and the relative error that this makes."""
    packed = known.read(layer, layer.weight)
    magnitude = layer.lora_magnitude_vector
    norms = None if magnitude is None else layer.row_norms()
    values = packed.dequantize(torch.float32)
    values = dora.merged(values, layer.lora_A, layer.lora_B, layer.scaling, magnitude, norms)
    _check_finite("weight", values, None)
    weight = known.quantized(layer, layer.weight, values)
    made = known.read(layer, weight).dequantize(torch.float32)
    _check_finite("weight", made, None)
    error = torch.linalg.vector_norm(made.sub_(values)) / torch.linalg.vector_norm(values).clamp_min(1e-30)
    return weight, float(error)


def unmerge(layer: LoRALayer) -> None:
    """What :meth:`LoRALayer.unmerge` says, likewise."""
    base = layer._base
    if base is None:
        raise LoRAStateError("unmerge was called on a layer that is not merged. Call merge() first.")
    with storage.onloaded(layer):
        weight, bias = layer.base_weight, layer.base_bias
        object.__setattr__(layer, "_base", None)
        if not base.in_place:
            take_away(layer)
        elif storage.owner(layer) == storage.OFFLOADED:
            exchange(layer, weight, bias)
        else:
            fsdp.unmerge_in_place(layer, weight, bias)


def base_of(layer: LoRALayer) -> Base | None:
    """The base Parameters of a merged layer; None of one that is not merged."""
    base: Base | None = layer.__dict__.get("_base")
    return base


def with_offset(bias: Tensor | None, lora_bias: Tensor, scaling: float) -> Tensor:
    """bias + s b_B, (N,), in the wider of their dtypes."""
    if bias is None:
        return lora_bias * scaling
    if is_compiling() and not is_fixed(scaling):
        return bias + lora_bias * scaling  # of which alone a symbolic number stays one
    return torch.add(bias, lora_bias, alpha=scaling)


def _merged_weight(layer: LoRALayer) -> Tensor:
    """The merged weight as it is stored, in its dtype."""
    if sharded.is_sharded(layer.weight):
        parts: Tensor = sharded.merged_weight(layer)
        return parts
    magnitude = layer.lora_magnitude_vector
    norms = None if magnitude is None else layer.row_norms()
    base = layer.matrix(layer.weight)
    merged = dora.merged(base, layer.lora_A, layer.lora_B, layer.scaling, magnitude, norms)
    return layer.matrix(merged).contiguous()


def _merged_bias(layer: LoRALayer) -> Tensor | None:
    """The bias itself, or with ``lora_bias`` one with s b_B added in fp32."""
    bias: nn.Parameter | None = layer.bias
    if layer.lora_bias is None:
        return bias
    own = layer.lora_bias.dtype if known.is_packed(layer.weight) else layer.weight.dtype
    wide = torch.promote_types(own, torch.float32)
    total = with_offset(None if bias is None else bias.to(wide), layer.lora_bias.to(wide), layer.scaling)
    return total.to(own if bias is None else bias.dtype)


def _check_finite(name: str, merged: Tensor, base: Tensor | None) -> None:
    """Raises for merged values that are not finite where the base's are."""
    if sharded.is_finite(merged) or (base is not None and not sharded.is_finite(base)):
        return
    raise LoRAStateError(
        f"merging gives a {name} that is not finite in {merged.dtype}: lora_A or lora_B holds NaN or inf, or the sum "
        "overflows. Nothing was changed; look at the adapters, or merge in a wider dtype."
    )


def exchange(layer: LoRALayer, weight: Tensor, bias: Tensor | None) -> None:
    """Registers others in the place of weight and bias, which ``storage.onloaded`` then keeps."""
    for name, value in (("weight", weight), ("bias", bias)):
        own: Any = value if isinstance(value, nn.Parameter | None) else nn.Parameter(value, requires_grad=False)
        layer._parameters[name] = own


def adopt(layer: LoRALayer) -> None:
    """Arranges a merged layer as layers are now, if it comes from a pickle where merged values were the Parameters."""
    former: Any = layer._base
    if former is None or isinstance(former, Base):
        return
    merged = {name: layer._parameters[name] for name in former._parameters}
    layer._parameters.update(former._parameters)
    object.__setattr__(layer, "_base", None)
    base = Base(layer, tuple(merged), in_place=False)
    beside(layer, base, {name: value if value is None else value.detach() for name, value in merged.items()})
    object.__setattr__(layer, "_base", base)


def follow(layer: LoRALayer, dispatched: bool) -> None:
    """Keeps a merged layer whole where accelerate has ``dispatched`` it, or has taken its hook away again.

    To move a Parameter accelerate reads ``layer.weight``, the merged values, and registers those: the base comes back.
    """
    base = layer.__dict__.get("_base")
    if base is None or base.in_place:
        return
    for name, kept in base._parameters.items():
        now = layer._parameters.get(name)
        if dispatched and now is not kept and not (now is None or now.is_meta or kept.is_meta):
            moved = kept.detach().to(now.device)
            layer._parameters[name] = nn.Parameter(moved, requires_grad=kept.requires_grad)
    show(layer)


def beside(layer: LoRALayer, base: Base, merged: dict[str, Any]) -> None:
    """Puts the merged values of what ``base`` holds beside it."""
    others = dict(layer._buffers)
    layer._buffers.clear()  # torch.export counts the places of buffers that are None, so these come first
    for name in base._parameters:
        layer.register_buffer(BUFFERS[name], merged[name], persistent=False)
    layer._buffers.update(others)


def show(layer: LoRALayer) -> None:
    """Has ``layer.weight``, and ``layer.bias`` where it is merged, read what acts; after each change of either."""
    base = layer._base
    if base is None or base.in_place or layer.__dict__.get("_is_fsdp_managed_module", False):
        return
    for name, buffer in BUFFERS.items():
        value = layer._buffers.get(buffer)
        if value is not None:
            packed = known.is_packed(value)  # the package's own Parameter, which is one already
            layer.__dict__[name] = value if packed else nn.Parameter(value, requires_grad=False)
            base.register_parameter(name, layer._parameters.get(name))


def take_away(layer: LoRALayer) -> None:
    """Undoes :func:`beside`."""
    for name, buffer in BUFFERS.items():
        layer.__dict__.pop(name, None)
        layer._buffers.pop(buffer, None)
        layer._non_persistent_buffers_set.discard(buffer)
        storage.forget(layer, buffer)


def acting(layer: LoRALayer, on: bool) -> tuple[Any, Any]:
    """Weight and bias of a layer that is merged, if it is switched ``on``, or else off.

    Raises:
        LoRAStateError: the layer is merged, and its base or its merged weight was exchanged behind its back.
    """
    base = layer._base
    if layer.training and layer.lora_B.requires_grad and torch.is_grad_enabled() and not is_compiling():
        tell_of_training(layer)
    if base is None:
        return layer.weight, layer.bias
    if base.in_place:
        if on:
            return layer.weight, layer.bias
        kept_weight, kept_bias = layer.base_weight, layer.base_bias
        return fsdp.kept_aside(kept_weight, layer.weight), fsdp.kept_aside(kept_bias, layer.bias)
    if is_compiling() and not is_dynamo_compiling() and known.is_packed(layer.__dict__.get("weight")):
        raise _merged_codes()
    marks = layer.__dict__
    replica = "_is_replica" in marks
    own: Any = marks if replica else layer._parameters  # DataParallel's replicas have no Parameters, but tensors
    outside = "_is_fsdp_managed_module" in marks or "_hf_hook" in marks  # FSDP and accelerate exchange Parameters
    if not outside and not replica and not is_compiling():
        _check_unchanged(layer, base)
    # One that is parametrized or pruned is no Parameter; ``get`` would look for it in each call.
    bias: Any = own["bias"] if "bias" in own else layer.bias  # noqa: SIM401
    if not on:
        return own["weight"], bias
    weight: Any = layer._buffers["merged_weight"]
    bias = layer._buffers.get("merged_bias", bias)
    if known.is_packed(weight):
        return weight, bias
    if outside and (now := own.get("weight")) is not None and not now.is_meta:  # gathered, in FSDP2's dtype
        weight, bias = weight.to(now.dtype), None if bias is None else bias.to(now.dtype)
    return weight, bias


def _merged_codes() -> LoRAStateError:
    return LoRAStateError(
        "torch.export was called on a layer whose merged weight is quantised again: the exporter takes its codes for a "
        "plain tensor's, without the scales. Call unmerge() or unmerge_lora(model) first; the program then has the "
        "base and the adapter, and nothing is rounded again."
    )


def _check_unchanged(layer: LoRALayer, base: Base) -> None:
    kept, held = base._parameters["weight"], layer._buffers["merged_weight"]
    now: Any = layer._parameters.get("weight")
    shown: Any = layer.__dict__.get("weight")
    if sharded.is_sharded(now):
        return  # distributed since: the same values, in parts
    compared = not torch._C._are_functorch_transforms_active()  # in vmap and the like no memory can be asked for
    if now is not kept and not (compared and _are_plain(now, kept) and now.is_set_to(kept)):
        raise _exchanged()
    if compared and _are_plain(shown, held) and not shown.is_set_to(held):
        raise _exchanged()


def _are_plain(one: Any, other: Any) -> bool:
    return type(one) in PLAIN_TENSORS and type(other) in PLAIN_TENSORS


def _exchanged() -> LoRAStateError:
    return LoRAStateError(
        "the weight of a merged layer was exchanged (functional_call, a parametrization, weight.data = ... and the "
        "like do that), and the merged values are those of the former one. Call unmerge() first, exchange the "
        "weight and merge() again; or call restore_linear(model) for a plain nn.Linear with the merged weight."
    )


def to_merge_again(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a layer, with what tells a copy of it to merge again in the place of its merged values."""
    merged = set(BUFFERS.values())
    buffers = {name: value for name, value in state["_buffers"].items() if name not in merged}
    others = state["_non_persistent_buffers_set"] - merged
    return state | {"_buffers": buffers, "_non_persistent_buffers_set": others, "_base": None, AGAIN: True}


class aside:
    """A merged layer with a quantised weight, unmerged for a block and merged anew after it; others as they are."""

    def __init__(self, layer: LoRALayer) -> None:
        base = base_of(layer)
        self.layer = layer if base is not None and base.error is not None else None

    def __enter__(self) -> None:
        if self.layer is not None:
            unmerge(self.layer)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.layer is not None and kind is None:
            merge(self.layer, quantize=True)


def tell_of_training(layer: Any) -> None:
    """Warns once that ``layer``, linear or experts, trains while its adapter is merged or off."""
    if layer.merged:
        telling.once(
            TRAINING,
            "a layer runs in training mode while its adapter is merged: lora_A and lora_B get no gradients, and "
            "dropout does not act. Call unmerge_lora(model) before training, or model.eval() to use it as it is.",
            stacklevel=4,
        )
    elif layer._left_off:
        telling.once(
            TRAINING,
            "a layer runs in training mode while its adapter is switched off by enable_lora(False): lora_A and lora_B "
            "get no gradients. Call enable_lora(True) before training, or model.eval() to use the base as it is.",
            stacklevel=4,
        )
