"""Stacked experts in PEFT's files: the adapters of one module nest, and no key names the Parameter that it is for.

PEFT wraps a module once for each adapted Parameter, in the module's order of Parameters. So the last one's tensors are
``experts.lora_A.weight``, and those of the one before it ``experts.base_layer.lora_A.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import storage
from ..config import ADAPTER_DTYPES, LoRAConfig, pattern_value
from ..errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from ..experts import held
from ..experts.layer import FusedLoRAExperts, around_experts
from ..experts.peft_form import from_peft, to_peft
from ..experts.run import stacked
from ..experts.suitable import targets, why_not_experts
from ..models.experts import parameter_matches, parameters_of
from ..models.matching import is_linear, listed, stacked_experts
from ..models.names import joined
from ..models.report import ReplacedLayer
from .expert_lists import WITHIN
from .plain_form import PlainForm, whole

__all__ = [
    "Factors",
    "carry_out",
    "expert_forms",
    "expert_rows",
    "expert_tensors",
    "overwrite",
    "take_experts",
]

Factors = tuple[Tensor, Tensor]  # a (E, R, K) and b (E, N, R)


def expert_forms(experts: Mapping[str, FusedLoRAExperts]) -> dict[str, PlainForm]:
    """What is written of each adapted Parameter, by its whole name."""
    forms = {}
    for name, layer in experts.items():
        for own in in_order(layer, layer.options):
            full, of = joined(name, own), layer.options[own]
            a, b = (whole(f"{full}.{f}", of_f[own]) for f, of_f in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)))
            lora_a, lora_b = to_peft(a, b)
            tensors = {"lora_A": lora_a, "lora_B": lora_b}
            forms[full] = PlainForm(of.r, layer.scaling(own), of.lora_alpha, of.use_rslora, tensors)
    return forms


def expert_tensors(experts: Mapping[str, FusedLoRAExperts], forms: Mapping[str, PlainForm]) -> dict[str, Tensor]:
    """The tensors of ``forms`` by PEFT's keys, without the prefix of all of them."""
    tensors = {}
    for name, layer in experts.items():
        order = in_order(layer, layer.options)
        for depth, own in enumerate(reversed(order)):
            for factor, tensor in forms[joined(name, own)].tensors.items():
                tensors[f"{name}{WITHIN * depth}.{factor}.weight"] = tensor
    return tensors


def in_order(module: nn.Module, names: Any) -> list[str]:
    """Those of ``names`` that are Parameters of ``module``, in its order."""
    return [own for own in held.names(module) if own in names]


def take_experts(
    model: nn.Module,
    config: LoRAConfig,
    adapters: dict[str, dict[str, Tensor]],
    modules: Mapping[str, nn.Module],
    where: str,
) -> dict[str, dict[str, Factors]]:
    """Takes out of ``adapters``, a file's by their paths, what ``target_parameters`` means: by module and Parameter.

    Raises:
        InvalidArgumentError, InvalidTypeError, LoRAStateError: a tensor is missing, or does not fit the model.
    """
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for path in list(adapters):
        name = path
        while name.endswith(WITHIN):
            name = name.removesuffix(WITHIN)
        module = modules.get(name)
        if module is None or is_linear(module):
            continue
        if not _wanted(config, name, module) and (stacked_experts(module) or path != name):
            raise InvalidArgumentError(
                f"{where} has an adapter for {path!r}, and target_parameters names no Parameter of "
                f"{type(module).__name__}. The two files do not belong together; save the adapter again."
            )
        if _wanted(config, name, module):
            depth = path.count(WITHIN, len(name))
            found.setdefault(name, {})[depth] = adapters.pop(path)
    for full in (joined(name, own) for name, _, own in parameters_of(model)):
        if parameter_matches(config, full) and full.rpartition(".")[0] not in found:
            raise InvalidArgumentError(
                f"target_parameters means {full!r}, and {where} holds no adapter for it: the file is not whole, or the "
                "adapter is of a smaller model."
            )
    return {name: _of_module(config, name, modules[name], depths, where) for name, depths in found.items()}


def _wanted(config: LoRAConfig, name: str, module: nn.Module) -> list[str]:
    return [own for own in held.names(module) if parameter_matches(config, joined(name, own))]


def _of_module(
    config: LoRAConfig, name: str, module: nn.Module, depths: Mapping[int, dict[str, Tensor]], where: str
) -> dict[str, Factors]:
    wanted = _wanted(config, name, module)
    if sorted(depths) != list(range(len(wanted))):
        raise InvalidArgumentError(
            f"{where} has {len(depths)} adapters nested at {name!r}, and target_parameters means {listed(wanted)} of "
            "it. The two files do not belong together; save the adapter again."
        )
    _check_module(name, module, wanted)
    factors = {own: depths[len(wanted) - 1 - i] for i, own in enumerate(wanted)}
    found = {own: _checked(config, joined(name, own), module, own, given, where) for own, given in factors.items()}
    if isinstance(module, FusedLoRAExperts):
        _check_fits(name, module, found)
    return found


