"""The values of a weight of 4-bit codes."""

import triton
import triton.language as tl

from .common import rounded

__all__ = ["four_bit_values_kernel"]

_CODES = tl.constexpr(16)
_ROW = tl.constexpr(16)  # bytes, 32 codes: a block is a multiple of them


@triton.jit
def _nf4(code):
    """NF4's number for each code 0 to 15, in fp32."""
    low = tl.where(code == 0, -1.0, tl.where(code == 1, -0.6961928009986877, -0.5250730514526367))
    low = tl.where(code >= 3, tl.where(code == 3, -0.39491748809814453, -0.28444138169288635), low)
    low = tl.where(code >= 5, tl.where(code == 5, -0.18477343022823334, -0.09105003625154495), low)
    high = tl.where(code == 7, 0.0, tl.where(code == 8, 0.07958029955625534, 0.16093020141124725))
    high = tl.where(code >= 10, tl.where(code == 10, 0.24611230194568634, 0.33791524171829224), high)
    high = tl.where(code >= 12, tl.where(code == 12, 0.44070982933044434, 0.5626170039176941), high)
    high = tl.where(code >= 14, tl.where(code == 14, 0.7229568362236023, 1.0), high)
    return tl.where(code < 7, low, high)


@triton.jit
def _fp4(code):
    """FP4's number for each code 0 to 15, in fp32: the fourth bit is the sign."""
    size = code & 7
    low = tl.where(size == 0, 0.0, tl.where(size == 1, 0.0052083334885537624, 0.6666666865348816))
    low = tl.where(size == 3, 1.0, low)
    high = tl.where(size == 4, 0.3333333432674408, tl.where(size == 5, 0.5, 0.1666666716337204))
    high = tl.where(size == 7, 0.25, high)
    magnitude = tl.where(size < 4, low, high)
    return tl.where(code > 8, -magnitude, magnitude)


@triton.jit
def four_bit_values_kernel(
    codes_ptr,
    absmax_ptr,
    outer_ptr,
    outer_table_ptr,
    offset_ptr,
    w_ptr,
    code_bytes,
    total,
    NF4: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w[i] = table[code i] * absmax[i / BLOCKSIZE], i over W's rows one after the other, rounded once to w's dtype.

    With OUTER absmax is nested: outer_table[absmax[j]] * outer[j / OUTER], rounded, + offset, rounded. Compile it with
    ``enable_fp_fusion=False``: a multiply-add would round these two steps once.

    =========== ============================================== ==========================================
    codes       (code_bytes,) uint8                            contiguous; the first of two in the high bits
    absmax      (ceil(total / BLOCKSIZE),) fp32, nested uint8  contiguous
    outer       (ceil(len(absmax) / OUTER),) fp32, or None     contiguous; the absmax of absmax
    outer_table (256,) fp32, or None                           contiguous
    offset      () fp32, or None
    w           (total,)                                       contiguous; fp32, bf16 or fp16
    =========== ============================================== ==========================================

    code_bytes is ceil(total / 2). Grid (ceil(code_bytes / BLOCK)): a program reads BLOCK bytes. BLOCKSIZE is a multiple
    of 32, so that 16 bytes share one absmax. Each program makes the table of 16 numbers once, and its codes look them
    up in shared memory. fp32 arithmetic, total multiplications; reads codes and absmax and writes W once.
    """
    number = tl.arange(0, _CODES)
    table = _nf4(number) if NF4 else _fp4(number)  # (16,)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + offs, mask=offs < code_bytes, other=0).to(tl.int32)  # (BLOCK,)
    rows = (first + tl.arange(0, BLOCK // _ROW) * _ROW) * 2  # the first value of each 32
    mask = rows < total
    block = rows // BLOCKSIZE
    if OUTER > 0:
        index = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)  # (BLOCK / 16,)
        outer = tl.load(outer_ptr + block // OUTER, mask=mask, other=0.0)  # (BLOCK / 16,)
        absmax = tl.load(outer_table_ptr + index, mask=mask, other=0.0) * outer  # (BLOCK / 16,)
        absmax = absmax + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)  # (BLOCK / 16,)
    factor = tl.reshape(tl.broadcast_to(absmax[:, None], (BLOCK // _ROW, _ROW)), (BLOCK,))
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    even = rounded(tl.gather(table, codes >> 4, 0) * factor, dtype)  # (BLOCK,)
    odd = rounded(tl.gather(table, codes & 15, 0) * factor, dtype)  # (BLOCK,)
    offs_w = first * 2 + tl.arange(0, 2 * BLOCK)
    tl.store(w_ptr + offs_w, tl.interleave(even, odd), mask=offs_w < total)
