"""h of several layers in one read of the x that they share; each member's mask is drawn on the way (sm_90a)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import barrier, members_of, next_buffer, operand_b, split_fp16, store_hi_lo, zero_sums
from .packed_draw import draw_words, load_seed
from .shrink import _mask_rows

__all__ = ["hopper_group_shrink_kernel"]


@gluon.jit
def _adapter(a_s, place, a_desc, RANK: gl.constexpr, BLOCK_K: gl.constexpr):
    """A member's rows of A, in one of the buffers that fit the largest member."""
    return a_s.index(place)._reinterpret(a_desc.dtype, [RANK, BLOCK_K], a_desc.layout)


@gluon.jit
def _add(x, a_s, first, a_desc, acc, RANK: gl.constexpr, BLOCK_K: gl.constexpr, WIDE: gl.constexpr):
    """acc + x Aᵀ, x in registers."""
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    x = gl.convert_layout(x, layout)
    a_high = operand_b(_adapter(a_s, first, a_desc, RANK, BLOCK_K), True)
    if WIDE:
        high, low = split_fp16(x)
        acc = warpgroup_mma(high, a_high, acc, is_async=True)
        acc = warpgroup_mma(low, a_high, acc, is_async=True)
        a_low = operand_b(_adapter(a_s, first + 1, a_desc, RANK, BLOCK_K), True)
        acc = warpgroup_mma(high, a_low, acc, is_async=True)
    else:
        acc = warpgroup_mma(x, a_high, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _draw_all(words, seeds, keep16, row, col, stride_w, M, K, MEMBERS: gl.constexpr):
    """Every member's words of one block of x, drawn and written."""
    row, col = gl.broadcast(gl.expand_dims(row, 1), gl.expand_dims(col, 0))
    drawn = ()
    for i in gl.static_range(MEMBERS):
        bits = draw_words(col.to(gl.uint32), row.to(gl.uint32), keep16, seeds[i], K).to(gl.int32)
        gl.store(words[i] + row * stride_w + col, bits, mask=(row < M) & (col < stride_w))
        drawn = drawn + (bits,)
    return drawn


@gluon.jit
def _places(acc, m0, M):
    """Rows, columns, and offsets of acc in a contiguous tensor as wide, and which rows are there."""
    rows = m0 + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    cols = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    at = gl.expand_dims(rows, 1) * acc.shape[1] + gl.expand_dims(cols, 0)
    return rows, cols, at, gl.expand_dims(rows < M, 1)


@gluon.jit
def _store_part(acc, part, m0, M):
    rows, cols, at, inside = _places(acc, m0, M)
    gl.store(part + gl.program_id(1) * (M * acc.shape[1]) + at, acc, mask=inside)


@gluon.jit
def _store_hidden(acc, hp, part, scale, m0, M, SPLIT: gl.constexpr):
    """The member's operand, of acc or of the sum of all programs' parts."""
    rows, cols, at, inside = _places(acc, m0, M)
    RANK: gl.constexpr = acc.shape[1]
    if SPLIT > 1:
        acc = gl.zeros_like(acc)
        for i in gl.static_range(SPLIT):
            acc += gl.load(part + i * (M * RANK) + at, mask=inside, other=0.0, cache_modifier=".cg")
    store_hi_lo(acc * scale, hp, rows, cols, M, RANK, 2 * RANK)


@gluon.jit
def _finish(accs, outputs, scales, counters, m0, M, SPLIT: gl.constexpr, MEMBERS: gl.constexpr):
    """Writes the members' operands; where programs share K, the last of them sums all members' parts."""
    hps, parts = outputs
    if SPLIT == 1:
        for i in gl.static_range(MEMBERS):
            _store_hidden(accs[i], hps[i], None, scales[i], m0, M, SPLIT)
    else:
        for i in gl.static_range(MEMBERS):
            _store_part(accs[i], parts[i], m0, M)
        barrier()
        before = gl.atomic_add(counters + gl.program_id(0), 1, sem="acq_rel", scope="gpu")
        if before == SPLIT - 1:
            barrier()
            for i in gl.static_range(MEMBERS):
                _store_hidden(accs[i], hps[i], parts[i], scales[i], m0, M, SPLIT)
            gl.store(counters + gl.program_id(0), 0)


@gluon.jit
def _consumer(
    a_descs,
    smem,
    bars,
    outputs,
    words,
    seed_ptrs,
    counters,
    scales,
    keep16,
    m0,
    first,
    steps,
    M,
    K,  #
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    RANKS: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    DROP: gl.constexpr,
    WIDE: gl.constexpr,
):
    xs, a_s = smem
    full, empty = bars
    W: gl.constexpr = gl.num_warps()
    # x in registers is one member's operand as well as another's: the layout does not depend on the rank
    hl: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, RANKS[0], 16])
    xl: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=hl, k_width=2)
    BW: gl.constexpr = BLOCK_K // 32
    PER: gl.constexpr = BLOCK_M * BW // (32 * W)  # words a thread draws
    wl: gl.constexpr = gl.BlockedLayout([1, PER], [32 * PER // BW, BW // PER], [W, 1], [1, 0])
    PARTS: gl.constexpr = 2 if WIDE else 1
    accs = zero_sums(BLOCK_M, RANKS, MEMBERS)
    wrow = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wl))
    wcol = first * BW + gl.arange(0, BW, layout=gl.SliceLayout(0, wl))
    stride_w = gl.cdiv(K, 128) * 4
    seeds = ()
    if DROP:
        for i in gl.static_range(MEMBERS):
            seeds = seeds + (load_seed(seed_ptrs[i]),)
    s = 0
    ph = 0
    for k in range(steps):
        if DROP:
            drawn = _draw_all(words, seeds, keep16, wrow, wcol + k * BW, stride_w, M, K, MEMBERS)
        mbarrier.wait(full.index(s), ph)
        sums = ()
        for i in gl.static_range(MEMBERS):
            if DROP or WIDE:
                x = xs.index(s).load(xl)
                if DROP:
                    x = _mask_rows(x, drawn[i])
                place = (s * MEMBERS + i) * PARTS
                sums = sums + (_add(x, a_s, place, a_descs[i], accs[i], RANKS[i], BLOCK_K, WIDE),)
            else:
                av = _adapter(a_s, s * MEMBERS + i, a_descs[i], RANKS[i], BLOCK_K)
                sums = sums + (warpgroup_mma(xs.index(s), operand_b(av, True), accs[i], is_async=True),)
        accs = sums
        if not DROP and not WIDE:
            sums = ()
            for i in gl.static_range(MEMBERS):
                sums = sums + (warpgroup_mma_wait(0, deps=[accs[i]]),)
            accs = sums
        mbarrier.arrive(empty.index(s), count=1)
        s, ph = next_buffer(s, ph, STAGES)
    _finish(accs, outputs, scales, counters, m0, M, SPLIT, MEMBERS)


