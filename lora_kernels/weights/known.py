"""Which form a weight is in. The class tells it; whoever has such a weight has loaded its package."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import bitsandbytes
from .packed import Form, Packed

__all__ = [
    "FORMS",
    "compute_dtype",
    "form_of",
    "form_of_module",
    "is_packed",
    "is_readable",
    "logical_shape",
    "read",
    "recover",
]

FORMS: dict[str, Form] = {"Params4bit": bitsandbytes.FOUR_BITS, "Int8Params": bitsandbytes.EIGHT_BITS}  # by class


def form_of(weight: Any) -> Form | None:
    """The form of ``weight``; None of a plain tensor and of what is not known."""
    kind = type(weight)
    form = FORMS.get(kind.__name__)
    return form if form is not None and kind.__module__.split(".")[0] == form.package else None


def form_of_module(module: nn.Module) -> Form | None:
    """The form of the weight of ``module``, if that is a package's linear layer; None of others."""
    form = form_of(module._parameters.get("weight"))
    return form if form is not None and form.knows(module) else None


def is_packed(weight: Any) -> bool:
    """Whether ``weight`` has values that are not its own memory, in a form that is known."""
    return form_of(weight) is not None


def is_readable(module: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` of ``module`` is packed and has all that it is read by."""
    form = form_of(weight)
    return form is not None and form.stands_in(module) and form.why_not(module) is None


def read(module: nn.Module, weight: Tensor) -> Packed:
    """The packed ``weight`` of ``module``."""
    form = form_of(weight)
    assert form is not None
    return form.read(module, weight)


def recover(module: nn.Module) -> None:
    """Gives the weight of ``module`` its class back, which a pickle or a conversion of its Parameters has lost."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return
    for form in FORMS.values():
        if form.package in sys.modules and form.stands_in(module):
            module._parameters["weight"] = form.recover(module, weight)


def logical_shape(module: nn.Module, weight: Tensor) -> torch.Size:
    """(N, K) of a packed weight, and a plain one's shape as it is stored."""
    return read(module, weight).shape if is_packed(weight) else weight.shape


def compute_dtype(module: nn.Module, weight: Tensor) -> torch.dtype | None:
    """The dtype that ``weight`` is multiplied in; None where that is the input's."""
    return read(module, weight).dtype if is_packed(weight) else weight.dtype
