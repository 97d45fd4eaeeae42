"""Which single modules a LoRA layer can take the place of, and why not the others.

A subclass of ``nn.Linear``, or of transformers' ``Conv1D``, is taken where it computes what that does. The class of its
LoRA layer derives from it too (``nn.py``), so what the subclass adds beside the computation stays.
"""

from __future__ import annotations

import sys
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import storage
from .dispatch import COMPUTE_DTYPES
from .layer import names_of_layers
from .weights import known
from .weights.packed import Form

__all__ = ["computes_otherwise", "is_conv1d", "not_linear", "own_state", "plain_kind", "why_not_replaceable"]

_SAME = (("transformers.models.falcon.modeling_falcon", "FalconLinear"),)  # x @ W.T + b, written out
_PEFTS = ("gptqmodel", "auto_gptq", "awq", "hqq", "aqlm", "eetq", "optimum")  # packages of quantised layers
_COMPUTING = ("__call__", "__getattr__", "__getattribute__", "_call_impl", "_wrapped_call_impl", "bias", "weight")
_COPYING = ("__copy__", "__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__setstate__")
_MAKING = (*_COPYING, "__init_subclass__", "__slots__")
_EVERY_MODULE = vars(nn.Module()).keys()
_NAMES_SHOWN = 8


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D`` or derives from it: a linear layer with its weight as (K, N)."""
    return plain_kind(type(module)) not in (nn.Linear, None)


def plain_kind(kind: type) -> type[nn.Module] | None:
    """``nn.Linear`` or transformers' ``Conv1D``, whichever ``kind`` is or derives from; None where it is neither.

    Nothing is imported: a model that has a ``Conv1D`` has loaded its class.
    """
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return next((each for each in (nn.Linear, conv1d) if each is not None and issubclass(kind, each)), None)


def not_linear(module: nn.Module) -> str:
    """Why ``module``, which is no linear layer, gets no adapter, and what can be done instead."""
    kind = type(module).__name__
    within = {name.rpartition(".")[2]: None for name, part in module.named_modules() if plain_kind(type(part))}
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        remedy = "Replace it with an nn.Linear if its kernel has one element; else peft.get_peft_model adapts it"
    elif isinstance(module, nn.Embedding):
        remedy = "peft.get_peft_model adapts it, and LoRAConfig.modules_to_save trains it whole"
    elif isinstance(module, nn.MultiheadAttention):
        remedy = "peft.get_peft_model adapts it"
    elif within:
        remedy = "Have replace_linear adapt the linear layers within it, by their names: "
        remedy += ", ".join(map(repr, list(within)[:_NAMES_SHOWN]))
    elif next(module.parameters(recurse=False), None) is not None:
        remedy = "LoRAConfig.modules_to_save trains it whole"
    else:
        remedy = "It has no weight"
    return f"{kind} is no linear layer, and lora_kernels adapts linear layers only. {remedy}"


def why_not_replaceable(module: nn.Module) -> str | None:
    """A sentence that says why ``module`` cannot become a LoRA layer, or None if it can."""
    kind = type(module).__name__
    if kind == "Linear" and type(module) is not nn.Linear:  # a quantized one, for example
        kind = f"{type(module).__module__}.{kind}"
    if parametrize.is_parametrized(module):
        return f"{kind} has parametrized weights: call torch.nn.utils.parametrize.remove_parametrizations first."
    form = known.form_of_module(module)
    if type(module) is not plain_kind(type(module)) and (reason := _why_not_of_its_kind(module, kind, form)):
        return reason
    if reason := storage.why_not_free(module):
        return f"{kind} cannot be replaced: {reason}"
    if "forward" in vars(module):
        return (
            f"{kind} has a forward of its own on the instance (accelerate's offloading does that), and it would be "
            "lost. Remove it first, with accelerate.hooks.remove_hook_from_module for example."
        )
    if form is not None:
        return form.why_not(module)
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{kind} computes its weight by a hook (weight_norm, spectral_norm, pruning): remove that first."
    if not weight.dtype.is_floating_point or weight.dtype not in COMPUTE_DTYPES or _is_quantized(weight):
        return (
            f"{kind} has a quantized weight ({type(weight.data).__name__}, {weight.dtype}), a form that is not known "
            f"here. {_instead_of(weight)}"
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


def computes_otherwise(kind: type[nn.Module]) -> bool:
    """Whether a call of a ``kind`` may give something else than ``nn.Linear`` or ``Conv1D`` with its weight and bias.

    Only classes are looked at: what is on the instance or in its hooks is another question.
    """
    plain = plain_kind(kind)
    if plain is None or any(name in vars(own) for own in _own_classes(kind) for name in _COMPUTING):
        return True
    same = (getattr(sys.modules.get(file), name, None) for file, name in _SAME) if plain is nn.Linear else ()
    return kind.forward not in (plain.forward, *(known.forward for known in same if known is not None))


def _why_not_of_its_kind(module: nn.Module, kind: str, form: Form | None) -> str | None:
    """Why ``module`` is of no class whose behaviour a LoRA layer keeps."""
    plain = plain_kind(type(module))
    if plain is None and not hasattr(module, "in_features"):  # quantized linear layers have it
        return f"{not_linear(module)}. Or exclude it."
    package = type(module).__module__.split(".")[0]
    if package in _PEFTS:
        return (
            f"{kind} is {package}'s quantized layer, whose weight has no form here. peft.get_peft_model adapts it, and "
            "fuse_peft leaves it to PEFT; or quantize the model with bitsandbytes or torchao instead."
        )
    own_classes = _own_classes(type(module))
    plain_name = "torch.nn.Linear" if plain is None or plain is nn.Linear else "Conv1D"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            f"{kind} is nn.MultiheadAttention's: its weight is read and it is never called, so an adapter would have "
            "no effect. Exclude it."
        )
    if (form is None and computes_otherwise(type(module))) or isinstance(module, LazyModuleMixin):
        return (
            f"{kind} is not a plain {plain_name}, and its own behaviour would be lost. Replace it with an nn.Linear "
            "first, or exclude it."
        )
    if made := sorted({name for own in own_classes for name in _MAKING if vars(own).get(name)}):
        return (
            f"{kind} is not a plain {plain_name}: it has a {made[0]} of its own, which would not know of the "
            "adapter. Replace it with an nn.Linear first, or exclude it."
        )
    held = {name for own in own_classes for name in vars(own)} | set(own_state(module) if own_classes else ())
    sizes = set() if plain is nn.Linear else {"in_features", "out_features"}  # a Conv1D has none
    if taken := sorted(held & (names_of_layers() | sizes)):
        return (
            f"{kind} has a {taken[0]!r} of its own, and so has every LoRA layer. Replace it with an nn.Linear first, "
            "or exclude it."
        )
    if own_classes and (hook := _hook_of_its_own(module)):
        return (
            f"{kind} has a hook that is bound to the module itself ({hook}), which would act on what is replaced. "
            "Remove the hook first, or exclude the layer."
        )
    return None


def own_state(module: nn.Module) -> dict[str, Any]:
    """What an instance of a subclass holds beside an ``nn.Linear``'s state, by name."""
    tables = (module._parameters, module._buffers, module._modules)
    held = {name: value for table in tables for name, value in table.items()}
    held |= {name: value for name, value in vars(module).items() if name not in _EVERY_MODULE}
    return {name: value for name, value in held.items() if name not in ("weight", "bias")}  # merged ones too


