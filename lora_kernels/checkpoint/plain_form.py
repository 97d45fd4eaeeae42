"""A layer's adapter as PEFT's files hold it: plain LoRA beside the untouched base, its scaling not negative."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import storage
from ..config import scaling_of
from ..errors import LoRAStateError
from ..layer import LoRALayer
from ..pissa import initial_scaling
from ..sharded import is_sharded

__all__ = ["NAMES", "PlainForm", "plain_form", "whole"]

NAMES = {  # ours by PEFT's
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
}


@dataclass(frozen=True)
class PlainForm:
    """What is written of a layer.

    Attributes:
        r: the rank.
        scaling: what B A is multiplied by.
        lora_alpha: the layer's own alpha, or None where it does not give ``scaling`` with this rank.
        use_rslora: how the layer makes a scaling of it.
        tensors: by our names of the Parameters.
    """

    r: int
    scaling: float
    lora_alpha: float | None
    use_rslora: bool
    tensors: dict[str, Tensor]

    def alpha(self, use_rslora: bool) -> float:
        """The alpha that gives the scaling, whichever way that came about."""
        if self.lora_alpha is not None and use_rslora == self.use_rslora:
            return self.lora_alpha
        return self.scaling * (math.sqrt(self.r) if use_rslora else self.r)


def plain_form(name: str, layer: LoRALayer, function: str) -> PlainForm:
    """The adapter of ``layer``, called ``name``, for ``function``.

    A negative scaling is written as a negative B (and bias of B). With PiSSA and OLoRA the base has lost s0 B0 A0, so
    what is added to the untouched one is ``s B A - s0 B0 A0 = s0 [s/s0 B, -B0] [A; A0]``: rank 2 r. DoRA scales the
    rows of W plus that, which is the same sum, so its magnitudes stay.

    Raises:
        LoRAStateError: the scaling is not finite, an activation stands between A and B, a tensor is parametrized or
            pruned, or one that is computed with is not here; see :func:`whole`.
    """
    layer.check_is_lora(function)
    if not math.isfinite(layer.scaling):
        raise LoRAStateError(f"the scaling of {name!r} is {layer.scaling}, which no file can hold. Set it first.")
    held = layer.adapter | layer.initial
    held = {own: storage.value(layer, own, tensor) for own, tensor in held.items()}
    tensors = {own: held[own] for own in layer.adapter}
    if computed := [own for own in tensors if own not in NAMES.values()]:
        raise LoRAStateError(
            f"{name}.{computed[0]} is no tensor of PEFT's files: the layer's own is computed from it. Call "
            "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove first."
        )
    alpha = layer.lora_alpha if layer.scaling == scaling_of(layer.r, layer.lora_alpha, layer.use_rslora) else None
    s, s0 = layer.scaling, initial_scaling(layer)
    if s0 is None:
        if s < 0:
            tensors |= {own: -tensors[own] for own in ("lora_B", "lora_bias") if own in tensors}
        return PlainForm(layer.r, abs(s), alpha, layer.use_rslora, tensors)
    here = {own: whole(f"{name}.{own}", tensor) for own, tensor in held.items()}
    tensors["lora_A"] = torch.cat([here["lora_A"], here["lora_initial_A"]])
    tensors["lora_B"] = torch.cat([here["lora_B"] * (s / s0), -here["lora_initial_B"]], dim=1)
    return PlainForm(2 * layer.r, s0, None, layer.use_rslora, tensors)


def whole(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` detached; a sharded one (DTensor) is gathered, which all its processes must do at once.

    Raises:
        LoRAStateError: its values are not, or not all, here.
    """
    tensor = tensor.detach()
    if is_sharded(tensor) and not tensor.is_meta:
        sharded: Any = tensor
        tensor = sharded.full_tensor()
    if tensor.is_meta:
        raise LoRAStateError(f"{name} is on the meta device and has no values. Load the model's weights first.")
    if ".lora_" in name and tensor.numel() == 0:
        raise LoRAStateError(
            f"{name} is empty: something else holds its values. Save within its context that gathers the parameters."
        )
    return tensor.contiguous() if tensor.layout == torch.strided else tensor
