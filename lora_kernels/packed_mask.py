"""Dropout's mask with one bit an element: the specification, in NumPy, that a kernel meets bit for bit.

**Layout.** ``words`` is int32 (M, 4 ceil(K / 128)): bit j of word w of a row is 1 where column 32 w + j is kept. A
row starts on a 16-byte boundary; bits of columns that are not there are 0.

**Draw.** An element is kept with probability q = keep / 2^16, keep = 65536 - round(65536 p), at least 1. Word w of
row m takes four calls of Philox4x32 with 7 rounds, c = 0 to 3, all of one 64-bit key (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", 2011: 7 pass BigCrush)::

    key      = seed[0], low and high half
    counter  = (4 w + c, m, seed[1]'s low half, seed[1]'s high half)

so 16 random words r_0 .. r_15, those of call c being r_4c to r_4c+3. They make 32 independent bits of
probability q: from the lowest binary digit d_0 of keep to the highest, d_15, starting with k = 0::

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

__all__ = ["dropout_threshold", "pack", "packed_keep_words", "unpack"]

_WORD, _LOW, _HALF = 32, np.uint64(0xFFFFFFFF), np.uint64(32)


def packed_keep_words(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask of ``rows`` x ``columns`` elements as words, int32 (rows, row_words(columns)), on seed's device.

    Args:
        seed: int64 (2,): the 64-bit key and the stream.
        rows, columns: M and K.
        p: the probability to drop, from 0 to below 1.
    """
    used = -(-columns // _WORD)
    words = np.zeros((rows, row_words(columns)), np.uint32)
    words[:, :used] = _draw(seed, rows, used, 65536 - dropout_threshold(p))
    if columns % _WORD:
        words[:, used - 1] &= np.uint32((1 << columns % _WORD) - 1)
    return torch.from_numpy(words.view(np.int32)).to(seed.device)


def dropout_threshold(p: float) -> int:
    """``round(65536 p)``, at most 65535: how many in 65536 elements are dropped."""
    return min(round(p * 65536), 65535)


def _draw(seed: Tensor, rows: int, words: int, keep: int) -> np.ndarray:
    """All words, with every column there."""
    if keep == 65536:
        return np.full((rows, words), _LOW)
    key, stream = (int(s) % 2**64 for s in seed.tolist())
    word, row = np.broadcast_arrays(np.arange(words, dtype=np.uint64), np.arange(rows, dtype=np.uint64)[:, None])
    kept = np.zeros((rows, words), np.uint64)
    for call in range(4):
        if keep % (16 << 4 * call) == 0:  # while all digits are 0, so are all bits
            continue
        for index, bits in enumerate(_philox((4 * word + np.uint64(call)) & _LOW, row & _LOW, stream, key)):
            kept = kept | bits if keep >> (4 * call + index) & 1 else kept & bits  # what majority is of a digit
    return kept


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
