"""``Codes``: what kernels that read a quantised weight as it is stored have to know of it, besides its tensors."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FOUR_BITS", "UNIT", "Codes"]

FOUR_BITS = ("nf4", "fp4")
UNIT = 32  # numbers: of 4-bit codes a block is a multiple of them


class Codes(NamedTuple):
    """How W (N, K) follows from numbers: less its block's zero, times its factor, all in fp32, and rounded once.

    Attributes:
        number: what is stored: "nf4" or "fp4" (two codes a byte in row order), "e2m1" (the same, the first of two in
            the low half), "int8" or "e4m3" (a byte each, (N, K)).
        high, wide: rows and columns of a block, 0 for all of them; its factors are in row order. Blocks of 4-bit codes
            are ``wide`` numbers of W's rows one after the other, whatever ``high`` is.
        nested: of how many factors a factor of their own is shared, where the factors are quantised again; else 0.
        per: what a stored factor is divided by, as a multiplication with 1 / per.
        zeros: whether each block has a zero, an int8.
        scales: what the factors are stored as: "" for floats, "e8m0" for powers of two, or "e4m3"; these may have one
            factor more, of all W.
    """

    number: str
    high: int
    wide: int
    nested: int = 0
    per: int = 1
    zeros: bool = False
    scales: str = ""
