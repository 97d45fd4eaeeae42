"""When the fused operators may run PEFT's ``lora.Linear``, and the reason why not otherwise.

All of it is asked on each call, for adapters, hooks, dtypes and modes come and go. A reason names what PEFT itself must
do; it is composed only where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from ..dispatch import COMPUTE_DTYPES
from ..replaceable import computes_otherwise
from ..tensors import PLAIN_TENSORS, is_plain
from ..weights import known
from . import dora

__all__ = [
    "hooked",
    "is_transposed",
    "own_parameter",
    "plain_parts",
    "why_adapter",
    "why_base",
    "why_call",
    "why_dtypes",
    "why_weight",
]


_KNOWN_ARGUMENTS = {"adapter_names", "alora_offsets"}  # what PEFT's hooks add to a call


# Asked on each call: to look them up takes as long as to call them.
_is_transforming = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def plain_parts(layer: Any, name: Any, x: Any) -> tuple[Any, Any, Any, Any, float, float] | None:
    """W, A, B, bias, s and p of a call with ``x`` alone, on which the adapter ``name`` acts alone, where none of the
    reasons here keeps it from the fused operators.

    Most calls are such: plain Parameters, an ``nn.Linear``, nothing in between. All is asked in the least host time, so
    None says only that the call is to be looked at closer.
    """
    if (
        type(x) not in PLAIN_TENSORS
        or is_compiling()
        or _is_transforming()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or torch_module._has_any_global_hook()
    ):
        return None
    modules = layer._modules
    base = modules["base_layer"]
    try:
        of_a, of_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        lora_a, lora_b = of_a._parameters["weight"], of_b._parameters["weight"]
        biased = of_a._parameters["bias"] is not None or of_b._parameters["bias"] is not None
    except KeyError:  # no such adapter, or a parametrization has put something else in a Parameter's place
        return None
    linear, held, dtype = nn.Linear, nn.Parameter, x.dtype
    if not (
        type(base) is type(of_a) is type(of_b) is linear
        and type(weight) is type(lora_a) is type(lora_b) is held
        and not biased
        and (bias is None or type(bias) is held)
        and weight.dtype is dtype
        and dtype in COMPUTE_DTYPES
        and lora_a.dtype in COMPUTE_DTYPES
        and lora_b.dtype in COMPUTE_DTYPES
        and weight.dim() == lora_a.dim() == lora_b.dim() == 2
        and x.dim() > 0
        and layer.cast_input_dtype_enabled
    ):
        return None
    if hooked(base) or hooked(of_a) or hooked(of_b) or hooked(dropout):
        return None
    p, scaling = 0.0, layer.scaling[name]
    if type(dropout) is nn.Dropout and dropout.training:
        p = dropout.p
    elif type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return None
    return (weight, lora_a, lora_b, bias, scaling, p) if type(scaling) is float and 0.0 <= p < 1.0 else None


def is_transposed(base: nn.Module) -> bool:
    """Whether ``base`` holds its weight as (K, N): transformers' ``Conv1D``."""
    return type(base).forward is Conv1D.forward


def own_parameter(module: nn.Module, name: str) -> Any:
    """``module``'s parameter, without the microsecond of ``nn.Module``'s lookup where it lies in its usual place."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name, None)


def why_call(x: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str | None:
    """Why this call's input, arguments or surroundings are PEFT's own matter; None if they are not."""
    if arguments or (keywords and not _KNOWN_ARGUMENTS.issuperset(keywords)):
        return "the call has arguments that only the base layer knows"
    if not is_plain(x) or x.dtype not in COMPUTE_DTYPES or x.dim() < 1:
        return "the input is not a plain floating tensor"
    if torch._C._are_functorch_transforms_active():  # a compiler answers it too, with a constant
        return "torch.func or vmap is active"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are active"
    if torch_module._has_any_global_hook():
        return "hooks on all modules are registered"
    if is_compiling():
        # The compiler of PyTorch 2.11 takes the function is_exporting() for True in all that it traces.
        return "torch.export is recording" if torch.compiler._is_exporting_flag else None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    return None


def why_base(base: nn.Module) -> str | None:
    """Why the layer around ``base`` is PEFT's own for good: it is no linear layer with a plain weight."""
    kind, weight = type(base), own_parameter(base, "weight")
    if (kind is not nn.Linear and kind is not Conv1D) or not is_plain(weight):
        if (form := known.form_of_module(base)) is not None:
            reason = form.why_not(base)
            return None if reason is None else f"its base is not ready: {reason.rstrip('.')}"
        if computes_otherwise(kind):
            return f"its base layer is a {kind.__name__}, which computes in a way of its own"
    return why_weight(weight)


def why_weight(weight: Any) -> str | None:
    """Why a base weight cannot be read as it is."""
    if not is_plain(weight):
        return f"its weight is a {type(getattr(weight, 'data', weight)).__name__} (sharded or quantized)"
    if weight.dtype not in COMPUTE_DTYPES or weight.dim() != 2:
        return f"its weight is {weight.dtype} of {weight.dim()} dimensions (quantized or packed)"
    return None


def why_adapter(layer: Any, adapter: str) -> str | None:
    """Why ``adapter`` of ``layer``, or the base layer at present, is PEFT's own matter; None if it is not."""
    modules = layer._modules
    if adapter in layer.lora_variant:
        if not dora.is_dora(layer, adapter):
            return f"{type(layer.lora_variant[adapter]).__name__} is a variant of LoRA"
        if reason := dora.why_magnitude(layer, adapter, is_transposed(modules["base_layer"])):
            return reason
    lora_a, lora_b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(lora_a).forward is not nn.Linear.forward or type(lora_b).forward is not nn.Linear.forward:
        return "lora_A or lora_B is wrapped"
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or not 0.0 <= dropout.p < 1.0):
        return "its dropout is not an nn.Dropout with p in [0, 1)"
    if hooked(modules["base_layer"]) or hooked(lora_a) or hooked(lora_b) or hooked(dropout):
        return "a module within it has hooks"
    a, b = own_parameter(lora_a, "weight"), own_parameter(lora_b, "weight")
    if not is_plain(a) or not is_plain(b) or own_parameter(lora_a, "bias") is not None:
        return "lora_A or lora_B is not a plain matrix"
    if a.dtype not in COMPUTE_DTYPES or b.dtype not in COMPUTE_DTYPES:
        return f"its adapter is stored as {a.dtype}"
    return None


def why_dtypes(layer: Any, x: Tensor, weight: Tensor, adapters: Sequence[str]) -> str | None:
    """Why x, the base weight and the adapters cannot be multiplied, as PEFT will say better."""
    device = x.device.type
    differ = weight.dtype is not x.dtype and (device == "meta" or not torch.is_autocast_enabled(device))
    if (
        differ and known.form_of_module(layer._modules["base_layer"]) is None
    ):  # those have a dtype of their own, or none
        return f"the input is {x.dtype}, the base weight {weight.dtype}, and autocast is off"
    if not layer.cast_input_dtype_enabled:
        lora_a = layer._modules["lora_A"]._modules
        if any(own_parameter(lora_a[adapter], "weight").dtype is not x.dtype for adapter in adapters):
            return "PEFT's casting of the input is switched off"
    return None


def hooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
