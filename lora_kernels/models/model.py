"""Whole models: replacing ``nn.Linear`` by ``FusedLoRALinear``, merging, restoring, and what trains.

Each function does all of its work or none: where it raises, the model is as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .. import called, fsdp, merging, storage
from ..assigning import check_restorable, has_moved
from ..config import LoRAConfig, as_tuple
from ..errors import InvalidTypeError, LoRAKernelsError, LoRAKernelsWarning, LoRAStateError
from ..experts.layer import FusedLoRAExperts
from ..layer import LoRALayer
from ..weights import known
from .adapter import Adapter, forget, remember, remember_bias, remembered_within
from .experts import build_experts, decide_experts, expert_rows, find_experts, notes_of_experts
from .grouping import share_found, unshare_inputs
from .heads import watch_heads
from .layers import adapter_of, adapter_parameters, expert_layers, lora_layers
from .matching import find_matches, listed, trained_whole
from .names import compiled_alone, joined, plain_modules
from .pretrained import tell_of_saving
from .replacing import build, check_model, decide, make_report, nothing_to_replace
from .report import MergeReport, ReplaceReport, RestoredLayer, RestoreReport, ShareReport
from .trained import (
    biases,
    check_bias,
    train_biases,
    train_whole,
    warn_of_left_out,
    warn_of_never_called,
    warn_of_prompts,
    whole_tensors,
)

__all__ = [
    "lora_layers",
    "mark_only_lora_as_trainable",
    "merge_lora",
    "replace_linear",
    "restore_linear",
    "state_of_adapters",
    "unmerge_lora",
]


def replace_linear(model: nn.Module, config: LoRAConfig) -> ReplaceReport:
    """Replaces, in place, each ``nn.Linear`` that ``config`` names by a ``FusedLoRALinear`` around the same Parameters.

    transformers' ``Conv1D`` (GPT-2) becomes a ``FusedLoRAConv1D`` around its weight as it is stored. Make the optimizer
    afterwards.

    **Which layers.** Names match as in PEFT, and ``exclude_modules`` always wins. "all-linear" is every ``nn.Linear``
    and ``Conv1D`` except the output head. The head is what ``get_output_embeddings()`` of a transformers model returns.
    Where that is None, it is the model's child ``score`` or ``classifier``. In other models no head can be told from
    the rest, so "all-linear" is all of their linear layers.

    **Experts.** ``config.target_parameters`` names a mixture's stacked Parameters. Their module becomes a
    :class:`~lora_kernels.FusedLoRAExperts`, with an A and a B for each expert. "all-linear" leaves experts out, and the
    report says so. Biases of experts do not train.

    **What trains.** The replaced layers' weights are frozen, and their biases as ``config.bias`` says. The modules of
    ``config.modules_to_save`` train whole. Nothing else is frozen: :func:`mark_only_lora_as_trainable` does that.

    **What stays.** Device, dtype, mode and forward hooks are kept. A module that is used at several places becomes one
    ``FusedLoRALinear`` at all of them. Tied Parameters stay tied. With PiSSA and OLoRA each layer gets its own
    residual, and what it was tied to keeps its values. A layer is left alone if its trainable weight is also used
    outside of the replaced layers, such as a head that is tied to an embedding.

    Layers that read one x run together in training; :func:`share_inputs` says how they are found. A layer on the meta
    device stays there: call ``reset_lora_parameters`` after ``to_empty``, when its weights are loaded.

    Args:
        model: any module. Wrapped ones (``torch.compile``, ``DataParallel``) are searched too.
        config: what to replace and how.

    Returns:
        A report to print: which layers were replaced, which were left alone and why, how many parameters train.

    Raises:
        InvalidArgumentError: there are no ``target_modules`` and no ``target_parameters``, or they match nothing (the
            message names close ones); PiSSA or OLoRA cannot give a layer that rank; or experts were named with an
            option that they cannot have, such as DoRA.
        InvalidTypeError: the model is no module, is itself an ``nn.Linear``, or is scripted; or none of the matches can
            be replaced.
        LoRAStateError: a layer that matches is replaced already; its weight has no decomposition (PiSSA, OLoRA); or the
            model holds a ``DistributedDataParallel``.

    Example:
        >>> from lora_kernels import LoRAConfig, replace_linear
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
        >>> print(replace_linear(model, LoRAConfig(r=2, lora_alpha=4, target_modules=["0"])))
        replaced 1 layer:
          0 (16→32), r = 2, alpha = 4: 96 parameters
        trainable parameters: 129 of 673 (19.17 %)
          of these 33 are not adapters; mark_only_lora_as_trainable(model) freezes them
    """
    check_model(model, config)
    matches = find_matches(model, config)
    targets, skipped = decide(model, config, matches)
    found = find_experts(model, config)
    experts, left = decide_experts(model, config, found)
    adapted = {match.name for match in experts}
    skipped = [each for each in skipped if each.name not in adapted] + left
    if not targets and not experts:
        raise nothing_to_replace(model, config, skipped)
    with training_kept_on_failure(model):
        layers, of_experts = build(targets, config), build_experts(experts, config)
        train_biases(model, list(layers.values()), config.bias)
        train_whole(model, config)
    put: dict[nn.Module, nn.Module] = {match.module: layers[match.name] for match in targets}
    put |= {match.module: layer for match, layer in zip(experts, of_experts, strict=True)}
    shared = put_layers(model, put)
    remember(model, config)
    rows, notes = expert_rows(experts, of_experts), notes_of_experts(model, config, found)
    return make_report(model, config, matches, layers, targets, skipped, shared, list(rows), list(notes))


def mark_only_lora_as_trainable(model: nn.Module, bias: str | None = None) -> None:
    """Freezes all parameters except those of the adapters: lora_A, lora_B, lora_bias and lora_magnitude_vector.

    The modules of ``LoRAConfig.modules_to_save`` still train whole.

    Args:
        model: a module that holds ``FusedLoRALinear`` layers.
        bias: which biases train too: ``"none"``, ``"lora_only"`` (those of the LoRA layers) or ``"all"``. None is
            ``LoRAConfig.bias``. Biases that train are saved with the adapter.

    Raises:
        InvalidArgumentError: ``bias`` has another value.
        LoRAStateError: the model holds no ``FusedLoRALinear``.

    Example:
        >>> from lora_kernels import FusedLoRALinear, mark_only_lora_as_trainable
        >>> from torch import nn
        >>> model = nn.Sequential(FusedLoRALinear(4, 4, r=2), nn.Linear(4, 1))
        >>> mark_only_lora_as_trainable(model)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.lora_A', '0.lora_B']
    """
    check_bias(bias)
    layers = [layer for _, layer in some_lora_layers(model, "mark_only_lora_as_trainable")]
    adapter = remembered_within(model) or Adapter(LoRAConfig())
    bias = adapter.config.bias if bias is None else bias
    fsdp.settle(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers:
        layer.base_weight.requires_grad_(False)
        if layer.base_bias is not None:
            layer.base_bias.requires_grad_(False)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(True)
    train_biases(model, layers, bias)
    train_whole(model, adapter.config)
    remember_bias(model, bias)


def merge_lora(model: nn.Module, quantize: bool = False) -> MergeReport:
    """Merges every ``FusedLoRALinear`` and ``FusedLoRAExperts``; see :meth:`FusedLoRALinear.merge`.

    It costs one more copy of their weights in memory. If one layer cannot be merged, none is.

    Args:
        quantize: quantise merged values again where a weight is quantised; without it such a layer is refused.

    Returns:
        A report to print: which layers were merged, and the relative error of those that were quantised again.

    Raises:
        LoRAStateError: the model holds no LoRA layer; one has a quantised weight and ``quantize`` is False; one
            is merged already; one cannot be merged, because its weights
            are on the meta device or would not be finite; or FSDP1 or ZeRO-3 would not keep merged values now.

    Example:
        >>> from lora_kernels import FusedLoRALinear, merge_lora
        >>> from torch import nn
        >>> model = nn.Sequential(FusedLoRALinear(4, 4, r=2))
        >>> print(merge_lora(model))
        merged 1 layer
        >>> model[0].merged
        True
    """
    layers = some_lora_layers(model, "merge_lora")
    fsdp.settle_for(model, layers, "merge_lora")
    experts = list(expert_layers(model))
    if merged := [name for name, layer in (*layers, *experts) if layer.merged]:
        raise LoRAStateError(
            f"merge_lora was called on a model where {listed(merged)} is merged already. Call unmerge_lora(model) "
            "first, or merge() on the layers that are not."
        )
    storage.check_merging("merge_lora", layers)
    warn_of_never_called(layers, "merge_lora", stacklevel=2)
    for name, layer in layers:
        if fsdp.in_place(layer):
            fsdp.check_untied(name, layer, _untied_from(model, layer))
    done: list[LoRALayer | FusedLoRAExperts] = []
    every: list[tuple[str, LoRALayer | FusedLoRAExperts]] = [*layers, *experts]
    try:
        for name, each in every:
            try:
                _merge(each, quantize)
            except LoRAKernelsError as error:
                raise LoRAStateError(f"layer {name!r} cannot be merged, so none is: {error}") from error
            done.append(each)
    except BaseException:
        for each in done:
            _unmerge(each)
        raise
    return MergeReport({name: getattr(each, "merge_error", None) for name, each in every})


def _merge(layer: LoRALayer | FusedLoRAExperts, quantize: bool) -> None:
    """Where the whole model was checked: a layer's own method would refuse what ``fully_shard`` manages."""
    if isinstance(layer, LoRALayer):
        merging.merge(layer, quantize)
    else:
        layer.merge()


