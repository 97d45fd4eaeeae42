"""The products with a packed weight: few tokens by its codes, where kernels read them, all others by its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...ops import dequantize, product_by_codes
from ...tensors import as_dtype
from . import part_operators

__all__ = ["OPERATORS"]


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
    rest = lora_b, h, bias, gain, scaling, with_linear
    if (made := product_by_codes(x, parts, form, spec, rows, columns, *rest)) is not None:
        y, linear = made
        return y, x.new_empty(0) if linear is None else linear
    weight = dequantize(parts, form, spec, rows, columns, x.dtype, None)
    if lora_b is None or h is None:
        return F.linear(x, weight, None if bias is None else as_dtype(bias, x.dtype)), x.new_empty(0)
    return part_operators.product(x, weight, lora_b, h, bias, gain, scaling, with_linear)


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
    weight = dequantize(parts, form, spec, rows, columns, dy.dtype, None)
    if dh is None or lora_a is None:
        return dy @ weight
    return part_operators.input_grad([dy], [weight], [dh], [lora_a], p, [] if state is None else [state])


OPERATORS: Mapping[str, Callable[..., Any]] = {"packed_product": _product, "packed_input_grad": _input_grad}
