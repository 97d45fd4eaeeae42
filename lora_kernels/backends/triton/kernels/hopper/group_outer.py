"""Several layers' dh with db in one launch; their da in one read of the x that they share (sm_90a)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import barrier, mask_columns, members_of, next_buffer, replace_tile, split_fp16, zero_sums
from .outer import _d_consumer, _d_producer

__all__ = ["hopper_group_da_kernel", "hopper_group_dh_db_kernel"]


@gluon.jit
def _member_smem(descs, smem, RANK: gl.constexpr, STAGES: gl.constexpr):
    """The buffers, which fit the largest member, as one member's."""
    dy_desc, b_desc, h_desc = descs
    ds, hs, bs, bl = smem
    BLOCK_M: gl.constexpr = ds.shape[1]
    BLOCK_N: gl.constexpr = ds.shape[2]
    hv = hs._reinterpret(h_desc.dtype, [STAGES * 2, BLOCK_M, RANK], h_desc.layout)
    bv = bs._reinterpret(b_desc.dtype, [BLOCK_N, RANK], b_desc.layout)
    return ds, hv, bv, bl._reinterpret(b_desc.dtype, [BLOCK_N, RANK], b_desc.layout)


@gluon.jit
def _dh_db_consumer(
    descs,
    smem,
    bars,
    parts,
    M,
    ns,
    blocks,
    block0,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    RANKS: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    dh_parts, db_parts = parts
    for i in gl.static_range(MEMBERS):
        if gl.program_id(2) == i:
            mine = _member_smem(descs[i], smem, RANKS[i], STAGES)
            _d_consumer(
                mine,
                bars,
                dh_parts[i],
                db_parts[i],
                M,
                ns[i],
                blocks,
                block0,
                BLOCK_M,
                BLOCK_N,
                RANKS[i],
                True,
                STAGES,
                WIDE,
            )


@gluon.jit
def _dh_db_producer(
    descs,
    smem,
    bars,
    blocks,
    block0,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    RANKS: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    for i in gl.static_range(MEMBERS):
        if gl.program_id(2) == i:
            mine = _member_smem(descs[i], smem, RANKS[i], STAGES)
            _d_producer(descs[i], mine, bars, blocks, block0, BLOCK_M, BLOCK_N, RANKS[i], True, STAGES, WIDE)


@gluon.jit(do_not_specialize=["chunk"])
def hopper_group_dh_db_kernel(
    dy_desc0,
    dy_desc1,
    dy_desc2,
    dy_desc3,
    b_desc0,
    b_desc1,
    b_desc2,
    b_desc3,
    h_desc0,
    h_desc1,
    h_desc2,
    h_desc3,
    dh_part0,
    dh_part1,
    dh_part2,
    dh_part3,
    db_part0,
    db_part1,
    db_part2,
    db_part3,
    M,
    N0,
    N1,
    N2,
    N3,
    chunk,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    RANKS: gl.constexpr,
    LARGEST: gl.constexpr,
    MEMBERS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dh_part_i[j] = dy_ij B_ij, db_part_i[j] = dy_ijᵀ h_i as ``hopper_dh_db_kernel``, whose code each member runs.

    ========= ========================================= ============================================================
    dy_i      (M, N_i) bf16 or fp16                     rows on 16-byte boundaries; block (BLOCK_M, BLOCK_N)
    b_i       (N_i, >= RANKS[i]) bf16                   contiguous; block (BLOCK_N, RANKS[i])
    h_i       (M, 2 RANKS[i]) bf16                      rows on 16-byte boundaries; block (BLOCK_M, RANKS[i])
    dh_part_i (ceil(N_i / BLOCK_N), M, RANKS[i]) fp32   contiguous
    db_part_i (row chunks, N_i, RANKS[i]) fp32          contiguous
    ========= ========================================= ============================================================

    LARGEST is the largest of the ranks. What a member that is not there would have is None.

    Grid (column chunks of the widest member, row chunks of ``chunk`` blocks of BLOCK_M, MEMBERS); programs beyond a
    narrower member's columns do nothing. Flops and bytes are the sum of the members'; shared memory as one of LARGEST.

    The partitions' bodies are the measured ones; the choice of the member around them is not measured yet.
    """
    WIDE: gl.constexpr = dy_desc0.dtype == gl.float16
    ds = gl.allocate_shared_memory(dy_desc0.dtype, [STAGES, BLOCK_M, BLOCK_N], dy_desc0.layout)
    hs = gl.allocate_shared_memory(h_desc0.dtype, [STAGES * 2, BLOCK_M, LARGEST], h_desc0.layout)
    bs = gl.allocate_shared_memory(b_desc0.dtype, [BLOCK_N, LARGEST], b_desc0.layout)
    if WIDE:
        bl = gl.allocate_shared_memory(b_desc0.dtype, [BLOCK_N, LARGEST], b_desc0.layout)
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
    ns = members_of(N0, N1, N2, N3, MEMBERS)
    columns = ns[0]
    for i in gl.static_range(1, MEMBERS):
        if gl.program_id(2) == i:
            columns = ns[i]
    block0 = gl.program_id(1) * chunk
    blocks = gl.minimum(gl.cdiv(M, BLOCK_M) - block0, chunk)
    if gl.program_id(0) * BLOCK_N >= columns:
        blocks = 0
    dys = members_of(dy_desc0, dy_desc1, dy_desc2, dy_desc3, MEMBERS)
    bs_of = members_of(b_desc0, b_desc1, b_desc2, b_desc3, MEMBERS)
    hs_of = members_of(h_desc0, h_desc1, h_desc2, h_desc3, MEMBERS)
    descs = ()
    for i in gl.static_range(MEMBERS):
        descs = descs + ((dys[i], bs_of[i], hs_of[i]),)
    parts = (
        members_of(dh_part0, dh_part1, dh_part2, dh_part3, MEMBERS),
        members_of(db_part0, db_part1, db_part2, db_part3, MEMBERS),
    )
    smem = (ds, hs, bs, bl)
    bars = (full, empty, once)
    gl.warp_specialize(
        [
            (
                _dh_db_consumer,
                (descs, smem, bars, parts, M, ns, blocks, block0, BLOCK_M, BLOCK_N, RANKS, MEMBERS, STAGES, WIDE),
            ),
            (
                _dh_db_producer,
                (descs, smem, bars, blocks, block0, BLOCK_M, BLOCK_N, RANKS, MEMBERS, STAGES, WIDE),
            ),
        ],
        [1],
        [24],
    )


@gluon.jit
def _part_of(hs, place, h_desc, BLOCK_M: gl.constexpr, RANK: gl.constexpr):
    return hs.index(place)._reinterpret(h_desc.dtype, [BLOCK_M, RANK], h_desc.layout)


@gluon.jit
def _add(tile, hs, place, h_desc, acc, RANK: gl.constexpr, LOW: gl.constexpr):
    """acc + tileᵀ dh of one member: dh's high part, and where LOW its low part. To be waited for."""
    BLOCK_M: gl.constexpr = tile.shape[0]
    acc = warpgroup_mma(tile.permute([1, 0]), _part_of(hs, place, h_desc, BLOCK_M, RANK), acc, is_async=True)
    if LOW:
        acc = warpgroup_mma(tile.permute([1, 0]), _part_of(hs, place + 1, h_desc, BLOCK_M, RANK), acc, is_async=True)
    return acc


@gluon.jit
def _add_all(tile, hs, place, h_descs, accs, RANKS: gl.constexpr, MEMBERS: gl.constexpr, LOW: gl.constexpr):
    """As ``_add``, of all members, and waited for."""
    sums = ()
    for i in gl.static_range(MEMBERS):
        sums = sums + (_add(tile, hs, place + 2 * i, h_descs[i], accs[i], RANKS[i], LOW),)
    waited = ()
    for i in gl.static_range(MEMBERS):
        waited = waited + (warpgroup_mma_wait(0, deps=[sums[i]]),)
    return waited


@gluon.jit
def _add_masked(x, words, tile, hs, place, h_desc, acc, RANK: gl.constexpr, WIDE: gl.constexpr):
    """As ``_add`` for x in registers, masked and put into its tile: over fp16 its high part, then its low part."""
    x = mask_columns(x, words)
    if WIDE:
        high, low = split_fp16(x)
        replace_tile(tile, high)
        acc = warpgroup_mma_wait(0, deps=[_add(tile, hs, place, h_desc, acc, RANK, True)])
        barrier()
        replace_tile(tile, low)
        acc = _add(tile, hs, place, h_desc, acc, RANK, False)
    else:
        replace_tile(tile, x)
        acc = _add(tile, hs, place, h_desc, acc, RANK, True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _tile_of(xs, s, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WIDE: gl.constexpr):
    """x's tile; over fp16 as what its bf16 parts are put into."""
    if WIDE:
        return xs.index(s)._reinterpret(gl.bfloat16, [BLOCK_M, BLOCK_N], xs.index(s).layout)
    else:
        return xs.index(s)


@gluon.jit
def _store_part(acc, part, N):
    BLOCK_N: gl.constexpr = acc.shape[0]
    RANK: gl.constexpr = acc.shape[1]
    n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, acc.type.layout))
    cols = gl.expand_dims(gl.arange(0, RANK, layout=gl.SliceLayout(0, acc.type.layout)), 0)
    to = part + gl.program_id(1).to(gl.int64) * (N * RANK)
    gl.store(to + gl.expand_dims(n, 1) * RANK + cols, acc, mask=gl.expand_dims(n < N, 1))


@gluon.jit
def _da_consumer(
    h_descs,
    smem,
    bars,
    parts,
    M,
    N,
    blocks,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    RANKS: gl.constexpr,
    MEMBERS: gl.constexpr,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    xs, hs, mw = smem
    full, empty = bars
    W: gl.constexpr = gl.num_warps()
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    accs = zero_sums(BLOCK_N, RANKS, MEMBERS)
    s = 0
    ph = 0
    for _block in range(blocks):
        mbarrier.wait(full.index(s), ph)
        place = 2 * MEMBERS * s
        if MASKED:
            tile = _tile_of(xs, s, BLOCK_M, BLOCK_N, WIDE)
            x = xs.index(s).load(plain)
            sums = ()
            for i in gl.static_range(MEMBERS):
                if i > 0:
                    barrier()  # the tile of the member before is read
                words = mw.index(s * MEMBERS + i)
                sums = sums + (_add_masked(x, words, tile, hs, place + 2 * i, h_descs[i], accs[i], RANKS[i], WIDE),)
            accs = sums
        elif WIDE:
            tile = _tile_of(xs, s, BLOCK_M, BLOCK_N, WIDE)
            high, low = split_fp16(xs.index(s).load(plain))
            replace_tile(tile, high)
            accs = _add_all(tile, hs, place, h_descs, accs, RANKS, MEMBERS, True)
            barrier()
            replace_tile(tile, low)
            accs = _add_all(tile, hs, place, h_descs, accs, RANKS, MEMBERS, False)
        else:
            accs = _add_all(xs.index(s), hs, place, h_descs, accs, RANKS, MEMBERS, True)
        mbarrier.arrive(empty.index(s), count=1)
        s, ph = next_buffer(s, ph, STAGES)
    for i in gl.static_range(MEMBERS):
        _store_part(accs[i], parts[i], N)


@gluon.jit
def _da_producer(
    descs,
    smem,
    bars,
    blocks,
    block0,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    RANKS: gl.constexpr,
    TOTAL: gl.constexpr,
    MEMBERS: gl.constexpr,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    x_desc, h_descs, m_descs = descs
    xs, hs, mw = smem
    full, empty = bars
    n0 = gl.program_id(0) * BLOCK_N
    s = 0
    ph = 0
    BITS: gl.constexpr = MEMBERS * BLOCK_M * BLOCK_N // 8 if MASKED else 0
    for block in range(blocks):
        bar = full.index(s)
        m0 = (block0 + block) * BLOCK_M
        mbarrier.wait(empty.index(s), ph ^ 1)
        mbarrier.expect(bar, BLOCK_M * (BLOCK_N + 2 * TOTAL) * 2 + BITS)
        tma.async_copy_global_to_shared(x_desc, [m0, n0], bar, xs.index(s))
        for i in gl.static_range(MEMBERS):
            if MASKED:
                tma.async_copy_global_to_shared(m_descs[i], [m0, n0 // 32], bar, mw.index(s * MEMBERS + i))
            for part in gl.static_range(2):
                to = _part_of(hs, 2 * (MEMBERS * s + i) + part, h_descs[i], BLOCK_M, RANKS[i])
                tma.async_copy_global_to_shared(h_descs[i], [m0, part * RANKS[i]], bar, to)
        s, ph = next_buffer(s, ph, STAGES)


@gluon.jit(do_not_specialize=["chunk"])
def hopper_group_da_kernel(
    x_desc,
    h_desc0,
    h_desc1,
    h_desc2,
    h_desc3,
    m_desc0,
    m_desc1,
    m_desc2,
    m_desc3,
    part0,
    part1,
    part2,
    part3,
    M,
    N,
    chunk,  #
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    RANKS: gl.constexpr,
    LARGEST: gl.constexpr,
    TOTAL: gl.constexpr,
    MEMBERS: gl.constexpr,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """part_i[j] = (mask_i * x)ᵀ dh_i over the j-th chunk of rows: the parts of every member's da, turned.

    ======== =================================== ==================================================================
    x        (M, N) bf16 or fp16                 rows on 16-byte boundaries; block (BLOCK_M, BLOCK_N); N is x's width
    h_i      (M, 2 RANKS[i]) bf16                rows on 16-byte boundaries: dh's operand; block (BLOCK_M, RANKS[i])
    m_i      (M, 4 ceil(N / 128)) int32          MASKED: the words; block (BLOCK_M, BLOCK_N / 32)
    part_i   (row chunks, N, RANKS[i]) fp32      contiguous
    ======== =================================== ==================================================================

    LARGEST is the largest of the ranks, TOTAL their sum. What a member that is not there would have is None.

    Grid (column chunks of BLOCK_N, row chunks of ``chunk`` blocks of BLOCK_M). MASKED: x lies in registers, and each
    member's mask in turn puts it where it lay. fp32 accumulators; 4 M N TOTAL flops; reads x once. Shared memory:
    STAGES BLOCK_M (2 BLOCK_N + MEMBERS (4 LARGEST + BLOCK_N / 8)) bytes. Not measured yet.
    """
    WIDE: gl.constexpr = x_desc.dtype == gl.float16
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_N], x_desc.layout)
    hs = gl.allocate_shared_memory(h_desc0.dtype, [STAGES * 2 * MEMBERS, BLOCK_M, LARGEST], h_desc0.layout)
    h_descs = members_of(h_desc0, h_desc1, h_desc2, h_desc3, MEMBERS)
    if MASKED:
        mw = gl.allocate_shared_memory(m_desc0.dtype, [STAGES * MEMBERS, BLOCK_M, BLOCK_N // 32], m_desc0.layout)
        m_descs = members_of(m_desc0, m_desc1, m_desc2, m_desc3, MEMBERS)
    else:
        mw = hs
        m_descs = ()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    block0 = gl.program_id(1) * chunk
    blocks = gl.minimum(gl.cdiv(M, BLOCK_M) - block0, chunk)
    parts = members_of(part0, part1, part2, part3, MEMBERS)
    smem = (xs, hs, mw)
    bars = (full, empty)
    gl.warp_specialize(
        [
            (
                _da_consumer,
                (h_descs, smem, bars, parts, M, N, blocks, BLOCK_M, BLOCK_N, RANKS, MEMBERS, MASKED, STAGES, WIDE),
            ),
            (
                _da_producer,
                (
                    (x_desc, h_descs, m_descs),
                    smem,
                    bars,
                    blocks,
                    block0,
                    BLOCK_M,
                    BLOCK_N,
                    RANKS,
                    TOTAL,
                    MEMBERS,
                    MASKED,
                    STAGES,
                ),
            ),
        ],
        [1],
        [24],
    )
