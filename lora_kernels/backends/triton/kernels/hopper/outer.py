"""dh with db in one read of dy; da (or db) in one read of x, masked in shared memory (sm_90a)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import barrier, mask_columns, next_buffer, replace_tile, split_fp16

__all__ = ["hopper_dh_db_kernel", "hopper_outer_kernel"]


@gluon.jit
def _d_consumer(
    smem,
    bars,
    dh_part,
    db_part,
    M,
    N,
    blocks,
    block0,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    LO: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    ds, hs, bs, bl = smem
    full, empty, once = bars
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, BLOCK_R, 16]
    )
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    db = gl.zeros([BLOCK_N, BLOCK_R], gl.float32, layout)
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    cols = gl.expand_dims(gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, layout)), 0)
    mbarrier.wait(once.index(0), 0)
    dh_to = dh_part + gl.program_id(0).to(gl.int64) * (M * BLOCK_R)
    s = 0
    ph = 0
    for i in range(blocks):
        mbarrier.wait(full.index(s), ph)
        dh = gl.zeros([BLOCK_M, BLOCK_R], gl.float32, layout)
        if WIDE:
            high, low = split_fp16(ds.index(s).load(plain))
            tile = ds.index(s)._reinterpret(gl.bfloat16, [BLOCK_M, BLOCK_N], ds.index(s).layout)
            replace_tile(tile, high)
            dh = warpgroup_mma(tile, bs, dh, use_acc=False, is_async=True)
            dh = warpgroup_mma(tile, bl, dh, is_async=True)
            db = warpgroup_mma(tile.permute([1, 0]), hs.index(2 * s), db, is_async=True)
            db = warpgroup_mma(tile.permute([1, 0]), hs.index(2 * s + 1), db, is_async=True)
            dh, db = warpgroup_mma_wait(0, deps=[dh, db])
            barrier()
            replace_tile(tile, low)
            dh = warpgroup_mma(tile, bs, dh, is_async=True)
            db = warpgroup_mma(tile.permute([1, 0]), hs.index(2 * s), db, is_async=True)
        else:
            dh = warpgroup_mma(ds.index(s), bs, dh, use_acc=False, is_async=True)
            db = warpgroup_mma(ds.index(s).permute([1, 0]), hs.index(2 * s), db, is_async=True)
            if LO:
                db = warpgroup_mma(ds.index(s).permute([1, 0]), hs.index(2 * s + 1), db, is_async=True)
        dh, db = warpgroup_mma_wait(0, deps=[dh, db])
        mbarrier.arrive(empty.index(s), count=1)
        at = (block0 + i) * BLOCK_M + rows
        gl.store(dh_to + gl.expand_dims(at, 1) * BLOCK_R + cols, dh, mask=gl.expand_dims(at < M, 1))
        s, ph = next_buffer(s, ph, STAGES)
    n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    db_to = db_part + gl.program_id(1).to(gl.int64) * (N * BLOCK_R)
    gl.store(db_to + gl.expand_dims(n, 1) * BLOCK_R + cols, db, mask=gl.expand_dims(n < N, 1))


@gluon.jit
def _d_producer(
    descs,
    smem,
    bars,
    blocks,
    block0,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    LO: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    dy_desc, b_desc, h_desc = descs
    ds, hs, bs, bl = smem
    full, empty, once = bars
    n0 = gl.program_id(0) * BLOCK_N
    mbarrier.expect(once.index(0), BLOCK_N * (2 * BLOCK_R if WIDE else BLOCK_R) * 2)
    tma.async_copy_global_to_shared(b_desc, [n0, 0], once.index(0), bs)
    if WIDE:
        tma.async_copy_global_to_shared(b_desc, [n0, 2 * BLOCK_R], once.index(0), bl)
    s = 0
    ph = 0
    PARTS: gl.constexpr = 2 if LO else 1
    for i in range(blocks):
        bar = full.index(s)
        m0 = (block0 + i) * BLOCK_M
        mbarrier.wait(empty.index(s), ph ^ 1)
        mbarrier.expect(bar, BLOCK_M * (BLOCK_N + PARTS * BLOCK_R) * 2)
        tma.async_copy_global_to_shared(dy_desc, [m0, n0], bar, ds.index(s))
        tma.async_copy_global_to_shared(h_desc, [m0, 0], bar, hs.index(2 * s))
        if LO:
            tma.async_copy_global_to_shared(h_desc, [m0, BLOCK_R], bar, hs.index(2 * s + 1))
        s, ph = next_buffer(s, ph, STAGES)


@gluon.jit(do_not_specialize=["chunk"])
def hopper_dh_db_kernel(
    dy_desc,
    b_desc,
    h_desc,
    dh_part,
    db_part,
    M,
    N,
    chunk,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    LO: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dh_part[j] = dy_j B_j over the j-th chunk of columns; db_part[i] = dy_iᵀ (hi + lo) over the i-th chunk of rows.

    ======== =================================== ==================================================================
    dy       (M, N) bf16 or fp16                 rows on 16-byte boundaries; block (BLOCK_M, BLOCK_N)
    b        (N, >= R) bf16                      contiguous: B's operand; block (BLOCK_N, BLOCK_R)
    h        (M, H) bf16                         contiguous: h's operand; block (BLOCK_M, BLOCK_R), at columns 0 and R
    dh_part  (ceil(N / BLOCK_N), M, R) fp32      contiguous
    db_part  (row chunks, N, R) fp32             contiguous
    ======== =================================== ==================================================================

    Grid (column chunks of BLOCK_N, row chunks of ``chunk`` blocks of BLOCK_M). R = BLOCK_R; LO: h has a low part. B
    stays on chip, db in registers. fp32 accumulators; 6 M N R flops; reads dy once; writes 4 R (M N / BLOCK_N + N row
    chunks) bytes. Shared memory: 2 STAGES BLOCK_M (BLOCK_N + 2 R) + 2 BLOCK_N R bytes; BLOCK_N R / threads registers
    for db.

    Measured on an H100 with BLOCK_R = 16; not measured yet with other ranks, nor fp16,
    whose tile is replaced by its two bf16 parts, one after the other.
    """
    ds = gl.allocate_shared_memory(dy_desc.dtype, [STAGES, BLOCK_M, BLOCK_N], dy_desc.layout)
    hs = gl.allocate_shared_memory(h_desc.dtype, [STAGES * 2, BLOCK_M, BLOCK_R], h_desc.layout)
    bs = gl.allocate_shared_memory(b_desc.dtype, [BLOCK_N, BLOCK_R], b_desc.layout)
    WIDE: gl.constexpr = dy_desc.dtype == gl.float16
    if WIDE:
        bl = gl.allocate_shared_memory(b_desc.dtype, [BLOCK_N, BLOCK_R], b_desc.layout)
    else:
        bl = bs
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    once = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(once.index(0), count=1)
    fence_async_shared()
    block0 = gl.program_id(1) * chunk
    blocks = gl.minimum(gl.cdiv(M, BLOCK_M) - block0, chunk)
    smem = (ds, hs, bs, bl)
    bars = (full, empty, once)
    gl.warp_specialize(
        [
            (
                _d_consumer,
                (smem, bars, dh_part, db_part, M, N, blocks, block0, BLOCK_M, BLOCK_N, BLOCK_R, LO, STAGES, WIDE),
            ),
            (
                _d_producer,
                ((dy_desc, b_desc, h_desc), smem, bars, blocks, block0, BLOCK_M, BLOCK_N, BLOCK_R, LO, STAGES, WIDE),
            ),
        ],
        [1],
        [24],
    )


