"""Device helpers: the forms of a product, the order in which programs walk the output's tiles, dependent launch."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "add_low_rank",
    "as_adapter",
    "dot",
    "dot_adapter",
    "dot_adapters",
    "dot_hidden",
    "launch_dependents",
    "load_hidden",
    "load_operand",
    "rounded",
    "store_hidden",
    "store_output",
    "store_parts",
    "tile_at",
    "tile_of_program",
    "wait_for_previous",
]

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
    """``acc + a @ b`` in fp32; PRECISION ("ieee" or "tf32") matters to fp32 operands only.

    IEEE products of fp32 are summed block by block: one chain through all blocks would round several times worse.
    """
    # With an imprecise accumulator, which means nothing to fp32, the compiler does not make a chain of the sum.
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32 and PRECISION == "ieee":
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _parts(value):
    """``value`` as high and low bf16 part, and the high one with 0 where it is not finite: inf * 0 would be NaN."""
    value = value.to(tl.float32)
    high = rounded(value, tl.bfloat16)
    low = value - high.to(tl.float32)
    finite = tl.abs(low) < float("inf")
    low = rounded(tl.where(finite, low, 0.0), tl.bfloat16)
    return high, low, tl.where(finite, high, 0.0)


@triton.jit
def _dot_wide(a, b, acc):
    """``acc + a @ b`` of any float operands with fp32's range: 16 bits of each count, all that fp16 has of its own."""
    high, low, finite = _parts(a)
    b_high, b_low, _ = _parts(b)
    acc = dot(low, b_high, acc, "ieee")
    acc = dot(finite, b_low, acc, "ieee")
    return dot(high, b_high, acc, "ieee")


@triton.jit
def as_adapter(value, dtype: tl.constexpr):
    """Of lora_a or lora_b, what the compute dtype ``dtype`` takes: rounded to it; over fp16 as it is, in any dtype."""
    if dtype == tl.float16:
        return value
    else:
        return rounded(value, dtype)


@triton.jit
def dot_adapter(x, adapter, acc, PRECISION: tl.constexpr):
    """``acc + x @ adapter`` for x (dy) in the compute dtype and an adapter, as loaded or as ``as_adapter`` gave it."""
    if x.dtype == tl.float16 and adapter.dtype != tl.float16:
        return _dot_wide(x, adapter, acc)
    else:
        return dot(x, as_adapter(adapter, x.dtype), acc, PRECISION)


@triton.jit
def dot_adapters(b, a, acc, dtype: tl.constexpr):
    """``acc + b @ a`` of two adapters, exact but for what ``as_adapter`` rounds and for the sums."""
    if dtype == tl.float16 and (a.dtype != tl.float16 or b.dtype != tl.float16):
        return dot(b.to(tl.float32), a.to(tl.float32), acc, "tf32x3")
    else:
        return dot(as_adapter(b, dtype), as_adapter(a, dtype), acc, "ieee")


