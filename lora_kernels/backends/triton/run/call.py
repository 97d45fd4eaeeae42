"""One call of an operator, by all that a run of it depends on; and the keys that a run is kept by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..choose import blocks
from ..choose.blocks import Machine, next_power_of_2
from ..choose.hidden_operand import HiddenOperand, operand_on
from ..choose.plans import Cell
from .descriptors import operand_fault
from .prepared import alignment, matrix, precision_of

__all__ = ["Call", "backward_key", "cdiv", "forward_key", "kind_of", "rows_in_one_piece", "told"]


def cdiv(size: int, block: int) -> int:
    """Blocks that cover ``size``."""
    return -(-size // block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a run is made ready for, in both passes; a field that its kernels do not read may stay as it is.

    Attributes:
        m, k, n, r: rows, in_features, out_features, rank.
        stride_h, stride_dh: the rows' distances; each row is in one piece.
        a_dtype, b_dtype, bias_dtype: of the gradients; ``bias_dtype`` is None where dbias is not due.
        dropout: whether there is a mask, with probability ``p`` of a drop.
        gain: whether a gain acts on the sum.
        by_descriptor: whether TMA can read what the large product multiplies, x or dy and weight.
        by_tma: whether it can read every matrix of a whole layer's pass that is there, as the Gluon kernels do.
        operand: how a whole layer's h is laid out, s and D's scale in it; None: fp32 (M, R), without s.
    """

    machine: Machine
    device: torch.device
    dtype: torch.dtype
    precision: str
    m: int
    r: int
    k: int = 0
    n: int = 0
    stride_x: tuple[int, ...] = (0, 0)
    stride_dy: tuple[int, ...] = (0, 0)
    stride_w: tuple[int, ...] = (0, 0)
    stride_a: tuple[int, ...] = (0, 0)
    stride_b: tuple[int, ...] = (0, 0)
    stride_bias: int = 0
    stride_gain: int = 0
    stride_h: int = 0
    stride_dh: int = 0
    a_dtype: torch.dtype = torch.float32
    b_dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype | None = None
    p: float = 0.0
    dropout: bool = False
    gain: bool = False
    by_descriptor: bool = False
    by_tma: bool = False
    operand: HiddenOperand | None = None

    @staticmethod
    def over(left: Tensor, weight: Tensor | None = None, **fields: Any) -> Call:
        """Of an operator that reads ``left``, x or dy; its large product, if it has one, is that with ``weight``."""
        return Call(
            machine=blocks.machine_of(left.device),
            device=left.device,
            dtype=left.dtype,
            precision=precision_of(left.dtype),
            m=left.shape[0],
            stride_w=(0, 0) if weight is None else weight.stride(),
            by_descriptor=weight is not None and _tma_reads(left, weight),
            **fields,
        )

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor,
        bias: Tensor | None,
        p: float,
        state: Tensor | None,
        h: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> Call:
        """Of a whole forward pass; or, with ``h``, of the product alone."""
        k, n, r = x.shape[1], *lora_b.shape
        operand = None if lora_a is None else _operand_of(x, k, n, r)
        return Call.over(
            x,
            weight,
            k=k,
            n=n,
            r=r,
            stride_x=x.stride(),
            stride_a=() if lora_a is None else lora_a.stride(),
            stride_b=lora_b.stride(),
            stride_bias=0 if bias is None else bias.stride(0),
            stride_gain=0 if gain is None else gain.stride(0),
            stride_h=_row_of(operand, r) if h is None else h.stride(0),
            operand=operand,
            p=p,
            dropout=state is not None,
            gain=gain is not None,
            by_tma=_all_by_tma(x, weight),
        )

    @staticmethod
    def backward(
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        h: Tensor | None,
        p: float,
        state: Tensor | None,
    ) -> Call:
        """Of a whole backward pass; h, where it is due, and dh are contiguous."""
        (r, k), n = lora_a.shape, dy.shape[1]
        operand = _operand_of(dy, k, n, r)
        return Call.over(
            dy,
            weight,
            k=k,
            n=n,
            r=r,
            stride_dy=dy.stride(),
            stride_x=(0, 0) if x is None else x.stride(),
            stride_a=lora_a.stride(),
            stride_b=lora_b.stride(),
            stride_h=_row_of(operand, r),
            operand=operand,
            stride_dh=r,
            a_dtype=lora_a.dtype,
            b_dtype=lora_b.dtype,
            bias_dtype=None if bias is None else bias.dtype,
            p=p,
            dropout=state is not None,
            by_tma=_all_by_tma(dy, x, weight, h, state),
        )

    def cell(self, direction: str) -> Cell:
        """What the choice of a plan for ``direction`` depends on."""
        dtype = "tf32" if self.precision == "tf32" else str(self.dtype).removeprefix("torch.")
        return Cell(direction, next_power_of_2(self.m), self.k, self.n, self.r, dtype, self.dropout)

    @property
    def padded_rank(self) -> int:
        """Columns of each part of h's operand; 0: there is none."""
        return 0 if self.operand is None else self.operand.rank

    @property
    def split(self) -> bool:
        """Whether h and dh enter their products as two 16-bit numbers, a high and a low one."""
        return self.dtype.itemsize == 2

    @property
    def keep_scale(self) -> float:
        """What an element that is kept is multiplied by."""
        return 1.0 / (1.0 - self.p)


