"""The values of a quantised weight: of 4-bit codes, and of bytes in blocks; and a tile of either for a product."""

import triton
import triton.language as tl

from .common import rounded

__all__ = ["eight_bit_values_kernel", "four_bit_values_kernel", "number_table", "weight_tile"]

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
def number_table(NUMBER: tl.constexpr):
    """The number of each 4-bit code: (16,) fp32."""
    code = tl.arange(0, _CODES)
    return _nf4(code) if NUMBER == "nf4" else _fp4(code)


@triton.jit
def _nested_factor(absmax_ptr, outer_ptr, outer_table_ptr, offset_ptr, block, mask, OUTER: tl.constexpr):
    """absmax of the blocks, fp32; with OUTER from its own code, factor and offset, in two roundings."""
    if OUTER > 0:
        index = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        outer = tl.load(outer_ptr + block // OUTER, mask=mask, other=0.0)
        absmax = tl.load(outer_table_ptr + index, mask=mask, other=0.0) * outer
        return absmax + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def _byte_numbers(value, NUMBER: tl.constexpr):
    """The fp32 numbers of bytes: int8, or of e4m3's bits as uint8, by way of fp16, whose exponent is 8 larger."""
    if NUMBER == "int8":
        return value.to(tl.float32)
    else:
        bits = value.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def _block_of(offs_n, offs_u, K, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """The number of the block in which each (row, column) of (BLOCK_N,) and (UNITS,) is: (BLOCK_N, UNITS)."""
    row = offs_n // HIGH if HIGH > 0 else offs_n * 0
    if WIDE > 0:
        return row[:, None] * tl.cdiv(K, WIDE) + (offs_u // WIDE)[None, :]
    else:
        return row[:, None] + (offs_u * 0)[None, :]


@triton.jit
def _spread(of_units, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr):
    """(BLOCK_N, BLOCK_K / UNIT) to (BLOCK_N, BLOCK_K)."""
    if UNIT == 1:
        return of_units
    else:
        wide = tl.broadcast_to(of_units[:, :, None], (BLOCK_N, BLOCK_K // UNIT, UNIT))
        return tl.reshape(wide, (BLOCK_N, BLOCK_K))


@triton.jit
def weight_tile(
    data_ptr,
    scales_ptr,
    outer_ptr,
    outer_table_ptr,
    offset_ptr,
    zeros_ptr,
    table,
    offs_n,
    first,
    last,
    mask_n,
    K,
    dtype: tl.constexpr,
    NUMBER: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    OUTER: tl.constexpr,
    PER: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W's rows ``offs_n``, columns ``first`` to ``first + BLOCK_K``, in ``dtype``: (BLOCK_N, BLOCK_K).

    Each number less its block's zero, times its factor, rounded once; from ``last`` on some finite numbers. UNIT
    columns share a factor, and BLOCK_K and ``first`` are multiples of it; of 4-bit codes K is too, and ``table`` is
    ``number_table``'s.
    """
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    offs_u = first + tl.arange(0, BLOCK_K // UNIT).to(tl.int64) * UNIT
    mask_u = mask_n[:, None] & (offs_u < last)[None, :]
    if NUMBER == "nf4" or NUMBER == "fp4":
        offs_b = first // 2 + tl.arange(0, BLOCK_K // 2).to(tl.int64)
        data_ptrs = data_ptr + offs_n[:, None] * (K // 2) + offs_b[None, :]
        mask_b = mask_n[:, None] & (offs_b < last // 2)[None, :]
        codes = tl.load(data_ptrs, mask=mask_b, other=0).to(tl.int32)  # (BLOCK_N, BLOCK_K / 2)
        codes = tl.reshape(tl.join(codes >> 4, codes & 15), (BLOCK_N * BLOCK_K,))
        number = tl.reshape(tl.gather(table, codes, 0), (BLOCK_N, BLOCK_K))
        block = (offs_n[:, None] * K + offs_u[None, :]) // WIDE
        factor = _nested_factor(scales_ptr, outer_ptr, outer_table_ptr, offset_ptr, block, mask_u, OUTER)
    else:
        offs_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = mask_n[:, None] & (offs_k < last)[None, :]
        value = tl.load(data_ptr + offs_n[:, None] * K + offs_k[None, :], mask=mask_k, other=0)  # (BLOCK_N, BLOCK_K)
        number = _byte_numbers(value, NUMBER)
        block = _block_of(offs_n, offs_u, K, HIGH, WIDE)
        factor = tl.load(scales_ptr + block, mask=mask_u, other=0.0).to(tl.float32)  # (BLOCK_N, UNITS)
        if PER > 1:
            factor *= 1.0 / PER
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + block, mask=mask_u, other=0).to(tl.float32)  # (BLOCK_N, UNITS)
            number -= _spread(zero, BLOCK_N, BLOCK_K, UNIT)
    return rounded(number * _spread(factor, BLOCK_N, BLOCK_K, UNIT), dtype)


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
    NUMBER: tl.constexpr,
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
    table = number_table(NUMBER)  # (16,)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + offs, mask=offs < code_bytes, other=0).to(tl.int32)  # (BLOCK,)
    rows = (first + tl.arange(0, BLOCK // _ROW) * _ROW) * 2  # the first value of each 32
    mask = rows < total
    block = rows // BLOCKSIZE
    absmax = _nested_factor(absmax_ptr, outer_ptr, outer_table_ptr, offset_ptr, block, mask, OUTER)  # (BLOCK / 16,)
    factor = tl.reshape(tl.broadcast_to(absmax[:, None], (BLOCK // _ROW, _ROW)), (BLOCK,))
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    even = rounded(tl.gather(table, codes >> 4, 0) * factor, dtype)  # (BLOCK,)
    odd = rounded(tl.gather(table, codes & 15, 0) * factor, dtype)  # (BLOCK,)
    offs_w = first * 2 + tl.arange(0, 2 * BLOCK)
    tl.store(w_ptr + offs_w, tl.interleave(even, odd), mask=offs_w < total)


@triton.jit
def eight_bit_values_kernel(
    data_ptr,
    scales_ptr,
    zeros_ptr,
    w_ptr,
    N,
    K,
    NUMBER: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    PER: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w[n, k] = (number[n, k] - zeros[i]) * (scales[i] / PER), i = (n / HIGH, k / WIDE), rounded once to w's dtype.

    ====== ================================== ===================================================
    data   (N, K) int8, or e4m3's bits uint8  contiguous
    scales (ceil(N / HIGH), ceil(K / WIDE))   contiguous; fp32, bf16 or fp16; HIGH or WIDE 0: all
    zeros  as scales, or None                 contiguous; int8
    w      (N, K)                             contiguous; fp32, bf16 or fp16
    ====== ================================== ===================================================

    Grid (ceil(N / BLOCK_N) ceil(K / BLOCK_K)), one tile each, along the rows first. WIDE is a multiple of UNIT. fp32
    arithmetic, N K multiplications; reads data and writes W once.
    """
    across = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    offs_n = (pid // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (pid % across) * BLOCK_K
    mask_n = offs_n < N
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    w = weight_tile(
        data_ptr, scales_ptr, None, None, None, zeros_ptr, None, offs_n, first, K, mask_n, K,
        dtype, NUMBER, HIGH, WIDE, 0, PER, UNIT, BLOCK_K,
    )  # (BLOCK_N, BLOCK_K)  # fmt: skip
    offs_k = first + tl.arange(0, BLOCK_K)
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    tl.store(w_ptr + offs_n[:, None] * K + offs_k[None, :], w, mask=mask)
