"""What ``replace_linear`` decides before it touches the model, and what it says about it afterwards.

:func:`check_model` refuses whole models, :func:`decide` sorts the matches, :func:`build` makes the layers,
:func:`make_report` tells. Only ``build`` changes anything: it freezes the weights that it takes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import LoRAConfig, pattern_value
from ..errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsError, LoRAStateError
from ..layer import LoRALayer
from ..nn import around
from ..replaceable import is_conv1d, why_not_replaceable
from .experts import stacked_names, why_not_by_modules
from .layers import adapter_parameters
from .matching import (
    Match,
    close_names,
    is_all_linear,
    linear_names,
    listed,
    name_matches,
    stacked_experts,
    trained_whole,
    unmatched_names,
)
from .names import compiled_alone, joined, plain_modules, prompt_parts
from .report import ReplacedLayer, ReplaceReport, ShareReport, SkippedLayer
from .watch import count_parameters

__all__ = ["build", "check_model", "decide", "make_report", "nothing_to_replace"]

# transformers' models whose mixers read out_proj.weight on a GPU; the first five are PEFT's list.
_OF_A_PROMPT = "it makes a prompt of PEFT's, and trains as it is. Exclude it."
_MAMBAS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"}


def check_model(model: nn.Module, config: Any) -> None:
    """Raises for what no configuration can repair, and for what is no configuration."""
    if not isinstance(config, LoRAConfig):
        if hasattr(config, "peft_type"):
            raise InvalidTypeError(
                f"peft.{type(config).__name__} was given as the configuration: it must be a lora_kernels.LoRAConfig. "
                "LoRAConfig.from_peft(config) makes one of a peft.LoraConfig."
            )
        raise InvalidTypeError(
            f"a configuration of type {type(config).__name__} was given: it must be a lora_kernels.LoRAConfig, whose "
            "fields have the names of peft.LoraConfig's."
        )
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"a model of type {type(model).__name__} was given: it must be a torch.nn.Module.")
    if isinstance(model, LoRALayer):
        raise LoRAStateError("the model given to replace_linear is a FusedLoRALinear already. Train it as it is.")
    if is_conv1d(model):
        raise InvalidTypeError("the model given to replace_linear is itself a Conv1D. Give the model that holds it.")
    if isinstance(model, nn.Linear):
        raise InvalidTypeError(
            "the model given to replace_linear is itself an nn.Linear, which cannot be replaced in place. Use "
            "FusedLoRALinear.from_linear(model, r=...) and take what it returns."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidTypeError(
            f"the model is a ScriptModule ({type(model).__name__}), whose layers cannot be exchanged. Call "
            "replace_linear on the model before torch.jit.script or torch.jit.trace."
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise LoRAStateError(
            "the model is wrapped in DistributedDataParallel, which would not synchronise the gradients of parameters "
            "that come later. Call replace_linear on the plain model, then wrap it."
        )


def decide(model: nn.Module, config: LoRAConfig, matches: list[Match]) -> tuple[list[Match], list[SkippedLayer]]:
    """The matches to replace, and those to leave alone, with the reasons."""
    adapted = (match for match in matches if isinstance(match.module, LoRALayer))
    replaced = [match.name for match in adapted if not match.excluded and not match.whole]
    if replaced:
        raise LoRAStateError(
            f"{listed(replaced)} is a FusedLoRALinear already, and no layer takes a second adapter. Name it in "
            "exclude_modules, or call restore_linear(model) first."
        )
    modules, alone = dict(plain_modules(model)), compiled_alone(model)
    reasons = {match.name: _why_left_alone(match, modules, alone) for match in matches}
    prompts = prompt_parts(model)
    reasons |= {match.name: _OF_A_PROMPT for match in matches if match.module in prompts and not reasons[match.name]}
    targets = [match for match in matches if reasons[match.name] is None]
    while tied := _tied_outside(model, targets, config.bias):
        reasons |= tied
        targets = [match for match in targets if match.name not in tied]
    return targets, [SkippedLayer(name, reason) for name, reason in reasons.items() if reason is not None]


def _why_left_alone(match: Match, modules: Mapping[str, nn.Module], compiled: set[nn.Module]) -> str | None:
    if match.excluded is not None:
        also = "it" if match.excluded == match.name else f"{match.excluded!r}, another name of it"
        return f"exclude_modules matches {also}."
    if match.whole is not None:
        return f"modules_to_save names it ({match.whole!r}), so it trains whole."
    for place in match.places:
        ends = [*(dot.start() for dot in re.finditer(r"\.", place)), len(place)]
        if any(_is_pefts(modules[place[:end]]) for end in ends):
            return (
                "it is PEFT's, or a part of a layer of PEFT's, which has an adapter already: exclude it, or unload "
                "PEFT's first. lora_kernels.fuse_peft(model) has PEFT's LoRA layers run fused as they are."
            )
    if isinstance(match.module, torch.jit.ScriptModule):
        return "it is a ScriptModule: call replace_linear before torch.jit.script or torch.jit.trace."
    if own := stacked_experts(match.module):
        return why_not_by_modules(match.name, match.module, own)
    if match.module in compiled:
        return (
            "torch.compile was called on it by itself, and the compiled function would go on calling it without an "
            "adapter: call replace_linear first, then compile."
        )
    return _why_never_called(match, modules) or why_not_replaceable(match.module)


def _why_never_called(match: Match, modules: Mapping[str, nn.Module]) -> str | None:
    """Mamba's kernels take the weight of ``out_proj``, and so they pass an adapter by."""
    for place in match.places:
        parts = place.split(".")
        above = [modules[".".join(parts[:i])] for i in range(len(parts))]
        types = {getattr(getattr(module, "config", None), "model_type", None) for module in above}
        kernels = next(iter(sorted(_MAMBAS.intersection(types))), None)
        if type(above[-1]).__module__.startswith("mamba_ssm."):
            kernels = "mamba_ssm"
        if parts[-1] == "out_proj" and kernels and hasattr(above[-1], "conv1d"):
            return (
                f"the kernels of {kernels} read its weight and never call it, so its adapter would have no effect. "
                "Leave it out of target_modules; PEFT refuses it too."
            )
    return None


