"""What other code assigns to a LoRA layer that it takes for an ``nn.Linear``; and a module that takes its place.

A weight of the same shape is the new base weight. One with other rows is taken where it is the former one resized, as
transformers' ``resize_token_embeddings`` does: the adapter is resized at its end, with zeros. While a layer is merged,
nothing that its merged values come from can be exchanged. All else is an error, for the numbers would be wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from . import dora, initialisation, merging, pissa, sharded
from .errors import InvalidArgumentError, LoRAKernelsWarning, LoRAStateError

if TYPE_CHECKING:
    from .layer import LoRALayer

__all__ = ["HOOK", "WATCHED", "allowed", "assign", "check_removable", "check_restorable", "has_moved", "watch"]

_SIZES = ("out_features", "nf")
_PARAMETERS = ("weight", "bias", "lora_A", "lora_B", "lora_bias", "lora_magnitude_vector")
_MERGED_FROM = (*_PARAMETERS, "scaling")
HOOK = "_hf_hook"  # accelerate's, which it sets after it has moved a module's tensors
WATCHED = frozenset((*_SIZES, *_MERGED_FROM, HOOK))
_LOADING = "_loading"  # in the layer's __dict__ while load_state_dict assigns, which sees to all that follows itself


@contextmanager
def allowed(layer: LoRALayer) -> Iterator[None]:
    """Within the block Parameters are assigned as to any module."""
    layer.__dict__[_LOADING] = True
    try:
        yield
    finally:
        del layer.__dict__[_LOADING]


def assign(layer: LoRALayer, name: str, value: Any) -> None:
    """``layer.name = value`` for a name of ``WATCHED``.

    Raises:
        InvalidArgumentError: a weight of a shape that the adapter does not fit.
        LoRAStateError: the layer is merged; or its adapter started as a part of the weight (PiSSA, OLoRA).
    """
    managed = _is_managed(layer)
    if (managed or sharded.is_sharded(value)) and name in layer._parameters:
        layer._parameters[name] = value  # FSDP2 and tensor parallelism lay out the same values otherwise
        layer.__dict__.pop(name, None)  # FSDP2 reads its own by the name
    elif _LOADING in layer.__dict__ or (managed and name in _PARAMETERS):  # FSDP1 deletes a view and sets another
        nn.Module.__setattr__(layer, name, value)
    elif name in _SIZES:
        nn.Module.__setattr__(layer, name, value)
        _follow(layer, value)
    elif name == HOOK:
        nn.Module.__setattr__(layer, name, value)
        merging.follow(layer, dispatched=True)
    elif layer.merged:
        _assign_merged(layer, name, value)
    elif name == "weight" and isinstance(value, nn.Parameter):
        _assign_weight(layer, value)
    else:
        nn.Module.__setattr__(layer, name, value)


def _is_managed(layer: LoRALayer) -> bool:
    return bool(layer.__dict__.get("_is_fsdp_managed_module", False))


def _assign_merged(layer: LoRALayer, name: str, value: Any) -> None:
    base = merging.base_of(layer)
    assert base is not None
    same = value is layer._parameters.get(name) or value is layer.__dict__.get(name)
    if same and value is not None:
        _follow(layer, _rows(layer, layer.base_weight))
    elif name == "bias" and "bias" not in base._parameters:
        nn.Module.__setattr__(layer, name, value)
    elif value is not layer._parameters.get(name, layer) and (name != "scaling" or value != layer.scaling):
        raise _while_merged(f"{name} was assigned to")


def check_removable(layer: LoRALayer, name: str) -> None:
    """Raises where ``layer.name`` is to be removed, as a parametrization does, and a merged layer needs it."""
    base = merging.base_of(layer)
    if base is None or (base.in_place and _is_managed(layer)):  # FSDP1 takes its views away, and merged into them
        return
    if name in _MERGED_FROM and (name != "bias" or "bias" in base._parameters):
        raise _while_merged(f"{name} was to be parametrized, pruned, distributed or removed")


def check_restorable(function: str, layers: Iterable[tuple[str, LoRALayer]]) -> None:
    """Raises where a plain layer could not hold what ``layers`` have, named: a weight or bias that is no Parameter.

    Pruning computes what it prunes in a hook, which the plain layer would keep: of an adapter too.
    """
    for place, layer in layers:
        own = layer._parameters
        computed = [name for name in ("weight", "bias") if name not in own]
        if computed := computed + [name for name in _PARAMETERS[2:] if f"{name}_orig" in own]:
            raise LoRAStateError(
                f"{function} was called on a layer{f' ({place!r})' if place else ''} whose {' and '.join(computed)} is "
                "parametrized, pruned or no Parameter, which a plain layer cannot hold. Call "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove first; a plain "
                "tensor becomes a Parameter by layer.weight = nn.Parameter(layer.weight)."
            )


def _while_merged(what: str) -> LoRAStateError:
    return LoRAStateError(
        f"{what} on a merged layer, whose merged values come from the former one. Call unmerge() first, then do it and "
        "merge() again; or call restore_linear(model): the plain nn.Linear with the merged weight takes any."
    )


def _assign_weight(layer: LoRALayer, value: nn.Parameter) -> None:
    rows = _checked_rows(layer, value)
    known = _is_known(layer, value)
    if not known and pissa.is_residual(layer):
        raise LoRAStateError(
            f"a weight was assigned to a layer whose adapter started as a part of it ({layer.init_lora_weights!r}): "
            "the layer keeps the rest, and which of both was meant cannot be told. Load it by load_state_dict, or "
            "call restore_linear(model) first and replace_linear after."
        )
    nn.Module.__setattr__(layer, "weight", value)
    if rows != layer.lora_B.shape[0]:
        _resize(layer, rows)
    elif not known and layer.lora_magnitude_vector is not None:
        _set_magnitude_anew(layer)


def _is_known(layer: LoRALayer, value: nn.Parameter) -> bool:
    """Whether ``value`` is the layer's weight, as far as it goes; or nothing can be said, where one has no values."""
    former = layer._parameters.get("weight")
    if former is None or former is value or former.is_meta or value.is_meta:
        return True
    sharding = any(map(sharded.is_sharded, (value, former)))
    return not sharding and value.dim() == former.dim() and _same_rows(layer, value, former)


