"""y (or dx, without dropout) with h (dh) computed inside: one launch that reads x once (sm_90a).

h is shared by the two tiles of columns 0 and 1 of a row, which come first: each multiplies the x of its first half of
K, which it has in shared memory anyway, by one more, BLOCK_R columns wide, operand. Column 1 starts in the middle of
K, so that both halves are there when a tile is half done: nobody waits for them at its end.

Measured form (half_ptr None): each writes its half of h, rounded to bf16, to its own BLOCK_R columns of h's operand,
and the low-rank K step, whose second operand has B twice, adds them up. flags[tm] counts 4 consumers. Exact form: the
halves meet in half_ptr, fp32; the second of the two to come (by a counter for each consumer) adds them up, and writes
high and low part, as the shrink kernel does: the operand has one layout, and h one precision, whoever computed it.
flags[tm] counts 2.

Producers look at the flag just before the low-rank step, the last of a tile. Nothing waits in a circle: a publication
waits for nothing but the program's earlier tiles. But a program does wait for others, so all must be resident: the
host launches a cooperative grid. The last program to finish lowers all flags.
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

from .common import barrier, next_buffer, operand_b, store_hi_lo, tile_of
from .product import store_columns

__all__ = ["hopper_product_h_kernel"]


@gluon.jit
def _fence_proxy():
    gl.inline_asm_elementwise("fence.proxy.async; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _probe(ptr):
    """The flag, with no order."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.u32 $0, [$1];", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _acquire():
    gl.inline_asm_elementwise("fence.acq_rel.gpu; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _tile_first(t, num_m, num_n, GROUP_M: gl.constexpr):
    """Columns 0 and 1 first, row by row, then the other columns in groups of rows."""
    gm, gn = tile_of(gl.maximum(t - 2 * num_m, 0), num_m, gl.maximum(num_n - 2, 1), GROUP_M)
    early = t < 2 * num_m
    tm = gl.where(early, t // 2, gm)
    tn = gl.where(early, t % 2, gn + 2)
    return tm, tn


@gluon.jit
def _share(tn, steps):
    """Where a tile starts in K, and how many of its first steps also compute h."""
    half = steps // 2
    begin = gl.where(tn == 1, half, 0)
    mine = gl.where(tn == 0, half, gl.where(tn == 1, steps - half, 0))
    return begin, mine


@gluon.jit
def _f_producer(
    descs,
    smem,
    bars,
    sizes,
    flags,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EXACT: gl.constexpr,
):
    x_desc, w_desc, a_desc, h_desc, b_desc = descs
    xs, ws, a_s = smem
    full, empty = bars
    num_m, num_n, steps = sizes
    ROWS: gl.constexpr = BLOCK_M // 2
    PUBLISHED: gl.constexpr = 2 if EXACT else 4
    s = 0
    ph = 0
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tm, tn = _tile_first(t, num_m, num_n, GROUP_M)
        m0 = tm * BLOCK_M
        n0 = tn * BLOCK_N
        begin, mine = _share(tn, steps)
        raised = _probe(flags + tm)
        for k in range(steps):
            bar = full.index(s)
            mbarrier.wait(empty.index(s), ph ^ 1)
            kk = k + begin
            kk = gl.where(kk >= steps, kk - steps, kk)
            k0 = kk * BLOCK_K
            if k < mine:
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N + BLOCK_R) * BLOCK_K * 2)
                if TRANS_W:
                    tma.async_copy_global_to_shared(a_desc, [0, k0], bar, a_s.index(s))
                else:
                    tma.async_copy_global_to_shared(a_desc, [k0, 0], bar, a_s.index(s))
            else:
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(x_desc, [m0, k0], bar, xs.index(s * 2))
            tma.async_copy_global_to_shared(x_desc, [m0 + ROWS, k0], bar, xs.index(s * 2 + 1))
            if TRANS_W:
                tma.async_copy_global_to_shared(w_desc, [n0, k0], bar, ws.index(s))
            else:
                tma.async_copy_global_to_shared(w_desc, [k0, n0], bar, ws.index(s))
            s, ph = next_buffer(s, ph, STAGES)
        for j in gl.static_range(EXTRA):
            bar = full.index(s)
            mbarrier.wait(empty.index(s), ph ^ 1)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_H * 2)
            wv = ws.index(s)
            if TRANS_W:
                tma.async_copy_global_to_shared(
                    b_desc, [n0, j * BLOCK_H], bar, wv._reinterpret(b_desc.dtype, [BLOCK_N, BLOCK_H], b_desc.layout)
                )
            else:
                tma.async_copy_global_to_shared(
                    b_desc, [j * BLOCK_H, n0], bar, wv._reinterpret(b_desc.dtype, [BLOCK_H, BLOCK_N], b_desc.layout)
                )
            if j == 0:
                while raised < PUBLISHED:
                    raised = _probe(flags + tm)
                _acquire()
                _fence_proxy()
            for p in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    h_desc,
                    [m0 + p * ROWS, j * BLOCK_H],
                    bar,
                    xs.index(s * 2 + p)._reinterpret(h_desc.dtype, [ROWS, BLOCK_H], h_desc.layout),
                )
            s, ph = next_buffer(s, ph, STAGES)
    # The last program's producer to come here knows that nobody waits any more.
    programs = gl.num_programs(0)
    before = gl.atomic_add(flags + num_m, 1, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
        raised_flags = 3 * num_m + 1 if EXACT else num_m + 1
        for i in range(0, raised_flags, 32):
            gl.store(flags + i + lanes, gl.zeros_like(lanes), mask=i + lanes < raised_flags)


@gluon.jit
def _h_steps(
    smem,
    bars,
    acc,
    hp,
    half,
    flag,
    meeting,
    scale,
    m0,
    tn,
    M,
    s,
    ph,
    count,
    WHICH: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STRIDE_H: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    EXACT: gl.constexpr,
):
    """The steps that also compute h; publishes it."""
    xs, ws, a_s = smem
    full, empty = bars
    hl: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_R, 16])
    mbarrier.wait(full.index(s), ph)
    h = gl.zeros([ROWS, BLOCK_R], gl.float32, hl)
    acc = warpgroup_mma(xs.index(s * 2 + WHICH), operand_b(ws.index(s), TRANS_W), acc, use_acc=False, is_async=True)
    h = warpgroup_mma(xs.index(s * 2 + WHICH), operand_b(a_s.index(s), TRANS_W), h, use_acc=False, is_async=True)
    acc, h = warpgroup_mma_wait(2, deps=[acc, h])
    last = s
    s, ph = next_buffer(s, ph, STAGES)
    for k in range(1, count):
        mbarrier.wait(full.index(s), ph)
        acc = warpgroup_mma(xs.index(s * 2 + WHICH), operand_b(ws.index(s), TRANS_W), acc, is_async=True)
        h = warpgroup_mma(xs.index(s * 2 + WHICH), operand_b(a_s.index(s), TRANS_W), h, is_async=True)
        acc, h = warpgroup_mma_wait(2, deps=[acc, h])
        mbarrier.arrive(empty.index(last), count=1)
        last = s
        s, ph = next_buffer(s, ph, STAGES)
    acc, h = warpgroup_mma_wait(0, deps=[acc, h])
    mbarrier.arrive(empty.index(last), count=1)
    rows = m0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, hl))
    if EXACT:
        own = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, hl))
        at = gl.expand_dims(rows, 1) * BLOCK_R + gl.expand_dims(own, 0)
        inside = gl.expand_dims(rows < M, 1)
        gl.store(half + tn * (M * BLOCK_R) + at, h, mask=inside)
        barrier()
        before = gl.atomic_add(meeting, 1, sem="acq_rel", scope="gpu")
        if before == 1:
            barrier()
            other = gl.load(half + (1 - tn) * (M * BLOCK_R) + at, mask=inside, other=0.0, cache_modifier=".cg")
            store_hi_lo((h + other) * scale, hp, rows, own, M, BLOCK_R, STRIDE_H)
            _fence_proxy()
            barrier()
            gl.atomic_add(flag, 1, sem="release", scope="gpu")
    else:
        cols = tn * BLOCK_R + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, hl))
        to = hp + gl.expand_dims(rows, 1) * STRIDE_H + gl.expand_dims(cols, 0)
        gl.store(to, (h * scale).to(gl.bfloat16), mask=gl.expand_dims(rows < M, 1))
        _fence_proxy()
        barrier()
        gl.atomic_add(flag, 1, sem="release", scope="gpu")
    return acc, s, ph


