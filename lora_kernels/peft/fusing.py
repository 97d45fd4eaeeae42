"""``fuse_peft`` and ``unfuse_peft``: which layers of a live PEFT model change their class, and what is said of it."""

from __future__ import annotations

import warnings
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from ..console import MissingExtraError
from ..errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from ..models.grouping import share_found, unshare_inputs
from ..models.heads import watch_heads
from ..models.names import plain_modules
from ..models.report import SkippedLayer
from .report import FusedLayer, FuseReport, UnfuseReport, counter, drop_counter, total

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["fuse_peft", "unfuse_peft", "with_fused_layers"]

_CREATION = "_create_new_module"


def fuse_peft(model: nn.Module) -> FuseReport:
    """Makes PEFT's ``lora.Linear`` layers in ``model`` run by the fused operators, in place.

    Each layer's class becomes a subclass of its class. Its Parameters, names, hooks and the optimizer's references to
    them stay the same objects. So these work as before: ``state_dict``, ``save_pretrained``, ``add_adapter`` (also onto
    layers that had none), ``set_adapter``, ``delete_adapter``, ``disable_adapter``, merging, ``merge_and_unload``,
    hot-swapping and mixed batches. Any dtypes mix. 32-bit adapters over a 16-bit base need no cast of x.

    Layers that read one x run together in training; :func:`~lora_kernels.share_inputs` says how they are found.

    **DoRA** runs fused too: a single DoRA adapter with or without dropout, and without dropout the last one of several
    active adapters. Each call computes the norms in fp32 or better; within PEFT's ``DoraCaching``, as often as PEFT.

    **Experts.** PEFT's ``ParamWrapper`` layers around a mixture's stacked experts are taken over too. PEFT builds
    W + s B A of every expert in each forward; fused, nothing of the weights' size is made.

    **PEFT's own forward** runs what the operators cannot: other variants, DoRA before other active adapters, dropout on
    several active adapters at once, modules with hooks inside of the layer, experts' weights that train,
    ``torch.func``, ``torch.jit.trace`` and ``torch.export``. This is decided for each call. Layers over a sharded or
    unusual base stay PEFT's own. So do those over a quantized one that ``docs/qlora.md`` does not list, and its
    embeddings and convolutions.

    **Numerics.** A and B are rounded to the compute dtype at the product. Over fp16 they are not rounded, and keep
    fp32's range as PEFT's do. Sums run in fp32, and y is rounded once, or twice in a mixed batch that takes one pass.
    PEFT rounds the base product and then the sum. Dropout draws from PyTorch's generator, but other numbers than PEFT.
    With DoRA it is PyTorch's own dropout of x as given, which PEFT first casts to the adapter's dtype. A row of
    W + s B A that is zero stays zero, where PEFT divides by its norm.

    Args:
        model: a ``PeftModel``, or any module that holds PEFT's LoRA layers.

    Returns:
        A report to print: what was fused, what was not and why. Its ``calls``, like
        :func:`lora_kernels.peft.calls`, count at any later time how many calls were fused.

    Raises:
        InvalidTypeError: ``model`` is no module.
        InvalidArgumentError: it holds none of PEFT's LoRA layers.
        LoRAStateError: an adapter is merged into a layer that would be fused.
        MissingExtraError: PEFT is not installed, or older than 0.16.

    Example:
        >>> import torch, lora_kernels
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        >>> print(lora_kernels.fuse_peft(model))
        fused 1 layer:
          base_model.model.0 (16→32), default r = 2
        calls so far: 0 fused, 0 by PEFT's own forward, 0 base alone
    """
    _check_module(model, "fuse_peft")
    layer_module = _layer_module("fuse_peft")
    ours, lora_layers = layer_module.FUSED_CLASSES, _lora_layers(model)
    if not lora_layers:
        raise InvalidArgumentError(f"fuse_peft was given {type(model).__name__}, {_what_it_holds(model)}")
    already = [(name, layer) for name, layer in lora_layers if isinstance(layer, ours)]
    reasons = {name: layer_module.why_not_fusable(layer) for name, layer in lora_layers if not isinstance(layer, ours)}
    chosen = [(name, layer) for name, layer in lora_layers if name in reasons and reasons[name] is None]
    _refuse_merged(chosen)
    for _, layer in chosen:
        layer_module.become_fused(layer)
    _fuse_what_comes(model, layer_module)
    watch_heads(model)
    shared = share_found(model)
    if not chosen and not already:
        warnings.warn(
            f"fuse_peft found no layer to fuse in {type(model).__name__}: PEFT's own forward runs all of it. Print the "
            "report for the reasons.",
            stacklevel=2,
        )
    report = FuseReport(
        layers=tuple(_fused_layer(name, layer) for name, layer in chosen),
        already=tuple(name for name, _ in already),
        skipped=tuple(SkippedLayer(name, f"{reason}.") for name, reason in reasons.items() if reason is not None),
        notes=(*_notes([*already, *chosen]), *_notes_of_encoders(model, {layer for _, layer in lora_layers})),
        groups=shared.groups,
        mlps=shared.mlps,
        plain_mlps=shared.plain_mlps,
        _counters=tuple(counter(layer) for _, layer in [*already, *chosen]),
    )
    return report.of(model, [*shared.mlps, *(name for name, _ in [*already, *chosen])])


