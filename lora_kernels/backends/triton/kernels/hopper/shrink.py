"""h (or dh) in one read of x (dy), as an operand; dropout's words are drawn on the way (sm_90a)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import barrier, next_buffer, operand_b, split_fp16, store_hi_lo
from .packed_draw import draw_by_offset, draw_words, load_seed

__all__ = ["hopper_shrink_kernel"]


@gluon.jit
def _mask_rows(t, words):
    """t (rows, cols) where the bit of words (rows, cols / 32; any layout) is set, else 0. Keeps t's layout."""
    rows: gl.constexpr = t.shape[0]
    cols: gl.constexpr = t.shape[1]
    t3 = t.reshape([rows, cols // 32, 32])
    wide: gl.constexpr = t3.type.layout
    w = gl.convert_layout(words, gl.SliceLayout(2, wide))
    bits = gl.full([32], 1, gl.int32, gl.SliceLayout(0, gl.SliceLayout(0, wide)))
    bits = bits << gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(0, wide)))
    keep = (gl.expand_dims(w, 2) & gl.expand_dims(gl.expand_dims(bits, 0), 0)) != 0
    t3 = gl.where(keep, t3, gl.zeros_like(t3))
    return gl.convert_layout(t3.reshape([rows, cols]), t.type.layout)


@gluon.jit
def _product_fp16(x, a_s, s, acc, BY_ROW: gl.constexpr):
    """acc + x A for fp16 x in registers, and A's high and low part in the buffers 2 s and 2 s + 1."""
    high, low = split_fp16(x)
    acc = warpgroup_mma(high, operand_b(a_s.index(2 * s), BY_ROW), acc, is_async=True)
    acc = warpgroup_mma(low, operand_b(a_s.index(2 * s), BY_ROW), acc, is_async=True)
    acc = warpgroup_mma(high, operand_b(a_s.index(2 * s + 1), BY_ROW), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _s_consumer(
    smem,
    bars,
    words,
    hp,
    part,
    counters,
    scale,
    keep16,
    seed0,
    seed1,
    offset,
    seed_ptr,
    m0,
    first,
    steps,
    M,
    K,  #
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STRIDE_H: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    DROP: gl.constexpr,
    BY_ROW: gl.constexpr,
    CALLS: gl.constexpr,
    ROUNDS: gl.constexpr,
    WIDE: gl.constexpr,
):
    xs, a_s = smem
    full, empty = bars
    W: gl.constexpr = gl.num_warps()
    hl: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, BLOCK_R, 16])
    xl: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=hl, k_width=2)
    BW: gl.constexpr = BLOCK_K // 32
    PER: gl.constexpr = BLOCK_M * BW // (32 * W)  # words a thread draws
    wl: gl.constexpr = gl.BlockedLayout([1, PER], [32 * PER // BW, BW // PER], [W, 1], [1, 0])
    acc = gl.zeros([BLOCK_M, BLOCK_R], gl.float32, hl)
    wrow = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wl))
    wcol = first * BW + gl.arange(0, BW, layout=gl.SliceLayout(0, wl))
    if DROP and seed_ptr is not None:
        seed = load_seed(seed_ptr)
        stride_w = gl.cdiv(K, 128) * 4
    s = 0
    ph = 0
    for k in range(steps):
        if DROP:
            row = gl.expand_dims(wrow, 1)
            col = gl.expand_dims(wcol + k * BW, 0)
            row2, col2 = gl.broadcast(row, col)
            if seed_ptr is None:
                bits = draw_by_offset(
                    col2.to(gl.uint32),
                    row2.to(gl.uint32),
                    keep16,
                    seed0.to(gl.uint32),
                    seed1.to(gl.uint32),
                    offset,
                    CALLS,
                    ROUNDS,
                ).to(gl.int32)
                gl.store(words + row2 * (K // 32) + col2, bits, mask=(row2 < M) & (col2 < K // 32))
            else:
                bits = draw_words(col2.to(gl.uint32), row2.to(gl.uint32), keep16, seed, K).to(gl.int32)
                gl.store(words + row2 * stride_w + col2, bits, mask=(row2 < M) & (col2 < stride_w))
            mbarrier.wait(full.index(s), ph)
            x = xs.index(s).load(xl)
            x = _mask_rows(x, bits)
            if WIDE:
                acc = _product_fp16(x, a_s, s, acc, BY_ROW)
            else:
                acc = warpgroup_mma(x, operand_b(a_s.index(s), BY_ROW), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(s), count=1)
        else:
            mbarrier.wait(full.index(s), ph)
            if WIDE:
                acc = _product_fp16(xs.index(s).load(xl), a_s, s, acc, BY_ROW)
            else:
                acc = warpgroup_mma(xs.index(s), operand_b(a_s.index(s), BY_ROW), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(s), count=1)
        s, ph = next_buffer(s, ph, STAGES)
    rows = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, hl))
    cols = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, hl))
    if SPLIT == 1:
        store_hi_lo(acc * scale, hp, rows, cols, M, BLOCK_R, STRIDE_H)
    else:
        at = gl.expand_dims(rows, 1) * BLOCK_R + gl.expand_dims(cols, 0)
        inside = gl.expand_dims(rows < M, 1)
        gl.store(part + gl.program_id(1) * (M * BLOCK_R) + at, acc, mask=inside)
        barrier()
        before = gl.atomic_add(counters + gl.program_id(0), 1, sem="acq_rel", scope="gpu")
        if before == SPLIT - 1:
            barrier()
            total = gl.zeros([BLOCK_M, BLOCK_R], gl.float32, hl)
            for i in gl.static_range(SPLIT):
                total += gl.load(part + i * (M * BLOCK_R) + at, mask=inside, other=0.0, cache_modifier=".cg")
            store_hi_lo(total * scale, hp, rows, cols, M, BLOCK_R, STRIDE_H)
            gl.store(counters + gl.program_id(0), 0)


