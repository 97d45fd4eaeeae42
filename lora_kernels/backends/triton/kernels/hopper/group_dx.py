"""One dx over all pairs (dy_i, W_i) of a group of layers, in one accumulator (sm_90a)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import mask_columns, members_of, next_buffer, tile_of
from .product import _extra_operands, _produce_extra, store_columns

__all__ = ["hopper_group_dx_kernel"]


@gluon.jit
def _produce_masked(
    h_desc,
    b_desc,
    m_desc,
    smem,
    bars,
    m0,
    n0,
    s,
    ph,
    PLACE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    H_BLOCKS: gl.constexpr,
    EXTRA: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Loads one member's low-rank steps, and with the first the mask's bits."""
    xs, ws, mw = smem
    full, empty = bars
    ROWS: gl.constexpr = BLOCK_M // 2
    for j in gl.static_range(EXTRA):
        bar = full.index(s)
        mbarrier.wait(empty.index(s), ph ^ 1)
        if j == 0:
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_H * 2 + BLOCK_M * BLOCK_N // 8)
        else:
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_H * 2)
        for p in gl.static_range(2):
            to = xs.index(s * 2 + p)._reinterpret(h_desc.dtype, [ROWS, BLOCK_H], h_desc.layout)
            tma.async_copy_global_to_shared(h_desc, [m0 + p * ROWS, j % H_BLOCKS * BLOCK_H], bar, to)
            if j == 0:
                tma.async_copy_global_to_shared(m_desc, [m0 + p * ROWS, n0 // 32], bar, mw.index(PLACE * 2 + p))
        to = ws.index(s)._reinterpret(b_desc.dtype, [BLOCK_H, BLOCK_N], b_desc.layout)
        tma.async_copy_global_to_shared(b_desc, [j * BLOCK_H, n0], bar, to)
        s, ph = next_buffer(s, ph, STAGES)
    return s, ph


@gluon.jit
def _produce_terms(
    descs,
    smem,
    bars,
    m0,
    n0,
    s,
    ph,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    H_BLOCKS: gl.constexpr,
    EXTRA: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Loads one member's low-rank steps of a whole tile."""
    for j in gl.static_range(EXTRA):
        s, ph = _produce_extra(
            descs, smem, bars, m0, n0, s, ph, j, BLOCK_M, BLOCK_N, BLOCK_H, H_BLOCKS, 2, False, STAGES, False
        )
    return s, ph


@gluon.jit
def _producer(
    descs,
    smem,
    bars,
    sizes,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_H: gl.constexpr,
    H_BLOCKS: gl.constexpr,
    EXTRA: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    MASKED: gl.constexpr,
):
    x_descs, w_descs, h_descs, b_descs, m_descs = descs
    xs, ws, mw = smem
    full, empty = bars
    num_m, num_n, steps = sizes
    ROWS: gl.constexpr = BLOCK_M // 2
    s = 0
    ph = 0
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tm, tn = tile_of(t, num_m, num_n, GROUP_M)
        m0 = tm * BLOCK_M
        n0 = tn * BLOCK_N
        if MASKED:
            for i in gl.static_range(MEMBERS):
                s, ph = _produce_masked(
                    h_descs[i],
                    b_descs[i],
                    m_descs[i],
                    smem,
                    bars,
                    m0,
                    n0,
                    s,
                    ph,
                    i,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_H[i],
                    H_BLOCKS[i],
                    EXTRA[i],
                    STAGES,
                )
        for i in gl.static_range(MEMBERS):
            for k in range(steps[i]):
                bar = full.index(s)
                mbarrier.wait(empty.index(s), ph ^ 1)
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
                for p in gl.static_range(2):
                    tma.async_copy_global_to_shared(x_descs[i], [m0 + p * ROWS, k * BLOCK_K], bar, xs.index(s * 2 + p))
                tma.async_copy_global_to_shared(w_descs[i], [k * BLOCK_K, n0], bar, ws.index(s))
                s, ph = next_buffer(s, ph, STAGES)
        if not MASKED:
            for i in gl.static_range(MEMBERS):
                s, ph = _produce_terms(
                    (x_descs[i], w_descs[i], h_descs[i], b_descs[i], x_descs[i]),
                    smem,
                    bars,
                    m0,
                    n0,
                    s,
                    ph,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_H[i],
                    H_BLOCKS[i],
                    EXTRA[i],
                    STAGES,
                )


@gluon.jit
def _masked_term(
    h_desc,
    b_desc,
    smem,
    bars,
    s,
    ph,
    PLACE: gl.constexpr,
    WHICH: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One member's term, masked."""
    xs, ws, mw = smem
    full, empty = bars
    warps: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, BLOCK_N, 16]
    )
    term = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    for j in gl.static_range(EXTRA):
        mbarrier.wait(full.index(s), ph)
        hv, bv = _extra_operands(xs, ws, h_desc, b_desc, s, WHICH, ROWS, BLOCK_N, BLOCK_H, 2, False)
        term = warpgroup_mma(hv, bv, term, use_acc=j > 0, is_async=True)
        term = warpgroup_mma_wait(0, deps=[term])
        if j == EXTRA - 1:
            term = mask_columns(term, mw.index(PLACE * 2 + WHICH))
        mbarrier.arrive(empty.index(s), count=1)
        s, ph = next_buffer(s, ph, STAGES)
    return term, s, ph


@gluon.jit
def _add_terms(
    acc,
    h_desc,
    b_desc,
    smem,
    bars,
    last,
    s,
    ph,
    WHICH: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    STAGES: gl.constexpr,
):
    """acc and one member's low-rank steps of a whole tile."""
    xs, ws, mw = smem
    full, empty = bars
    for j in gl.static_range(EXTRA):
        mbarrier.wait(full.index(s), ph)
        hv, bv = _extra_operands(xs, ws, h_desc, b_desc, s, WHICH, ROWS, BLOCK_N, BLOCK_H, 2, False)
        acc = warpgroup_mma(hv, bv, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)
        last = s
        s, ph = next_buffer(s, ph, STAGES)
    return acc, last, s, ph


@gluon.jit
def _masked_terms(
    h_descs,
    b_descs,
    smem,
    bars,
    s,
    ph,
    WHICH: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The sum of the members' masked terms."""
    total = None
    for i in gl.static_range(MEMBERS):
        term, s, ph = _masked_term(
            h_descs[i], b_descs[i], smem, bars, s, ph, i, WHICH, ROWS, BLOCK_N, BLOCK_H[i], EXTRA[i], STAGES
        )
        if i == 0:
            total = term
        else:
            total = total + term
    return total, s, ph


@gluon.jit
def _consumer(
    descs,
    smem,
    ys,
    bars,
    sizes,
    WHICH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EPI_N: gl.constexpr,
    NBUF: gl.constexpr,
    MASKED: gl.constexpr,
):
    """One consumer: rows WHICH * ROWS on of every tile."""
    y_desc, h_descs, b_descs = descs
    xs, ws, mw = smem
    full, empty = bars
    num_m, num_n, steps = sizes
    ROWS: gl.constexpr = BLOCK_M // 2
    warps: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, BLOCK_N, 16]
    )
    s = 0
    ph = 0
    y_buf = WHICH * NBUF
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tm, tn = tile_of(t, num_m, num_n, GROUP_M)
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        if MASKED:
            acc, s, ph = _masked_terms(
                h_descs, b_descs, smem, bars, s, ph, WHICH, ROWS, BLOCK_N, BLOCK_H, EXTRA, MEMBERS, STAGES
            )
        mbarrier.wait(full.index(s), ph)
        acc = warpgroup_mma(xs.index(s * 2 + WHICH), ws.index(s), acc, use_acc=MASKED, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        last = s
        s, ph = next_buffer(s, ph, STAGES)
        for i in gl.static_range(MEMBERS):
            for k in range(1 if i == 0 else 0, steps[i]):
                mbarrier.wait(full.index(s), ph)
                acc = warpgroup_mma(xs.index(s * 2 + WHICH), ws.index(s), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index(last), count=1)
                last = s
                s, ph = next_buffer(s, ph, STAGES)
        if not MASKED:
            for i in gl.static_range(MEMBERS):
                acc, last, s, ph = _add_terms(
                    acc,
                    h_descs[i],
                    b_descs[i],
                    smem,
                    bars,
                    last,
                    s,
                    ph,
                    WHICH,
                    ROWS,
                    BLOCK_N,
                    BLOCK_H[i],
                    EXTRA[i],
                    STAGES,
                )
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)
        y_buf = store_columns(
            acc, y_desc, ys, y_buf, tm * BLOCK_M + WHICH * ROWS, tn * BLOCK_N, (), BLOCK_N, EPI_N, NBUF
        )
    tma.store_wait(0)


@gluon.jit
def hopper_group_dx_kernel(
    dy_desc0,
    dy_desc1,
    dy_desc2,
    dy_desc3,
    w_desc0,
    w_desc1,
    w_desc2,
    w_desc3,
    dh_desc0,
    dh_desc1,
    dh_desc2,
    dh_desc3,
    a_desc0,
    a_desc1,
    a_desc2,
    a_desc3,
    m_desc0,
    m_desc1,
    m_desc2,
    m_desc3,
    dx_desc,
    M,
    K,
    N0,
    N1,
    N2,
    N3,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_H: gl.constexpr,
    H_BLOCKS: gl.constexpr,
    EXTRA: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EPI_N: gl.constexpr,
    NBUF: gl.constexpr,
    MASKED: gl.constexpr,
    REGS: gl.constexpr,
):
    """dx = Σ_i dy_i W_i + mask_i * (dh̃_i Ã_i) for 2 to 4 members (MASKED: 2 or 3), rounded once.

    ====== =========================== =============================================================================
    dy_i   (M, N_i) 16-bit             rows on 16-byte boundaries, any distance; block (BLOCK_M / 2, BLOCK_K)
    w_i    (N_i, K) 16-bit             the same; block (BLOCK_K, BLOCK_N)
    dh_i   (M, H_i) bf16               the same; block (BLOCK_M / 2, BLOCK_H[i]); H_i = H_BLOCKS[i] BLOCK_H[i]
    a_i    (C_i, K) bf16               contiguous; block (BLOCK_H[i], BLOCK_N); C_i = EXTRA[i] BLOCK_H[i]
    m_i    (M, 4 ceil(K / 128)) int32  MASKED: bit j of word w keeps column 32 w + j; block (BLOCK_M / 2, BLOCK_N / 32)
    dx     (M, K) as dy                rows on 16-byte boundaries; block (BLOCK_M / 2, EPI_N)
    ====== =========================== =============================================================================

    BLOCK_H, H_BLOCKS and EXTRA are tuples, a number a member. What a member that is not there would have is None.

    Grid (programs,), at most one a tile, in the order of ``tile_of``. Two consumers of 4 warps, one warp loads. Without
    masks all K loops come first, then all low-rank steps. MASKED: the low-rank terms come first, each in a sum of its
    own until it is masked. The compiler masks and adds late, with all terms in registers: so BLOCK_N is 128 there, and
    the members are 2 or 3.
    The mask's bits have a buffer for each member. A tile's steps, without the extra ones of one member but for the
    first, have to be at least STAGES: then a buffer is read before it is loaded again.

    fp32 accumulator. 2 M K Σ (N_i + C_i) flops; reads dy_i and W_i by tiles, writes 2 M K bytes. Shared memory: that of
    ``hopper_product_kernel``, and MEMBERS BLOCK_M BLOCK_N / 8 for the masks. Not measured yet.
    """
    ROWS: gl.constexpr = BLOCK_M // 2
    xs = gl.allocate_shared_memory(dy_desc0.dtype, [STAGES * 2, ROWS, BLOCK_K], dy_desc0.layout)
    ws = gl.allocate_shared_memory(w_desc0.dtype, [STAGES, BLOCK_K, BLOCK_N], w_desc0.layout)
    ys = gl.allocate_shared_memory(dx_desc.dtype, [2 * NBUF, ROWS, EPI_N], dx_desc.layout)
    dy_descs = members_of(dy_desc0, dy_desc1, dy_desc2, dy_desc3, MEMBERS)
    w_descs = members_of(w_desc0, w_desc1, w_desc2, w_desc3, MEMBERS)
    dh_descs = members_of(dh_desc0, dh_desc1, dh_desc2, dh_desc3, MEMBERS)
    a_descs = members_of(a_desc0, a_desc1, a_desc2, a_desc3, MEMBERS)
    if MASKED:
        mw = gl.allocate_shared_memory(m_desc0.dtype, [2 * MEMBERS, ROWS, BLOCK_N // 32], m_desc0.layout)
        m_descs = members_of(m_desc0, m_desc1, m_desc2, m_desc3, MEMBERS)
    else:
        mw = xs
        m_descs = ()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    ns = members_of(N0, N1, N2, N3, MEMBERS)
    steps = ()
    for i in gl.static_range(MEMBERS):
        steps = steps + (gl.cdiv(ns[i], BLOCK_K),)
    sizes = (gl.cdiv(M, BLOCK_M), gl.cdiv(K, BLOCK_N), steps)
    bars = (full, empty)
    smem = (xs, ws, mw)
    cdescs = (dx_desc, dh_descs, a_descs)
    pdescs = (dy_descs, w_descs, dh_descs, a_descs, m_descs)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    cdescs,
                    smem,
                    ys,
                    bars,
                    sizes,
                    0,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_H,
                    EXTRA,
                    MEMBERS,
                    STAGES,
                    GROUP_M,
                    EPI_N,
                    NBUF,
                    MASKED,
                ),
            ),
            (
                _consumer,
                (
                    cdescs,
                    smem,
                    ys,
                    bars,
                    sizes,
                    1,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_H,
                    EXTRA,
                    MEMBERS,
                    STAGES,
                    GROUP_M,
                    EPI_N,
                    NBUF,
                    MASKED,
                ),
            ),
            (
                _producer,
                (
                    pdescs,
                    smem,
                    bars,
                    sizes,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    BLOCK_H,
                    H_BLOCKS,
                    EXTRA,
                    MEMBERS,
                    STAGES,
                    GROUP_M,
                    MASKED,
                ),
            ),
        ],
        [4, 1],
        [REGS, 24],
    )
