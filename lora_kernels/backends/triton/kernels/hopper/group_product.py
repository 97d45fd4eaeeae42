"""y of several layers that read one x, in one persistent launch over the tiles of all weights (sm_90a).

Counts of q, k, v of Llama-3-8B: M = 8192, K = 4096, N = 4096 + 1024 + 1024, r = 16, bf16, without dropout. Each kernel
is counted to read its tensors once; x has 67 MB, all dy 101 MB, all W 50 MB::

                        forward             backward
                        separate  group     separate  group
    launches                   9      3     18 and 2      6    pack in both passes; 2: the sums of three dx
    reads of x, MB           403    134          201     67
    reads of dy, MB                              201    201
    dx, MB                                  201, 403     67    written; and read and written by the sums
    all bytes, MB            557    289         1088    417    with W, y, operands and parts
    flops, T               0.419  0.419        0.430  0.430    0.412 of each are W's
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import members_of, next_buffer, operand_b
from .product import _extra_operands, _produce_extra, store_columns

__all__ = ["hopper_group_product_kernel"]


@gluon.jit
def _produce_tile(
    descs,
    smem,
    bars,
    m0,
    n0,
    steps,
    s,
    ph,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_H: gl.constexpr,
    H_BLOCKS: gl.constexpr,
    EXTRA: gl.constexpr,
    STAGES: gl.constexpr,
):
    x_desc, w_desc, h_desc, b_desc, m_desc = descs
    xs, ws, mw = smem
    full, empty = bars
    ROWS: gl.constexpr = BLOCK_M // 2
    for k in range(steps):
        bar = full.index(s)
        mbarrier.wait(empty.index(s), ph ^ 1)
        mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
        for p in gl.static_range(2):
            tma.async_copy_global_to_shared(x_desc, [m0 + p * ROWS, k * BLOCK_K], bar, xs.index(s * 2 + p))
        tma.async_copy_global_to_shared(w_desc, [n0, k * BLOCK_K], bar, ws.index(s))
        s, ph = next_buffer(s, ph, STAGES)
    for j in gl.static_range(EXTRA):
        s, ph = _produce_extra(
            descs, smem, bars, m0, n0, s, ph, j, BLOCK_M, BLOCK_N, BLOCK_H, H_BLOCKS, 2, True, STAGES, False
        )
    return s, ph


@gluon.jit
def _producer(
    x_desc,
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
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    MEMBERS: gl.constexpr,
):
    w_descs, h_descs, b_descs = descs
    num_m, steps, num_n, _ = sizes
    programs = gl.num_programs(0)
    s = 0
    ph = 0
    t = gl.program_id(0)
    begin = 0
    for g in range(gl.cdiv(num_m, GROUP_M)):
        rows = gl.minimum(num_m - g * GROUP_M, GROUP_M)
        for i in gl.static_range(MEMBERS):
            end = begin + rows * num_n[i]
            for _tile in range(gl.cdiv(end - t, programs)):
                inside = t - begin
                s, ph = _produce_tile(
                    (x_desc, w_descs[i], h_descs[i], b_descs[i], x_desc),
                    smem,
                    bars,
                    (g * GROUP_M + inside % rows) * BLOCK_M,
                    inside // rows * BLOCK_N,
                    steps,
                    s,
                    ph,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    BLOCK_H[i],
                    H_BLOCKS[i],
                    EXTRA[i],
                    STAGES,
                )
                t += programs
            begin = end


@gluon.jit
def _consume_tile(
    h_desc,
    b_desc,
    smem,
    bars,
    steps,
    s,
    ph,
    WHICH: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The tile's rows of one consumer, the low-rank steps last."""
    xs, ws, mw = smem
    full, empty = bars
    warps: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, BLOCK_N, 16]
    )
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    mbarrier.wait(full.index(s), ph)
    acc = warpgroup_mma(xs.index(s * 2 + WHICH), operand_b(ws.index(s), True), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    last = s
    s, ph = next_buffer(s, ph, STAGES)
    for k in range(1, steps):
        mbarrier.wait(full.index(s), ph)
        acc = warpgroup_mma(xs.index(s * 2 + WHICH), operand_b(ws.index(s), True), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)
        last = s
        s, ph = next_buffer(s, ph, STAGES)
    for j in gl.static_range(EXTRA):
        mbarrier.wait(full.index(s), ph)
        hv, bv = _extra_operands(xs, ws, h_desc, b_desc, s, WHICH, ROWS, BLOCK_N, BLOCK_H, 2, True)
        acc = warpgroup_mma(hv, bv, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)
        last = s
        s, ph = next_buffer(s, ph, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(last), count=1)
    return acc, s, ph


@gluon.jit
def _store_biased(
    acc,
    y_desc,
    ys,
    first_buf,
    m0,
    n0,
    bias_ptr,
    N,
    COLS: gl.constexpr,
    EPI_N: gl.constexpr,
    NBUF: gl.constexpr,
):
    """``store_columns`` of acc + bias: its pair of gain and bias may not hold None under Triton 3.6."""
    if COLS > EPI_N:
        rows: gl.constexpr = acc.shape[0]
        half: gl.constexpr = COLS // 2
        left, right = acc.reshape([rows, 2, half]).permute([0, 2, 1]).split()
        first_buf = _store_biased(left, y_desc, ys, first_buf, m0, n0, bias_ptr, N, half, EPI_N, NBUF)
        first_buf = _store_biased(right, y_desc, ys, first_buf, m0, n0 + half, bias_ptr, N, half, EPI_N, NBUF)
    else:
        offs_n = n0 + gl.arange(0, COLS, layout=gl.SliceLayout(0, acc.type.layout))
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc = acc + gl.expand_dims(bias.to(gl.float32), 0)
        first_buf = store_columns(acc, y_desc, ys, first_buf, m0, n0, (), COLS, EPI_N, NBUF)
    return first_buf


@gluon.jit
def _consumer(
    descs,
    smem,
    ys,
    bars,
    sizes,
    biases,
    WHICH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EPI_N: gl.constexpr,
    NBUF: gl.constexpr,
    MEMBERS: gl.constexpr,
):
    """One consumer: rows WHICH * ROWS on of every tile."""
    y_descs, h_descs, b_descs = descs
    num_m, steps, num_n, ns = sizes
    ROWS: gl.constexpr = BLOCK_M // 2
    programs = gl.num_programs(0)
    s = 0
    ph = 0
    y_buf = WHICH * NBUF
    t = gl.program_id(0)
    begin = 0
    for g in range(gl.cdiv(num_m, GROUP_M)):
        rows = gl.minimum(num_m - g * GROUP_M, GROUP_M)
        for i in gl.static_range(MEMBERS):
            end = begin + rows * num_n[i]
            for _tile in range(gl.cdiv(end - t, programs)):
                inside = t - begin
                acc, s, ph = _consume_tile(
                    h_descs[i],
                    b_descs[i],
                    smem,
                    bars,
                    steps,
                    s,
                    ph,
                    WHICH,
                    ROWS,
                    BLOCK_N,
                    BLOCK_H[i],
                    EXTRA[i],
                    STAGES,
                )
                m0 = (g * GROUP_M + inside % rows) * BLOCK_M + WHICH * ROWS
                n0 = inside // rows * BLOCK_N
                if biases[i] is None:
                    y_buf = store_columns(acc, y_descs[i], ys, y_buf, m0, n0, (), BLOCK_N, EPI_N, NBUF)
                else:
                    y_buf = _store_biased(acc, y_descs[i], ys, y_buf, m0, n0, biases[i], ns[i], BLOCK_N, EPI_N, NBUF)
                t += programs
            begin = end
    tma.store_wait(0)


@gluon.jit
def hopper_group_product_kernel(
    x_desc,
    w_desc0,
    w_desc1,
    w_desc2,
    w_desc3,
    h_desc0,
    h_desc1,
    h_desc2,
    h_desc3,
    b_desc0,
    b_desc1,
    b_desc2,
    b_desc3,
    y_desc0,
    y_desc1,
    y_desc2,
    y_desc3,
    bias0,
    bias1,
    bias2,
    bias3,
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
    REGS: gl.constexpr,
):
    """y_i = x W_iᵀ + h̃_i B̃_iᵀ + bias_i for 2 to 4 members, as ``hopper_product_kernel`` computes one.

    ====== ===================== ===================================================================================
    x      (M, K) 16-bit         rows on 16-byte boundaries, any distance; block (BLOCK_M / 2, BLOCK_K)
    w_i    (N_i, K) 16-bit       the same; block (BLOCK_N, BLOCK_K)
    h_i    (M, H_i) bf16         rows on 16-byte boundaries; block (BLOCK_M / 2, BLOCK_H[i]); H_i = H_BLOCKS BLOCK_H
    b_i    (N_i, C_i) bf16       contiguous; block (BLOCK_N, BLOCK_H[i]); C_i = EXTRA[i] BLOCK_H[i]
    y_i    (M, N_i) as x         rows on 16-byte boundaries; block (BLOCK_M / 2, EPI_N)
    bias_i (N_i,) or None        in one piece, any float dtype
    ====== ===================== ===================================================================================

    BLOCK_H, H_BLOCKS and EXTRA are tuples, a number a member. What a member that is not there would have is None.

    Grid (programs,), at most one a tile; program i takes tiles i, i + programs, ... of all members. GROUP_M rows of
    tiles are one group: all of its members' tiles come before the next group, so that its x stays in the L2 cache. In
    it the members follow each other, each column by column. Two consumers of 4 warps, and one warp that loads.

    fp32 accumulator, rounded once. 2 M Σ N_i (K + C_i) flops; reads x and W_i by tiles, writes 2 M Σ N_i bytes. Shared
    memory and registers are those of ``hopper_product_kernel``, split.

    Not measured yet. Each member's loops are those of the measured kernel; the code is there once a member.
    """
    ROWS: gl.constexpr = BLOCK_M // 2
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, ROWS, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(w_desc0.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc0.layout)
    ys = gl.allocate_shared_memory(y_desc0.dtype, [2 * NBUF, ROWS, EPI_N], y_desc0.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    w_descs = members_of(w_desc0, w_desc1, w_desc2, w_desc3, MEMBERS)
    h_descs = members_of(h_desc0, h_desc1, h_desc2, h_desc3, MEMBERS)
    b_descs = members_of(b_desc0, b_desc1, b_desc2, b_desc3, MEMBERS)
    y_descs = members_of(y_desc0, y_desc1, y_desc2, y_desc3, MEMBERS)
    biases = (bias0, bias1, bias2, bias3)
    ns = members_of(N0, N1, N2, N3, MEMBERS)
    num_n = ()
    for i in gl.static_range(MEMBERS):
        num_n = num_n + (gl.cdiv(ns[i], BLOCK_N),)
    sizes = (gl.cdiv(M, BLOCK_M), gl.cdiv(K, BLOCK_K), num_n, ns)
    bars = (full, empty)
    smem = (xs, ws, xs)
    cdescs = (y_descs, h_descs, b_descs)
    pdescs = (w_descs, h_descs, b_descs)
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
                    biases,
                    0,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_H,
                    EXTRA,
                    STAGES,
                    GROUP_M,
                    EPI_N,
                    NBUF,
                    MEMBERS,
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
                    biases,
                    1,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_H,
                    EXTRA,
                    STAGES,
                    GROUP_M,
                    EPI_N,
                    NBUF,
                    MEMBERS,
                ),
            ),
            (
                _producer,
                (
                    x_desc,
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
                    STAGES,
                    GROUP_M,
                    MEMBERS,
                ),
            ),
        ],
        [4, 1],
        [REGS, 24],
    )
