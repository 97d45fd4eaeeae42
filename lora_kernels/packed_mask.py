"""Dropout's mask with one bit an element: the specification, in NumPy, that a kernel meets bit for bit.

**Layout.** ``words`` is int32 (M, 4 ceil(K / 128)): bit j of word w of a row is 1 where column 32 w + j is kept. A
row starts on a 16-byte boundary; bits of columns that are not there are 0.

**Draw.** An element is kept with probability q = keep / 2^16, keep = 65536 - round(65536 p), at least 1. Word w of
row m takes four calls of
Philox4x32 with 7 rounds (Salmon et al., 2011), c = 0 to 3, all of one 64-bit key::

    key      = seed[0], low and high half
    counter  = (4 w + c, m, seed[1]'s low half, seed[1]'s high half)

so 16 random words r_0 .. r_15, those of call c being r_4c to r_4c+3. They make 32 independent bits of probability q:
from the lowest binary
digit d_0 of keep to the highest, d_15, starting with k = 0::

    k <- majority(k, r_i, d_i) = (k & r_i) | (d_i & (k | r_i))        d_i: 0, or all ones

Each step makes the probability of a bit (its own + d_i) / 2. A p that rounds to 0 draws nothing and keeps everything;
a p near 1 keeps one element in 65536. What is kept is scaled by 1 / (1 - p), exactly, whatever q is.

Tokens are counted within a call: m is below 2^32, and 4 w + c is too, for K below 2^35.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .kept import row_words
from .reference import dropout_threshold

__all__ = ["pack", "packed_keep_words", "unpack"]

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def packed_keep_words(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask of ``rows`` x ``columns`` elements as words, int32 (rows, row_words(columns)), on seed's device.

    Args:
        seed: int64 (2,): the key and the stream, as ``reference.philox_keep_mask`` takes them.
        rows, columns: M and K.
        p: the probability to drop, from 0 to below 1.
    """
    width = row_words(columns)
    keep = 65536 - dropout_threshold(p)
    kept = np.full((rows, width), _LOW)
    if keep < 65536:
        key, stream = (int(s) % 2**64 for s in seed.tolist())
        word = np.arange(width, dtype=np.uint64)[None, :] + np.zeros((rows, 1), np.uint64)
        row = np.arange(rows, dtype=np.uint64)[:, None] + np.zeros((1, width), np.uint64)
        kept = np.zeros((rows, width), np.uint64)
        for call in range(4):
            drawn = _philox((np.uint64(4) * word + np.uint64(call)) & _LOW, row & _LOW, stream, key)
            for index, bits in enumerate(drawn):
                digit = _LOW if keep >> (4 * call + index) & 1 else np.uint64(0)
                kept = (kept & bits) | (digit & (kept | bits))
    there = np.clip(columns - 32 * np.arange(width), 0, 32).astype(np.uint64)
    kept &= (np.uint64(1) << there) - np.uint64(1)
    return torch.from_numpy(kept.astype(np.uint32).view(np.int32)).to(seed.device)


def _philox(c0: np.ndarray, c1: np.ndarray, stream: int, key: int) -> tuple[np.ndarray, ...]:
    """Seven rounds of Philox4x32; all counters as 32-bit numbers in uint64."""
    c2, c3 = np.full_like(c0, stream & 0xFFFFFFFF), np.full_like(c0, stream >> 32)
    k0, k1 = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)
    for _ in range(7):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (product1 >> _HALF) ^ c1 ^ k0, product1 & _LOW, (product0 >> _HALF) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return c0, c1, c2, c3


def unpack(words: Tensor, columns: int) -> Tensor:
    """bool (M, columns): True where the element is kept."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> bits) & 1).bool().flatten(-2)[..., :columns]


def pack(mask: Tensor) -> Tensor:
    """The words of a bool mask (M, K)."""
    rows, columns = mask.shape
    wide = torch.zeros(rows, 32 * row_words(columns), dtype=torch.int64, device=mask.device)
    wide[:, :columns] = mask.long()
    sums = (wide.view(rows, -1, 32) << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(sums >= 2**31, sums - 2**32, sums).to(torch.int32)
