"""What loading an adapter would change, found out and checked before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import pissa, storage
from ..config import ADAPTER_DTYPES, LoRAConfig, as_tuple, pattern_value
from ..errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from ..layer import LoRALayer
from ..models.layers import expert_layers, lora_layers
from ..models.matching import close_names, is_all_linear, is_linear, listed, selects, trained_whole
from ..models.names import parameter_name, plain_modules, plain_name, plain_names
from ..replaceable import is_conv1d, why_not_replaceable
from ..weights import known
from .expert_lists import stack_lists
from .experts import Factors, take_experts
from .plain_form import NAMES
from .saving import PREFIX

__all__ = ["Plan", "make_plan"]

_ADAPTER_KEY = re.compile(
    r"(?P<path>.+)\.(?:(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias)|(?P<dora>lora_magnitude_vector)(\.weight)?)"
)
_NAMED = re.compile(  # the parts as a live model of PEFT's calls them, with the adapter's name within
    r"(?P<part>\.lora_[AB]|\.lora_magnitude_vector)\.(?P<adapter>[^.]+)(?P<end>\.weight|\.bias)"
    r"|(?P<vector>\.lora_magnitude_vector)\.(?P<its>(?!weight$)[^.]+)"
)
_DATA_PARALLEL = "module."  # what DistributedDataParallel puts before all names
_IN_WRAPPERS = re.compile(r"\.(original_module|modules_to_save)\.")  # PEFT's copies of what modules_to_save names


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        config: the adapter's configuration.
        modules: the modules with an adapter in the file, by name.
        adapters: their tensors, by name and by our names of the Parameters.
        experts: of modules with stacked experts, by name and by Parameter, a (E, R, K) and b (E, N, R).
        expert_modules: these modules, by name.
        others: other tensors of the model, each with the file's value.
        untied: modules, names of their Parameters and values, where one of their own is needed.
        other_names: the names of ``others`` and ``untied``.
        notes: sentences for the report.
    """

    config: LoRAConfig
    modules: dict[str, nn.Module] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    experts: dict[str, dict[str, Factors]] = field(default_factory=dict)
    expert_modules: dict[str, nn.Module] = field(default_factory=dict)
    others: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    untied: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    other_names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_plan(model: nn.Module, config: LoRAConfig, tensors: Mapping[str, Tensor], where: str) -> Plan:
    """The plan for loading ``tensors`` from the file ``where``, or the error that says why they do not fit."""
    plan = Plan(config)
    modules = dict(plain_modules(model))
    rest: dict[str, Tensor] = {}
    for name, tensor in _plain_keys(tensors, modules, where).items():
        found = _ADAPTER_KEY.fullmatch(name)
        of_layer = found is not None and (
            _slot(modules, name) is None or found["path"] not in modules or is_linear(modules[found["path"]])
        )
        if found is not None and of_layer:  # else it is a Parameter of the model's own with such a name
            part = NAMES[found["part"] or found["dora"]]
            plan.adapters.setdefault(found["path"], {})[part] = tensor
        else:
            rest[name] = tensor
    if not plan.adapters:
        raise InvalidArgumentError(
            f"{where} holds no tensors of a LoRA layer (names that end with lora_A.weight). It is of another method, "
            "or was saved without its adapter."
        )
    plan.config = config = stack_lists(model, config, plan.adapters, modules, where)
    plan.experts = take_experts(model, config, plan.adapters, modules, where)
    plan.expert_modules = {name: modules[name] for name in plan.experts}
    _check_parts(modules, rest, where)
    _find_modules(plan, model, modules, where)
    _check_rule(plan, modules, where)
    layers = [(name, module) for name, module in plan.modules.items() if isinstance(module, LoRALayer)]
    storage.check_kept("load_adapter", ((name, layer, list(plan.adapters[name])) for name, layer in layers))
    for name, module in plan.modules.items():
        _check_layer(plan, name, module, where)
    _check_others_adapted(plan, model)
    _plan_rest(plan, model, modules, rest, where)
    return plan