def _operand_of(left: Tensor, k: int, n: int, r: int) -> HiddenOperand | None:
    return operand_on(blocks.machine_of(left.device).capability, left.dtype, k, n, r)


def _row_of(operand: HiddenOperand | None, r: int) -> int:
    return r if operand is None else operand.columns


def _tma_reads(left: Tensor, weight: Tensor) -> bool:
    """Whether TMA can read both: contiguous rows, all on 16-byte boundaries, and no size of zero."""
    contiguous = left.stride(1) == 1 == weight.stride(1)
    rows = (left.stride(0) * left.itemsize, weight.stride(0) * left.itemsize)
    on_boundaries = alignment(left, weight) == 0 and all(row > 0 and row % 16 == 0 for row in rows)
    return contiguous and on_boundaries and left.shape[1] > 0 and max(*left.shape, *weight.shape) < 2**31


def _all_by_tma(*matrices: Tensor | None) -> bool:
    """Whether TMA can read all that are there; a seed is none."""
    return all(operand_fault("", t) is None for t in matrices if t is not None and t.dim() == 2)


def forward_key(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, p: float, state: Tensor | None
) -> tuple[Any, ...]:
    """All that a run depends on; the device's index comes first.

    Contiguous parameters need no strides: those of sizes above 1 follow from the shapes, and no other is used.
    """
    if weight.is_contiguous() and lora_a.is_contiguous() and lora_b.is_contiguous():
        strides: Any = bias is None or bias.stride()
    else:
        strides = (weight.stride(), lora_a.stride(), lora_b.stride(), bias is None or bias.stride())
    dtype = x.dtype
    return (
        x.get_device(),
        dtype,
        x.shape,
        x.stride(),
        weight.shape,
        lora_a.shape,
        lora_a.dtype,
        lora_b.dtype,
        None if bias is None else bias.dtype,
        strides,
        p,
        None if state is None else state.shape,  # tells a seed from the words
        alignment(x, weight, lora_a, lora_b, bias, state),
        dtype is not torch.float32 or precision_of(dtype),
    )


def backward_key(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    p: float,
    state: Tensor | None,
) -> tuple[Any, ...]:
    """All that a run depends on; the device's index comes first."""
    return (
        *matrix(dy),
        None if x is None else x.stride(),
        None if weight is None else weight.stride(),
        *matrix(lora_a),
        *matrix(lora_b),
        None if bias is None else bias.dtype,
        h is None,
        p,
        None if state is None else state.shape,  # tells a seed from the words
        alignment(dy, x, weight, lora_a, lora_b, h, state),
        precision_of(dy.dtype),
    )


def told(state: Tensor | None) -> torch.Size | None:
    """What a launch depends on of a state: None, a seed (int64) or the mask's words (int32)."""
    return None if state is None else state.shape


def rows_in_one_piece(matrix: Tensor) -> Tensor:
    """What is (M, R), with contiguous rows at any distance: as the kernels read h and dh."""
    return matrix if matrix.shape[1] == 1 or matrix.stride(1) == 1 else matrix.contiguous()


_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def kind_of(precision: str, biases: Iterable[Tensor | None] = ()) -> int:
    """A number for what a run depends on beyond its tensors: how fp32 is multiplied, and of which dbias is due."""
    kind = 1 if precision == "tf32" else 0
    for bias in biases:
        kind = 8 * kind + (0 if bias is None else _DTYPES.index(bias.dtype))
    return kind
