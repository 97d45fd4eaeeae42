"""The fields of ``peft.LoraConfig`` and of ``adapter_config.json``: which ``LoRAConfig`` has, which say nothing of what
is computed, and which ask for another computation and are refused.

One table for both readers: ``LoRAConfig.from_peft`` and ``checkpoint/peft_config.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from .errors import InvalidArgumentError

__all__ = ["DROPOUT", "HELD", "KEPT", "check_method", "held", "sentence_of_unknown"]

HELD: dict[str, Any] = {  # fields that LoRAConfig has, with PEFT's defaults
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": None,
    "exclude_modules": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "target_parameters": None,
}
KEPT = {  # fields without effect on what a loaded adapter computes
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
DROPOUT = "lora_kernels_dropout"  # ours, beside target_parameters: PEFT refuses its own lora_dropout there
_REFUSED = {  # fields that ask for another computation where they are set
    "alora_invocation_tokens": "the adapter acts on the last tokens of a prompt alone (aLoRA)",
    "arrow_config": "tokens are routed between several adapters (Arrow)",
    "ensure_weight_tying": "adapters of tied layers share their tensors",
    "kasa_config": "a trained diagonal stands between A and B (KaSA)",
    "layer_replication": "the model is deepened with copies of its layers",
    "megatron_config": "the layers are Megatron's parallel ones",
    "monteclora_config": "A is sampled while training (MonteCLoRA)",
    "trainable_token_indices": "single rows of an embedding are trained",
    "use_bdlora": "A or B is block-diagonal (BD-LoRA)",
    "use_qalora": "the input is pooled in groups (QA-LoRA)",
    "velora_config": "training keeps a compressed input (VeLoRA)",
}
_OTHER_METHODS = {
    "ADALORA": "AdaLoRA, which prunes ranks through a diagonal between A and B",
    "ADAPTION_PROMPT": "an adaption prompt, which adds tokens in attention",
    "IA3": "(IA)3, which scales activations",
    "LN_TUNING": "layer-norm tuning",
    "LOHA": "LoHa, whose update is a Hadamard product",
    "LOKR": "LoKr, whose update is a Kronecker product",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning, which adds tokens to the input",
    "OFT": "OFT, which turns weights by an orthogonal matrix",
    "BOFT": "BOFT, which turns weights by an orthogonal matrix",
    "PREFIX_TUNING": "prefix tuning, which adds keys and values in attention",
    "PROMPT_TUNING": "prompt tuning, which adds tokens to the input",
    "P_TUNING": "P-tuning, which adds tokens to the input",
    "VERA": "VeRA, which shares random A and B between layers",
    "XLORA": "X-LoRA, a mixture of adapters",
}
_MEANT_ELSEWHERE = {  # what stands in the place of a field that LoRAConfig lacks
    "task_type": "It says nothing of what is computed: leave it out, or give it to save_adapter(..., task_type=...).",
    "inference_mode": "Adapters train when they are made: leave it out, and freeze with requires_grad_(False).",
    "fan_in_fan_out": "How a layer's weight is stored is seen from its class: leave it out.",
}
_MEANT_NOTHING = "It says nothing of what a new adapter computes: leave it out."


def check_method(fields: Mapping[str, Any], where: str, instead: str) -> None:
    """Raises unless ``fields`` are those of a LoRA that is computed here; ``instead`` ends the sentence."""
    method = getattr(fields.get("peft_type"), "value", fields.get("peft_type"))
    if method != "LORA":
        what = _OTHER_METHODS.get(str(method), "another method")
        raise InvalidArgumentError(
            f"{where} has peft_type={method!r}: that is {what}, not LoRA, and lora_kernels computes LoRA only. "
            f"{instead}"
            if method is not None
            else f"{where} has no peft_type, so it is not known to be LoRA. PEFT and save_adapter write 'LORA'."
        )
    for name, what in _REFUSED.items():
        if fields.get(name):
            raise InvalidArgumentError(f"{where} sets {name}: {what}, which lora_kernels does not compute. {instead}")


def held(fields: Mapping[str, Any], where: str, what_becomes: str, stacklevel: int) -> dict[str, Any]:
    """The arguments of ``LoRAConfig`` in ``fields``, ``init_lora_weights`` aside.

    One warning names the fields that this version does not know; ``what_becomes`` says what becomes of them.
    """
    unknown = sorted(
        name for name in set(fields) - set(HELD) - KEPT - set(_REFUSED) - {DROPOUT} if fields[name] is not None
    )
    if unknown:
        warnings.warn(
            f"{where} has fields that this version of lora_kernels does not know: {', '.join(unknown)}. {what_becomes} "
            "A newer PEFT may compute something else with them.",
            stacklevel=stacklevel + 1,
        )
    given = {name: fields.get(name, default) for name, default in HELD.items()}
    given |= {name: False for name, value in given.items() if value is None and HELD[name] is False}
    given["lora_dropout"] = fields.get(DROPOUT) or given["lora_dropout"]
    return given | {name: given[name] or {} for name in ("rank_pattern", "alpha_pattern")}


def sentence_of_unknown(name: str, known: list[str]) -> str:
    """What is said of an argument ``name`` that ``LoRAConfig`` does not have."""
    if name in _REFUSED:
        return (
            f"{name} was given to LoRAConfig, which has no such field: {_REFUSED[name]}, and lora_kernels does not "
            "compute that. Use peft.get_peft_model; lora_kernels.fuse_peft(model) then runs fused what it can."
        )
    if name in KEPT:
        what = _MEANT_ELSEWHERE.get(name, _MEANT_NOTHING)
        return (
            f"{name} was given to LoRAConfig, which has no such field of peft.LoraConfig's. {what} "
            "LoRAConfig.from_peft(config) takes a whole peft.LoraConfig."
        )
    return f"{name} was given to LoRAConfig, which has no such field. Its fields are {', '.join(known)}."
