"""``save_adapter``: the tensors of a model's LoRA layers under PEFT's names."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import peft_fields, storage
from ..config import LoRAConfig, as_tuple, check_modules_to_save
from ..errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsWarning, LoRAStateError
from ..experts.layer import FusedLoRAExperts
from ..fsdp import settle_for
from ..layer import LoRALayer
from ..models.adapter import Adapter, remembered_within
from ..models.layers import adapter_parameters, expert_layers, lora_layers
from ..models.matching import trained_whole
from ..models.model import check_adapters_here, check_experts_here, some_lora_layers
from ..models.names import parameter_name, plain_modules, plain_names, unwrapped
from ..models.trained import (
    biases,
    check_bias,
    warn_of_left_out,
    warn_of_never_called,
    warn_of_prompts,
    whole_tensors,
)
from . import files, peft_config
from .collective import once
from .experts import expert_forms, expert_tensors
from .plain_form import NAMES, PlainForm, plain_form, whole

__all__ = ["PREFIX", "Collected", "collect", "save_adapter"]

PREFIX = "base_model.model."
_HEADS = {  # modules that PEFT always saves whole for a task
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def save_adapter(
    model: nn.Module,
    folder: files.PathLike,
    *,
    bias: str | None = None,
    modules_to_save: list[str] | None = None,
    task_type: str | None = None,
) -> None:
    """Writes the adapter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``PeftModel.from_pretrained(plain_model, folder)`` and :func:`lora_kernels.load_adapter` read them. Tensors keep
    their dtype. A layer that is used at several places is written once, under its first name. Merged layers are saved
    as they were before merging. Unknown fields that :func:`load_adapter` found are written back. A warning names what
    may have been trained and is not written.

    **The base.** The files go with the untouched model. Layers that PiSSA or OLoRA initialised have another base, the
    residual ``W - s B0 A0``. Their adapter is written as plain LoRA of rank 2 r, ``A' = [A; A0]``, ``B' = [B, -B0]``,
    with the alpha that keeps the scaling. A negative ``scaling`` is written as a positive one with ``-B``.

    **Experts.** The adapters of stacked experts are written as PEFT's ``target_parameters``, which it loads. PEFT
    refuses ``lora_dropout`` beside them. So 0 is written for it, ours stands in a field of its own, and a warning says
    so.

    **Interruptions.** Both files are put in place together. A reader finds the former adapter or this one, never a
    mixture, also after this process was killed. PEFT reads the two files one after the other, so it could only see a
    mixture between the two renames. Other files of the folder are left alone.

    **Several processes.** Where Parameters are sharded (FSDP2, tensor parallelism), every process of their mesh must
    call this. The tensors are gathered, and the first process writes. The others wait for it, and return or raise as it
    does. FSDP1 and ZeRO-3 have contexts that gather; within them each process that calls this writes.

    Args:
        model: a module that holds ``FusedLoRALinear`` layers. Wrapped ones are searched too.
        folder: where to write. It is made if it does not exist.
        bias: which biases are saved too: ``"none"``, ``"lora_only"`` (those of the LoRA layers) or ``"all"``. None is
            what ``LoRAConfig.bias`` said when the layers of the model, or of parts of it, were replaced, or what
            :func:`mark_only_lora_as_trainable` was given.
        modules_to_save: how the names of the modules end that are saved whole. None is ``LoRAConfig.modules_to_save``.
        task_type: PEFT's name of the task, such as ``"CAUSAL_LM"``, for its ``AutoPeftModel`` classes. None is the one
            that the adapter was loaded with. With a task, PEFT's heads for it are saved whole (``"classifier"``, ...).

    Raises:
        InvalidArgumentError: ``bias`` has another value, or ``modules_to_save`` an entry that means no module.
        InvalidTypeError: ``modules_to_save`` is no list of strings, ``task_type`` no string, or ``folder`` no path.
        LoRAStateError: the model holds no LoRA layer or is one itself; a parameter is on the meta device; a
            scaling is not finite; an activation stands between A and B, which PEFT does not have (``lora_state_dict``
            holds such an adapter); a module that is saved whole holds a LoRA layer, or shares a weight with one that is
            not saved; the layers differ where PEFT's file has one value for all; FSDP1 or ZeRO-3 holds values that are
            not gathered; the folder holds an adapter of another kind, such as a prompt; or the files cannot be written:
            what was there stays.
        MissingExtraError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from lora_kernels import FusedLoRALinear, load_adapter, save_adapter
        >>> from torch import nn
        >>> model, plain = nn.Sequential(FusedLoRALinear(4, 4, r=2)), nn.Sequential(nn.Linear(4, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     print(load_adapter(plain, folder))
        loaded an adapter into 1 layer:
          0 (4→4), r = 2, alpha = 16: 16 parameters
    """
    files_of = collect("save_adapter", model, bias, modules_to_save, task_type, stacklevel=2)
    of_all = [*adapter_parameters(unwrapped(model)), *files_of.tensors.values()]
    gathered = _apart({name: whole(name, tensor) for name, tensor in files_of.tensors.items()})
    once(of_all, lambda: files.write_pair(folder, files_of.fields, gathered))


class Collected(NamedTuple):
    """What PEFT's two files hold."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def collect(
    function: str,
    model: nn.Module,
    bias: str | None = None,
    modules_to_save: list[str] | None = None,
    task_type: str | None = None,
    stacklevel: int = 1,
) -> Collected:
    """What :func:`save_adapter` writes; ``stacklevel`` as if the caller, called ``function``, warned itself."""
    named = some_lora_layers(model, function)
    if isinstance(inner := unwrapped(model), (LoRALayer, FusedLoRAExperts)):
        raise LoRAStateError(
            f"{function} was called on a LoRA layer itself, whose tensors have no names in PEFT's files. Call it on "
            "the model that holds the layer."
        )
    settle_for(inner, named, function)
    layers, experts = dict(lora_layers(inner)), dict(expert_layers(inner))
    adapter = remembered_within(inner) or Adapter(LoRAConfig())
    bias, entire, task_type = _settings(adapter, bias, modules_to_save, task_type)
    for entry in modules_to_save or ():
        if not trained_whole([entry], inner):
            raise InvalidArgumentError(
                f"{function} was given modules_to_save={modules_to_save}, and no module's name ends in {entry!r}. "
                "Name modules of the model, or leave it out."
            )
    check_adapters_here(function, list(layers.items()))
    check_experts_here(function, list(experts.items()))
    forms = {name: plain_form(name, layer, function) for name, layer in layers.items()}
    of_experts = expert_forms(experts)
    tensors = _adapters(forms) | _biases(function, inner, bias) | _whole(function, inner, entire)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in expert_tensors(experts, of_experts).items()}
    fields = peft_config.compose(inner, layers, experts, forms, of_experts, adapter, bias, entire or None, task_type)
    _warn_of_dropout(function, fields, stacklevel + 1)
    _warn_of_places(inner, stacklevel + 1)
    _warn_of_left_out(function, inner, bias, entire, stacklevel + 1)
    warn_of_prompts(model, function, stacklevel + 1)
    warn_of_never_called(layers.items(), function, stacklevel + 1)
    return Collected(fields, tensors)