def _unmerge(layer: LoRALayer | FusedLoRAExperts) -> None:
    if isinstance(layer, LoRALayer):
        merging.unmerge(layer)
    else:
        layer.unmerge()


def unmerge_lora(model: nn.Module) -> None:
    """Puts the original weights of every ``FusedLoRALinear`` and ``FusedLoRAExperts`` back, exactly.

    Raises:
        LoRAStateError: the model holds no LoRA layer; one is not merged; or FSDP1 or ZeRO-3 would not keep the original
            values now. Then nothing is changed.

    Example:
        >>> from lora_kernels import FusedLoRALinear, merge_lora, unmerge_lora
        >>> from torch import nn
        >>> model = nn.Sequential(FusedLoRALinear(4, 4, r=2))
        >>> report = merge_lora(model)
        >>> unmerge_lora(model)
        >>> model[0].merged
        False
    """
    layers = some_lora_layers(model, "unmerge_lora")
    fsdp.settle_for(model, layers, "unmerge_lora")
    experts = list(expert_layers(model))
    if unmerged := [name for name, layer in (*layers, *experts) if not layer.merged]:
        raise LoRAStateError(
            f"unmerge_lora was called on a model where {listed(unmerged)} is not merged. Call merge_lora(model) first, "
            "or unmerge() on the layers that are."
        )
    storage.check_merging("unmerge_lora", layers)
    for _, layer in layers:
        _unmerge(layer)
    for _, each in experts:
        _unmerge(each)


