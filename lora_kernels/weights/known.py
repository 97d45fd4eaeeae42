"""Which form a weight is in. Its class tells it, or its layer's; whoever has such a weight has loaded its package."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import LoRAStateError
from . import bitsandbytes, block_fp8, torchao
from .packed import Form, Packed

__all__ = [
    "FORMS",
    "LAYERS",
    "compute_dtype",
    "form_of",
    "form_of_module",
    "is_of_package",
    "is_packed",
    "is_readable",
    "logical_shape",
    "packed",
    "quantized",
    "read",
    "recover",
]

FORMS: dict[str, Form] = {  # by the class of the weight
    "Params4bit": bitsandbytes.FOUR_BITS,
    "Int8Params": bitsandbytes.EIGHT_BITS,
    "BlockScaled": block_fp8.BLOCK_FP8,
    **torchao.FORMS,
}
LAYERS: dict[str, Form] = {  # by the class of a layer: where its weight is a plain Parameter, as FSDP2 gathers it
    "FP8Linear": block_fp8.BLOCK_FP8,
    "Linear4bit": bitsandbytes.FOUR_BITS,
    "Linear8bitLt": bitsandbytes.EIGHT_BITS,
}
_OWN = __name__.split(".")[0]


def form_of(weight: Any) -> Form | None:
    """The form of ``weight``; None of a plain tensor and of what is not known."""
    kind = type(weight)
    form = FORMS.get(kind.__name__)
    return form if form is not None and kind.__module__.split(".")[0] in (form.package, _OWN) else None


def form_of_module(module: nn.Module) -> Form | None:
    """The form of the weight of ``module``, if that is a package's linear layer; None of others."""
    weight, kind = module._parameters.get("weight"), type(module)
    form = form_of(weight)
    if form is None and type(weight) is nn.Parameter and (named := LAYERS.get(kind.__name__)) is not None:
        form = named if kind.__module__.split(".")[0] == named.package else None
    return form if form is not None and form.knows(module) else None


def is_of_package(kind: type) -> bool:
    """Whether ``kind`` is, or derives from, a package's quantised linear layer."""
    return _form_of_class(kind) is not None


def _form_of_class(kind: type) -> Form | None:
    named = ((own, LAYERS.get(own.__name__)) for own in kind.__mro__)
    return next((form for own, form in named if form and own.__module__.split(".")[0] == form.package), None)


def packed(module: nn.Module) -> Packed | None:
    """The weight of a package's linear layer, as it is stored; None of every other module's."""
    form, weight = form_of_module(module), module._parameters.get("weight")
    return None if form is None or weight is None else form.read(module, weight)


def is_packed(weight: Any, module: nn.Module | None = None) -> bool:
    """Whether ``weight``, of ``module``, has values that are not its own memory, in a form that is known."""
    return form_of(weight) is not None or (module is not None and _form_in_export(module, weight) is not None)


def _form_in_export(module: nn.Module, weight: Any) -> Form | None:
    """The form of a weight that ``torch.export`` has put a tensor without a class of its own in the place of."""
    return _form_of_class(type(module)) if type(weight) is FakeTensor else None


def is_readable(module: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` of ``module`` is packed and has all that it is read by."""
    form = form_of(weight)
    try:
        return form is not None and form.stands_in(module) and form.why_not(module) is None
    except LoRAStateError:
        return False


def read(module: nn.Module, weight: Tensor) -> Packed:
    """The packed ``weight`` of ``module``."""
    form = form_of(weight) or _form_in_export(module, weight)
    assert form is not None
    return form.read(module, weight)


def quantized(module: nn.Module, weight: Tensor, values: Tensor) -> nn.Parameter:
    """``values`` (N, K) as another weight of the form and the settings of ``weight``, which stays."""
    form = form_of(weight)
    assert form is not None
    return form.quantize(module, weight, values)


def recover(module: nn.Module) -> None:
    """Gives the weight of ``module`` its class back, which a pickle or a conversion of its Parameters has lost."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return
    for form in FORMS.values():
        if form.package in sys.modules and form.stands_in(module):
            module._parameters["weight"] = form.recover(module, weight)
            if module._parameters["weight"] is not weight:
                return


def logical_shape(module: nn.Module, weight: Tensor) -> torch.Size:
    """(N, K) of a packed weight, and a plain one's shape as it is stored."""
    return read(module, weight).shape if is_packed(weight) else weight.shape


def compute_dtype(module: nn.Module, weight: Tensor) -> torch.dtype | None:
    """The dtype that ``weight`` is multiplied in; None where that is the input's."""
    return read(module, weight).dtype if is_packed(weight) else weight.dtype
