"""``load_adapter``: an adapter that PEFT or ``save_adapter`` wrote, onto a plain model or one that is replaced already.

:mod:`.plan` checks everything against the model; only then is anything changed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..config import ADAPTER_DTYPES, pattern_value, scaling_of
from ..errors import InvalidTypeError, LoRAStateError
from ..experts.layer import FusedLoRAExperts
from ..layer import LoRALayer
from ..models.adapter import remember
from ..models.matching import Match
from ..models.model import put_layers, training_kept_on_failure
from ..models.names import plain_modules, unwrapped
from ..models.replacing import build, check_model, decide
from ..models.report import LoadReport, ReplacedLayer
from ..models.trained import train_biases, train_whole
from . import experts, files, peft_config
from .plan import Plan, make_plan

__all__ = ["load_adapter"]


def load_adapter(model: nn.Module, folder: files.PathLike, adapter_dtype: torch.dtype | None = None) -> LoadReport:
    """Puts the adapter in ``folder`` onto ``model``, in place: the layers that it names are replaced and loaded.

    So it is with a mixture's stacked experts, which ``target_parameters`` names. Files of transformers 4, whose experts
    were linear layers of their own, load as in PEFT: the adapters of layers that are one Parameter now become one.

    A layer that is a ``FusedLoRALinear`` already keeps its Parameters and dtypes, and gets the values, if rank and kind
    match. Another layer becomes one, as in :func:`lora_kernels.replace_linear`. The adapters train, and so do the
    biases and whole modules that the configuration names.

    Biases and modules that were saved with the adapter are loaded into the model. If such a module's weight is tied and
    the file has another value for it, the module gets its own weight, as in PEFT. torch's random generator is not used.

    Args:
        model: the model that the adapter was made for: a plain one, or one whose layers are replaced.
        folder: it holds ``adapter_config.json`` and ``adapter_model.safetensors``. Names in it may have the prefixes of
            ``torch.compile`` and ``DistributedDataParallel``, and the adapter's name (``lora_A.default.weight``).
        adapter_dtype: dtype of the adapters of layers that are made here. None is fp32 over a 16-bit base, whatever the
            file has, as in PEFT: 16-bit Parameters hardly move by a small step. Over another base it is the base's
            dtype. A wider dtype of the file is kept.

    Returns:
        A report to print: which layers were loaded, and what else.

    Raises:
        InvalidArgumentError: a file is missing, truncated or of another kind; the adapter is no LoRA, or of a kind that
            is not computed here; or its tensors or names do not match the model.
        InvalidTypeError: a layer cannot be replaced, or a dtype is not floating.
        LoRAStateError: a layer is merged, on the meta device, or has an adapter that the file does not have; FSDP1,
            ZeRO-3 or accelerate's offloading would not keep what is loaded; or a tensor of the model cannot be written.
        MissingExtraError: safetensors is not installed.
        In all cases the model is as it was.

    Example:
        >>> import tempfile
        >>> from lora_kernels import LoRAConfig, load_adapter, replace_linear, save_adapter
        >>> from torch import nn
        >>> trained, plain = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
        >>> report = replace_linear(trained, LoRAConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(trained, folder)
        ...     len(load_adapter(plain, folder))
        1
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"a model of type {type(model).__name__} was given: it must be a torch.nn.Module.")
    if adapter_dtype is not None and adapter_dtype not in ADAPTER_DTYPES:
        raise InvalidTypeError(
            f"adapter_dtype={adapter_dtype!r} was given: it must be torch.float16, torch.bfloat16, torch.float32, "
            "torch.float64, or None for fp32 over a 16-bit base and the base's dtype otherwise."
        )
    fields, tensors = files.read_pair(folder)
    where = str(Path(folder) / files.CONFIG)
    adapter = peft_config.parse(fields, where)
    inner = unwrapped(model)
    plan = make_plan(inner, adapter.config, tensors, str(Path(folder) / files.WEIGHTS))
    layers, of_experts = _carry_out(plan, inner, _targets(model, inner, plan), adapter_dtype)
    remember(inner, plan.config, adapter.kept)
    report = _report(layers, of_experts, plan)
    return report.of(inner, [row.name for row in report])


