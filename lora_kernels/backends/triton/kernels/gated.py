"""Kernels of a gated MLP's activation: σ(gate) * up, and its gradients, in one read of what they are made of."""

import triton
import triton.language as tl

from .common import rounded

__all__ = ["gated_grad_kernel", "gated_kernel"]


@triton.jit
def _logistic(t):
    """1 / (1 + e^-t), and 1 minus that, so that nothing cancels."""
    falling = tl.exp(-t)
    part = 1.0 / (1.0 + falling)
    return part, tl.where(t < 0.0, 1.0 - part, falling * part)


@triton.jit
def _gate_of(z, GATE: tl.constexpr):
    """σ(z) and σ'(z) in fp32: SiLU (0), GELU with the error function (1), GELU by tanh (2)."""
    if GATE == 0:
        part, rest = _logistic(z)
        slope = part * (1.0 + z * rest)
    elif GATE == 1:
        part = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        slope = part + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        # (1 + tanh(u)) / 2 is the logistic function of 2 u; beyond 1e4 it is 0 or 1, and its slope 0.
        near = tl.minimum(tl.maximum(z, -1e4), 1e4)
        square = near * near
        part, rest = _logistic(1.5957691216057308 * near * (1.0 + 0.044715 * square))
        slope = part + near * part * rest * 1.5957691216057308 * (1.0 + 0.134145 * square)
    return z * part, slope


@triton.jit(do_not_specialize=["M"])
def gated_kernel(
    gate_ptr,
    up_ptr,
    a_ptr,
    M,
    F,
    stride_gm,
    stride_gf,
    stride_um,
    stride_uf,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """a = σ(gate) * up.

    ===== ======= ===========
    gate  (M, F)  any strides
    up    (M, F)  any strides
    a     (M, F)  contiguous
    ===== ======= ===========

    Grid (blocks of M, blocks of F). fp32 arithmetic, one rounding; 3 M F elements are moved.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_m < M)[:, None] & (offs_f < F)[None, :]
    gate_ptrs = gate_ptr + offs_m[:, None] * stride_gm + offs_f[None, :] * stride_gf
    up_ptrs = up_ptr + offs_m[:, None] * stride_um + offs_f[None, :] * stride_uf
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_F)
    up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_F)
    value, _ = _gate_of(gate, GATE)
    tl.store(a_ptr + offs_m[:, None] * F + offs_f[None, :], rounded(value * up, a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def gated_grad_kernel(
    da_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    M,
    F,
    stride_dm,
    stride_df,
    stride_gm,
    stride_gf,
    stride_um,
    stride_uf,
    stride_out,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dgate = da * up * σ'(gate) and dup = da * σ(gate), in one read of all three.

    ============ ======= ==================================================
    da, gate, up (M, F)  any strides
    dgate        (M, F)  rows at a distance of stride_out
    dup          (M, F)  the same; None: it lies after dgate, F columns on
    ============ ======= ==================================================

    Grid (blocks of M, blocks of F). fp32 arithmetic, one rounding; 5 M F elements are moved.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_m < M)[:, None] & (offs_f < F)[None, :]
    da_ptrs = da_ptr + offs_m[:, None] * stride_dm + offs_f[None, :] * stride_df
    gate_ptrs = gate_ptr + offs_m[:, None] * stride_gm + offs_f[None, :] * stride_gf
    up_ptrs = up_ptr + offs_m[:, None] * stride_um + offs_f[None, :] * stride_uf
    da = tl.load(da_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_F)
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_F)
    up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_F)
    value, slope = _gate_of(gate, GATE)
    dtype: tl.constexpr = dgate_ptr.dtype.element_ty
    offs = offs_m[:, None] * stride_out + offs_f[None, :]
    tl.store(dgate_ptr + offs, rounded(da * up * slope, dtype), mask=mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + offs, rounded(da * value, dtype), mask=mask)
    else:
        tl.store(dgate_ptr + offs + F, rounded(da * value, dtype), mask=mask)