def _rows(layer: LoRALayer, weight: Tensor) -> int:
    return layer.matrix(weight).shape[0] if weight.dim() == 2 else -1


def _checked_rows(layer: LoRALayer, value: nn.Parameter) -> int:
    """How many outputs ``value`` has; raises where the adapter neither fits it nor can be made to."""
    (n, r), k = layer.lora_B.shape, layer.lora_A.shape[1]
    given = layer.matrix(value) if value.dim() == 2 else value
    if given.shape == (n, k):
        return n
    plain = not any(map(sharded.is_sharded, (value, layer.lora_B)))
    if plain and given.dim() == 2 and given.shape[1] == k and _is_known(layer, value):
        return given.shape[0]
    raise InvalidArgumentError(
        f"a weight of shape {tuple(value.shape)} was assigned to a layer whose adapter of rank {r} is for {k} inputs "
        f"and {n} outputs. Allowed is that shape, or the layer's own weight with outputs added or removed at the end. "
        "Call restore_linear(model) first, and replace_linear after."
    )


@torch.no_grad()
def _same_rows(layer: LoRALayer, one: Tensor, other: Tensor) -> bool:
    """Whether two weights as they are stored agree in the outputs that both have."""
    left, right = layer.matrix(one), layer.matrix(other)
    n = min(left.shape[0], right.shape[0])
    return left.shape[1] == right.shape[1] and torch.equal(left[:n].to(right), right[:n])


def _follow(layer: LoRALayer, rows: int) -> None:
    """Resizes the adapter where the weight has been, in place: the embedding that it is tied to was."""
    weight = layer._parameters.get("weight")
    if weight is None or sharded.is_sharded(weight) or rows == layer.lora_B.shape[0]:
        return
    if weight.dim() != 2 or layer.matrix(weight).shape != (rows, layer.lora_A.shape[1]):
        return
    merged = layer.merged
    if merged:
        merging.unmerge(layer)
    _resize(layer, rows)
    if merged:
        merging.merge(layer)


@torch.no_grad()
def _resize(layer: LoRALayer, rows: int) -> None:
    """Has the adapter give ``rows`` outputs: those at the end are removed, or added with zeros in B."""
    former = layer.lora_B.shape[0]
    parts = {"lora_B": layer.lora_B, "lora_bias": layer.lora_bias, **layer.initial}
    parts.pop(pissa.NAMES[0], None)
    for name, tensor in {**parts, "lora_magnitude_vector": layer.lora_magnitude_vector}.items():
        if tensor is None:
            continue
        tensor.grad, data = None, _resized(tensor, rows)
        other = torch.float32 if tensor.dtype is torch.float64 else torch.float64
        tensor.data = data.new_empty(0, dtype=other)  # or autograd, where a loss is kept, goes by the former shape
        tensor.data = data
        if name == "lora_magnitude_vector" and rows > former and not layer.weight.is_meta:
            tensor[former:] = layer.row_norms()[former:].to(tensor)
    if (bias := layer.base_bias) is not None and bias.shape[0] == former:
        bias.data = _resized(bias, rows)
    for name in _SIZES:
        if name in layer.__dict__:
            layer.__dict__[name] = rows


def _resized(tensor: Tensor, rows: int) -> Tensor:
    kept = tensor.detach()[:rows]
    return torch.cat([kept, kept.new_zeros(rows - kept.shape[0], *kept.shape[1:])])


