"""What the Gluon kernels share: the order of tiles, the ring of buffers, the mask's bits, the rows of h's operand."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

__all__ = [
    "barrier",
    "mask_columns",
    "members_of",
    "next_buffer",
    "operand_b",
    "replace_tile",
    "split_fp16",
    "store_hi_lo",
    "tile_of",
    "zero_sums",
]

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6 has the first, 3.7 the second


@gluon.jit
def members_of(first, second, third, fourth, MEMBERS: gl.constexpr):
    """The arguments of a group's 2 to 4 members; none of theirs may be None, which Triton 3.6 cannot return."""
    if MEMBERS == 2:
        return (first, second)
    elif MEMBERS == 3:
        return (first, second, third)
    else:
        return (first, second, third, fourth)


@gluon.jit
def _zero_sum(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, COLUMNS, 16]
    )
    return gl.zeros([ROWS, COLUMNS], gl.float32, layout)


@gluon.jit
def zero_sums(ROWS: gl.constexpr, RANKS: gl.constexpr, MEMBERS: gl.constexpr):
    """A group's sums (ROWS, RANKS[i])."""
    sums = ()
    for i in gl.static_range(MEMBERS):
        sums = sums + (_zero_sum(ROWS, RANKS[i]),)
    return sums


@gluon.jit
def tile_of(t, num_m, num_n, GROUP_M: gl.constexpr):
    """Row and column of tile t: columns of GROUP_M tiles, one after the other."""
    per_group = GROUP_M * num_n
    group = t // per_group
    first = group * GROUP_M
    rows = gl.minimum(num_m - first, GROUP_M)
    inside = t % per_group
    return first + inside % rows, inside // rows


@gluon.jit
def next_buffer(s, ph, STAGES: gl.constexpr):
    """The ring's next buffer, and the parity of its barriers."""
    s += 1
    wrap = s == STAGES
    s = gl.where(wrap, 0, s)
    ph = gl.where(wrap, ph ^ 1, ph)
    return s, ph


@gluon.jit
def operand_b(buf, TRANS_W: gl.constexpr):
    if TRANS_W:
        return buf.permute([1, 0])
    else:
        return buf


@gluon.jit
def mask_columns(t, words_smem):
    """t (rows, cols) where the bit of words_smem (rows, cols / 32; int32, shared) is set, else 0. Keeps t's layout."""
    rows: gl.constexpr = t.shape[0]
    cols: gl.constexpr = t.shape[1]
    t3 = t.reshape([rows, cols // 32, 32])
    wide: gl.constexpr = t3.type.layout
    words = words_smem.load(gl.SliceLayout(2, wide))
    bits = gl.full([32], 1, gl.int32, gl.SliceLayout(0, gl.SliceLayout(0, wide)))
    bits = bits << gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(0, wide)))
    keep = (gl.expand_dims(words, 2) & gl.expand_dims(gl.expand_dims(bits, 0), 0)) != 0
    t3 = gl.where(keep, t3, gl.zeros_like(t3))
    return gl.convert_layout(t3.reshape([rows, cols]), t.type.layout)


@gluon.jit
def store_hi_lo(h, hp, rows, cols, M, BLOCK_R: gl.constexpr, STRIDE_H: gl.constexpr):
    """Rows of h's operand: the high part's BLOCK_R columns and, where STRIDE_H has room, the low part's behind them."""
    hi = h.to(gl.bfloat16)
    to = hp + gl.expand_dims(rows, 1) * STRIDE_H + gl.expand_dims(cols, 0)
    inside = gl.expand_dims(rows < M, 1)
    gl.store(to, hi, mask=inside)
    if STRIDE_H >= 2 * BLOCK_R:
        gl.store(to + BLOCK_R, (h - hi.to(gl.float32)).to(gl.bfloat16), mask=inside)


@gluon.jit
def split_fp16(x):
    """x, fp16, as two bf16 tensors whose sum it is: so that products keep fp32's range. Not measured yet."""
    wide = x.to(gl.float32)
    high = wide.to(gl.bfloat16)
    return high, (wide - high.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def replace_tile(tile, values):
    """Puts values where a tile lies in shared memory, for the tensor cores of all warps. Not measured yet."""
    tile.store(values)
    fence_async_shared()
    barrier()
