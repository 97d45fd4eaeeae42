"""Which single modules a LoRA layer can take the place of, and why not the others."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import storage
from .dispatch import COMPUTE_DTYPES

__all__ = ["is_conv1d", "why_not_replaceable"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is exactly transformers' ``Conv1D``: a linear layer whose weight is stored (K, N).

    Nothing is imported: a model that has one has loaded its class.
    """
    return type(module) is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def why_not_replaceable(module: nn.Module) -> str | None:
    """A sentence that says why ``module`` cannot become a LoRA layer, or None if it can."""
    kind = type(module).__name__
    if kind == "Linear" and type(module) is not nn.Linear:  # a quantized one, for example
        kind = f"{type(module).__module__}.{kind}"
    if parametrize.is_parametrized(module):
        return f"{kind} has parametrized weights: call torch.nn.utils.parametrize.remove_parametrizations first."
    if type(module) is not nn.Linear and not is_conv1d(module):
        return (
            f"{kind} is not a plain torch.nn.Linear, and its own behaviour would be lost. Replace it with an nn.Linear "
            "first, or exclude it."
        )
    if reason := storage.why_not_free(module):
        return f"{kind} cannot be replaced: {reason}"
    if "forward" in vars(module):
        return (
            f"{kind} has a forward of its own on the instance (accelerate's offloading does that), and it would be "
            "lost. Remove it first, with accelerate.hooks.remove_hook_from_module for example."
        )
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{kind} computes its weight by a hook (weight_norm, spectral_norm, pruning): remove that first."
    if not weight.dtype.is_floating_point or weight.dtype not in COMPUTE_DTYPES or _is_quantized(weight):
        return (
            f"{kind} has a quantized weight ({type(weight.data).__name__}, {weight.dtype}): only fp16, bf16, fp32 and "
            "fp64 weights are supported. Dequantize it first."
        )
    if type(weight.data).__name__ == "DTensor" or getattr(module, "_is_fsdp_managed_module", False):
        return f"{kind} has a sharded weight (DTensor): replace it first, then call parallelize_module or fully_shard."
    expected: tuple[Any, ...] = (
        (module.nx, module.nf) if is_conv1d(module) else (module.out_features, module.in_features)
    )
    if weight.dim() != 2 or weight.shape != expected:
        return (
            f"{kind} has a weight of shape {tuple(weight.shape)} where {expected} is expected: it is sharded, packed "
            "or not initialised. Materialise it first."
        )
    return None


def _is_quantized(weight: Tensor) -> bool:
    """Tensor subclasses that are not plain storage (torchao and others) hold something else than their dtype says."""
    inner = weight.data
    return (
        weight.is_quantized
        or (type(inner) not in (Tensor, nn.Parameter) and hasattr(inner, "dequantize_weight"))
        or (type(inner).__module__.startswith(("torchao", "bitsandbytes")))
    )
