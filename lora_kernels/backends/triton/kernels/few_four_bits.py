"""Forward for few tokens over 4-bit codes in 16-bit compute: a block's 16 products are made once and looked up."""

import triton
import triton.language as tl

from .codes import _fp4, _nested_factor, _nf4
from .common import (
    INTERPRET,
    dot,
    dot_adapter,
    dot_hidden,
    launch_dependents,
    load_hidden,
    rounded,
    store_output,
    wait_for_previous,
)
from .packed import keep_tile

__all__ = ["few_four_bits_kernel", "sum_four_bits_kernel"]


_RANKS = tl.constexpr(16)  # of h, that a program makes

# The fp32 bits of the number of each code.
_BITS = {
    "nf4": "BF800000 BF3239B1 BF066B30 BECA32A0 BE91A24D BE3D353F BDBA7871 00000000 "
    "3DA2FAFF 3E24CAE3 3E7C04DD 3EAD033A 3EE1A4B8 3F1007AB 3F3913B3 3F800000",
    "fp4": "00000000 3BAAAAAB 3F2AAAAB 3F800000 3EAAAAAB 3F000000 3E2AAAAB 3E800000 "
    "00000000 BBAAAAAB BF2AAAAB BF800000 BEAAAAAB BF000000 BE2AAAAB BE800000",
}


def _products_of(number: str, dtype: str) -> str:
    """PTX: of an fp32 factor, the 16 products in ``dtype``: four registers of their low bytes, four of the high."""
    words = [f"0f{bits}" for bits in _BITS[number].split()]
    lines = ["{ .reg .f32 a, b; .reg .b32 p, q;"]
    for i in range(4):
        for register, j in (("p", 4 * i), ("q", 4 * i + 2)):
            lines.append(f"mul.f32 a, $8, {words[j]}; mul.f32 b, $8, {words[j + 1]};")
            lines.append(f"cvt.rn.{dtype}x2.f32 {register}, b, a;")
        lines.append(f"prmt.b32 ${i}, p, q, 0x6420; prmt.b32 ${4 + i}, p, q, 0x7531;")
    return "\n".join((*lines, "}"))


def _look_up() -> str:
    """PTX: of eight codes and the products' bytes, the products of each byte's two codes as a pair, column by column.

    A permutation takes the low three bits of four codes and picks of eight bytes; another picks by the fourth bit.
    """
    lines = ["{ .reg .b32 m, s, a, b, l, h;", "and.b32 m, $4, 0x77777777;", "shr.b32 s, $4, 1;"]
    lines.append("lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;")
    for i in (0, 2):
        lines += ["shr.b32 m, m, 16;", "shr.b32 s, s, 16;"] if i else []
        for found, first in (("l", 5), ("h", 9)):
            lines.append(f"prmt.b32 a, ${first}, ${first + 1}, m; prmt.b32 b, ${first + 2}, ${first + 3}, m;")
            lines.append(f"prmt.b32 {found}, a, b, s;")
        lines.append(f"prmt.b32 ${i}, l, h, 0x4051; prmt.b32 ${i + 1}, l, h, 0x6273;")
    return "\n".join((*lines, "}"))


_NF4_BF16, _NF4_FP16 = (tl.constexpr(_products_of("nf4", dtype)) for dtype in ("bf16", "f16"))
_FP4_BF16, _FP4_FP16 = (tl.constexpr(_products_of("fp4", dtype)) for dtype in ("bf16", "f16"))
_LOOK_UP = tl.constexpr(_look_up())
_PRODUCTS_ARE = tl.constexpr(",".join((*["=&r"] * 8, "f")))
_PAIRS_ARE = tl.constexpr(",".join((*["=&r"] * 4, *["r"] * 9)))