@gluon.jit
def _producer(
    x_desc,
    a_descs,
    smem,
    bars,
    m0,
    first,
    steps,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    RANKS: gl.constexpr,
    TOTAL: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    xs, a_s = smem
    full, empty = bars
    PARTS: gl.constexpr = 2 if WIDE else 1
    s = 0
    ph = 0
    for k in range(steps):
        bar = full.index(s)
        mbarrier.wait(empty.index(s), ph ^ 1)
        mbarrier.expect(bar, (BLOCK_M + PARTS * TOTAL) * BLOCK_K * 2)
        k0 = (first + k) * BLOCK_K
        tma.async_copy_global_to_shared(x_desc, [m0, k0], bar, xs.index(s))
        for i in gl.static_range(MEMBERS):
            for part in gl.static_range(PARTS):
                to = _adapter(a_s, (s * MEMBERS + i) * PARTS + part, a_descs[i], RANKS[i], BLOCK_K)
                tma.async_copy_global_to_shared(a_descs[i], [2 * part * RANKS[i], k0], bar, to)
        s, ph = next_buffer(s, ph, STAGES)


@gluon.jit(do_not_specialize=["keep16"])
def hopper_group_shrink_kernel(
    x_desc,
    a_desc0,
    a_desc1,
    a_desc2,
    a_desc3,
    words0,
    words1,
    words2,
    words3,
    hp0,
    hp1,
    hp2,
    hp3,
    part0,
    part1,
    part2,
    part3,
    counters,
    seed0_ptr,
    seed1_ptr,
    seed2_ptr,
    seed3_ptr,
    scale0,
    scale1,
    scale2,
    scale3,
    keep16,
    M,
    K,  #
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    RANKS: gl.constexpr,
    LARGEST: gl.constexpr,
    TOTAL: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    DROP: gl.constexpr,
):
    """hp_i = high and low part of scale_i * (mask_i * x) A_iᵀ for 2 to 4 members; the masks' words where DROP.

    ======== ================================= =====================================================================
    x        (M, K) bf16 or fp16               rows on 16-byte boundaries; block (BLOCK_M, BLOCK_K)
    a_i      (>= RANKS[i], K) bf16             contiguous; block (RANKS[i], BLOCK_K)
    words_i  (M, 4 ceil(K / 128)) int32        contiguous: bit j of word w keeps column 32 w + j. Where DROP only
    hp_i     (M, 2 RANKS[i]) bf16              contiguous
    part_i   (SPLIT, M, RANKS[i]) fp32         contiguous; None where SPLIT is 1
    counters (ceil(M / BLOCK_M),) int32        zero, and left zero; None where SPLIT is 1
    seed_i   (2,) int64                        key and stream, where DROP only
    ======== ================================= =====================================================================

    LARGEST is the largest of the ranks, TOTAL their sum. What a member that is not there would have is None.

    Grid (row blocks, SPLIT): SPLIT programs share K; the last one to finish adds every member's parts up, in order. It
    waits for nobody. Each member has a sum of its own, and not a column block of one sum: each has a scale and a mask
    of its own, and its operand is written as a layer by itself would write it. One warp loads, num_warps multiply.

    fp32 accumulators; 2 M K Σ RANKS flops; reads x once. Shared memory: STAGES (BLOCK_M + MEMBERS LARGEST) BLOCK_K 2
    bytes, over fp16 twice LARGEST. Not measured yet.
    """
    WIDE: gl.constexpr = x_desc.dtype == gl.float16
    A_BUFFERS: gl.constexpr = STAGES * MEMBERS * (2 if WIDE else 1)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    a_s = gl.allocate_shared_memory(a_desc0.dtype, [A_BUFFERS, LARGEST, BLOCK_K], a_desc0.layout)
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
    a_descs = members_of(a_desc0, a_desc1, a_desc2, a_desc3, MEMBERS)
    words = (words0, words1, words2, words3)
    outputs = (members_of(hp0, hp1, hp2, hp3, MEMBERS), (part0, part1, part2, part3))
    seed_ptrs = (seed0_ptr, seed1_ptr, seed2_ptr, seed3_ptr)
    scales = members_of(scale0, scale1, scale2, scale3, MEMBERS)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    a_descs,
                    (xs, a_s),
                    (full, empty),
                    outputs,
                    words,
                    seed_ptrs,
                    counters,
                    scales,
                    keep16,
                    m0,
                    first,
                    steps,
                    M,
                    K,
                    BLOCK_M,
                    BLOCK_K,
                    RANKS,
                    MEMBERS,
                    STAGES,
                    SPLIT,
                    DROP,
                    WIDE,
                ),
            ),
            (
                _producer,
                (
                    x_desc,
                    a_descs,
                    (xs, a_s),
                    (full, empty),
                    m0,
                    first,
                    steps,
                    BLOCK_M,
                    BLOCK_K,
                    RANKS,
                    TOTAL,
                    MEMBERS,
                    STAGES,
                    WIDE,
                ),
            ),
        ],
        [1],
        [24],
    )
