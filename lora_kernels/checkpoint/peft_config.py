"""PEFT's ``adapter_config.json``; ``peft_fields`` says which of its fields are ``LoRAConfig``'s, kept or refused.

:func:`parse` reads them, :func:`compose` writes those of the layers as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .. import peft_fields
from ..config import AdapterOptions, LoRAConfig, as_tuple, pattern_value
from ..errors import InvalidArgumentError, LoRAKernelsError, LoRAStateError
from ..experts.layer import FusedLoRAExperts
from ..fsdp import plain_class
from ..layer import LoRALayer
from ..models.adapter import Adapter
from ..models.experts import parameter_matches, parameters_of
from ..models.matching import is_all_linear, name_matches, selects
from ..models.names import joined, plain_modules
from ..nn import FusedLoRAConv1D
from .plain_form import PlainForm

__all__ = ["compose", "parse"]

_REWRITING = ("pissa", "olora", "corda", "lora_ga", "loftq")  # initialisations that change the base weights
_NOT_KEPT = {*peft_fields.HELD, peft_fields.DROPOUT, "runtime_config"}
_WRITTEN = (True, False, "gaussian")  # initialisations that PEFT makes at any rank and without data


def parse(fields: Mapping[str, Any], where: str) -> Adapter:
    """What ``fields`` ask for. One warning names the fields that this version does not know; they are kept.

    Raises:
        InvalidArgumentError: no LoRA, a kind of it that is not computed here, or a value that is not allowed.
    """
    peft_fields.check_method(fields, where, "Load it with peft.PeftModel.from_pretrained.")
    _check_start(fields, where)
    given = peft_fields.held(
        fields, where, "They are kept and written back on saving, and have no effect here.", stacklevel=3
    )
    initial = fields.get("init_lora_weights", True)
    given["init_lora_weights"] = initial if initial in _WRITTEN else True
    try:
        config = LoRAConfig(**given)
    except (LoRAKernelsError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(f"{where} cannot be used: {error}") from error
    kept = {name: value for name, value in fields.items() if name not in _NOT_KEPT}
    if initial in _WRITTEN:
        kept.pop("init_lora_weights", None)
    return Adapter(config, kept)


def _check_start(fields: Mapping[str, Any], where: str) -> None:
    initial = fields.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_REWRITING):
        raise InvalidArgumentError(
            f"{where} has init_lora_weights={initial!r}, which changes the base weights when the adapter is made: it "
            "does not fit the plain model. Save it from PEFT as an adapter of the plain one, with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or save the changed base and set the field to true."
        )


def compose(
    model: nn.Module,
    layers: Mapping[str, LoRALayer],
    experts: Mapping[str, FusedLoRAExperts],
    forms: Mapping[str, PlainForm],
    of_experts: Mapping[str, PlainForm],
    adapter: Adapter,
    bias: str,
    modules_to_save: list[str] | None,
    task_type: str | None,
) -> dict[str, Any]:
    """The fields that make PEFT build ``layers`` and ``experts`` just as ``forms`` and ``of_experts`` write them.

    ``adapter``'s rule is kept where it still says just that.

    Raises:
        LoRAStateError: the layers differ in what the file holds once for all of them.
    """
    kept, config = dict(adapter.kept), replace(adapter.config, modules_to_save=modules_to_save)
    options = {joined(name, own): of for name, layer in experts.items() for own, of in layer.options.items()}
    every: dict[str, Any] = {**layers, **options}
    rslora = all(each.use_rslora for each in every.values())
    dropout = _common("lora_dropout", {name: each.lora_dropout for name, each in every.items()})
    initial = config.init_lora_weights if config.init_lora_weights in _WRITTEN else True
    fields = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": kept.get("base_model_name_or_path") or vars(model).get("name_or_path") or None,
        "inference_mode": True,
        "init_lora_weights": kept.get("init_lora_weights", initial),
        "lora_dropout": 0.0 if experts else dropout,
        "use_dora": _common("use_dora", {name: each.use_dora for name, each in every.items()}),
        "lora_bias": _common("lora_bias", {name: _has_bias(each) for name, each in every.items()}),
        "use_rslora": rslora,
        "fan_in_fan_out": any(isinstance(layer, FusedLoRAConv1D) for layer in layers.values()),
        "bias": bias,
        "modules_to_save": modules_to_save,
        **_which(model, list(layers), config),
        "target_parameters": _parameters(model, list(of_experts), config),
        **_sizes({**forms, **of_experts}, config, rslora),
    }
    if experts and dropout:
        fields[peft_fields.DROPOUT] = dropout
    if fields["task_type"] is None:
        kind = plain_class(model)
        fields["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {**kept, **fields}


def _common(name: str, values: Mapping[str, Any]) -> Any:
    (first, value), *_ = values.items()
    for other, its in values.items():
        if its != value:
            raise LoRAStateError(
                f"the layers {first!r} and {other!r} differ in {name} ({value!r} and {its!r}), and PEFT's file has one "
                "value for all. Make them alike before saving."
            )
    return value


def _has_bias(each: LoRALayer | AdapterOptions) -> bool:
    return each.lora_bias if isinstance(each, AdapterOptions) else each.lora_bias is not None


def _parameters(model: nn.Module, names: list[str], config: LoRAConfig) -> list[str] | None:
    """How the stacked Parameters are named: by the rule that chose them, if it chooses no others, else one by one."""
    if not names:
        return None
    every = {joined(prefix, own) for prefix, _, own in parameters_of(model)}
    if {name for name in every if parameter_matches(config, name)} == set(names):
        return sorted(as_tuple(config.target_parameters))
    if others := [name for name in every if name_matches(names, name) and name not in names]:
        raise LoRAStateError(
            f"the Parameter {others[0]!r} has no adapter, and its name ends like that of one that has: PEFT's file "
            "could not tell them apart. Rename a part of the model, or keep lora_state_dict(model)."
        )
    return names


def _which(model: nn.Module, names: list[str], config: LoRAConfig) -> dict[str, Any]:
    """How the layers are named: by the rule that chose them, if it chooses them and no others, else one by one."""
    if not names:
        return {"target_modules": [], "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    every = [name for name, _ in plain_modules(model, shared=False) if name]
    if not is_all_linear(config.target_modules) and [name for name in every if selects(config, name)] == names:
        return {
            "target_modules": _listed(config.target_modules),
            "exclude_modules": _listed(config.exclude_modules),
            "layers_to_transform": _listed(config.layers_to_transform),
            "layers_pattern": _listed(config.layers_pattern),
        }
    alone = [name for name in every if name_matches(names, name)] == names
    target = names if alone else "|".join(re.escape(name) for name in names)
    return {"target_modules": target, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, set, frozenset)) else value


def _sizes(forms: Mapping[str, PlainForm], config: LoRAConfig, rslora: bool) -> dict[str, Any]:
    """Ranks and alphas: the configuration's where they are the layers', else the commonest and the exceptions."""
    actual: dict[str, tuple[str, dict[str, float]]] = {
        "r": ("rank_pattern", {name: form.r for name, form in forms.items()}),
        "lora_alpha": ("alpha_pattern", {name: form.alpha(rslora) for name, form in forms.items()}),
    }
    fields: dict[str, Any] = {}
    for field, (pattern, values) in actual.items():
        default, exceptions = getattr(config, field), dict(getattr(config, pattern))
        if not all(pattern_value(exceptions, name, default) == value for name, value in values.items()):
            default = Counter(values.values()).most_common(1)[0][0]
            exceptions = {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
        fields |= {field: default, pattern: exceptions}
    return fields