def _settings(
    adapter: Adapter, bias: str | None, modules_to_save: list[str] | None, task_type: str | None
) -> tuple[str, list[str], str | None]:
    """The arguments, or what the model remembers of them."""
    if bias is not None:
        check_bias(bias)
    check_modules_to_save(modules_to_save)
    if task_type is not None and not isinstance(task_type, str):
        raise InvalidTypeError(f"task_type={task_type!r} was given: it must be a string such as 'CAUSAL_LM', or None.")
    if modules_to_save is None:
        modules_to_save = list(as_tuple(adapter.config.modules_to_save))
    task_type = task_type or adapter.kept.get("task_type")
    whole = list(dict.fromkeys([*modules_to_save, *_HEADS.get(str(task_type), ())]))
    return bias or adapter.config.bias, whole, task_type


def _adapters(forms: dict[str, PlainForm]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{name}.{theirs}": form.tensors[ours]
        for name, form in forms.items()
        for theirs, ours in NAMES.items()
        if ours in form.tensors
    }


def _biases(function: str, model: nn.Module, bias: str) -> dict[str, Tensor]:
    """Biases of the base model; a LoRA layer's is in PEFT's ``base_layer``."""
    found = list(biases(model, bias))
    storage.check_here(function, ((name, module, ["bias"]) for name, module, _ in found))
    names, tensors = plain_names(model), {}
    for name, module, parameter in found:
        base = ".base_layer" if isinstance(module, LoRALayer) else ""
        tensors[f"{PREFIX}{names[name]}{base}.bias"] = storage.value(module, "bias", parameter)
    return tensors


