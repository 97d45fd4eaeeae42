"""What is small beside a group's products, in one launch for all members: the measured kernels, a member each.

The second axis of each grid is the member. A program beyond the blocks that its member has loads and writes nothing.
RANK, BLOCK_R and the like are tuples, a number a member; what a member that is not there would have is None. The bodies
are ``small``'s, as measured; the choice of the member around them is not measured yet.
"""

import triton
import triton.language as tl

from .small import hopper_pack_kernel, hopper_reduce_dh_kernel, hopper_reduce_grads_kernel

__all__ = ["hopper_group_pack_kernel", "hopper_group_reduce_dh_kernel", "hopper_group_reduce_grads_kernel"]


@triton.jit
def hopper_group_pack_kernel(
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    b2,
    b3,
    ap0,
    ap1,
    ap2,
    ap3,
    bp0,
    bp1,
    bp2,
    bp3,
    zeros,
    K,
    N0,
    N1,
    N2,
    N3,
    count,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STRIDE_H: tl.constexpr,
    MEMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The operands of every member's A and B, as ``hopper_pack_kernel`` makes one's: A_i and B_i are contiguous.

    Grid (the most blocks of a member, MEMBERS). The first member's programs zero ``zeros``. Reads Σ RANK (K + N_i)
    numbers, writes 2 Σ STRIDE_H (K + N_i) bytes.
    """
    if tl.program_id(1) == 0:
        hopper_pack_kernel(
            a0,
            b0,
            ap0,
            bp0,
            zeros,
            None,
            None,
            None,
            None,
            K,
            N0,
            count,
            RANK[0],
            BLOCK_R[0],
            STRIDE_H[0],
            SPLIT,
            BLOCK,
        )
    if tl.program_id(1) == 1:
        hopper_pack_kernel(
            a1, b1, ap1, bp1, None, None, None, None, None, K, N1, None, RANK[1], BLOCK_R[1], STRIDE_H[1], SPLIT, BLOCK
        )
    if MEMBERS > 2:
        if tl.program_id(1) == 2:
            hopper_pack_kernel(
                a2,
                b2,
                ap2,
                bp2,
                None,
                None,
                None,
                None,
                None,
                K,
                N2,
                None,
                RANK[2],
                BLOCK_R[2],
                STRIDE_H[2],
                SPLIT,
                BLOCK,
            )
    if MEMBERS > 3:
        if tl.program_id(1) == 3:
            hopper_pack_kernel(
                a3,
                b3,
                ap3,
                bp3,
                None,
                None,
                None,
                None,
                None,
                K,
                N3,
                None,
                RANK[3],
                BLOCK_R[3],
                STRIDE_H[3],
                SPLIT,
                BLOCK,
            )


@triton.jit
def hopper_group_reduce_dh_kernel(
    part0,
    part1,
    part2,
    part3,
    out0,
    out1,
    out2,
    out3,
    scale0,
    scale1,
    scale2,
    scale3,
    M,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out_i = high and low part of scale_i times the sum of the parts of member i, as ``hopper_reduce_dh_kernel``.

    Grid (ceil(M / BLOCK_M), MEMBERS). Reads 4 M Σ PARTS BLOCK_R bytes, writes 4 M Σ BLOCK_R.
    """
    if tl.program_id(1) == 0:
        hopper_reduce_dh_kernel(part0, out0, scale0, M, PARTS[0], BLOCK_R[0], 2 * BLOCK_R[0], BLOCK_M, False)
    if tl.program_id(1) == 1:
        hopper_reduce_dh_kernel(part1, out1, scale1, M, PARTS[1], BLOCK_R[1], 2 * BLOCK_R[1], BLOCK_M, False)
    if MEMBERS > 2:
        if tl.program_id(1) == 2:
            hopper_reduce_dh_kernel(part2, out2, scale2, M, PARTS[2], BLOCK_R[2], 2 * BLOCK_R[2], BLOCK_M, False)
    if MEMBERS > 3:
        if tl.program_id(1) == 3:
            hopper_reduce_dh_kernel(part3, out3, scale3, M, PARTS[3], BLOCK_R[3], 2 * BLOCK_R[3], BLOCK_M, False)


@triton.jit(do_not_specialize=["a_parts", "b_parts"])
def hopper_group_reduce_grads_kernel(
    a_part0,
    a_part1,
    a_part2,
    a_part3,
    b_part0,
    b_part1,
    b_part2,
    b_part3,
    da0,
    da1,
    da2,
    da3,
    db0,
    db1,
    db2,
    db3,
    K0,
    K1,
    K2,
    K3,
    N0,
    N1,
    N2,
    N3,
    a_parts,
    b_parts,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """da_i and db_i, the sums of member i's parts, as ``hopper_reduce_grads_kernel``, whose tensors these are.

    Grid (the most blocks of a member, MEMBERS). K_i or N_i is 0 where that gradient is not due. All members have as
    many parts.
    """
    if tl.program_id(1) == 0:
        hopper_reduce_grads_kernel(a_part0, b_part0, da0, db0, K0, N0, a_parts, b_parts, RANK[0], BLOCK_R[0], BLOCK)
    if tl.program_id(1) == 1:
        hopper_reduce_grads_kernel(a_part1, b_part1, da1, db1, K1, N1, a_parts, b_parts, RANK[1], BLOCK_R[1], BLOCK)
    if MEMBERS > 2:
        if tl.program_id(1) == 2:
            hopper_reduce_grads_kernel(a_part2, b_part2, da2, db2, K2, N2, a_parts, b_parts, RANK[2], BLOCK_R[2], BLOCK)
    if MEMBERS > 3:
        if tl.program_id(1) == 3:
            hopper_reduce_grads_kernel(a_part3, b_part3, da3, db3, K3, N3, a_parts, b_parts, RANK[3], BLOCK_R[3], BLOCK)
