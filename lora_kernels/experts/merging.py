"""Merging stacked experts: W + s B A of each expert, in fp32 and rounded once, beside the Parameters that stay.

As with a linear layer the base Parameter stays registered, for ``state_dict()``, optimizers and what is tied to it. The
merged values are buffers that no state dict has, and Parameters around their memory stand in the module's ``__dict__``,
where the module's own forward finds them first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import dora, storage, telling
from .. import merging as of_linear
from ..errors import LoRAStateError
from ..tensors import is_plain
from .held import is_quantised
from .run import stacked

if TYPE_CHECKING:
    from .layer import FusedLoRAExperts

__all__ = ["buffer_name", "merge", "merged_values", "show", "take_away", "unmerge"]


def buffer_name(name: str) -> str:
    """What the merged values of the Parameter called ``name`` are called."""
    return f"merged_{name}"


@torch.no_grad()
def merge(layer: FusedLoRAExperts) -> None:
    """What :meth:`FusedLoRAExperts.merge` says."""
    if layer.merged:
        raise LoRAStateError("merge was called on experts that are merged already. Call unmerge() first.")
    own = list(layer.options)
    storage.check_here("merge", [("", part, own) for part in (layer, layer.lora_A, layer.lora_B)])
    merged = {name: _merged(layer, name) for name in layer.options}
    for name, values in merged.items():
        layer.register_buffer(buffer_name(name), values, persistent=False)
    layer.__dict__["_merged"] = True
    show(layer)
    telling.forget(of_linear.TRAINING)


def unmerge(layer: FusedLoRAExperts) -> None:
    """What :meth:`FusedLoRAExperts.unmerge` says."""
    if not layer.merged:
        raise LoRAStateError("unmerge was called on experts that are not merged. Call merge() first.")
    take_away(layer)


def _merged(layer: FusedLoRAExperts, name: str) -> Tensor:
    """The merged weight as it is stored; one expert is in fp32 at a time."""
    if is_quantised(layer, name):
        raise LoRAStateError(
            f"merge was called on experts whose {name} is quantized, and stacked experts are not quantized again. Save "
            "the adapter by save_adapter(model, folder), load it onto the model in 16 bits, and merge there."
        )
    stored = layer.get_parameter(name)
    a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling(name)
    if stored.is_meta or a.is_meta:
        raise LoRAStateError("merge was called on experts on the meta device. Load their weights first.")
    if not is_plain(stored):
        raise LoRAStateError(
            f"merge was called on experts whose {name} is a {type(stored).__name__}, sharded over processes. Save the "
            "adapter by save_adapter(model, folder), and merge it into the whole model in one process."
        )
    merged = torch.empty_like(stored)
    rows = merged.transpose(1, 2) if getattr(layer, "is_transposed", False) else merged
    whole = stacked(layer, name)
    assert isinstance(whole, Tensor)
    for e, weight in enumerate(whole):
        rows[e] = dora.merged(weight, a[e], b[e], scaling, None, None)
        if not bool(torch.isfinite(rows[e]).all()) and bool(torch.isfinite(weight).all()):
            raise LoRAStateError(
                f"merging gives {name} of expert {e} values that are not finite in {merged.dtype}: lora_A or lora_B "
                "holds NaN or inf, or the sum overflows. Nothing was changed; look at the adapters, or merge in a "
                "wider dtype."
            )
    return merged


def merged_values(layer: FusedLoRAExperts) -> dict[str, Tensor]:
    """The merged weights by the names of their Parameters."""
    held: Mapping[str, Tensor | None] = layer._buffers
    found = {name: held.get(buffer_name(name)) for name in layer.options}
    return {name: values for name, values in found.items() if values is not None}


def show(layer: FusedLoRAExperts) -> None:
    """Has the names of merged Parameters read what acts; after each change of the buffers."""
    for name, values in merged_values(layer).items():
        layer.__dict__[name] = nn.Parameter(values, requires_grad=False)


def take_away(layer: FusedLoRAExperts) -> None:
    """Undoes :func:`merge`: the registered Parameters act again."""
    layer.__dict__.pop("_merged", None)
    for name in layer.options:
        layer.__dict__.pop(name, None)
        layer._buffers.pop(buffer_name(name), None)
        layer._non_persistent_buffers_set.discard(buffer_name(name))
