"""Weights that kernels read as they are stored: which forms, by what numbers, and the kernels in Triton that do it.

A form names its numbers where it is registered (``enter``). The kernels are there on GPUs where ``triton`` runs,
unless ``LORA_KERNELS_GPU_QUANTIZED=package``. Elsewhere, and for what they do not take, its package makes the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..codes import FOUR_BITS, UNIT, Codes
from ..ops import CodedParts, code_kernels, register_form, register_product
from .packed import Layout

__all__ = ["codes_of", "enter", "forward", "number_of"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STORED = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
_WIDE = (16, 32, 64, 128)  # e2m1 numbers of a factor
_readers: dict[str, Callable[[Layout], Codes | None]] = {}


def enter(
    form: str,
    values: Callable[..., Tensor],
    stored: Callable[[Layout], Codes | None],
    codes: Callable[..., CodedParts | None] | None = None,
) -> None:
    """Has ``ops`` ask for weights of ``form``: the kernels first, of what is ``stored``, then ``values``.

    ``values`` and ``codes`` are as ``ops.register_form`` wants them.
    """
    _readers[form] = stored

    def values_or_kernels(parts: list[Tensor], spec: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        if dtype in _DTYPES and (kernels := code_kernels(parts[0].device.type)) is not None:
            read = codes_of(Layout(form, spec, rows, columns, len(parts)))
            if read is not None and (given := _given(parts, read)) is not None:
                return kernels.values(given, read, rows, columns, dtype)
        return values(parts, spec, rows, columns, dtype)

    register_form(form, values_or_kernels, codes)
    register_product(form, partial(_product, form))


@lru_cache(maxsize=256)
def codes_of(layout: Layout) -> Codes | None:
    """By what numbers kernels read such a weight; None where they do not."""
    codes = _readers[layout.form](layout) if layout.form in _readers else None
    if codes is None or (codes.number in FOUR_BITS and codes.wide % UNIT):
        return None
    return None if codes.number == "e2m1" and (codes.wide not in _WIDE or layout.columns % codes.wide) else codes


def number_of(layout: Layout) -> str:
    """What is stored of such a weight, where kernels read it: "nf4", "int8"; else ""."""
    codes = codes_of(layout)
    return "" if codes is None else codes.number


def _given(parts: Sequence[Tensor], codes: Codes) -> list[Tensor] | None:
    """The parts as the kernels take them; None of a part of a tensor, or of dtypes that no package makes."""
    data, scales = parts[0], parts[1]
    if not all(type(part) is Tensor and part.device == data.device and part.is_contiguous() for part in parts):
        return None
    if codes.number == "e2m1":
        if any(part.element_size() != 1 for part in parts[:2]) or any(p.dtype is not torch.float32 for p in parts[2:]):
            return None
        return [*(part.view(torch.uint8) for part in parts[:2]), *parts[2:]]
    if codes.number in FOUR_BITS:
        of_absmax = torch.uint8 if codes.nested else torch.float32
        if scales.dtype is not of_absmax or not all(part.dtype is torch.float32 for part in parts[2:]):
            return None
        return [data if data.dtype is torch.uint8 else data.view(torch.uint8), *parts[1:]]
    if data.dtype is not _STORED[codes.number] or not scales.is_floating_point():
        return None
    if codes.zeros and parts[2].dtype is not torch.int8:
        return None
    bits = data if data.dtype is torch.int8 else data.view(torch.uint8)
    return [bits, scales if scales.dtype in _DTYPES else scales.float(), *parts[2:]]


def _product(
    form: str,
    x: Tensor,
    parts: list[Tensor],
    spec: str,
    rows: int,
    columns: int,
    lora_b: Tensor | None,
    h: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    with_linear: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """As ``ops.register_product`` wants it."""
    if (found := _ready(x, Layout(form, spec, rows, columns, len(parts)), parts)) is None:
        return None
    few_tokens, given, codes = found
    with_linear = with_linear and gain is not None
    made = few_tokens(x, given, codes, None, lora_b, h, bias, gain, scaling, 0.0, None, with_linear)
    return None if made is None else (made[0], made[2])


def forward(
    x: Tensor,
    layouts: Sequence[Layout | None],
    parts: Sequence[tuple[Tensor, ...]],
    members: Sequence[Any],
    p: float,
    scalings: Sequence[float],
    states: Sequence[Any],
) -> tuple[list[Tensor], list[Tensor]] | None:
    """y and z of each branch without a gain or an activation, each formed in the pass over its codes; None: in parts.

    ``members``: as ``branches_autograd.Member``; the other arguments are ``forward_only``'s.
    """
    ys, zs = [], []
    for i, (layout, own, member) in enumerate(zip(layouts, parts, members, strict=True)):
        if layout is None or (found := _ready(x, layout, own)) is None:
            return None
        few_tokens, given, codes = found
        of = member.lora_a, member.lora_b, None, member.bias, None, scalings[i], p, states[i] if states else None, False
        if (made := few_tokens(x, given, codes, *of)) is None:
            return None
        ys.append(made[0])
        zs.append(made[1])
    return ys, zs


def _ready(x: Tensor, layout: Layout, parts: Sequence[Tensor]) -> tuple[Callable[..., Any], list[Tensor], Codes] | None:
    """The kernel, the parts as it takes them, and what they are; None: there is none for them."""
    kernels = code_kernels(x.device.type)
    if kernels is None or x.dtype not in _DTYPES or x.device != parts[0].device:
        return None
    codes = codes_of(layout)
    given = None if codes is None else _given(parts, codes)
    return None if codes is None or given is None else (kernels.few_tokens, given, codes)
