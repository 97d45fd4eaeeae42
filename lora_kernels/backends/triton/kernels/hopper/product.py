"""y and dx with the low-rank term as more K steps: persistent, warp-specialised, TMA both ways (sm_90a)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from .common import mask_columns, next_buffer, operand_b, tile_of

__all__ = ["hopper_product_kernel", "store_columns"]


@gluon.jit
def _affine(acc, affine, n0, COLS: gl.constexpr):
    """gain * acc + bias, by columns; or acc + bias."""
    offs_n = n0 + gl.arange(0, COLS, layout=gl.SliceLayout(0, acc.type.layout))
    if len(affine) == 3:
        gain_ptr, bias_ptr, N = affine
        gain = gl.load(gain_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc = acc * gl.expand_dims(gain.to(gl.float32), 0)
    else:
        bias_ptr, N = affine
    bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
    return acc + gl.expand_dims(bias.to(gl.float32), 0)


@gluon.jit
def store_columns(
    acc, y_desc, ys, first_buf, m0, n0, affine, COLS: gl.constexpr, EPI_N: gl.constexpr, NBUF: gl.constexpr
):
    """Writes acc (rows, COLS) by TMA, EPI_N columns at a time through NBUF buffers from first_buf on.

    affine is (), (bias_ptr, N) or (gain_ptr, bias_ptr, N): acc + bias or gain * acc + bias is written. Under Triton 3.6
    None may not stand in a tuple.
    """
    if COLS > EPI_N:
        rows: gl.constexpr = acc.shape[0]
        half: gl.constexpr = COLS // 2
        left, right = acc.reshape([rows, 2, half]).permute([0, 2, 1]).split()
        first_buf = store_columns(left, y_desc, ys, first_buf, m0, n0, affine, half, EPI_N, NBUF)
        first_buf = store_columns(right, y_desc, ys, first_buf, m0, n0 + half, affine, half, EPI_N, NBUF)
    else:
        if len(affine) > 0:
            acc = _affine(acc, affine, n0, COLS)
        tma.store_wait(NBUF - 1)
        buf = ys.index(first_buf)
        buf.store(acc.to(y_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [m0, n0], buf)
        base = first_buf // NBUF * NBUF
        first_buf = base + (first_buf - base + 1) % NBUF
    return first_buf


@gluon.jit
def _produce_extra(
    descs,
    smem,
    bars,
    m0,
    n0,
    s,
    ph,
    J: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    H_BLOCKS: gl.constexpr,
    XPARTS: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Loads the J-th extra step; the mask's bits come with the first."""
    x_desc, w_desc, h_desc, b_desc, m_desc = descs
    xs, ws, mw = smem
    full, empty = bars
    ROWS: gl.constexpr = BLOCK_M // XPARTS
    HCOL: gl.constexpr = J % H_BLOCKS * BLOCK_H
    BCOL: gl.constexpr = J * BLOCK_H
    bar = full.index(s)
    mbarrier.wait(empty.index(s), ph ^ 1)
    BITS: gl.constexpr = BLOCK_M * BLOCK_N // 8 if MASKED and J == 0 else 0
    mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_H * 2 + BITS)
    for p in gl.static_range(XPARTS):
        tma.async_copy_global_to_shared(
            h_desc,
            [m0 + p * ROWS, HCOL],
            bar,
            xs.index(s * XPARTS + p)._reinterpret(h_desc.dtype, [ROWS, BLOCK_H], h_desc.layout),
        )
        if MASKED and J == 0:
            tma.async_copy_global_to_shared(m_desc, [m0 + p * ROWS, n0 // 32], bar, mw.index(p))
    wv = ws.index(s)
    if TRANS_W:
        tma.async_copy_global_to_shared(
            b_desc, [n0, BCOL], bar, wv._reinterpret(b_desc.dtype, [BLOCK_N, BLOCK_H], b_desc.layout)
        )
    else:
        tma.async_copy_global_to_shared(
            b_desc, [BCOL, n0], bar, wv._reinterpret(b_desc.dtype, [BLOCK_H, BLOCK_N], b_desc.layout)
        )
    s, ph = next_buffer(s, ph, STAGES)
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
    XPARTS: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    PDL: gl.constexpr,
    MASKED: gl.constexpr,
):
    x_desc, w_desc, h_desc, b_desc, m_desc = descs
    xs, ws, mw = smem
    full, empty = bars
    num_m, num_n, steps = sizes
    ROWS: gl.constexpr = BLOCK_M // XPARTS
    s = 0
    ph = 0
    fresh = 1
    for t in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        tm, tn = tile_of(t, num_m, num_n, GROUP_M)
        m0 = tm * BLOCK_M
        n0 = tn * BLOCK_N
        if MASKED:
            if PDL:
                if fresh == 1:
                    gdc_wait()
                fresh = 0
            for j in gl.static_range(EXTRA):
                s, ph = _produce_extra(
                    descs,
                    smem,
                    bars,
                    m0,
                    n0,
                    s,
                    ph,
                    j,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_H,
                    H_BLOCKS,
                    XPARTS,
                    TRANS_W,
                    STAGES,
                    True,
                )
        for k in range(steps):
            bar = full.index(s)
            mbarrier.wait(empty.index(s), ph ^ 1)
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            k0 = k * BLOCK_K
            for p in gl.static_range(XPARTS):
                tma.async_copy_global_to_shared(x_desc, [m0 + p * ROWS, k0], bar, xs.index(s * XPARTS + p))
            if TRANS_W:
                tma.async_copy_global_to_shared(w_desc, [n0, k0], bar, ws.index(s))
            else:
                tma.async_copy_global_to_shared(w_desc, [k0, n0], bar, ws.index(s))
            s, ph = next_buffer(s, ph, STAGES)
        if EXTRA > 0 and not MASKED:
            if PDL:
                if fresh == 1:
                    gdc_wait()
                fresh = 0
            for j in gl.static_range(EXTRA):
                s, ph = _produce_extra(
                    descs,
                    smem,
                    bars,
                    m0,
                    n0,
                    s,
                    ph,
                    j,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_H,
                    H_BLOCKS,
                    XPARTS,
                    TRANS_W,
                    STAGES,
                    False,
                )


@gluon.jit
def _extra_operands(
    xs,
    ws,
    h_desc,
    b_desc,
    s,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr,
    XPARTS: gl.constexpr,
    TRANS_W: gl.constexpr,
):
    hv = xs.index(s * XPARTS + PART)._reinterpret(h_desc.dtype, [ROWS, BLOCK_H], h_desc.layout)
    if TRANS_W:
        bv = ws.index(s)._reinterpret(b_desc.dtype, [BLOCK_N, BLOCK_H], b_desc.layout)
    else:
        bv = ws.index(s)._reinterpret(b_desc.dtype, [BLOCK_H, BLOCK_N], b_desc.layout)
    return hv, operand_b(bv, TRANS_W)


@gluon.jit
def _consumer(
    descs,
    smem,
    ys,
    bars,
    sizes,
    affine,
    WHICH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_H: gl.constexpr,
    EXTRA: gl.constexpr,
    XPARTS: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EPI_N: gl.constexpr,
    NBUF: gl.constexpr,
    MASKED: gl.constexpr,
):
    """One consumer: rows WHICH * ROWS on of every tile."""
    y_desc, h_desc, b_desc = descs
    xs, ws, mw = smem
    full, empty = bars
    num_m, num_n, steps = sizes
    ROWS: gl.constexpr = BLOCK_M // XPARTS
    PART: gl.constexpr = WHICH
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
            for j in gl.static_range(EXTRA):
                mbarrier.wait(full.index(s), ph)
                hv, bv = _extra_operands(xs, ws, h_desc, b_desc, s, PART, ROWS, BLOCK_N, BLOCK_H, XPARTS, TRANS_W)
                acc = warpgroup_mma(hv, bv, acc, use_acc=j > 0, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                if j == EXTRA - 1:
                    acc = mask_columns(acc, mw.index(PART))
                mbarrier.arrive(empty.index(s), count=1)
                s, ph = next_buffer(s, ph, STAGES)
        mbarrier.wait(full.index(s), ph)
        acc = warpgroup_mma(
            xs.index(s * XPARTS + PART), operand_b(ws.index(s), TRANS_W), acc, use_acc=MASKED, is_async=True
        )
        acc = warpgroup_mma_wait(1, deps=[acc])
        last = s
        s, ph = next_buffer(s, ph, STAGES)
        for k in range(1, steps):
            mbarrier.wait(full.index(s), ph)
            acc = warpgroup_mma(xs.index(s * XPARTS + PART), operand_b(ws.index(s), TRANS_W), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(last), count=1)
            last = s
            s, ph = next_buffer(s, ph, STAGES)
        if EXTRA > 0 and not MASKED:
            for j in gl.static_range(EXTRA):
                mbarrier.wait(full.index(s), ph)
                hv, bv = _extra_operands(xs, ws, h_desc, b_desc, s, PART, ROWS, BLOCK_N, BLOCK_H, XPARTS, TRANS_W)
                acc = warpgroup_mma(hv, bv, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index(last), count=1)
                last = s
                s, ph = next_buffer(s, ph, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(last), count=1)
        y_buf = store_columns(
            acc, y_desc, ys, y_buf, tm * BLOCK_M + PART * ROWS, tn * BLOCK_N, affine, BLOCK_N, EPI_N, NBUF
        )
    tma.store_wait(0)


@gluon.jit
def hopper_product_kernel(
    x_desc,
    w_desc,
    h_desc,
    b_desc,
    m_desc,
    y_desc,
    gain_ptr,
    bias_ptr,
    M,
    N,
    K,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_H: gl.constexpr,
    H_BLOCKS: gl.constexpr,
    EXTRA: gl.constexpr,
    MODE: gl.constexpr,
    TRANS_W: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    EPI_N: gl.constexpr,
    NBUF: gl.constexpr,
    PDL: gl.constexpr,
    MASKED: gl.constexpr,
    REGS: gl.constexpr,
):
    """y = gain * (x Wᵀ + h̃ B̃ᵀ) + bias, or dx = dy W + mask * (dh̃ Ã), as one product.

    y[m, n] = Σ_k x[m, k] W[n, k] + Σ_c h̃[m, c mod H] B̃[n, c]             (TRANS_W: y)
    y[m, n] = Σ_k x[m, k] W[k, n] + mask[m, n] Σ_c h̃[m, c mod H] B̃[c, n]  (not TRANS_W: dx; x is dy, B̃ is A's operand)

    ====== ============================ ============================================================================
    x      (M, K) 16-bit                rows on 16-byte boundaries, any distance; block (BLOCK_M / parts, BLOCK_K)
    w      (N, K), dx: (K, N), 16-bit   the same; block (BLOCK_N, BLOCK_K), dx: (BLOCK_K, BLOCK_N)
    h      (M, H) bf16                  contiguous; block (BLOCK_M / parts, BLOCK_H); H = H_BLOCKS * BLOCK_H
    b      (N, C), dx: (C, N), bf16     contiguous; block (BLOCK_N, BLOCK_H) or turned; C = EXTRA * BLOCK_H
    m      (M, 4 ceil(N / 128)) int32   MASKED: bit j of word w keeps column 32 w + j; block (rows, BLOCK_N / 32)
    y      (M, N) as x                  rows on 16-byte boundaries; block (BLOCK_M / parts, EPI_N)
    gain   (N,) or None                 in one piece, any float dtype; None without a bias
    bias   (N,) or None                 in one piece, any float dtype
    ====== ============================ ============================================================================

    Grid (programs,), at most one a tile; program i takes tiles i, i + programs, ... in the order of ``tile_of``. One
    warp loads; MODE "split": two consumers of 4 warps with half a tile's rows each (parts = 2); "coop": one of 8
    warps. Sizes need not be multiples of the blocks: TMA reads zeros outside and does not write there. MASKED: the
    extra steps come first and are masked in registers; the mask has one buffer, so K must be at least (STAGES - 1) *
    BLOCK_K.

    fp32 accumulator, rounded once. 2 M N (K + C) flops; reads x and W by tiles, writes 2 M N bytes. Shared memory:
    STAGES (BLOCK_M + BLOCK_N) BLOCK_K 2 bytes + BLOCK_M NBUF EPI_N 2 + the mask's BLOCK_M BLOCK_N / 8; 168 registers
    a thread, of which consumers take REGS and the loading warp 24.

    Measured on an H100: bf16, EXTRA = 1 with BLOCK_H = 32 (r = 16), every MODE, MASKED, PDL; gain and bias None.
    Not measured yet: EXTRA > 1, BLOCK_H = 64, H_BLOCKS != EXTRA (fp16), gain, bias.
    """
    XPARTS: gl.constexpr = 2 if MODE == "split" else 1
    ROWS: gl.constexpr = BLOCK_M // XPARTS
    WROWS: gl.constexpr = BLOCK_N if TRANS_W else BLOCK_K
    WCOLS: gl.constexpr = BLOCK_K if TRANS_W else BLOCK_N
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * XPARTS, ROWS, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(w_desc.dtype, [STAGES, WROWS, WCOLS], w_desc.layout)
    ys = gl.allocate_shared_memory(y_desc.dtype, [XPARTS * NBUF, ROWS, EPI_N], y_desc.layout)
    if MASKED:
        mw = gl.allocate_shared_memory(m_desc.dtype, [XPARTS, ROWS, BLOCK_N // 32], m_desc.layout)
    else:
        mw = xs
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=XPARTS)
    fence_async_shared()
    sizes = (gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K))
    bars = (full, empty)
    smem = (xs, ws, mw)
    cdescs = (y_desc, h_desc, b_desc)
    pdescs = (x_desc, w_desc, h_desc, b_desc, m_desc)
    if bias_ptr is None:
        affine = ()
    elif gain_ptr is None:
        affine = (bias_ptr, N)
    else:
        affine = (gain_ptr, bias_ptr, N)
    if XPARTS == 1:
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
                        affine,
                        0,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                        BLOCK_H,
                        EXTRA,
                        XPARTS,
                        TRANS_W,
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
                        XPARTS,
                        TRANS_W,
                        STAGES,
                        GROUP_M,
                        PDL,
                        MASKED,
                    ),
                ),
            ],
            [1],
            [24],
        )
    else:
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
                        affine,
                        0,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                        BLOCK_H,
                        EXTRA,
                        XPARTS,
                        TRANS_W,
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
                        affine,
                        1,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                        BLOCK_H,
                        EXTRA,
                        XPARTS,
                        TRANS_W,
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
                        XPARTS,
                        TRANS_W,
                        STAGES,
                        GROUP_M,
                        PDL,
                        MASKED,
                    ),
                ),
            ],
            [4, 1],
            [REGS, 24],
        )