def _named_experts(model: nn.Module, entries: Collection[str] | str) -> str | None:
    """A sentence on the stacked experts of which ``entries`` names a Parameter; None where it names none."""
    for name, module in plain_modules(model):
        own = stacked_experts(module)
        if found := [each for each in own if name_matches(entries, joined(name, each))]:
            return f"{joined(name, found[0])!r} is no module: {why_not_by_modules(name, module, own)}"
    return None


def _is_pefts(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _tied_outside(model: nn.Module, targets: list[Match], bias: str) -> dict[str, str]:
    """For each target whose freezing would freeze a module that is not replaced: its name and the reason."""
    replaced = {match.module for match in targets}
    outside = {
        parameter: joined(prefix, name)
        for prefix, module in plain_modules(model, shared=False)
        if module not in replaced
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }
    reasons = {}
    for match in targets:
        for name, parameter in match.module.named_parameters(recurse=False):
            if parameter in outside and (name == "weight" or bias == "none"):
                reasons[match.name] = (
                    f"its {name} is also {outside[parameter]}, which is not replaced and would be frozen with it. "
                    f"Freeze it yourself with requires_grad_(False) first, give the layer its own {name} or exclude it."
                )
    return reasons


def nothing_to_replace(model: nn.Module, config: LoRAConfig, skipped: list[SkippedLayer]) -> LoRAKernelsError:
    kind, target = type(model).__name__, config.target_modules
    if config.target_parameters and not (target and skipped):
        return _no_parameter(model, config, skipped)
    if skipped:
        reasons = dict.fromkeys(layer.reason for layer in skipped)
        by_choice = all(reason.startswith(("exclude_modules", "modules_to_save")) for reason in reasons)
        error = InvalidArgumentError if by_choice else InvalidTypeError
        return error(
            f"target_modules={target!r} matches {listed([layer.name for layer in skipped])} in {kind}, and nothing of "
            f"it can be replaced: {' '.join(reasons)}"
        )
    if config.layers_to_transform is not None:  # target_modules is a list then
        named = [name for name, _ in plain_modules(model, shared=False) if name and name_matches(target or (), name)]
        if named:
            return InvalidArgumentError(
                f"target_modules={target!r} matches {listed(named)} in {kind}, and none of it is in "
                f"layers_to_transform={config.layers_to_transform!r}. Without layers_pattern a block's number is the "
                "first one that stands below two names (model.layers.3); for blocks at the top give "
                "layers_pattern='layers', or whatever their list is called."
            )
    names = linear_names(model)
    if not is_all_linear(target) and (experts := _named_experts(model, target or ())):
        return InvalidTypeError(f"target_modules={target!r} matches no module in {kind}. {experts}")
    if not names:
        return InvalidArgumentError(f"target_modules={target!r} was given, but {kind} has no nn.Linear to replace.")
    if is_all_linear(target):
        return InvalidArgumentError(
            f"target_modules={target!r} was given, but the output head is the only nn.Linear in {kind}: "
            f"{listed(names)}. Name it to replace it."
        )
    whole = "the whole dotted name of " if isinstance(target, str) else ""
    return InvalidArgumentError(
        f"target_modules={target!r} matches {whole}no module in {kind}. {_close_sentence(model, config)}Its linear "
        f"layers are called {listed(names)}.{_experts_sentence(model)}"
    )


def _no_parameter(model: nn.Module, config: LoRAConfig, skipped: list[SkippedLayer]) -> LoRAKernelsError:
    kind = type(model).__name__
    given = f"target_parameters={sorted(config.target_parameters or ())!r}"
    if config.target_modules:
        given += f" and target_modules={config.target_modules!r}"
    if skipped:
        reasons = " ".join(dict.fromkeys(layer.reason for layer in skipped))
        return InvalidTypeError(
            f"{given} names {listed([layer.name for layer in skipped])} in {kind}, and nothing of it can be adapted: "
            f"{reasons}"
        )
    ends = stacked_names(model)
    there = f"Its stacked Parameters are {listed(ends)}." if ends else "It has no stacked experts."
    return InvalidArgumentError(f"{given} matches no Parameter in {kind}. Give dotted ends of names. {there}")


def _experts_sentence(model: nn.Module) -> str:
    """What is said of stacked experts where a name may have meant them: many know an expert's layers as w1, w2, w3."""
    for name, module in plain_modules(model):
        if own := stacked_experts(module):
            return f" {name!r} is none of them: {why_not_by_modules(name, module, own)}"
    return ""


def _close_sentence(model: nn.Module, config: LoRAConfig) -> str:
    target = config.target_modules or ()
    words = re.findall(r"\w{2,}", target) if isinstance(target, str) else list(target)
    close = dict.fromkeys(name for word in words for name in close_names(word, model))
    return f"Close names are {listed(list(close))}. " if close else ""


def build(targets: list[Match], config: LoRAConfig, draw: bool = True) -> dict[str, LoRALayer]:
    """The layers for ``targets`` by name, with one warning for all ranks that are too high.

    ``draw=False`` is for adapters that exist: it leaves their values unset and torch's generator as it is, and does not
    warn.
    """
    layers = {match.name: around(match.module, config.options_of(match.name), draw=draw) for match in targets}
    high = [name for name, layer in layers.items() if layer.r > min(layer.in_features, layer.out_features)]
    if high and draw:
        warnings.warn(
            f"the rank is above min(in_features, out_features) of {listed(high)}: the adapter costs more than a full "
            "update of the weight and can represent no more. A smaller r, or a rank_pattern for these, does the same.",
            stacklevel=3,
        )
    return layers


def make_report(
    model: nn.Module,
    config: LoRAConfig,
    matches: list[Match],
    layers: dict[str, LoRALayer],
    targets: list[Match],
    skipped: list[SkippedLayer],
    shared: ShareReport,
    of_experts: Sequence[ReplacedLayer],
    notes: Sequence[str],
) -> ReplaceReport:
    replaced = []
    for match in targets:
        layer = layers[match.name]
        count = sum(parameter.numel() for parameter in layer.adapter.values())
        shape = layer.in_features, layer.out_features
        sizes = *shape, layer.r, layer.lora_alpha, layer.scaling, count
        replaced.append(ReplacedLayer(match.name, match.places, *sizes, layer.activation))
    replaced += of_experts
    names = [row.name for row in replaced]
    counts = count_parameters(model)
    report = ReplaceReport(
        layers=tuple(replaced),
        skipped=tuple(skipped),
        notes=(*_notes(model, config, matches, names), *notes),
        groups=shared.groups,
        adapter_parameters=sum(parameter.numel() for parameter in adapter_parameters(model)),
        trainable=counts.trainable,
        total=counts.total,
        mlps=shared.mlps,
        plain_mlps=shared.plain_mlps,
    )
    return report.of(model, [*names, *shared.mlps, *(name for group in shared.groups for name in group)])


def _notes(model: nn.Module, config: LoRAConfig, matches: list[Match], replaced: list[str]) -> Iterator[str]:
    for entry in unmatched_names(model, config):
        if experts := _named_experts(model, [entry]):
            yield f"target_modules names {entry!r}: {experts}"
            continue
        close = close_names(entry, model)
        yield f"target_modules names {entry!r}, which matches nothing{f' (close: {listed(close)})' if close else ''}."
    if config.exclude_modules and config.target_modules and not any(match.excluded for match in matches):
        yield f"exclude_modules={config.exclude_modules!r} excludes nothing that target_modules matches."
    for entry in config.modules_to_save or ():
        if not trained_whole([entry], model):
            yield f"modules_to_save names {entry!r}, which matches nothing."
    for pattern, field in ((config.rank_pattern, "rank_pattern"), (config.alpha_pattern, "alpha_pattern")):
        for key in pattern:
            if not any(pattern_value({key: True}, name, False) for name in replaced):
                yield f"{field} has the key {key!r}, which matches no replaced layer."
    for prefix, module in plain_modules(model, shared=False):
        nested = isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
        if nested and any(name.startswith(f"{prefix}." if prefix else "") for name in replaced):
            yield (
                f"{prefix or 'the model'} is an nn.TransformerEncoder, which turns padded batches into nested tensors "
                "in evaluation, and the replaced layers take none. Set its use_nested_tensor to False."
            )