@triton.jit
def dot_hidden(hidden, b, acc, dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + hidden @ b`` for an fp32 ``hidden`` and x, dy or an adapter as ``b``; ``dtype`` is the compute dtype.

    With SPLIT (16-bit compute) ``hidden`` enters as high + low part, both 16-bit, so that nearly all its bits count.
    An infinite or NaN high part travels alone: inf - inf would turn an infinity into NaN. ``b`` is rounded to
    ``dtype``. Over fp16, whose range neither h nor an adapter keeps to, the parts are bf16 and ``b`` has two as well.
    """
    if dtype == tl.float16:
        return _dot_wide(hidden, b, acc)
    else:
        b = rounded(b, dtype)
        high = rounded(hidden, dtype)
        acc = dot(high, b, acc, PRECISION)
        if SPLIT:
            low = hidden - high.to(tl.float32)
            low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
            acc = dot(rounded(low, dtype), b, acc, PRECISION)
        return acc


@triton.jit
def load_operand(ptrs, mask, OPERAND: tl.constexpr):
    """h or dh at ``ptrs``, fp32. With OPERAND, the padded rank, the sum of its bf16 parts (``choose.hidden_operand``):
    the low one stands OPERAND columns beside the high one, and the sum is exact."""
    value = tl.load(ptrs, mask=mask, other=0.0)
    if OPERAND > 0:
        value = value.to(tl.float32) + tl.load(ptrs + OPERAND, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def store_parts(ptrs, value, mask, OPERAND: tl.constexpr):
    """fp32 ``value`` as bf16 high and low part, OPERAND columns apart."""
    high, low, _ = _parts(value)
    tl.store(ptrs, high, mask=mask)
    tl.store(ptrs + OPERAND, low, mask=mask)


@triton.jit
def store_hidden(ptrs, value, mask_m, offs_r, R: tl.constexpr, OPERAND: tl.constexpr):
    """``value`` (BLOCK_M, BLOCK_R) fp32 to ``ptrs``; with OPERAND as its bf16 parts, zeros from rank R to OPERAND."""
    if OPERAND > 0:
        value = tl.where((offs_r < R)[None, :], value, 0.0)
        store_parts(ptrs, value, mask_m[:, None] & (offs_r < OPERAND)[None, :], OPERAND)
    else:
        tl.store(ptrs, value, mask=mask_m[:, None] & (offs_r < R)[None, :])


@triton.jit
def load_hidden(h_ptr, offs_m, offs_r, mask, M, stride_hm: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr):
    """Σ_i h[i, m, r] of h (PARTS, M, R) fp32, rows stride_hm apart, in the order of i: (BLOCK_M, BLOCK_R).

    With OPERAND one part is its bf16 parts; several are fp32, and only their sum is stored so.
    """
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :]
    h = load_operand(h_ptrs, mask, OPERAND if PARTS == 1 else 0)  # (BLOCK_M, BLOCK_R)
    part = tl.full((), stride_hm, tl.int64) * M
    for i in tl.static_range(1, PARTS):
        h += tl.load(h_ptrs + i * part, mask=mask, other=0.0)  # (BLOCK_M, BLOCK_R)
    return h


@triton.jit
def _low_rank_step(
    acc, r, h_ptr, h_sum_ptr, lora_b_ptr, scaling, tile_n, offs_m, offs_n, mask_m, mask_n,
    M, R: tl.constexpr, stride_bn: tl.constexpr, stride_br: tl.constexpr, stride_hm: tl.constexpr, dtype: tl.constexpr,
    BLOCK_R: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``add_low_rank`` for ranks ``r`` to ``r + BLOCK_R``."""
    offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < R
    mask_h = mask_m[:, None] & mask_r[None, :]
    h = load_hidden(h_ptr, offs_m, offs_r, mask_h, M, stride_hm, PARTS, OPERAND)
    b_ptrs = lora_b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)  # (BLOCK_R, BLOCK_N)
    if PARTS > 1:
        if tile_n == 0:
            h_sum_ptrs = h_sum_ptr + offs_m[:, None] * (2 * OPERAND if OPERAND > 0 else R) + offs_r[None, :]
            store_hidden(h_sum_ptrs, h, mask_m, offs_r, R, OPERAND)
    acc = dot_hidden(h * scaling, b, acc, dtype, SPLIT, PRECISION)
    return acc


@triton.jit
def add_low_rank(
    acc,
    h_ptr,
    h_sum_ptr,
    lora_b_ptr,
    scaling,
    tile_n,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    M,
    R: tl.constexpr,
    stride_bn: tl.constexpr,
    stride_br: tl.constexpr,
    stride_hm: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc + scaling h Bᵀ`` for a tile of y. Where h comes in PARTS, the first tile column writes their sum.

    With OPERAND that sum is stored as bf16 parts, with zeros beyond R.
    """
    LAST: tl.constexpr = OPERAND if PARTS > 1 and OPERAND > 0 else R
    for r in tl.range(0, LAST, BLOCK_R, num_stages=1):
        acc = _low_rank_step(
            acc, r, h_ptr, h_sum_ptr, lora_b_ptr, scaling, tile_n, offs_m, offs_n, mask_m, mask_n,
            M, R, stride_bn, stride_br, stride_hm, dtype, BLOCK_R, PARTS, OPERAND, SPLIT, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def store_output(
    acc, y_ptr, linear_ptr, bias_ptr, gain_ptr, stride_bias, stride_gain, offs_m, offs_n, mask_m, mask_n, N
):
    """y = acc + bias for a tile of y (M, N), or with a gain acc * gain + bias; one rounding. linear, where it is there,
    gets acc itself. The bias is first rounded to y's dtype."""
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if linear_ptr is not None:
        tl.store(linear_ptr + offs, rounded(acc, linear_ptr.dtype.element_ty), mask=mask)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + offs_n * stride_gain, mask=mask_n, other=0.0)  # (BLOCK_N,)
        acc *= gain[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)  # (BLOCK_N,)
        acc += rounded(bias, y_ptr.dtype.element_ty).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, rounded(acc, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """With PDL: the kernel launched next may start as soon as every program of this one has come here."""
    if PDL and not INTERPRET:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """With PDL: wait until the kernel before has ended and what it wrote can be read; only then may anything that it
    writes be read, and anything that it or its predecessors read be written."""
    if PDL and not INTERPRET:
        gdc_wait()


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """``tile_at`` for one program a tile."""
    return tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)


@triton.jit
def tile_at(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile row, tile column) of a tile's number: GROUP_M tile rows are walked column by column, so that L2 keeps both
    operands' panels."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % rows, within // rows