@gluon.jit
def _rest(
    smem,
    bars,
    descs,
    acc,
    s,
    ph,
    count,
    WHICH: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    ADD: gl.constexpr,
):
    xs, ws, a_s = smem
    full, empty = bars
    h_desc, b_desc = descs
    mbarrier.wait(full.index(s), ph)
    acc = warpgroup_mma(xs.index(s * 2 + WHICH), operand_b(ws.index(s), TRANS_W), acc, use_acc=ADD, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    last = s
    s, ph = next_buffer(s, ph, STAGES)
    for k in range(1, count):
        mbarrier.wait(full.index(s), ph)
        acc = warpgroup_mma(xs.index(s * 2 + WHICH), operand_b(ws.index(s), TRANS_W), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)
        last = s
        s, ph = next_buffer(s, ph, STAGES)
    for j in gl.static_range(EXTRA):
        mbarrier.wait(full.index(s), ph)
        hv = xs.index(s * 2 + WHICH)._reinterpret(h_desc.dtype, [ROWS, BLOCK_H], h_desc.layout)
        if TRANS_W:
            bv = ws.index(s)._reinterpret(b_desc.dtype, [BLOCK_N, BLOCK_H], b_desc.layout)
        else:
            bv = ws.index(s)._reinterpret(b_desc.dtype, [BLOCK_H, BLOCK_N], b_desc.layout)
        acc = warpgroup_mma(hv, operand_b(bv, TRANS_W), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)
        last = s
        s, ph = next_buffer(s, ph, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(last), count=1)
    return acc, s, ph


@gluon.jit
def _f_consumer(
    descs,
    smem,
    ys,
    bars,
    sizes,
    hp,
    half,
    flags,
    scale,
    M,
    affine,
    WHICH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EPI_N: gl.constexpr,
    NBUF: gl.constexpr,
    EXACT: gl.constexpr,
):
    y_desc, h_desc, b_desc = descs
    num_m, num_n, steps = sizes
    ROWS: gl.constexpr = BLOCK_M // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    s = 0
    ph = 0
    y_buf = WHICH * NBUF
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tm, tn = _tile_first(t, num_m, num_n, GROUP_M)
        m0 = tm * BLOCK_M + WHICH * ROWS
        begin, mine = _share(tn, steps)
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        if tn < 2:
            if EXACT:
                meeting = flags + num_m + 1 + 2 * tm + WHICH
            else:
                meeting = flags
            acc, s, ph = _h_steps(
                smem,
                bars,
                acc,
                hp,
                half,
                flags + tm,
                meeting,
                scale,
                m0,
                tn,
                M,
                s,
                ph,
                mine,
                WHICH,
                ROWS,
                BLOCK_R,
                BLOCK_H * EXTRA,
                TRANS_W,
                STAGES,
                EXACT,
            )
            acc, s, ph = _rest(
                smem,
                bars,
                (h_desc, b_desc),
                acc,
                s,
                ph,
                steps - mine,
                WHICH,
                ROWS,
                BLOCK_N,
                BLOCK_H,
                EXTRA,
                TRANS_W,
                STAGES,
                True,
            )
        else:
            acc, s, ph = _rest(
                smem,
                bars,
                (h_desc, b_desc),
                acc,
                s,
                ph,
                steps,
                WHICH,
                ROWS,
                BLOCK_N,
                BLOCK_H,
                EXTRA,
                TRANS_W,
                STAGES,
                False,
            )
        y_buf = store_columns(acc, y_desc, ys, y_buf, m0, tn * BLOCK_N, affine, BLOCK_N, EPI_N, NBUF)
    tma.store_wait(0)


@gluon.jit
def hopper_product_h_kernel(
    x_desc,
    w_desc,
    a_desc,
    h_desc,
    b_desc,
    y_desc,
    hp,
    half,
    flags,
    gain_ptr,
    bias_ptr,
    scale,
    M,
    N,
    K,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EPI_N: gl.constexpr,
    NBUF: gl.constexpr,
    REGS: gl.constexpr,
):
    """y = gain * (x Wᵀ + h Bᵀ) + bias and h = scale x Aᵀ (TRANS_W); or dx = dy W + dh A and dh = scale dy B.

    ====== ================================ ========================================================================
    x      (M, K) 16-bit (dx: dy)           rows on 16-byte boundaries; block (BLOCK_M / 2, BLOCK_K)
    w      (N, K), dx: (K, N)               the same; block (BLOCK_N, BLOCK_K), dx: (BLOCK_K, BLOCK_N)
    a      (>= R, K), dx: (K, >= R), bf16   the operand of A, dx: of B; its first BLOCK_R rows (columns) are read
    h      (M, H) bf16                      contiguous, H = EXTRA * BLOCK_H = 2 BLOCK_R; written by hp, read
    b      (N, H), dx: (H, N), bf16         contiguous: the operand of B, dx: of A
    y      (M, N) as x                      rows on 16-byte boundaries; block (BLOCK_M / 2, EPI_N)
    half   (2, M, BLOCK_R) fp32 or None     the exact form's workspace
    flags  int32                            ceil(M / BLOCK_M) + 1, exact form three times the first; zero, and left zero
    gain   (N,) or None; bias too           in one piece, any float dtype; no gain without a bias
    ====== ================================ ========================================================================

    Grid (programs,), at most one a tile and a multiprocessor, all resident (cooperative). Tiles in the order of
    ``_tile_first``. One warp loads, two consumers of 4 warps have half a tile's rows each. Needs at least two tiles
    of columns and 4 K steps. fp32 accumulators; 2 M N (K + H) + 2 M K R flops; reads x and W by tiles. Shared memory:
    STAGES (BLOCK_M + BLOCK_N + BLOCK_R) BLOCK_K 2 bytes + BLOCK_M NBUF EPI_N 2; 168 registers a thread (consumers
    REGS).

    Measured on an H100: bf16, half None, EXTRA = 1, BLOCK_R = 16 and BLOCK_H = 32, not cooperative; its error is
    larger (2.3e-3 for 1.7e-3). Not measured yet: the exact form, other ranks, gain, bias, the cooperative launch.
    """
    EXACT: gl.constexpr = half is not None
    ROWS: gl.constexpr = BLOCK_M // 2
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, ROWS, BLOCK_K], x_desc.layout)
    if TRANS_W:
        ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
        a_s = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_R, BLOCK_K], a_desc.layout)
    else:
        ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_K, BLOCK_N], w_desc.layout)
        a_s = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_K, BLOCK_R], a_desc.layout)
    ys = gl.allocate_shared_memory(y_desc.dtype, [2 * NBUF, ROWS, EPI_N], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    sizes = (gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K))
    bars = (full, empty)
    smem = (xs, ws, a_s)
    cdescs = (y_desc, h_desc, b_desc)
    if bias_ptr is None:
        affine = ()
    elif gain_ptr is None:
        affine = (bias_ptr, N)
    else:
        affine = (gain_ptr, bias_ptr, N)
    gl.warp_specialize(
        [
            (
                _f_consumer,
                (
                    cdescs,
                    smem,
                    ys,
                    bars,
                    sizes,
                    hp,
                    half,
                    flags,
                    scale,
                    M,
                    affine,
                    0,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                    BLOCK_H,
                    EXTRA,
                    TRANS_W,
                    STAGES,
                    GROUP_M,
                    EPI_N,
                    NBUF,
                    EXACT,
                ),
            ),
            (
                _f_consumer,
                (
                    cdescs,
                    smem,
                    ys,
                    bars,
                    sizes,
                    hp,
                    half,
                    flags,
                    scale,
                    M,
                    affine,
                    1,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                    BLOCK_H,
                    EXTRA,
                    TRANS_W,
                    STAGES,
                    GROUP_M,
                    EPI_N,
                    NBUF,
                    EXACT,
                ),
            ),
            (
                _f_producer,
                (
                    (x_desc, w_desc, a_desc, h_desc, b_desc),
                    smem,
                    bars,
                    sizes,
                    flags,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    BLOCK_R,
                    BLOCK_H,
                    EXTRA,
                    TRANS_W,
                    STAGES,
                    GROUP_M,
                    EXACT,
                ),
            ),
        ],
        [4, 1],
        [REGS, 24],
    )
