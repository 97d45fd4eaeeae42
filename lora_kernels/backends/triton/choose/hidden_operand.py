"""How h and dh are kept where the Gluon kernels run: written by one kernel, loaded as they are by the next.

A row of h's operand, bf16::

    column    0 .. R - 1     R .. 2 R - 1
              high part      low part          R = the rank, filled up to 16, 32, 64 or 128 with zeros

The high part is the value rounded to bf16, the low part the rest, rounded: together 16 bits of precision and fp32's
range, over bf16 and over fp16 alike. s and 1 / (1 - p) are folded in (h's operand is s h, dh's is s dz with D's
scale), so that what reads it only multiplies.

The low-rank term is Σ_c h̃[:, c mod 2R] B̃[:, c]. Over bf16 B̃ (N, 2 R) has B twice. Over fp16, where A and B keep
fp32's range too, it is (N, 4 R): the high part twice, then the low part twice, and h̃ is read twice. Ã (2 R, K) or (4
R, K) is A's, turned.

The layout depends on the compute dtype and the rank alone, never on M, on alignment or on a tuned table: forward and
backward choose apart. K and N say only whether TMA can take the layer (``tma_takes``). Bytes kept for backward, a
token, beside fp32's 4 r:

    ======  ====  ====  ====  ====  ====  ====  ====
    rank       1     4     8    16    32    64   128
    4 r        4    16    32    64   128   256   512
    here      64    64    64    64   128   256   512
    ======  ====  ====  ====  ====  ====  ====  ====
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....kept import row_words
from . import gluon

__all__ = ["RANKS", "HiddenOperand", "hidden_operand", "operand_fault", "operand_on", "tma_takes"]

RANKS = (16, 32, 64, 128)
_INDEX_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class HiddenOperand:
    """h's operand: ``rank`` columns for the high part, as many for the low part.

    Attributes:
        terms: how often the adapter's operand has R columns: 2, over fp16 4.
    """

    rank: int
    terms: int = 2

    @property
    def columns(self) -> int:
        """A row's bf16 numbers."""
        return 2 * self.rank

    @property
    def adapter_columns(self) -> int:
        return self.terms * self.rank

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.columns

    def pack(self, scaled: Tensor) -> Tensor:
        """The operand, bf16 (M, 2 R), of s h (M, r)."""
        wide = torch.nn.functional.pad(scaled.float(), (0, self.rank - scaled.shape[1]))
        high = wide.to(torch.bfloat16)
        low = wide - high.float()
        return torch.cat((high, low.where(low.isfinite(), 0.0).to(torch.bfloat16)), 1)

    def unpack(self, operand: Tensor, r: int) -> Tensor:
        """s h, fp32 (M, r), of that operand; exact."""
        return operand[:, :r].float() + operand[:, self.rank : self.rank + r].float()

    @property
    def step(self) -> int:
        """Columns of one K step of the low-rank term: what a buffer of 64 columns holds."""
        return min(self.columns, 64)


def hidden_operand(dtype: torch.dtype, r: int) -> HiddenOperand | None:
    """The layout for 16-bit x and W and rank r; None where the Gluon kernels do not take them."""
    if dtype not in (torch.bfloat16, torch.float16) or not 1 <= r <= RANKS[-1]:
        return None
    return HiddenOperand(next(rank for rank in RANKS if rank >= r), 2 if dtype is torch.bfloat16 else 4)


def tma_takes(k: int, n: int) -> bool:
    """Whether contiguous rows of K and of N 16-bit numbers start on 16-byte boundaries."""
    return k % 8 == 0 and n % 8 == 0 and k > 0 and n > 0


def operand_on(capability: int, dtype: torch.dtype, k: int, n: int, r: int) -> HiddenOperand | None:
    """The layout of ``forward``'s h on a device of that compute capability (90: 9.0), whatever plan runs; None: fp32.

    Static facts alone: every Triton kernel of a whole layer writes and reads this one.
    """
    if gluon.why_not(capability) is not None or not tma_takes(k, n):
        return None
    return hidden_operand(dtype, r)


def operand_fault(dtype: torch.dtype, m: int, k: int, n: int, r: int) -> str | None:
    """The end of a sentence "the Gluon kernels do not run: ..." where they do not take the sizes; tensors aside."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"x is {dtype} and they are for torch.bfloat16 and torch.float16"
    operand = hidden_operand(dtype, r)
    if operand is None:
        return f"rank {r} is not from 1 to {RANKS[-1]}"
    if not tma_takes(k, n):
        return f"in_features {k} and out_features {n} are not both multiples of 8"
    tokens = m * max(operand.columns, row_words(k), operand.rank * -(-n // 128))  # the last: dh's parts
    if max(tokens, operand.adapter_columns * max(k, n)) >= _INDEX_LIMIT:
        return f"{m} tokens of rank {r} are more than their 32-bit offsets reach"
    return None