@torch.no_grad()
def _set_magnitude_anew(layer: LoRALayer) -> None:
    """DoRA starts as the base layer: for another base its magnitudes are others, unless they were trained."""
    magnitude = layer.lora_magnitude_vector
    assert magnitude is not None
    if magnitude.is_meta:
        return
    if has_moved(layer):
        warnings.warn(
            "a weight was assigned to a layer whose DoRA adapter is trained. Its lora_magnitude_vector is kept, which "
            "was trained for the former weight's rows; reset_lora_parameters() starts the adapter anew.",
            LoRAKernelsWarning,
            stacklevel=5,
        )
    elif sharded.is_sharded(layer.weight):
        layer.reset_magnitude()
    else:
        weight = layer.matrix(layer.weight)
        a, b = (adapter.to(weight.device) for adapter in (layer.lora_A, layer.lora_B))
        magnitude.copy_(dora.row_norms(weight, a, b, layer.scaling))


@torch.no_grad()
def has_moved(layer: LoRALayer) -> bool:
    """Whether the adapter adds anything to the base as it was given: dropping it would lose that."""
    own: list[Any] = [p for p in (layer.lora_A, layer.lora_B, layer.lora_bias) if p is not None]
    if any(p.is_meta for p in own):
        return False
    own = [p.full_tensor() if sharded.is_sharded(p) else p for p in own]
    if pissa.is_residual(layer):
        starts: list[Any] = list(layer.initial.values())
        starts = [p.full_tensor() if sharded.is_sharded(p) else p for p in starts]
        return not all(torch.equal(p, start.to(p)) for p, start in zip(own[:2], starts, strict=True))
    if initialisation.kind_of(layer.init_lora_weights) == "orthogonal":  # neither is zero, but the product is
        a, b = (p.double() for p in own[:2])
        product = ((b.t() @ b) * (a @ a.t())).sum().clamp(min=0).sqrt()
        rounding = 4 * layer.r**0.5 * torch.finfo(own[1].dtype).eps * a.norm() * b.norm()
        return bool(product > rounding) or any(bool(torch.count_nonzero(p)) for p in own[2:])
    return any(bool(torch.count_nonzero(p)) for p in own[1:])


# A module that takes a layer's place

_watched: type[LoRALayer] | None = None  # LoRALayer itself, from the first layer of a process on


def watch(kind: type[LoRALayer]) -> None:
    """Has PyTorch tell of modules that are put into others, in the place of a ``kind`` too."""
    global _watched
    if _watched is None:
        _watched = kind
        register_module_module_registration_hook(_on_registration)


def _on_registration(parent: nn.Module, name: str, module: Any) -> Any:
    """A resized copy of a LoRA layer gives its weight to the layer, which stays; of another loss it tells."""
    if name not in parent._modules:  # this is called for each module that is put into any other
        return None
    former: Any = parent._modules[name]
    if (
        _watched is None
        or not isinstance(former, _watched)
        or module is former
        or getattr(parent, "_is_replica", False)
    ):
        return None
    if isinstance(module, nn.Module) and any(part is former for part in module.modules()):
        return None  # it is wrapped
    plain: type = type(module)
    if plain is nn.Linear and issubclass(type(former), plain) and _take_over(former, module):
        return former
    if not former.merged and has_moved(former):
        warnings.warn(
            f"{type(parent).__name__}.{name} was a LoRA layer, and a {type(module).__name__} takes its place: the "
            "trained adapter is dropped. Call merge_lora(model) and restore_linear(model) first to keep it.",
            LoRAKernelsWarning,
            stacklevel=3,
        )
    return None


@torch.no_grad()
def _take_over(layer: LoRALayer, linear: Any) -> bool:
    """Takes ``linear``'s weight and bias, if they are the layer's with outputs added or removed at the end."""
    weight: nn.Parameter = linear.weight
    bias: nn.Parameter | None = linear.bias
    rows, base = weight.shape[0], merging.base_of(layer)
    plain = not any(sharded.is_sharded(t) or t.is_meta for t in (weight, layer.weight, layer.lora_B))
    if not plain or (bias is None) != (layer.bias is None) or (base is not None and base.in_place):
        return False
    if rows == layer.lora_B.shape[0] or not _same_rows(layer, weight, layer.weight):
        return False
    if base is not None:  # the added rows are the base's too: B's are zero
        weight = _continued(layer.base_weight, weight)
        bias = None if layer.base_bias is None or bias is None else _continued(layer.base_bias, bias)
        merging.unmerge(layer)
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    _resize(layer, rows)
    if base is not None:
        merging.merge(layer)
    return True


def _continued(former: nn.Parameter, resized: Tensor) -> nn.Parameter:
    """``former`` with as many rows as ``resized``, from where it ends that one's; itself where it has as many."""
    n = former.shape[0]
    if n == resized.shape[0]:
        return former
    values = torch.cat([former[: resized.shape[0]], resized[n:].to(former)])
    return nn.Parameter(values, requires_grad=former.requires_grad)