def _plain_keys(tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], where: str) -> dict[str, Tensor]:
    """The tensors by their names in the plain model: without PEFT's prefix, wrappers' names and the adapter's name."""
    names = {key: plain_name(key).removeprefix(_DATA_PARALLEL + PREFIX).removeprefix(PREFIX) for key in tensors}
    wrapped = all(name.startswith(_DATA_PARALLEL) for name in names.values())
    if wrapped and _DATA_PARALLEL.rstrip(".") not in modules:
        names = {key: name.removeprefix(_DATA_PARALLEL) for key, name in names.items()}
    plain: dict[str, str] = {}
    adapters: dict[str, str] = {}
    for key, name in names.items():
        found = _NAMED.search(name)
        if found is not None and found.end() == len(name) and _slot(modules, name) is None:
            adapters.setdefault(found["adapter"] or found["its"], key)
            name = name[: found.start()] + (found["part"] or found["vector"]) + (found["end"] or "")
        if name in plain and len(adapters) < 2:
            raise InvalidArgumentError(
                f"{where} holds {plain[name]!r} and {key!r}, which both mean {name!r}, and which of them counts is not "
                "known. Take one of the two out of the file, or save the adapter again."
            )
        plain[name] = key
    if len(adapters) > 1:
        raise InvalidArgumentError(
            f"{where} holds adapters of several names, {listed(list(adapters))} (as in {min(adapters.values())!r}), "
            "and one is loaded at a time. Save each into a folder of its own, as PEFT's save_pretrained does."
        )
    return {name: tensors[key] for name, key in plain.items()}


def _check_parts(modules: Mapping[str, nn.Module], rest: Mapping[str, Tensor], where: str) -> None:
    for name in rest:
        if re.search(r"\.lora_\w+(\.\w+)?$", name) and _slot(modules, name) is None:
            raise InvalidArgumentError(
                f"{where} holds {name!r}, a part of an adapter that lora_kernels does not compute: it knows lora_A, "
                "lora_B, its bias and lora_magnitude_vector of linear layers, and no embeddings or variants. Load it "
                "with peft.PeftModel.from_pretrained."
            )


def _find_modules(plan: Plan, model: nn.Module, modules: Mapping[str, nn.Module], where: str) -> None:
    missing = [name for name in plan.adapters if name not in modules]
    if missing:
        close = close_names(missing[0], model)
        hint = f" Close to the first is {listed(close)}." if close else ""
        raise InvalidArgumentError(
            f"{where} has adapters for {listed(missing)}, and {type(model).__name__} has no such module: the "
            f"adapter is of another model, or of another part of this one.{hint}"
        )
    for name in plan.adapters:
        if not is_linear(modules[name]):
            kind = type(modules[name])
            raise InvalidTypeError(
                f"{where} has an adapter for {name!r}, which is a {kind.__module__}.{kind.__name__}: only nn.Linear "
                "and transformers' Conv1D are adapted here. Load it with peft.PeftModel.from_pretrained, or onto the "
                "plain model."
            )
    plan.modules = {name: module for name, module in modules.items() if name in plan.adapters}
    first = {module: name for name, module in reversed(plan.modules.items())}
    for name, module in plan.modules.items():
        if first[module] != name:
            raise InvalidArgumentError(
                f"{where} has adapters for {first[module]!r} and for {name!r}, which are one shared layer here: the "
                "adapter is of a model where they are two."
            )


def _check_rule(plan: Plan, modules: Mapping[str, nn.Module], where: str) -> None:
    """Raises unless the configuration names the modules that the file has adapters for."""
    if is_all_linear(plan.config.target_modules):
        return  # which head that leaves out is not the file's to say
    named: dict[nn.Module, str] = {}  # of a shared module, its first name
    for name, module in modules.items():
        named.setdefault(module, name)
    wanted = {module: name for module, name in named.items() if name and selects(plan.config, name)}
    adapted = set(plan.modules.values())
    for module, name in wanted.items():
        if module not in adapted:
            raise InvalidArgumentError(
                f"target_modules means {name!r}, and {where} holds no adapter for it: the file is not whole, or the "
                "adapter is of a smaller model."
            )
    for name, module in plan.modules.items():
        if module not in wanted:
            raise InvalidArgumentError(
                f"{where} has an adapter for {name!r}, which its configuration does not name (target_modules, "
                "exclude_modules, layers_to_transform). The two files do not belong together; save the adapter again."
            )


