"""The values of a weight of MXFP4 or NVFP4: e2m1 numbers, two a byte, and a coarse factor for each few of them."""

import triton
import triton.language as tl

from .codes import _byte_numbers
from .common import rounded

__all__ = ["e2m1_values_kernel"]


@triton.jit
def _e2m1(code):
    """The fp32 number of each code 0 to 15, by way of fp16, whose exponent is 14 larger."""
    half = ((code & 8) << 12) | ((code & 7) << 9)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _e8m0(exponent):
    """2^(exponent - 127) in fp32; NaN of 255."""
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)  # 2^-127 is subnormal
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_values_kernel(
    codes_ptr,
    scales_ptr,
    whole_ptr,
    w_ptr,
    code_bytes,
    SCALES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w[i] = number of code i * factor of block i / WIDE, rounded once to w's dtype; i over W's rows, one by one.

    A factor is 2^(scale - 127) where SCALES is "e8m0", and scale * whole, rounded, where it is "e4m3".

    ====== ============================ ====================================================
    codes  (code_bytes,) uint8          contiguous; the first of two in the low bits
    scales (2 code_bytes / WIDE,) uint8 contiguous
    whole  () fp32, or None             None: 1
    w      (2 code_bytes,)              contiguous; fp32, bf16 or fp16
    ====== ============================ ====================================================

    Grid (ceil(code_bytes / BLOCK)): a program reads BLOCK bytes. WIDE is a power of two, at most 2 BLOCK, and divides
    W's rows. fp32 arithmetic, one multiplication a number; reads codes and scales and writes W once.
    """
    BYTES: tl.constexpr = WIDE // 2  # of codes, for a factor
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + offs, mask=offs < code_bytes, other=0).to(tl.int32)  # (BLOCK,)
    offs_f = pid * (BLOCK // BYTES) + tl.arange(0, BLOCK // BYTES)
    scale = tl.load(scales_ptr + offs_f, mask=offs_f < code_bytes // BYTES, other=0).to(tl.int32)  # (BLOCK / BYTES,)
    if SCALES == "e8m0":
        factor = _e8m0(scale)
    else:
        factor = _byte_numbers(scale, "e4m3")
        if whole_ptr is not None:
            factor *= tl.load(whole_ptr)
    spread = tl.reshape(tl.broadcast_to(factor[:, None], (BLOCK // BYTES, BYTES)), (BLOCK,))
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    even = rounded(_e2m1(codes & 15) * spread, dtype)  # (BLOCK,)
    odd = rounded(_e2m1(codes >> 4) * spread, dtype)  # (BLOCK,)
    offs_w = pid * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(w_ptr + offs_w, tl.interleave(even, odd), mask=offs_w < 2 * code_bytes)
