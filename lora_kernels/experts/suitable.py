"""Which experts modules, Parameters and options can be adapted, and why not the others."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import storage
from ..config import AdapterOptions
from ..dispatch import COMPUTE_DTYPES
from ..errors import InvalidArgumentError
from ..initialisation import splits
from ..tensors import PLAIN_TENSORS
from ..weights.mxfp4 import is_experts as is_mxfp4
from ..weights.stacked import packed_names, why_not
from . import held

__all__ = ["DOWN", "UP", "check_options", "check_target", "lacking", "targets", "why_not_experts"]

UP = {True: "gate_up_proj", False: "up_proj"}  # by has_gate
DOWN = "down_proj"
_DECORATED = ("_apply_gate", "is_transposed", "has_bias", "config", "num_experts")


def targets(module: nn.Module) -> tuple[str, str]:
    """The names of the two stacked Parameters."""
    return UP[getattr(module, "has_gate", True)], DOWN


def lacking(kind: type[nn.Module]) -> dict[str, Any]:
    """What a class has to be given to be computed as those that ``use_experts_implementation`` has prepared.

    transformers' MXFP4 experts compute what gpt-oss's do, by kernels that take the routing from the block around them
    unless ``_is_hooked`` says that the experts are called with it.
    """
    if not is_mxfp4(kind):
        return {}
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    of: Any = GptOssExperts
    return {
        "has_gate": True,
        "has_bias": True,
        "is_transposed": False,
        "_apply_gate": of._apply_gate,
        "_is_hooked": True,
    }


def why_not_experts(module: nn.Module) -> str | None:
    """A sentence that says why ``module``'s experts cannot be adapted, or None if they can."""
    kind = type(module).__name__
    if hasattr(module, "lora_A"):
        return f"{kind} has an adapter already, and no module takes a second one. Restore it first."
    decorated = is_mxfp4(type(module)) or all(hasattr(module, name) for name in _DECORATED)
    own = targets(module) if decorated else ()
    for name in packed_names(module):
        reason = why_not(module, name)
        if reason is not None or name not in own:
            return reason or f"{kind}.{name} is quantized, and only stacked experts are read so. Dequantize it."
    if not own or any(name not in held.names(module) for name in own):
        return (
            f"{kind} is no experts module that transformers' use_experts_implementation has prepared, with stacked "
            "gate_up_proj (or up_proj) and down_proj. peft.LoraConfig(target_parameters=...) adapts others."
        )
    if getattr(module, "_is_expert_parallel", False):
        return (
            f"{kind} has its experts split over processes by transformers (ep_size), and a process would adapt those "
            "of its own alone, unknown to saving and to the others. Load the model without it; FSDP2 shards experts."
        )
    if "forward" in vars(module):
        return f"{kind} has a forward of its own on the instance, which would be lost. Remove it first."
    if reason := storage.why_not_free(module):
        return f"{kind} cannot be adapted: {reason}"
    for name in own:
        if held.packed(module, name) is not None:
            continue
        weight = module._parameters[name]
        if weight is None or weight.dim() != 3 or weight.dtype not in COMPUTE_DTYPES or not _is_plain(weight):
            what = "None" if weight is None else f"{type(weight.data).__name__} {tuple(weight.shape)}, {weight.dtype}"
            return (
                f"{kind}.{name} is {what}: it must be a plain (experts, rows, columns) of fp16, bf16, fp32 or fp64. "
                "Dequantize it, or adapt it before it is sharded."
            )
    return None


def check_target(module: nn.Module, name: str) -> None:
    """Raises unless ``name`` is a Parameter that an adapter can be put on."""
    if name not in targets(module):
        raise InvalidArgumentError(
            f"{name!r} of {type(module).__name__} was named as a target parameter: only {targets(module)} can be "
            "adapted. Leave it out."
        )


def check_options(options: AdapterOptions) -> None:
    """Raises for what stacked experts cannot have."""
    options.check()
    refused = {
        "use_dora=True": options.use_dora,
        "lora_bias=True": options.lora_bias,
        f"activation={options.activation!r}": options.activation != "identity",
        f"init_lora_weights={options.init_lora_weights!r}": splits(options.init_lora_weights),
    }
    for given, is_given in refused.items():
        if is_given:
            raise InvalidArgumentError(
                f"{given} was given for stacked experts: only plain LoRA is computed for them. Leave it out, or "
                "adapt the linear layers alone."
            )


def _is_plain(weight: nn.Parameter) -> bool:
    return type(weight) in PLAIN_TENSORS and type(weight.data) in PLAIN_TENSORS
