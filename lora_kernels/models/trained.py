"""What trains beside the adapters: biases and whole modules; and what trains that none of them is.

Training, saving and warnings ask the same functions, so that what trains and what is saved are one list.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn

from .. import called, sharded, storage
from ..assigning import has_moved
from ..config import BIAS_CHOICES, LoRAConfig, as_tuple
from ..errors import InvalidArgumentError, LoRAKernelsWarning, LoRAStateError
from ..layer import LoRALayer
from .layers import adapter_parameters
from .matching import listed, trained_whole
from .names import joined, parameter_name, plain_names, prompt_parts

__all__ = [
    "biases",
    "check_bias",
    "left_out",
    "train_biases",
    "train_whole",
    "warn_of_left_out",
    "warn_of_never_called",
    "warn_of_prompts",
    "whole_tensors",
]


def check_bias(bias: str | None) -> None:
    if bias is not None and bias not in BIAS_CHOICES:
        raise InvalidArgumentError(f"bias={bias!r} was given: it must be one of {BIAS_CHOICES}, or None.")


def biases(model: nn.Module, which: str) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """``(name in named_modules(), module, bias)`` of each bias that ``which`` means: "none", "lora_only" or "all".

    Of a merged layer it is the one that was merged into.
    """
    for prefix, module in model.named_modules() if which != "none" else ():
        if isinstance(module, LoRALayer):
            bias = module.base_bias
        else:
            bias = module._parameters.get("bias") if which == "all" else None
        if bias is not None:
            yield prefix, module, bias


def train_biases(model: nn.Module, layers: Iterable[LoRALayer], which: str) -> None:
    """Has the biases train that ``which`` means; with "lora_only" those of ``layers``."""
    of_layers = (layer.base_bias for layer in layers) if which == "lora_only" else ()
    of_all = (bias for _, _, bias in biases(model, which)) if which == "all" else ()
    for bias in (*of_layers, *of_all):
        if bias is not None:
            _train(bias)


def train_whole(model: nn.Module, config: LoRAConfig) -> None:
    """Has the modules of ``modules_to_save`` train, with all that is in them."""
    for _, module in trained_whole(as_tuple(config.modules_to_save), model):
        for parameter in module.parameters():
            _train(parameter)


def _train(parameter: nn.Parameter) -> None:
    trains = parameter.is_floating_point() or parameter.is_complex()
    if parameter.requires_grad != trains:  # an inference tensor takes no call at all
        parameter.requires_grad_(trains)


def whole_tensors(model: nn.Module, names: Collection[str], function: str) -> dict[str, Tensor]:
    """The whole state of the modules that ``names`` (``modules_to_save``) mean, by its names in ``model``."""
    found = {}
    for name, module in trained_whole(names, model):
        parts = {f"{name}.{inner}".rstrip("."): part for inner, part in module.named_modules()}
        storage.check_here(function, ((path, part, list(part._parameters)) for path, part in parts.items()))
        for key, tensor in module.state_dict().items():
            if not isinstance(tensor, Tensor):
                raise LoRAStateError(
                    f"{joined(name, key)} is no tensor but a {type(tensor).__name__} (get_extra_state), which no file "
                    f"of adapters holds. Leave its module out of modules_to_save; {function} then leaves it out."
                )
            path, _, own = joined(name, key).rpartition(".")
            holder = parts.get(path)
            found[joined(name, key)] = tensor if holder is None else storage.value(holder, own, tensor)
    return found


def left_out(model: nn.Module, written: Collection[nn.Parameter | Tensor]) -> list[str]:
    """Names of the Parameters that require a gradient and are none of the adapters' and none of ``written``."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer)]
    kept = {*written, *adapter_parameters(model)}
    candidates = dict(model.named_parameters())
    for prefix, layer in layers:
        aside = (("weight", layer.base_weight), ("bias", layer.base_bias)) if layer.merged else ()
        candidates |= {joined(prefix, own): parameter for own, parameter in aside if parameter is not None}
    left = [name for name, parameter in candidates.items() if parameter.requires_grad and parameter not in kept]
    names = plain_names(model) if left else {}
    return [parameter_name(names, name) for name in left]


def warn_of_left_out(
    model: nn.Module, written: Collection[nn.Parameter | Tensor], function: str, stacklevel: int
) -> None:
    """Names what trains and is not in what ``function`` gives; ``stacklevel`` as if the caller warned itself."""
    prompts = (parameter for part in prompt_parts(model) for parameter in part.parameters())
    if names := left_out(model, {*written, *prompts}):
        warnings.warn(
            f"{function} leaves out {listed(names)}, which can train (requires_grad=True) and may have been trained. "
            "To keep it, name its module in modules_to_save, or give bias='lora_only' or 'all' for biases. If it has "
            "not been trained, freeze it: mark_only_lora_as_trainable(model) does that.",
            stacklevel=stacklevel + 1,
        )


def warn_of_prompts(model: nn.Module, function: str, stacklevel: int) -> None:
    """Says that a prompt of PEFT's, which can train, is not in what ``function`` gives of the LoRA layers."""
    if any(parameter.requires_grad for part in prompt_parts(model) for parameter in part.parameters()):
        warnings.warn(
            f"{function} leaves out the prompt of PEFT's, which can train: it gives the LoRA layers alone. The PEFT "
            "model's own save_pretrained writes the prompt; give it another folder.",
            stacklevel=stacklevel + 1,
        )


def never_called(layers: Iterable[tuple[str, LoRALayer]]) -> list[tuple[str, LoRALayer]]:
    """Those whose adapter can train and that nothing ever called, while others of them trained.

    A compiled graph notes no calls. Where there was one, a layer counts as called whose adapter has moved.
    """
    layers = list(layers)
    waiting = [(name, layer) for name, layer in layers if not called.was_called(layer) and _can_train(layer)]
    if waiting and called.compiled_in_training():
        trained = {layer for _, layer in layers if _may_have_moved(layer)}
    else:
        trained = {layer for _, layer in layers if called.has_trained(layer)}
    return [(name, layer) for name, layer in waiting if trained and layer not in trained]


def _can_train(layer: LoRALayer) -> bool:
    return any(parameter.requires_grad for parameter in layer.adapter.values())


def _may_have_moved(layer: LoRALayer) -> bool:
    """Whether the adapter adds anything, or its values cannot be looked at by this process alone."""
    return (
        not storage.is_here(layer, layer.weight, layer.lora_A, layer.lora_B)
        or sharded.is_sharded(layer.lora_B)
        or has_moved(layer)
    )


def warn_of_never_called(layers: Iterable[tuple[str, LoRALayer]], function: str, stacklevel: int) -> None:
    """Names once the layers of :func:`never_called`; ``stacklevel`` as if the caller warned itself."""
    if names := [name for name, layer in never_called(layers) if called.tell(layer)]:
        warnings.warn(
            f"{function} finds that {listed(names)} was never called while other layers trained: the adapter had no "
            "effect and no gradient. A model that reads the layer's weight, as a loss in chunks does, or that keeps "
            "the former layer in a list, passes it by. Have the model call the layer, or name it in exclude_modules. "
            "If it only had no input, as an expert may, all is well.",
            LoRAKernelsWarning,
            stacklevel=stacklevel + 1,
        )