def _check_layer(plan: Plan, name: str, module: nn.Module, where: str) -> None:
    """Raises unless the tensors for ``name`` are those that the configuration and the module ask for."""
    config, tensors = plan.config, plan.adapters[name]
    if not isinstance(module, LoRALayer) and (reason := why_not_replaceable(module)):
        raise InvalidTypeError(f"the adapter cannot be loaded: {name}: {reason}")
    weight = module.base_weight if isinstance(module, LoRALayer) else module._parameters["weight"]
    assert weight is not None
    if weight.is_meta:
        raise LoRAStateError(f"{name}.weight is on the meta device. Load the model's weights first, then its adapter.")
    rank = pattern_value(config.rank_pattern, name, config.r)
    turned = is_conv1d(module) or not isinstance(module, nn.Linear)
    sizes = known.logical_shape(module, weight)
    n, k = reversed(sizes) if turned else sizes
    expected: dict[str, tuple[int, ...]] = {"lora_A": (rank, k), "lora_B": (n, rank)}
    expected |= {"lora_bias": (n,)} if config.lora_bias else {}
    expected |= {"lora_magnitude_vector": (n,)} if config.use_dora else {}
    if expected.keys() != tensors.keys():
        theirs = {ours: theirs for theirs, ours in NAMES.items()}
        lacking = [f"no {theirs[own]}" for own in expected if own not in tensors]
        lacking += [f"a {theirs[own]} that the configuration does not have" for own in tensors if own not in expected]
        raise InvalidArgumentError(f"{where} has {' and '.join(lacking)} for {name!r}. Save the adapter again.")
    for own, shape in expected.items():
        if tuple(tensors[own].shape) != tuple(shape):
            raise InvalidArgumentError(
                f"{where} has {own} {tuple(tensors[own].shape)} for {name!r}, where {tuple(shape)} is expected: the "
                f"layer is {k} -> {n} and the configuration gives it r={rank}. The adapter is of another model."
            )
        if tensors[own].dtype not in ADAPTER_DTYPES:
            raise InvalidTypeError(
                f"{where} has {own} in {tensors[own].dtype} for {name!r}: it must be torch.float16, bfloat16, float32 "
                "or float64. Convert it first."
            )
    if isinstance(module, LoRALayer):
        _check_fits(name, module, rank, tensors)


def _check_fits(name: str, layer: LoRALayer, rank: int, tensors: Mapping[str, Tensor]) -> None:
    if layer.activation != "identity":
        raise LoRAStateError(
            f"the layer {name!r} has activation={layer.activation!r}, and PEFT's adapters have none: the same A and B "
            "would compute something else. Call restore_linear(model) first; load_adapter then makes the layers."
        )
    if layer.merged:
        raise LoRAStateError(f"the layer {name!r} is merged. Call unmerge_lora(model) before load_adapter.")
    if pissa.is_residual(layer):
        raise LoRAStateError(
            f"the layer {name!r} was initialised with {layer.init_lora_weights!r}, so its weight is a residual, and "
            "the file is for the untouched model. Call restore_linear(model) first, which puts that weight back."
        )
    if (layer.r, set(layer.adapter)) != (rank, set(tensors)):
        raise InvalidArgumentError(
            f"the layer {name!r} has r={layer.r} and {', '.join(layer.adapter)}, and the adapter has r={rank} and "
            f"{', '.join(tensors)}. Call restore_linear(model) first; load_adapter then makes the layers."
        )
    for own, parameter in layer.adapter.items():
        if parameter.is_meta or type(parameter.data).__name__ == "DTensor":
            raise LoRAStateError(
                f"{name}.{own} is on the meta device or sharded (DTensor), so nothing can be loaded into it. Load the "
                "adapter onto the plain model first, then distribute it."
            )


def _check_others_adapted(plan: Plan, model: nn.Module) -> None:
    adapted = {*plan.modules.values(), *plan.expert_modules.values()}
    others = [name for name, m in (*lora_layers(model), *expert_layers(model)) if m not in adapted]
    if others:
        raise LoRAStateError(
            f"{listed(others)} has an adapter, and the file has none for it: it would go on acting beside the loaded "
            "one. Call restore_linear(model) first, after merge_lora(model) to keep what it has learned."
        )


def _slot(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str] | None:
    """The module and the name in it of the Parameter or buffer called ``name``; a layer's base by PEFT's name."""
    path, _, own = name.rpartition(".")
    while path not in modules and path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    module = modules.get(path)
    if module is None or not isinstance(_held(module, own), Tensor):
        return None
    return module, own