def _own_classes(kind: type) -> list[type]:
    """The classes that ``kind`` has before ``nn.Linear`` or ``Conv1D``."""
    plain = plain_kind(kind)
    return list(takewhile(lambda each: each is not plain, kind.__mro__))


def _hook_of_its_own(module: nn.Module) -> str | None:
    """The name of a table of hooks in which one is bound to ``module``."""
    for table in _EVERY_MODULE:
        hooks = vars(module).get(table)
        for hook in hooks.values() if "hooks" in table and isinstance(hooks, dict) else ():
            function = getattr(hook, "hook", hook)
            if getattr(function, "__self__", None) is module or getattr(hook, "with_module", False):
                return table.strip("_")
    return None


def _instead_of(weight: Tensor) -> str:
    """What to do about a quantised weight of a form that is not known."""
    if type(weight.data).__module__.startswith("torchao"):  # not every one of its tensors can be dequantised
        return (
            "Quantize the 16-bit model with Int8WeightOnlyConfig, IntxWeightOnlyConfig, which has 4 bits too, or "
            "Float8WeightOnlyConfig."
        )
    return "Load the model in 16 bits, or quantize it with bitsandbytes or torchao."


def _is_quantized(weight: Tensor) -> bool:
    """Tensor subclasses that are not plain storage (torchao and others) hold something else than their dtype says."""
    inner = weight.data
    return (
        weight.is_quantized
        or (type(inner) not in (Tensor, nn.Parameter) and hasattr(inner, "dequantize_weight"))
        or (type(inner).__module__.startswith(("torchao", "bitsandbytes")))
    )