@triton.jit
def _products(factor, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """The bytes of the 16 products of a block's fp32 factor, each rounded once: eight int32 of factor's shape."""
    if NUMBER == "nf4":
        text: tl.constexpr = _NF4_BF16 if dtype == tl.bfloat16 else _NF4_FP16
    else:
        text: tl.constexpr = _FP4_BF16 if dtype == tl.bfloat16 else _FP4_FP16
    return tl.inline_asm_elementwise(text, _PRODUCTS_ARE, [factor], dtype=(tl.int32,) * 8, is_pure=True, pack=1)


@triton.jit
def _beside(of_units, EIGHTS: tl.constexpr):
    """(BLOCK_N, 4) to (BLOCK_N, 4, EIGHTS)."""
    return tl.broadcast_to(of_units[:, :, None], (of_units.shape[0], of_units.shape[1], EIGHTS))


@triton.jit
def _interpreted_pair(codes, factor, BYTE: tl.constexpr, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """What ``_LOOK_UP`` finds for one byte, without PTX."""
    first = (codes >> 8 * BYTE + 4) & 15
    second = (codes >> 8 * BYTE) & 15
    first = _nf4(first) if NUMBER == "nf4" else _fp4(first)
    second = _nf4(second) if NUMBER == "nf4" else _fp4(second)
    low = rounded(first * factor, dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = rounded(second * factor, dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return low | high


@triton.jit
def _pairs(codes, factor, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """W's numbers of eight codes each, two in an int32: four of (BLOCK_N, 4, EIGHTS), for (BLOCK_N, 4) factors."""
    EIGHTS: tl.constexpr = codes.shape[2]
    if INTERPRET:
        factor = _beside(factor, EIGHTS)
        pair_0 = _interpreted_pair(codes, factor, 0, NUMBER, dtype)
        pair_1 = _interpreted_pair(codes, factor, 1, NUMBER, dtype)
        pair_2 = _interpreted_pair(codes, factor, 2, NUMBER, dtype)
        pair_3 = _interpreted_pair(codes, factor, 3, NUMBER, dtype)
        return pair_0, pair_1, pair_2, pair_3
    else:
        l0, l1, l2, l3, h0, h1, h2, h3 = _products(factor, NUMBER, dtype)
        l0, l1, l2, l3 = _beside(l0, EIGHTS), _beside(l1, EIGHTS), _beside(l2, EIGHTS), _beside(l3, EIGHTS)
        h0, h1, h2, h3 = _beside(h0, EIGHTS), _beside(h1, EIGHTS), _beside(h2, EIGHTS), _beside(h3, EIGHTS)
        return tl.inline_asm_elementwise(
            _LOOK_UP, _PAIRS_ARE, [codes, l0, l1, l2, l3, h0, h1, h2, h3],
            dtype=(tl.int32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _in_order(numbers, UNIT: tl.constexpr, RUN: tl.constexpr):
    """Columns of (rows, 4, UNIT) in the order of the products' sum: (rows, 4 UNIT), the units in turn.

    A thread then multiplies one unit's columns, and makes one block's products. A turn has RUN columns: two pairs, 4
    columns apart, or one.
    """
    ROWS: tl.constexpr = numbers.shape[0]
    if RUN > 2:
        runs = tl.reshape(numbers, (ROWS, 4, UNIT // RUN // 2, RUN // 2, 2, 2))
        return tl.reshape(tl.permute(runs, (0, 2, 4, 1, 3, 5)), (ROWS, 4 * UNIT))
    else:
        runs = tl.reshape(numbers, (ROWS, 4, UNIT // 2, 2))
        return tl.reshape(tl.permute(runs, (0, 2, 1, 3)), (ROWS, 4 * UNIT))


@triton.jit
def _pieces(x_ptr, stride_xm, stride_xk, left, rows, ROWS: tl.constexpr, UNIT: tl.constexpr, EVEN_K: tl.constexpr):
    """Rows of x at ``x_ptr``, 4 UNIT columns; zeros beyond ``rows`` rows and ``left`` columns: (ROWS, 4, UNIT).

    They are loaded in pieces of 8 columns, in an order in which shared memory serves all threads of a warp at once:
    4 units, 2 rows, 2 pieces of a unit, the other rows, the other pieces.
    """
    place = tl.arange(0, ROWS * UNIT // 8)
    row = place // 4 % (ROWS // 2) * 2 + place % 2
    piece = place // (2 * ROWS) * 2 + place // 2 % 2
    starts = piece[:, None] * 8 + (tl.arange(0, 32) // 8 * UNIT)[None, :]
    offs = row[:, None] * stride_xm + (starts + (tl.arange(0, 32) % 8)[None, :]) * stride_xk
    mask = (row < rows)[:, None]
    if not EVEN_K:
        mask = mask & (starts < left)
    tile = tl.load(x_ptr + offs, mask=mask, other=0.0)  # (ROWS UNIT / 8, 32)
    tile = tl.reshape(tile, (UNIT // 16, ROWS // 2, 2, 2, 4, 8))
    return tl.reshape(tl.permute(tile, (1, 3, 4, 0, 2, 5)), (ROWS, 4, UNIT))


@triton.jit
def _eights(codes_ptr, K, left, rows, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, EVEN_K: tl.constexpr):
    """Codes of W's rows from ``codes_ptr`` on, 4 UNIT columns: (BLOCK_N, 4, UNIT / 8) int32; in pieces of 16 bytes."""
    PIECES: tl.constexpr = UNIT // 32
    place = tl.arange(0, BLOCK_N * PIECES)
    row = place // (2 * PIECES) * 2 + place % 2
    piece = place // 2 % PIECES
    starts = piece[:, None] * 4 + (tl.arange(0, 16) // 4 * (UNIT // 8))[None, :]
    offs = row[:, None] * (K // 32 * 4) + (starts + (tl.arange(0, 16) % 4)[None, :])
    mask = (row < rows)[:, None]
    if not EVEN_K:
        mask = mask & (starts < left // 8)
    codes = tl.load(codes_ptr + offs, mask=mask, other=0)  # (BLOCK_N PIECES, 16)
    codes = tl.reshape(codes, (BLOCK_N // 2, PIECES, 2, 4, 4))
    return tl.reshape(tl.permute(codes, (0, 2, 3, 1, 4)), (BLOCK_N, 4, UNIT // 8))


@triton.jit
def _numbers(codes, factor, UNIT: tl.constexpr, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """W's numbers of codes (BLOCK_N, 4, UNIT / 8) and factors (BLOCK_N, 4): (BLOCK_N, 4, UNIT)."""
    pair_0, pair_1, pair_2, pair_3 = _pairs(codes, factor, NUMBER, dtype)
    pairs = tl.join(tl.join(pair_0, pair_2), tl.join(pair_1, pair_3))  # (BLOCK_N, 4, UNIT / 8, 2, 2)
    both = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(dtype, bitcast=True)
    return tl.reshape(both, (codes.shape[0], 4, UNIT))


@triton.jit
def _hidden_part(
    x_ptr, lora_a_ptr, words_ptr, h_ptr, keep_scale, first_r, first, last, M, K, R: tl.constexpr, stride_xm, stride_xk,
    stride_ar, stride_ak, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = keep_scale (x * keep) Aᵀ of columns ``first`` to ``last``, ranks from ``first_r`` on."""
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_r = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R
    offs_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = lora_a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar
    step = tl.full((), BLOCK_K, tl.int64)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, last, BLOCK_K):
        mask_k = k + tl.arange(0, BLOCK_K) < last
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        a = tl.load(a_ptrs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)  # (BLOCK_K, BLOCK_R)
        if words_ptr is not None:
            x = x * keep_tile(words_ptr, offs_m, k, mask_m, K, BLOCK_K).to(x.dtype)
        h = dot_adapter(x, a, h, PRECISION)
        x_ptrs += step * stride_xk
        a_ptrs += step * stride_ak
    offs = (tl.program_id(1).to(tl.int64) * M + offs_m)[:, None] * R + offs_r[None, :]
    tl.store(h_ptr + offs, h * keep_scale, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _strip_part(
    x_ptr, data_ptr, scales_ptr, outer_ptr, outer_table_ptr, offset_ptr, y_ptr, strip, first, last, M, N, K,
    stride_xm, stride_xk, NUMBER: tl.constexpr, WIDE: tl.constexpr, OUTER: tl.constexpr, UNIT: tl.constexpr,
    RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x Wᵀ of columns ``first`` to ``last``, W's rows of strip number ``strip``."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first_n = strip.to(tl.int64) * BLOCK_N
    rows = tl.minimum(N - first_n, BLOCK_N).to(tl.int32)
    mask_n = tl.arange(0, BLOCK_N) < rows
    eights_ptr = data_ptr.to(tl.pointer_type(tl.int32)) + first_n * (K // 32 * 4)
    offs_u = tl.arange(0, BLOCK_N)[:, None] * K + (tl.arange(0, 4) * UNIT)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(first, last, BLOCK_K):
        left = last - k
        start = tl.full((), k, tl.int64)
        x = _pieces(x_ptr + start * stride_xk, stride_xm, stride_xk, left, M, BLOCK_M, UNIT, EVEN_K)
        codes = _eights(eights_ptr + k // 8, K, left, rows, BLOCK_N, UNIT, EVEN_K)  # (BLOCK_N, 4, UNIT / 8)
        number = first_n * K + k
        block = number // WIDE + (number % WIDE + offs_u) // WIDE  # (BLOCK_N, 4)
        mask_u = mask_n[:, None]
        if not EVEN_K:
            mask_u = mask_u & (tl.arange(0, 4) * UNIT < left)[None, :]
        factor = _nested_factor(scales_ptr, outer_ptr, outer_table_ptr, offset_ptr, block, mask_u, OUTER)
        w = _numbers(codes, factor, UNIT, NUMBER, dtype)  # (BLOCK_N, 4, UNIT)
        acc = dot(_in_order(w, UNIT, RUN), tl.trans(_in_order(x, UNIT, RUN)), acc, PRECISION)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_part = tl.program_id(1).to(tl.int64) * M + offs_m
    y_ptrs = y_ptr + first_n + offs_part[None, :] * N + tl.arange(0, BLOCK_N)[:, None]
    tl.store(y_ptrs, acc, mask=mask_n[:, None] & (offs_m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def few_four_bits_kernel(
    x_ptr,
    data_ptr,
    scales_ptr,
    outer_ptr,
    outer_table_ptr,
    offset_ptr,
    lora_a_ptr,
    words_ptr,
    h_ptr,
    y_ptr,
    M,
    N,
    K,
    R: tl.constexpr,
    keep_scale,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    NUMBER: tl.constexpr,
    WIDE: tl.constexpr,
    OUTER: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """x Wᵀ and h = keep_scale (x * keep) Aᵀ of each of PARTS shares of K, for M <= BLOCK_M.

    ``sum_four_bits_kernel`` is the second stage. Without lora_a no h is formed.

    ======== ======================= ==================================================================
    x        (M, K)                  any strides, all in all below 2^31; bf16 or fp16
    data     (N, K / 2)              contiguous, from a 16-byte boundary on; K and WIDE multiples of UNIT
    lora_a   (R, K) or None          any strides, any float dtype
    words    (M, 4 ceil(K / 128))    int32 (``packed_mask``); None: nothing is dropped
    h        (PARTS, M, R) fp32      contiguous; None without lora_a
    y        (PARTS, M, N) fp32      contiguous
    ======== ======================= ==================================================================

    Grid (ceil(R / 16) + ceil(N / BLOCK_N), PARTS): 16 columns of h each, then a strip of y each. BLOCK_K = 4 UNIT, of
    32 or 64 columns that share a factor. The 16 products of a unit are made once, with the very numbers that W's
    values have. They stay in registers as bytes, where the codes look them up. The sum goes through the 4 units in
    turn, so that a thread has one unit's codes; RUN is 2, 4 or 8 (``choose.code_blocks.sum_run``). fp32 accumulation,
    of yᵀ; 2 M N K + 2 M K R flops; reads the codes once.
    """
    launch_dependents(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = 0
    last = K
    if PARTS > 1:
        chunk = tl.cdiv(tl.cdiv(K, PARTS), BLOCK_K) * BLOCK_K
        first = tl.program_id(1) * chunk
        last = tl.minimum(first + chunk, K)
    if lora_a_ptr is None:
        _strip_part(
            x_ptr, data_ptr, scales_ptr, outer_ptr, outer_table_ptr, offset_ptr, y_ptr, tl.program_id(0), first, last,
            M, N, K, stride_xm, stride_xk, NUMBER, WIDE, OUTER, UNIT, RUN, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
            PRECISION,
        )  # fmt: skip
    else:
        HIDDEN: tl.constexpr = (R + _RANKS - 1) // _RANKS
        # A high and a low operand.
        TWO: tl.constexpr = dtype == tl.float16 and lora_a_ptr.dtype.element_ty != tl.float16
        if tl.program_id(0) < HIDDEN:
            _hidden_part(
                x_ptr, lora_a_ptr, words_ptr, h_ptr, keep_scale, tl.program_id(0) * _RANKS, first, last, M, K, R,
                stride_xm, stride_xk, stride_ar, stride_ak, 16, _RANKS, 64 if TWO else 128, PRECISION,
            )  # fmt: skip
        else:
            _strip_part(
                x_ptr, data_ptr, scales_ptr, outer_ptr, outer_table_ptr, offset_ptr, y_ptr, tl.program_id(0) - HIDDEN,
                first, last, M, N, K, stride_xm, stride_xk, NUMBER, WIDE, OUTER, UNIT, RUN, BLOCK_M, BLOCK_N, BLOCK_K,
                EVEN_K, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def sum_four_bits_kernel(
    y_parts_ptr,
    h_parts_ptr,
    lora_b_ptr,
    bias_ptr,
    gain_ptr,
    y_ptr,
    h_ptr,
    linear_ptr,
    scaling,
    M,
    N,
    R: tl.constexpr,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    stride_bias,
    stride_gain,
    stride_hm: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_H: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = gain * (Σ_i y_parts[i] + scaling h Bᵀ) + bias, rounded once, and h = Σ_i h_parts[i], each in the order of i.

    Without lora_b there is no low-rank term, and no h.

    ======== ====================== ===============================================
    y_parts  (PARTS, M, N) fp32     contiguous
    h_parts  (PARTS_H, M, R) fp32   rows stride_hm apart; several are contiguous
    lora_b   (N, R) or None         any strides, any float dtype, R <= BLOCK_R
    bias     (N,) or None           any stride, any float dtype
    gain     (N,) fp32 or None      any stride
    y        (M, N)                 contiguous
    h        (M, R) fp32, or None   contiguous
    linear   (M, N) or None         contiguous; gets Σ_i y_parts[i] + scaling h Bᵀ
    ======== ====================== ===============================================

    Grid (ceil(N / BLOCK_N)): a strip of y each, the first one writes h. fp32 accumulation; 2 M N R flops.
    """
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < R
    if lora_b_ptr is not None:
        b_ptrs = lora_b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
    wait_for_previous(PDL)
    mask = mask_m[:, None] & mask_n[None, :]
    y_ptrs = y_parts_ptr + offs_m[:, None] * N + offs_n[None, :]
    part = tl.full((), N, tl.int64) * M
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(PARTS):
        acc += tl.load(y_ptrs + i * part, mask=mask, other=0.0)  # (BLOCK_M, BLOCK_N)
    if lora_b_ptr is not None:
        mask_h = mask_m[:, None] & mask_r[None, :]
        h = load_hidden(h_parts_ptr, offs_m, offs_r, mask_h, M, stride_hm, PARTS_H, 0)  # (BLOCK_M, BLOCK_R)
        if h_ptr is not None:
            if tl.program_id(0) == 0:
                tl.store(h_ptr + offs_m[:, None] * R + offs_r[None, :], h, mask=mask_h)
        acc = dot_hidden(h * scaling, b, acc, y_ptr.dtype.element_ty, SPLIT, PRECISION)
    store_output(
        acc, y_ptr, linear_ptr, bias_ptr, gain_ptr, stride_bias, stride_gain, offs_m, offs_n, mask_m, mask_n, N
    )