def _held(module: nn.Module, own: str) -> Tensor | None:
    """``module``'s Parameter or buffer called ``own``; FSDP1 may have a tensor of its own there."""
    held = module._parameters.get(own, module._buffers.get(own))
    return vars(module).get(own) if held is None and storage.is_flat(module) else held


def _plan_rest(
    plan: Plan, model: nn.Module, modules: Mapping[str, nn.Module], rest: Mapping[str, Tensor], where: str
) -> None:
    """Plans what is no adapter: biases, modules that were saved whole, embeddings."""
    whole = dict(trained_whole(as_tuple(plan.config.modules_to_save), model))
    names = plain_names(model)
    due = {parameter_name(names, f"{name}.{key}") for name, module in whole.items() for key in module.state_dict()}
    if lacking := sorted(due - set(rest)):
        raise InvalidArgumentError(
            f"{where} has no {listed(lacking)}, which modules_to_save names. The file is not whole; save it again."
        )
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for name, tensor in rest.items():
        slot = _slot(modules, name)
        if slot is None and _IN_WRAPPERS.search(name):
            continue  # PEFT's second copy of a module that is saved whole
        if slot is not None and isinstance(slot[0], LoRALayer) and slot[1] in slot[0].adapter:
            raise InvalidArgumentError(
                f"{where} holds {name!r}, which is lora_kernels' name of a part of an adapter, beside parts under "
                "PEFT's names: which of them counts is not known. Take it out of the file, or save the adapter again."
            )
        if slot is None:
            raise InvalidArgumentError(
                f"{where} holds {name!r}, and {type(model).__name__} has no such parameter. The adapter is of another "
                "model, or of a kind that lora_kernels does not compute."
            )
        found[name] = (*slot, tensor)
    storage.check_kept("load_adapter", ((name, module, [own]) for name, (module, own, _) in found.items()))
    for name, (module, own, tensor) in found.items():
        _check_value(name, _value(module, own), tensor, where)
    plan.other_names = list(found)
    inside = {part for module in whole.values() for part in module.modules()}
    _plan_tied(plan, model, found, inside)


def _value(module: nn.Module, own: str) -> Tensor:
    value = _held(module, own)
    assert value is not None
    return value


def _check_value(name: str, value: Tensor, tensor: Tensor, where: str) -> None:
    if is_lazy(value) or value.is_meta or type(value.data).__name__ == "DTensor":
        raise LoRAStateError(
            f"{name} has no values here yet, or is sharded (DTensor), and {where} has some for it. Load the model's "
            "weights first, then its adapter, and distribute the model last."
        )
    if value.shape != tensor.shape:
        raise InvalidArgumentError(
            f"{where} has {name} {tuple(tensor.shape)}, and the model's is {tuple(value.shape)}. The adapter is of "
            "another model, or the model's head or vocabulary has to be resized first."
        )
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (value, tensor)]
    if kinds[0] != kinds[1]:
        raise InvalidTypeError(f"{where} has {name} in {tensor.dtype}, and the model's is in {value.dtype}.")
    if kinds[0] == (False, False) and not torch.equal(tensor.to(value.dtype).to(tensor.dtype), tensor):
        raise InvalidTypeError(
            f"{where} has {name} in {tensor.dtype}, with numbers that the model's {value.dtype} cannot hold."
        )


def _same(slot: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether ``slot`` would have the same values of both, in whatever dtypes the file has them."""
    return torch.equal(one.to(slot.dtype), other.to(slot.dtype))


def _plan_tied(
    plan: Plan, model: nn.Module, found: Mapping[str, tuple[nn.Module, str, Tensor]], inside: set[nn.Module]
) -> None:
    """Writes in place, except where that would give a tied Parameter two values: there the saved one is set apart."""
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, own))
    saved = {(module, own): tensor for module, own, tensor in found.values()}
    done: set[tuple[nn.Module, str]] = set()
    for name, (module, own, tensor) in found.items():
        value = _value(module, own)
        if (module, own) in done:
            continue
        done.add((module, own))
        values = [saved.get(owner) for owner in owners.get(value, [])]
        alike = all(other is tensor or (other is not None and _same(value, other, tensor)) for other in values)
        if module in inside and not alike:
            storage.check_free("load_adapter", [(name, module)])
            plan.untied.append((module, own, tensor))
            plan.notes.append(f"{name} was tied to another parameter and has a value of its own now.")
        else:
            plan.others.append((value, tensor))