def _carry_out(
    plan: Plan, inner: nn.Module, targets: list[Match], adapter_dtype: torch.dtype | None
) -> tuple[dict[str, nn.Module], dict[str, FusedLoRAExperts]]:
    """Makes all that is new, which may fail; then changes the model. Returns the loaded layers, linear and experts."""
    _check_writable(inner, [slot for slot, _ in _values(inner, plan)])
    with training_kept_on_failure(inner):
        of_experts = experts.carry_out(plan.config, plan.experts, plan.expert_modules, adapter_dtype)
        made = build(targets, plan.config, draw=False)
        for name, layer in made.items():
            for own, tensor in plan.adapters[name].items():
                dtype = adapter_dtype or torch.promote_types(layer.adapter[own].dtype, tensor.dtype)
                setattr(layer, own, nn.Parameter(tensor.to(layer.weight.device, dtype)))
        values = [(slot, _like(slot, tensor)) for slot, tensor in _values(inner, plan)]
        untied = [(owner, name, _parameter(owner, name, tensor)) for owner, name, tensor in plan.untied]
        layers = {name: made.get(name) or module for name, module in plan.modules.items()}
        loras = [layer for layer in layers.values() if isinstance(layer, LoRALayer)]
        train_biases(inner, loras, plan.config.bias)
        train_whole(inner, plan.config)
        for _, _, parameter in untied:
            parameter.requires_grad_(parameter.is_floating_point())
    put: dict[nn.Module, nn.Module] = {match.module: made[match.name] for match in targets}
    put_layers(inner, put | {plan.expert_modules[name]: layer for name, layer in of_experts.items()})
    for owner, name, parameter in untied:
        setattr(owner, name, parameter)
    with torch.no_grad():
        for slot, value in values:
            slot.copy_(value)
    for name, module in plan.modules.items():
        if isinstance(module, LoRALayer):
            _set(module, name, plan)
    for name, module in plan.expert_modules.items():
        if isinstance(module, FusedLoRAExperts):
            experts.overwrite(plan.config, name, module, plan.experts[name])
            of_experts[name] = module
    return layers, of_experts


def _targets(model: nn.Module, inner: nn.Module, plan: Plan) -> list[Match]:
    """The layers to replace; raises if one of them cannot be."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in plain_modules(inner):
        places.setdefault(module, []).append(name)
    plain = {name: module for name, module in plan.modules.items() if not isinstance(module, LoRALayer)}
    if not plain:
        return []
    check_model(model, plan.config)
    matches = [Match(name, tuple(places[module]), module, None) for name, module in plain.items()]
    targets, skipped = decide(inner, plan.config, matches)
    if skipped:
        raise InvalidTypeError(f"the adapter cannot be loaded: {skipped[0].name}: {skipped[0].reason}")
    return targets


def _values(model: nn.Module, plan: Plan) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each existing tensor that is written to, with what is written."""
    existing = [
        (module.adapter[own], tensor)
        for name, module in plan.modules.items()
        if isinstance(module, LoRALayer)
        for own, tensor in plan.adapters[name].items()
    ]
    return existing + plan.others


def _check_writable(model: nn.Module, slots: list[torch.Tensor]) -> None:
    """Raises where PyTorch would refuse to write, when others are written already."""
    for slot in slots:
        if slot.is_inference() and not torch.is_inference_mode_enabled():
            why = "was made under torch.inference_mode, and is written only there. Make the model under torch.no_grad"
        elif _is_expanded(slot):
            why = "was expanded: several of its elements are one number in memory. Give the model its clone"
        else:
            continue
        held = (*model.named_parameters(), *model.named_buffers())
        name = next((name for name, tensor in held if tensor is slot), "a tensor of the model")
        raise LoRAStateError(f"the adapter cannot be loaded: {name} {why}, then load the adapter.")


def _is_expanded(tensor: torch.Tensor) -> bool:
    sizes = zip(tensor.stride(), tensor.shape, strict=True) if tensor.layout == torch.strided else ()
    return any(step == 0 and size > 1 for step, size in sizes)


def _parameter(owner: nn.Module, name: str, tensor: torch.Tensor) -> nn.Parameter:
    parameter = owner._parameters[name]
    assert parameter is not None
    return nn.Parameter(_like(parameter, tensor).clone(), requires_grad=False)


def _like(slot: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(device=slot.device, dtype=slot.dtype)


def _set(layer: LoRALayer, name: str, plan: Plan) -> None:
    """The settings of an adapter that a layer with one is loaded with."""
    config = plan.config
    layer.lora_alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    layer.use_rslora, layer.lora_dropout = config.use_rslora, config.lora_dropout
    layer.scaling = scaling_of(layer.r, layer.lora_alpha, layer.use_rslora)


def _report(layers: dict[str, nn.Module], of_experts: dict[str, FusedLoRAExperts], plan: Plan) -> LoadReport:
    loaded = []
    for name, layer in layers.items():
        assert isinstance(layer, LoRALayer)
        count = sum(parameter.numel() for parameter in layer.adapter.values())
        sizes = layer.in_features, layer.out_features, layer.r
        loaded.append(ReplacedLayer(name, (name,), *sizes, layer.lora_alpha, layer.scaling, count))
    loaded += experts.expert_rows(of_experts)
    return LoadReport(tuple(loaded), tuple(plan.other_names), tuple(plan.notes))