def restore_linear(model: nn.Module) -> RestoreReport:
    """Replaces, in place, every ``FusedLoRALinear`` by a plain ``nn.Linear`` with the layer's current weight.

    Experts become modules of their own class again. A merged layer gives its merged weight. Another layer gives its
    base weight and drops its adapter, with a warning if the adapter adds anything. So call :func:`merge_lora` or save
    :func:`lora_kernels.lora_state_dict` first. What PiSSA or OLoRA took of the base weight is put back, to within
    rounding. Weights and biases keep their ``requires_grad``: they stay frozen, as :func:`replace_linear` left them.
    Forward hooks are kept, also those that were added later.

    Returns:
        A report to print: whose adapters were merged or dropped, and which merged weights are no longer tied.

    Raises:
        LoRAStateError: the model holds no ``FusedLoRALinear``, or is one itself; torch.compile was called on a layer by
            itself; FSDP, ZeRO-3 or accelerate's offloading holds the values of a layer; or a layer is parametrized or
            pruned where a plain one could not hold it.

    Example:
        >>> from lora_kernels import FusedLoRALinear, restore_linear
        >>> from torch import nn
        >>> model = nn.Sequential(FusedLoRALinear(4, 4, r=2))
        >>> print(restore_linear(model))
        restored 1 layer:
          0: base weight; adapter dropped
        adapters merged: 0; adapters dropped: 1
        >>> type(model[0]).__name__
        'Linear'
    """
    layers = some_lora_layers(model, "restore_linear")
    experts = list(expert_layers(model))
    if isinstance(model, (LoRALayer, FusedLoRAExperts)):
        kind, own = ("FusedLoRALinear", "to_linear") if isinstance(model, LoRALayer) else (type(model), "to_plain")
        raise LoRAStateError(
            f"restore_linear was called on a {getattr(kind, '__name__', kind)} itself, which has no parent to put an "
            f"nn.Linear or plain experts into. Call its {own}() instead."
        )
    every: list[tuple[str, Any]] = [*layers, *experts]
    if managed := [name for name, layer in every if fsdp.is_managed(layer)]:
        raise LoRAStateError(
            f"restore_linear was called on a model where fully_shard (FSDP2) manages {listed(managed)}: it would go on "
            "with the layers that are replaced. Save the adapter, and merge or restore the plain model."
        )
    alone = compiled_alone(model)
    if compiled := [name for name, layer in every if layer in alone]:
        raise LoRAStateError(
            f"restore_linear was called on a model where torch.compile was called on {listed(compiled)} by itself: the "
            "compiled function would go on calling the LoRA layer. Put the layer itself back into the model first."
        )
    storage.check_free("restore_linear", every)
    check_restorable("restore_linear", layers)
    moved = [name for name, layer in layers if not layer.merged and has_moved(layer)]
    if dropped := moved + [name for name, layer in experts if not layer.merged and layer.has_moved]:
        packed = any(known.is_packed(layer.weight) for _, layer in layers)
        merging_call = f"merge_lora(model{', quantize=True' if packed else ''})"
        warnings.warn(
            f"restore_linear drops the adapters of {listed(dropped)}, which add to the base weights that remain. Call "
            f"{merging_call} first to keep what they do, or save_adapter(model, folder) to keep them.",
            LoRAKernelsWarning,
            stacklevel=2,
        )
    places: dict[nn.Module, list[str]] = {layer: [] for _, layer in every}
    for name, module in plain_modules(model):
        if module in places:
            places[module].append(name)
    restored = tuple(
        RestoredLayer(
            name,
            tuple(places[layer]),
            layer.merged,
            _untied_from(model, layer) if layer.merged and isinstance(layer, LoRALayer) else (),
        )
        for name, layer in every
    )
    plain = {layer: layer.to_plain() for _, layer in every}
    unshare_inputs(model)
    for module in plain.values():
        _remove_hook(module._forward_pre_hooks, _keep_off_the_fast_path)
    _exchange(model, plain)
    _remove_hook(model._load_state_dict_pre_hooks, _check_ranks)
    _remove_hook(model._state_dict_pre_hooks, tell_of_saving)
    forget(model)
    return RestoreReport(restored)