@gluon.jit
def _s_producer(
    descs,
    smem,
    bars,
    m0,
    first,
    steps,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BY_ROW: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    x_desc, a_desc = descs
    xs, a_s = smem
    full, empty = bars
    s = 0
    ph = 0
    for k in range(steps):
        bar = full.index(s)
        mbarrier.wait(empty.index(s), ph ^ 1)
        mbarrier.expect(bar, (BLOCK_M + (2 * BLOCK_R if WIDE else BLOCK_R)) * BLOCK_K * 2)
        k0 = (first + k) * BLOCK_K
        tma.async_copy_global_to_shared(x_desc, [m0, k0], bar, xs.index(s))
        if WIDE and BY_ROW:
            tma.async_copy_global_to_shared(a_desc, [0, k0], bar, a_s.index(2 * s))
            tma.async_copy_global_to_shared(a_desc, [2 * BLOCK_R, k0], bar, a_s.index(2 * s + 1))
        elif WIDE:
            tma.async_copy_global_to_shared(a_desc, [k0, 0], bar, a_s.index(2 * s))
            tma.async_copy_global_to_shared(a_desc, [k0, 2 * BLOCK_R], bar, a_s.index(2 * s + 1))
        elif BY_ROW:
            tma.async_copy_global_to_shared(a_desc, [0, k0], bar, a_s.index(s))
        else:
            tma.async_copy_global_to_shared(a_desc, [k0, 0], bar, a_s.index(s))
        s, ph = next_buffer(s, ph, STAGES)


@gluon.jit(do_not_specialize=["keep16", "seed0", "seed1", "offset"])
def hopper_shrink_kernel(
    x_desc,
    a_desc,
    words,
    hp,
    part,
    counters,
    scale,
    keep16,
    seed0,
    seed1,
    offset,
    seed_ptr,
    M,
    K,  #
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STRIDE_H: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    DROP: gl.constexpr,
    BY_ROW: gl.constexpr,
    CALLS: gl.constexpr,
    ROUNDS: gl.constexpr,
):
    """hp = high and low part of scale * (mask * x) Aᵀ, and the mask's words where DROP.

    ======== ============================== =========================================================================
    x        (M, K) bf16 or fp16            rows on 16-byte boundaries; block (BLOCK_M, BLOCK_K)
    a        (>= R, K) bf16                 contiguous; block (BLOCK_R, BLOCK_K). BY_ROW False: (K, >= R), turned block
    words    (M, 4 ceil(K / 128)) int32     contiguous: bit j of word w keeps column 32 w + j. Read where DROP only
    hp       (M, STRIDE_H) bf16             contiguous; the first 2 BLOCK_R columns are written
    part     (SPLIT, M, BLOCK_R) fp32       contiguous; unused where SPLIT is 1
    counters (ceil(M / BLOCK_M),) int32     zero, and left zero; unused where SPLIT is 1
    seed     (2,) int64, or None            key and stream. None: seed0, seed1, offset; words are (M, K / 32)
    ======== ============================== =========================================================================

    Grid (row blocks, SPLIT): SPLIT programs share K; the last one of them to finish adds the parts up, in order. It
    waits for nobody. BLOCK_M is 16 rows a warp. One warp loads, num_warps multiply; masked x is a register operand.
    fp32 accumulator; 2 M K R flops; reads x once. Shared memory: STAGES (BLOCK_M + BLOCK_R) BLOCK_K 2 bytes.

    Measured on an H100: BY_ROW, BLOCK_R = 16, seed None. Not measured yet: the words of ``draw_words``, BY_ROW False,
    other ranks,
    fp16 (x in two bf16 parts, A's low part 2 R behind the high one).
    """
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    WIDE: gl.constexpr = x_desc.dtype == gl.float16
    A_BUFFERS: gl.constexpr = 2 * STAGES if WIDE else STAGES
    A_ROWS: gl.constexpr = BLOCK_R if BY_ROW else BLOCK_K
    A_COLUMNS: gl.constexpr = BLOCK_K if BY_ROW else BLOCK_R
    a_s = gl.allocate_shared_memory(a_desc.dtype, [A_BUFFERS, A_ROWS, A_COLUMNS], a_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    m0 = gl.program_id(0) * BLOCK_M
    all_steps = gl.cdiv(K, BLOCK_K)
    each = gl.cdiv(all_steps, SPLIT)
    first = gl.program_id(1) * each
    steps = gl.maximum(gl.minimum(all_steps - first, each), 0)
    gl.warp_specialize(
        [
            (
                _s_consumer,
                (
                    (xs, a_s),
                    (full, empty),
                    words,
                    hp,
                    part,
                    counters,
                    scale,
                    keep16,
                    seed0,
                    seed1,
                    offset,
                    seed_ptr,
                    m0,
                    first,
                    steps,
                    M,
                    K,
                    BLOCK_M,
                    BLOCK_K,
                    BLOCK_R,
                    STRIDE_H,
                    STAGES,
                    SPLIT,
                    DROP,
                    BY_ROW,
                    CALLS,
                    ROUNDS,
                    WIDE,
                ),
            ),
            (
                _s_producer,
                (
                    (x_desc, a_desc),
                    (xs, a_s),
                    (full, empty),
                    m0,
                    first,
                    steps,
                    BLOCK_M,
                    BLOCK_K,
                    BLOCK_R,
                    BY_ROW,
                    STAGES,
                    WIDE,
                ),
            ),
        ],
        [1],
        [24],
    )
