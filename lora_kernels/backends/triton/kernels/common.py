"""Device helpers: the two forms of a product, and the order in which programs walk the output's tiles."""

import triton
import triton.language as tl

__all__ = ["dot", "dot_hidden", "rounded", "tile_of_program"]

# Triton's interpreter (3.6 to 3.9) gets two things wrong that compiled code gets right: its product of bf16 is garbage,
# so operands are widened first, and its cast of fp32 to bf16 cuts off instead of rounding to nearest even.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """``value`` in ``dtype``, rounded to nearest even."""
    if INTERPRET and value.dtype == tl.float32 and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32; PRECISION ("ieee" or "tf32") matters to fp32 operands only."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_hidden(hidden, b, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + hidden @ b`` for an fp32 ``hidden`` and ``b`` in the compute dtype.

    With SPLIT (16-bit compute) ``hidden`` enters as high + low part, both 16-bit, so that nearly all its bits count.
    An infinite or NaN high part travels alone: inf - inf would turn an infinity into NaN.
    """
    high = rounded(hidden, b.dtype)
    acc = dot(high, b, acc, PRECISION)
    if SPLIT:
        low = hidden - high.to(tl.float32)
        low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
        acc = dot(rounded(low, b.dtype), b, acc, PRECISION)
    return acc


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile row, tile column) of this program: GROUP_M tile rows are walked column by column, so that L2 keeps both
    operands' panels."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % rows, within // rows