def unfuse_peft(model: nn.Module) -> UnfuseReport:
    """Makes the fused layers PEFT's ``lora.Linear`` and ``ParamWrapper`` again.

    Their tensors do not change, and merged layers stay merged.

    Raises:
        InvalidTypeError: ``model`` is no module.
        LoRAStateError: no layer of it is fused.

    Example:
        >>> import torch, lora_kernels
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> report = lora_kernels.fuse_peft(model)
        >>> print(lora_kernels.unfuse_peft(model))
        unfused 1 layer: base_model.model.0
        calls while fused: 0 fused, 0 by PEFT's own forward, 0 base alone
    """
    _check_module(model, "unfuse_peft")
    layer_module = _layer_module("unfuse_peft")
    layers = [
        (name, module)
        for name, module in plain_modules(model, shared=False)
        if isinstance(module, layer_module.FUSED_CLASSES)
    ]
    if not layers:
        raise LoRAStateError(
            f"unfuse_peft was called on {type(model).__name__}, none of whose layers is fused: there is nothing "
            "to undo."
        )
    counters = []
    unshare_inputs(model)
    for _, layer in layers:
        layer.__class__ = layer._pefts
        counters.append(drop_counter(layer))
    for tuner in _tuners(model):
        if isinstance(vars(tuner).get(_CREATION), partial):
            del vars(tuner)[_CREATION]
        for config in tuner.peft_config.values():
            _forget_registration(config, layer_module.build_layer)
    return UnfuseReport(tuple(name for name, _ in layers), total(iter(counters)))


def with_fused_layers(config: LoraConfig) -> LoraConfig:
    """Registers fused layers in ``config`` by PEFT's own hook, so that PEFT builds them itself; returns ``config``.

    It is for code that makes its model from a config, such as trainers and ``inject_adapter_in_model``. It calls
    ``LoraConfig._register_custom_module`` for ``nn.Linear`` and transformers' ``Conv1D``. A class of your own that you
    registered earlier for one of them stays. Register classes that derive from ``nn.Linear`` before you call this.

    PEFT builds what cannot be fused, as usual. The registration is not saved with the adapter: a config that PEFT reads
    from a file has none. Layers that read one x run together after :func:`~lora_kernels.share_inputs` was called on the
    model.

    Raises:
        InvalidTypeError: ``config`` is not a ``peft.LoraConfig``.
        MissingExtraError: PEFT is not installed, or older than 0.16.

    Example:
        >>> import torch
        >>> from lora_kernels.peft import with_fused_layers
        >>> from peft import LoraConfig, get_peft_model
        >>> config = with_fused_layers(LoraConfig(r=2, target_modules=["0"]))
        >>> type(get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config).base_model.model[0]).__name__
        'FusedLoraLinear'
    """
    layer_module = _layer_module("with_fused_layers")
    if not isinstance(config, import_module("peft").LoraConfig):
        raise InvalidTypeError(
            f"with_fused_layers was given a {type(config).__name__}: it must be a peft.LoraConfig, for only LoRA "
            "layers can be fused."
        )
    kinds = (nn.Linear, import_module("transformers.pytorch_utils").Conv1D)
    config._register_custom_module(dict.fromkeys(kinds, layer_module.build_layer) | (config._custom_modules or {}))
    return config


