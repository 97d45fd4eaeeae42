"""The products with a packed weight: few tokens on CPUs with its codes, all others with its values.

The values of a large weight are made in parts on CPUs, each used at once: memory of more than 32 MiB comes from the
system anew at each call, and touching it for the first time took a fifth of the product's time at 512 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import CodedParts, coded_input_grad, coded_product, coded_values, codes_of, dequantize
from ...tensors import as_dtype

__all__ = ["FEW_TOKENS", "OPERATORS"]

FEW_TOKENS = 16  # as CODED_TOKENS in csrc/cpu/kernels.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PART_BYTES = 8 << 20  # of values that are made at a time
_UNIT = 64  # rows or columns: a part is a multiple of it


def _codes(tokens: Tensor, parts: list[Tensor], form: str, spec: str, rows: int, columns: int) -> CodedParts | None:
    if tokens.device.type != "cpu" or tokens.dtype not in _DTYPES:
        return None
    return codes_of(parts, form, spec, rows, columns)


def _ranges(count: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Parts of ``count`` rows or columns of a weight that has ``nbytes``, as even as they get."""
    number = -(-nbytes // _PART_BYTES)
    step = -(-count // (number * _UNIT)) * _UNIT
    return ((start, min(count, start + step)) for start in range(0, count, step))


def _product(
    x: Tensor,
    parts: list[Tensor],
    form: str,
    spec: str,
    rows: int,
    columns: int,
    lora_b: Tensor | None,
    h: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    with_linear: bool,
) -> tuple[Tensor, Tensor]:
    codes, nbytes = _codes(x, parts, form, spec, rows, columns), rows * columns * x.element_size()
    if codes is not None and x.shape[0] <= FEW_TOKENS:
        return coded_product(x, codes, rows, lora_b, h, bias, gain, scaling, with_linear)
    if codes is None or nbytes <= _PART_BYTES:
        weight = dequantize(parts, form, spec, rows, columns, x.dtype, None)
        return _by_values(x, weight, lora_b, h, bias, gain, scaling, with_linear)
    y = x.new_empty(x.shape[0], rows)
    linear = torch.empty_like(y) if gain is not None and with_linear else x.new_empty(0)
    for start, end in _ranges(rows, nbytes):
        weight = coded_values(codes, rows, columns, x.dtype, (start, 0, end - start, columns))
        b, own_bias, own_gain = (None if t is None else t[start:end] for t in (lora_b, bias, gain))
        part, of_linear = _by_values(x, weight, b, h, own_bias, own_gain, scaling, with_linear)
        del weight
        y[:, start:end] = part
        if linear.numel():
            linear[:, start:end] = of_linear
    return y, linear


def _by_values(
    x: Tensor, weight: Tensor, lora_b: Tensor | None, h: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    if lora_b is None:
        return F.linear(x, weight, None if bias is None else as_dtype(bias, x.dtype)), x.new_empty(0)
    product = torch.ops.lora_kernels.native_product.default._op
    found: tuple[Tensor, Tensor] = product(x, weight, lora_b, h, bias, *rest)
    return found


def _input_grad(
    dy: Tensor,
    parts: list[Tensor],
    form: str,
    spec: str,
    rows: int,
    columns: int,
    dh: Tensor | None,
    lora_a: Tensor | None,
    p: float,
    state: Tensor | None,
) -> Tensor:
    codes, nbytes = _codes(dy, parts, form, spec, rows, columns), rows * columns * dy.element_size()
    if codes is not None and dy.shape[0] <= FEW_TOKENS:
        return coded_input_grad(dy, codes, columns, dh, lora_a, p, state)
    if codes is None or state is not None or nbytes <= _PART_BYTES:  # a mask is drawn of whole rows
        weight = dequantize(parts, form, spec, rows, columns, dy.dtype, None)
        return _grad_by_values(dy, weight, dh, lora_a, p, [] if state is None else [state])
    dx = dy.new_empty(dy.shape[0], columns)
    for start, end in _ranges(columns, nbytes):
        weight = coded_values(codes, rows, columns, dy.dtype, (0, start, rows, end - start))
        a = None if lora_a is None else lora_a[:, start:end]
        dx[:, start:end] = _grad_by_values(dy, weight, dh, a, p, [])
        del weight
    return dx


def _grad_by_values(
    dy: Tensor, weight: Tensor, dh: Tensor | None, lora_a: Tensor | None, p: float, states: list[Tensor]
) -> Tensor:
    if dh is None:
        return dy @ weight
    input_grad = torch.ops.lora_kernels.native_input_grad.default._op
    dx: Tensor = input_grad([dy], [weight], [dh], [lora_a], p, states)
    return dx


OPERATORS: Mapping[str, Callable[..., Any]] = {"packed_product": _product, "packed_input_grad": _input_grad}
