"""What a layer may be run with, asked in the least time, and the sentence for what it may not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import COMPUTE_DTYPES
from .errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsError

__all__ = ["check", "fits", "kind_refusal", "refusal"]

_STRIDED = torch.strided


def check(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """Raises unless they may be run; the sentences are composed only where something is wrong."""
    if not fits(x, weight, lora_a, lora_b, bias, autocast):
        raise refusal(x, weight, lora_a, lora_b, bias)


def fits(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, autocast: bool) -> bool:
    """The quick test of what may be run."""
    try:
        device, dtype = x.device, x.dtype
        return (
            not x.is_nested
            and x.layout is lora_a.layout is lora_b.layout is _STRIDED
            and _is_strided(weight)
            and (bias is None or bias.layout is _STRIDED)
            and _shapes_fit(x, weight, lora_a, lora_b, bias)
            and device == weight.device == lora_a.device == lora_b.device
            and (weight.dtype is dtype or (autocast and weight.dtype.is_floating_point))
            and dtype in COMPUTE_DTYPES
            and lora_a.dtype in COMPUTE_DTYPES
            and lora_b.dtype in COMPUTE_DTYPES
            and (bias is None or (bias.device == device and bias.dtype in COMPUTE_DTYPES))
        )
    except AttributeError:  # something that is no tensor
        return False


def _is_strided(tensor: Any) -> bool:
    return tensor.layout is _STRIDED or not isinstance(tensor.layout, torch.layout)  # a packed weight's is its own


def _is_tensor(given: Any) -> bool:
    return isinstance(given, Tensor) or getattr(given, "stands_for_a_tensor", False)


def _shapes_fit(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> bool:
    shape, a_shape, b_shape = weight.shape, lora_a.shape, lora_b.shape
    return (
        len(shape) == len(a_shape) == len(b_shape) == 2
        and x.dim() >= 1
        and x.shape[-1] == shape[1] == a_shape[1]
        and b_shape[0] == shape[0]
        and b_shape[1] == a_shape[0] >= 1
        and (bias is None or bias.shape == shape[:1])
    )


def refusal(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> LoRAKernelsError:
    """What :func:`check` raises: the first of kinds, shapes, devices and dtypes that is wrong, told of all tensors."""
    given: dict[str, Any] = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    given |= {} if bias is None else {"bias": bias}
    if not all(map(_is_tensor, given.values())):
        return kind_refusal(given)
    if x.is_nested:
        return InvalidTypeError(
            "a nested tensor was given: LoRA's products need plain tensors. Pad it first, with "
            "torch.nested.to_padded_tensor(x, 0.0)."
        )
    for name, tensor in given.items():
        if not _is_strided(tensor):
            return InvalidTypeError(
                f"{name} of layout {tensor.layout} was given: LoRA's products need plain tensors. Convert it first, "
                f"with {name}.to_dense()."
            )
    if not _shapes_fit(x, weight, lora_a, lora_b, bias):
        return InvalidArgumentError(
            f"shapes that do not fit were given: {', '.join([f'{name} {tuple(t.shape)}' for name, t in given.items()])}"
            ". They must be x (..., K), weight (N, K), lora_a (R, K), lora_b (N, R) with R >= 1, and bias (N,) or "
            "None; make K, N and R agree in all of them."
        )
    if len({t.device for t in given.values()}) > 1:
        listed = ", ".join([f"{name} on {t.device}" for name, t in given.items()])
        return InvalidTypeError(f"tensors on different devices were given: {listed}. Move all of them to one device.")
    return InvalidTypeError(
        f"dtypes that cannot run together were given: {', '.join([f'{name} {t.dtype}' for name, t in given.items()])}. "
        "All must be floating (torch.float16, torch.bfloat16, torch.float32, torch.float64), and x and weight must "
        "share one dtype; lora_a, lora_b and bias may differ. Convert x with x.to(weight.dtype), or run under "
        "torch.autocast."
    )


def kind_refusal(given: dict[str, Any]) -> InvalidTypeError:
    kinds = [f"{name} of type {type(t).__name__}" for name, t in given.items() if not _is_tensor(t)]
    return InvalidTypeError(
        f"{', '.join(kinds)} was given where a torch.Tensor is expected. A NumPy array becomes one by "
        "torch.from_numpy; bias alone may be None."
    )
