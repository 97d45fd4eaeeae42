"""PEFT's DoRA on the fused operators: when it may run so, and its gains.

PEFT adds active adapters one after the other onto the result r = x Wᵀ + b. Its DoRA for linear layers makes of it

    r + (g - 1) (r - b) + g s B A x = g (r - b + s B A x) + b,      g = magnitude / ‖W + s B A‖, row by row,

without dropout: all that came before it is scaled too, which is one fused product of all adapters if DoRA comes last.
With dropout d = drop(x) it makes r + (g - 1) d Wᵀ + g s B A d, which is ``lora_kernels.gate.run_branch`` if r is the
base's alone. The norm is a constant to the gradient, and of this adapter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import variants
from torch import Tensor, nn

from .. import dora
from ..dispatch import COMPUTE_DTYPES
from ..weights.packed import Packed

__all__ = ["gains", "is_dora", "why_magnitude", "why_together"]

_VARIANT = getattr(variants, "DoraLinearVariant", None)  # so called in PEFT 0.16 to 0.21; without it none is DoRA
_MAGNITUDES = getattr(peft_dora, "DoraLinearLayer", None)


def is_dora(layer: Any, adapter: str) -> bool:
    """Whether ``adapter`` of ``layer`` is exactly PEFT's DoRA for linear layers, and no class derived from it."""
    return adapter in layer.lora_variant and type(layer.lora_variant[adapter]) is _VARIANT


def why_magnitude(layer: Any, adapter: str, transposed: bool) -> str | None:
    """Why the magnitudes of a DoRA ``adapter`` are PEFT's own matter; ``transposed``: the weight is stored (K, N)."""
    module = layer._modules["lora_magnitude_vector"]._modules[adapter]
    if type(module) is not _MAGNITUDES or bool(module.fan_in_fan_out) != transposed:
        return "its magnitudes are not in PEFT's own layer for a weight that is stored so"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a module within it has hooks"
    if "forward" in module.__dict__ or layer._modules["lora_B"]._modules[adapter].bias is not None:
        return "its magnitudes have a forward of their own, or lora_B a bias"
    magnitude, weight = module.weight, layer._modules["base_layer"].weight
    if type(magnitude) not in (Tensor, nn.Parameter) or magnitude.dtype not in COMPUTE_DTYPES:
        return "its magnitudes are not a plain vector"
    if magnitude.shape != (layer.out_features,) or magnitude.device != weight.device:
        return "its magnitudes are not a vector on the weight's device (PEFT's ephemeral offload)"
    return None


def why_together(layer: Any, x: Tensor, adapters: Sequence[str], dropout: bool) -> str | None:
    """Why these active adapters, some of them DoRA, are not one fused product: see the module's text."""
    ours = [is_dora(layer, name) for name in adapters]
    if not any(ours):
        return None
    if x.dim() == 1:
        return "the input is one vector, to whose output PEFT's DoRA adds a dimension"
    if len(adapters) == 1:
        return None
    if any(ours[:-1]):
        return "a DoRA adapter acts before other active adapters, and is to leave those unscaled"
    modules = layer._modules["lora_B"]._modules
    if dropout or any(modules[name].bias is not None for name in adapters):
        return "a DoRA adapter acts together with others, with dropout or a bias of lora_B"
    return None


def gains(layer: Any, adapter: str, weight: Any, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """magnitude / ‖W + s B A‖ (N,) for W (N, K), A (R, K), B (N, R); within PEFT's ``DoraCaching`` as that keeps it.

    PEFT's context keeps a layer's norm while it evaluates, in the layer, until the context is left or it trains; a
    weight that is written to meanwhile is not seen. Older versions of PEFT have none.
    """
    module = layer._modules["lora_magnitude_vector"]._modules[adapter]
    caching = getattr(peft_dora, "ENABLE_DORA_CACHING", False) and not module.training
    key = f"weight-norm-{adapter}"
    norms = module._cache_get(key, None) if caching else None
    if norms is None:
        values = weight.dequantize() if type(weight) is Packed else weight
        norms = dora.row_norms(values, lora_a, lora_b, scaling)
        if caching:
            module._cache_store(key, norms)
        elif getattr(module, "_dora_cache", None):
            module._cache_clear()
    return dora.gain(module.weight, norms)