def _check_module(name: str, module: nn.Module, wanted: Sequence[str]) -> None:
    reason = None if isinstance(module, FusedLoRAExperts) else why_not_experts(module)
    if reason is None and (strange := [own for own in wanted if own not in targets(module)]):
        reason = f"{type(module).__name__} computes with {strange[0]} in a way that is not known."
    if reason is not None:
        raise InvalidTypeError(f"the adapter cannot be loaded: {name}: {reason}")
    if any(parameter is not None and parameter.is_meta for parameter in map(module._parameters.get, wanted)):
        raise LoRAStateError(f"{name} is on the meta device. Load the model's weights first, then its adapter.")


def _checked(
    config: LoRAConfig, full: str, module: nn.Module, own: str, given: Mapping[str, Tensor], where: str
) -> Factors:
    if given.keys() != {"lora_A", "lora_B"}:
        raise InvalidArgumentError(
            f"{where} has {listed(sorted(given))} for {full!r}, where lora_A and lora_B are expected. Save it again."
        )
    rank = pattern_value(config.rank_pattern, full, config.r)
    e, n, k = stacked(module, own).shape
    for factor, expected in (("lora_A", (e * rank, k)), ("lora_B", (n, rank * e))):
        tensor = given[factor]
        if tuple(tensor.shape) != expected:
            raise InvalidArgumentError(
                f"{where} has {factor} {tuple(tensor.shape)} for {full!r}, where {expected} is expected: it has {e} "
                f"experts {k} -> {n}, and the configuration gives each r={rank}. The adapter is of another model."
            )
        if tensor.dtype not in ADAPTER_DTYPES:
            raise InvalidTypeError(
                f"{where} has {factor} in {tensor.dtype} for {full!r}: it must be torch.float16, bfloat16, float32 or "
                "float64. Convert it first."
            )
    return from_peft(given["lora_A"], given["lora_B"], e)


def _check_fits(name: str, layer: FusedLoRAExperts, found: Mapping[str, Factors]) -> None:
    if layer.merged:
        raise LoRAStateError(f"the experts {name!r} are merged. Call unmerge_lora(model) before load_adapter.")
    ranks = {own: of.r for own, of in layer.options.items()}
    given = {own: a.shape[1] for own, (a, _) in found.items()}
    if ranks != given:
        raise InvalidArgumentError(
            f"the experts {name!r} have adapters of the ranks {ranks}, and the file has {given}. Call "
            "restore_linear(model) first; load_adapter then makes the layers."
        )
    for own, parameter in layer.adapter.items():
        if parameter.is_meta or type(parameter.data).__name__ == "DTensor":
            raise LoRAStateError(
                f"{name}.{own} is on the meta device or sharded (DTensor), so nothing can be loaded into it. Load the "
                "adapter onto the plain model first, then distribute it."
            )
    storage.check_kept("load_adapter", ((f"{name}.{f}", getattr(layer, f), list(found)) for f in ("lora_A", "lora_B")))


def carry_out(
    config: LoRAConfig,
    found: Mapping[str, Mapping[str, Factors]],
    modules: Mapping[str, nn.Module],
    adapter_dtype: torch.dtype | None,
) -> dict[str, FusedLoRAExperts]:
    """New layers with the values of ``found``, for the modules that have none yet; nothing takes its place here."""
    made = {}
    for name, factors in found.items():
        if isinstance(modules[name], FusedLoRAExperts):
            continue
        layer = around_experts(
            modules[name], {own: config.options_of(joined(name, own)) for own in factors}, draw=False
        )
        for own, pair in factors.items():
            for factor, tensor in zip((layer.lora_A, layer.lora_B), pair, strict=True):
                dtype = adapter_dtype or torch.promote_types(factor[own].dtype, tensor.dtype)
                factor[own] = nn.Parameter(tensor.to(factor[own].device, dtype))
        made[name] = layer
    return made


def overwrite(config: LoRAConfig, name: str, layer: FusedLoRAExperts, factors: Mapping[str, Factors]) -> None:
    """Gives a layer that had adapters the values and the settings of the file."""
    with torch.no_grad():
        for own, (a, b) in factors.items():
            layer.lora_A[own].copy_(a)
            layer.lora_B[own].copy_(b)
    for own, of in layer.options.items():
        given = config.options_of(joined(name, own))
        layer.options[own] = replace(of, **{f: getattr(given, f) for f in ("lora_alpha", "lora_dropout", "use_rslora")})


def expert_rows(experts: Mapping[str, FusedLoRAExperts]) -> Iterator[ReplacedLayer]:
    """A row for each adapted Parameter, for a report."""
    for name, layer in experts.items():
        for own, of in layer.options.items():
            a, b, full = layer.lora_A[own], layer.lora_B[own], joined(name, own)
            sizes = a.shape[2], b.shape[1], of.r, of.lora_alpha, layer.scaling(own), a.numel() + b.numel()
            yield ReplacedLayer(full, (full,), *sizes, experts=a.shape[0])