def _layer_module(function: str) -> Any:
    """``layer.py``, which imports PEFT."""
    try:
        peft_layers = import_module("peft.tuners.lora.layer")
    except ImportError as error:
        raise MissingExtraError(
            f"{function} works on PEFT's layers, and peft cannot be imported ({error}). Run: pip install 'peft>=0.16'."
        ) from error
    if not hasattr(peft_layers, "LoraVariant"):
        version = import_module("peft").__version__
        raise MissingExtraError(
            f"{function} needs peft 0.16 or later, and {version} is installed: older ones do not tell plain LoRA from "
            "its variants. Run: pip install -U peft."
        )
    return import_module(f"{__package__}.layer")


def _check_module(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            f"{function} was given a {type(model).__name__}: it must be a torch.nn.Module that holds PEFT's "
            "LoRA layers."
        )


def _refuse_merged(layers: list[tuple[str, Any]]) -> None:
    merged = [(name, layer.merged_adapters) for name, layer in layers if layer.merged_adapters]
    if merged:
        adapters = sorted({adapter for _, adapters in merged for adapter in adapters})
        more = f" and {len(merged) - 1} more" if len(merged) > 1 else ""
        raise LoRAStateError(
            f"fuse_peft was called while {', '.join(map(repr, adapters))} is merged into {merged[0][0]!r}{more}: "
            "merged layers run their base alone, and there is nothing to fuse. Call model.unmerge_adapter() first."
        )


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    kind = import_module("peft.tuners.lora.layer").LoraLayer
    return [(name, module) for name, module in plain_modules(model, shared=False) if isinstance(module, kind)]


def _tuners(model: nn.Module) -> list[Any]:
    kinds = import_module("peft.tuners.lora").LoraModel, import_module("peft.tuners.mixed").MixedModel
    return [module for module in model.modules() if isinstance(module, kinds)]


def _what_it_holds(model: nn.Module) -> str:
    kinds = sorted({config.peft_type.value for config in getattr(model, "peft_config", {}).values()})
    if kinds:
        return f"whose adapters are {' and '.join(kinds)}, without any LoRA layer: only LoRA can be fused."
    return (
        "which holds no LoRA layer of PEFT's. Make one with peft.get_peft_model(model, LoraConfig(...)) first; for a "
        "model without PEFT there is lora_kernels.replace_linear."
    )


def _fuse_what_comes(model: nn.Module, layer_module: Any) -> None:
    """Layers that a later ``add_adapter`` makes are fused too."""
    for tuner in _tuners(model):
        vars(tuner)[_CREATION] = partial(layer_module.create_fused, type(tuner))


def _forget_registration(config: Any, build_layer: Any) -> None:
    registered = getattr(config, "_custom_modules", None)
    if registered:
        config._custom_modules = {k: v for k, v in registered.items() if v is not build_layer} or None


def _fused_layer(name: str, layer: Any) -> FusedLayer:
    ranks = {adapter: module.weight.shape[0] for adapter, module in layer.lora_A.items()}
    return FusedLayer(name, layer.in_features, layer.out_features, ranks)


def _notes(layers: list[tuple[str, Any]]) -> list[str]:
    why_adapter = import_module(f"{__package__}.conditions").why_adapter
    affected: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers:
        for adapter in layer.lora_A if hasattr(layer, "shared_branch") else ():
            if (reason := why_adapter(layer, adapter)) is not None:
                affected.setdefault((adapter, reason), []).append(name)
    return [
        f"PEFT's own forward will run adapter {adapter!r} in {len(names)} of the fused layers ({names[0]}"
        f"{', ...' if len(names) > 1 else ''}): {reason}."
        for (adapter, reason), names in affected.items()
    ]


def _notes_of_encoders(model: nn.Module, layers: set[nn.Module]) -> list[str]:
    """What is said where ``nn.TransformerEncoderLayer`` reads the weights of its linear layers and calls none of them.

    :func:`lora_kernels.replace_linear` keeps its layers from that; here the model goes on computing as PEFT's.
    """
    skipping = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and getattr(module.self_attn, "batch_first", False)
        and not layers.isdisjoint(module.modules())
    ]
    if not skipping:
        return []
    which = f"{skipping[0] or 'the model'}{f' and {len(skipping) - 1} more' if len(skipping) > 1 else ''}"
    note = (
        f"{which}: in evaluation an nn.TransformerEncoderLayer reads the base weights and calls none of its layers, so "
        "the adapters do not act there, with or without fuse_peft. torch.backends.mha.set_fastpath_enabled(False) "
        "has it call them."
    )
    return [note]
