"""The products with a packed weight: few tokens on CPUs with its codes, all others with its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import coded_input_grad, coded_product, codes_of, dequantize
from ...tensors import as_dtype

__all__ = ["FEW_TOKENS", "OPERATORS"]

FEW_TOKENS = 16  # as CODED_TOKENS in csrc/cpu/kernels.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reads_codes(tokens: Tensor) -> bool:
    return tokens.shape[0] <= FEW_TOKENS and tokens.device.type == "cpu" and tokens.dtype in _DTYPES


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
    if _reads_codes(x) and (codes := codes_of(parts, form, spec, rows, columns)) is not None:
        return coded_product(x, codes, rows, lora_b, h, bias, gain, scaling, with_linear)
    weight = dequantize(parts, form, spec, rows, columns, x.dtype, None)
    if lora_b is None:
        return F.linear(x, weight, None if bias is None else as_dtype(bias, x.dtype)), x.new_empty(0)
    found: tuple[Tensor, Tensor] = torch.ops.lora_kernels.native_product.default._op(
        x, weight, lora_b, h, bias, gain, scaling, with_linear
    )
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
    if _reads_codes(dy) and (codes := codes_of(parts, form, spec, rows, columns)) is not None:
        return coded_input_grad(dy, codes, columns, dh, lora_a, p, state)
    weight = dequantize(parts, form, spec, rows, columns, dy.dtype, None)
    if dh is None:
        return dy @ weight
    states = [] if state is None else [state]
    dx: Tensor = torch.ops.lora_kernels.native_input_grad.default._op([dy], [weight], [dh], [lora_a], p, states)
    return dx


OPERATORS: Mapping[str, Callable[..., Any]] = {"packed_product": _product, "packed_input_grad": _input_grad}