def _whole(function: str, model: nn.Module, entries: list[str]) -> dict[str, Tensor]:
    """The whole state of the modules that ``entries`` mean."""
    modules = trained_whole(entries, model)
    saved = {parameter for _, module in modules for parameter in module.parameters()}
    inside = {part for _, module in modules for part in module.modules()}
    names = plain_names(model)
    for name, module in modules:
        if any(isinstance(part, (LoRALayer, FusedLoRAExperts)) for part in module.modules()):
            raise LoRAStateError(
                f"modules_to_save means {names[name]!r}, which holds LoRA layers: a module is saved whole or as an "
                "adapter. Leave it out, or leave its layers out of target_modules."
            )
    for name, module in plain_modules(model, shared=False):
        for own, parameter in module.named_parameters(recurse=False):
            if parameter in saved and module not in inside:
                raise LoRAStateError(
                    f"modules_to_save means a module that shares its weight with {name}.{own}, which is not saved and "
                    "has been trained with it. Name that module in modules_to_save too."
                )
    tensors = whole_tensors(model, entries, function)
    return {f"{PREFIX}{parameter_name(names, name)}": tensor for name, tensor in tensors.items()}


def _warn_of_left_out(function: str, model: nn.Module, bias: str, entire: list[str], stacklevel: int) -> None:
    written = {parameter for _, _, parameter in biases(model, bias)}
    written |= {parameter for _, module in trained_whole(entire, model) for parameter in module.parameters()}
    warn_of_left_out(model, written, function, stacklevel + 1)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with copies of those that share memory, which safetensors does not take."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            apart[name] = tensor  # safetensors will refuse it
            continue
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


def _warn_of_dropout(function: str, fields: dict[str, Any], stacklevel: int) -> None:
    p = fields.get(peft_fields.DROPOUT)
    if p:
        warnings.warn(
            f"{function} writes lora_dropout=0 and keeps {p:g} in {peft_fields.DROPOUT!r}: PEFT refuses dropout "
            "beside target_parameters. load_adapter takes it up again; PEFT trains on without dropout.",
            LoRAKernelsWarning,
            stacklevel=stacklevel + 1,
        )


def _warn_of_places(model: nn.Module, stacklevel: int) -> None:
    places: dict[nn.Module, list[str]] = {}
    for name, module in plain_modules(model):
        if isinstance(module, (LoRALayer, FusedLoRAExperts)):
            places.setdefault(module, []).append(name)
    shared = [names for names in places.values() if len(names) > 1]
    if shared:
        warnings.warn(
            f"the layer {shared[0][0]!r} also stands at {', '.join(map(repr, shared[0][1:]))}. It is saved once, and "
            "load_adapter puts it back at all places; PEFT adapts the first place alone.",
            stacklevel=stacklevel + 1,
        )