def state_of_adapters(model: nn.Module, bias: str | None, stacklevel: int) -> dict[str, Tensor]:
    """What :func:`lora_kernels.lora_state_dict` gives by default; ``stacklevel`` as if the caller warned itself."""
    check_bias(bias)
    layers = some_lora_layers(model, "lora_state_dict")
    fsdp.settle(model)
    adapter = remembered_within(model) or Adapter(LoRAConfig())
    entire = as_tuple(adapter.config.modules_to_save)
    found = list(biases(model, adapter.config.bias if bias is None else bias))
    check_adapters_here("lora_state_dict", layers)
    check_experts_here("lora_state_dict", list(expert_layers(model)))
    storage.check_here("lora_state_dict", ((name, module, ["bias"]) for name, module, _ in found))
    tensors: dict[str, Tensor] = {}
    for prefix, layer in model.named_modules():
        own: dict[str, Tensor] = {**adapter_of(layer), **(layer.initial if isinstance(layer, LoRALayer) else {})}
        tensors |= {joined(prefix, name): storage.value(layer, name, tensor) for name, tensor in own.items()}
    seen: set[Tensor] = set()
    for prefix, module, parameter in found:
        if parameter not in seen:
            tensors[joined(prefix, "bias")] = storage.value(module, "bias", parameter)
            seen.add(parameter)
    tensors |= whole_tensors(model, entire, "lora_state_dict")
    seen |= {parameter for _, module in trained_whole(entire, model) for parameter in module.parameters()}
    warn_of_left_out(model, seen, "lora_state_dict", stacklevel + 1)
    warn_of_prompts(model, "lora_state_dict", stacklevel + 1)
    warn_of_never_called(layers, "lora_state_dict", stacklevel + 1)
    return {storage.state_name(name): tensor for name, tensor in tensors.items()}