@gluon.jit
def _o_consumer(
    smem,
    bars,
    part,
    M,
    N,
    blocks,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    LO: gl.constexpr,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    xs, hs, mw = smem
    full, empty = bars
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, BLOCK_R, 16]
    )
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    acc = gl.zeros([BLOCK_N, BLOCK_R], gl.float32, layout)
    s = 0
    ph = 0
    for i in range(blocks):
        mbarrier.wait(full.index(s), ph)
        if WIDE:
            x = xs.index(s).load(plain)
            if MASKED:
                x = mask_columns(x, mw.index(s))
            high, low = split_fp16(x)
            tile = xs.index(s)._reinterpret(gl.bfloat16, [BLOCK_M, BLOCK_N], xs.index(s).layout)
            replace_tile(tile, high)
            acc = warpgroup_mma(tile.permute([1, 0]), hs.index(2 * s), acc, is_async=True)
            acc = warpgroup_mma(tile.permute([1, 0]), hs.index(2 * s + 1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            barrier()
            replace_tile(tile, low)
            acc = warpgroup_mma(tile.permute([1, 0]), hs.index(2 * s), acc, is_async=True)
        else:
            if MASKED:
                x = mask_columns(xs.index(s).load(plain), mw.index(s))
                xs.index(s).store(x)
                fence_async_shared()
                barrier()
            acc = warpgroup_mma(xs.index(s).permute([1, 0]), hs.index(2 * s), acc, is_async=True)
            if LO:
                acc = warpgroup_mma(xs.index(s).permute([1, 0]), hs.index(2 * s + 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(s), count=1)
        s, ph = next_buffer(s, ph, STAGES)
    n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    cols = gl.expand_dims(gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, layout)), 0)
    to = part + gl.program_id(1).to(gl.int64) * (N * BLOCK_R)
    gl.store(to + gl.expand_dims(n, 1) * BLOCK_R + cols, acc, mask=gl.expand_dims(n < N, 1))


@gluon.jit
def _o_producer(
    descs,
    smem,
    bars,
    blocks,
    block0,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    LO: gl.constexpr,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    x_desc, h_desc, m_desc = descs
    xs, hs, mw = smem
    full, empty = bars
    n0 = gl.program_id(0) * BLOCK_N
    s = 0
    ph = 0
    PARTS: gl.constexpr = 2 if LO else 1
    BITS: gl.constexpr = BLOCK_M * BLOCK_N // 8 if MASKED else 0
    for i in range(blocks):
        bar = full.index(s)
        m0 = (block0 + i) * BLOCK_M
        mbarrier.wait(empty.index(s), ph ^ 1)
        mbarrier.expect(bar, BLOCK_M * (BLOCK_N + PARTS * BLOCK_R) * 2 + BITS)
        if MASKED:
            tma.async_copy_global_to_shared(m_desc, [m0, n0 // 32], bar, mw.index(s))
        tma.async_copy_global_to_shared(x_desc, [m0, n0], bar, xs.index(s))
        tma.async_copy_global_to_shared(h_desc, [m0, 0], bar, hs.index(2 * s))
        if LO:
            tma.async_copy_global_to_shared(h_desc, [m0, BLOCK_R], bar, hs.index(2 * s + 1))
        s, ph = next_buffer(s, ph, STAGES)


@gluon.jit(do_not_specialize=["chunk"])
def hopper_outer_kernel(
    x_desc,
    h_desc,
    m_desc,
    part,
    M,
    N,
    chunk,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    LO: gl.constexpr,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """part[i] = (mask * x)ᵀ (hi + lo) over the i-th chunk of rows: da's parts, turned; without mask, of dy and h, db's.

    ======== =================================== ==================================================================
    x        (M, N) bf16 or fp16                 rows on 16-byte boundaries; block (BLOCK_M, BLOCK_N)
    h        (M, H) bf16                         contiguous: dh's operand; block (BLOCK_M, BLOCK_R), at columns 0 and R
    m        (M, 4 ceil(N / 128)) int32          MASKED: the words; block (BLOCK_M, BLOCK_N / 32)
    part     (row chunks, N, R) fp32             contiguous
    ======== =================================== ==================================================================

    Grid (column chunks of BLOCK_N, row chunks of ``chunk`` blocks of BLOCK_M); x's tile is masked where it lies. fp32
    accumulator; 4 M N R flops; reads x once. Shared memory: STAGES BLOCK_M (2 BLOCK_N + 4 R + BLOCK_N / 8) bytes.

    Measured on an H100 with BLOCK_R = 16, masked and not; not measured yet with other ranks, nor fp16,
    whose tile is replaced by its two bf16 parts, one after the other.
    """
    WIDE: gl.constexpr = x_desc.dtype == gl.float16
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_N], x_desc.layout)
    hs = gl.allocate_shared_memory(h_desc.dtype, [STAGES * 2, BLOCK_M, BLOCK_R], h_desc.layout)
    if MASKED:
        mw = gl.allocate_shared_memory(m_desc.dtype, [STAGES, BLOCK_M, BLOCK_N // 32], m_desc.layout)
    else:
        mw = hs
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    block0 = gl.program_id(1) * chunk
    blocks = gl.minimum(gl.cdiv(M, BLOCK_M) - block0, chunk)
    smem = (xs, hs, mw)
    gl.warp_specialize(
        [
            (
                _o_consumer,
                (smem, (full, empty), part, M, N, blocks, BLOCK_M, BLOCK_N, BLOCK_R, LO, MASKED, STAGES, WIDE),
            ),
            (
                _o_producer,
                (
                    (x_desc, h_desc, m_desc),
                    smem,
                    (full, empty),
                    blocks,
                    block0,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                    LO,
                    MASKED,
                    STAGES,
                ),
            ),
        ],
        [1],
        [24],
    )