def put_layers(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> ShareReport:
    """Puts each layer in the place of its key, and has ``load_state_dict`` look at ranks first; what shares an x."""
    _exchange(model, layers)
    for _, each in lora_layers(model):
        called.forget(each)
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _check_ranks for hook in hooks):
        model.register_load_state_dict_pre_hook(_check_ranks)
    if tell_of_saving not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(tell_of_saving)
    watch_heads(model)
    return share_found(model)


@contextmanager
def training_kept_on_failure(model: nn.Module) -> Iterator[None]:
    """Where the block raises, each parameter trains, or does not, as before it."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:  # an inference tensor takes no call at all
                parameter.requires_grad_(requires_grad)
        raise


def _exchange(model: nn.Module, layers: Mapping[Any, nn.Module]) -> None:
    """Puts each layer wherever its key stands. It writes to the parents' tables, so no override can fail half-way."""
    for parent in list(model.modules()):
        for name, module in parent._modules.items():
            layer = layers.get(module)
            if layer is None:
                continue
            parent._modules[name] = layer
            guarded = any(hook is _keep_off_the_fast_path for hook in layer._forward_pre_hooks.values())
            if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(layer, LoRALayer) and not guarded:
                layer.register_forward_pre_hook(_keep_off_the_fast_path)


def _keep_off_the_fast_path(module: nn.Module, args: Any) -> None:
    """A hook that does nothing but be there.

    In evaluation ``nn.TransformerEncoderLayer`` reads its linear layers' weights and calls none of them, which would
    leave the adapters out, unless one of its modules has a hook.
    """


def _check_ranks(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raises for an adapter of another rank before anything of the state dict is loaded."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (LoRALayer, FusedLoRAExperts)):
            of_state = storage.state_name(name)
            module.check_rank(state_dict, f"{joined(prefix.removesuffix('.'), of_state)}." if name else prefix)


def _remove_hook(hooks: dict[int, Any], function: Any) -> None:
    for key in [key for key, hook in hooks.items() if hook is function or getattr(hook, "hook", None) is function]:
        del hooks[key]


def some_lora_layers(model: nn.Module, function: str) -> list[tuple[str, LoRALayer]]:
    """The linear layers, which may be none where there are experts; raises where there is neither."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"a model of type {type(model).__name__} was given: it must be a torch.nn.Module.")
    layers = list(lora_layers(model))
    if not layers and not any(expert_layers(model)):
        advice = "Call replace_linear(model, config) first."
        if any(isinstance(getattr(module, "lora_A", None), nn.ModuleDict) for module in model.modules()):
            advice = (
                "Its LoRA layers are PEFT's, fused or not, and so are the functions for them, such as "
                "peft.get_peft_model_state_dict(model), model.save_pretrained and model.merge_adapter."
            )
        raise LoRAStateError(
            f"{function} was called on {type(model).__name__}, which holds no FusedLoRALinear. {advice}"
        )
    return layers


def check_adapters_here(function: str, layers: list[tuple[str, LoRALayer]]) -> None:
    """Raises unless the adapters' values are here, or where they can be fetched from."""
    names = ("lora_A", "lora_B", "lora_bias", "lora_magnitude_vector")
    own = ((name, layer, [each for each in names if getattr(layer, each) is not None]) for name, layer in layers)
    storage.check_here(function, own)


def check_experts_here(function: str, experts: list[tuple[str, FusedLoRAExperts]]) -> None:
    """Likewise of stacked experts."""
    for name, layer in experts:
        held = ((f"{name}.{factor}", getattr(layer, factor)) for factor in ("lora_A", "lora_B"))
        storage.check_here(function, ((path, factors, list(factors)) for path, factors in held))


def _untied_from(model: nn.Module, layer: LoRALayer) -> tuple[str, ...]:
    """Names of other modules' parameters that are the layer's base weight."""
    names = []
    for prefix, module in plain_modules(model, shared=False):
        for name, own in module.named_parameters(recurse=False):
            parameter = module.base_weight if isinstance(module, LoRALayer) and name == "weight" else own
            if module is not layer and parameter is layer.base_weight:
                names.append(joined(prefix, name))
    return tuple(names)
