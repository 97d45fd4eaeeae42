"""Grids and arguments: the operators of ``ops.py``, and the parts of ``backward``, on top of the kernels.

Launches: ``forward`` 2 (1 for few tokens), ``dh_db`` 2, ``dx``, ``da``, ``dh`` and ``mask`` 1 each. Empty results
launch nothing. All outputs come from ``torch.empty`` and are written in full.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...reference import dropout_threshold
from .configs import (
    FEW_TOKENS,
    FewTokensConfig,
    Machine,
    da_config,
    dh_db_config,
    few_tokens_config,
    gemm_config,
    machine_of,
    next_power_of_2,
    shrink_config,
)
from .kernels.backward import da_kernel, dh_db_kernel, dx_kernel, reduce_kernel
from .kernels.forward import few_tokens_kernel, forward_kernel, shrink_kernel
from .kernels.philox import mask_kernel

__all__ = ["backward", "da", "dh", "dh_db", "dx", "forward", "mask"]

_REDUCE_BLOCK = 512
_MASK_BLOCK_M, _MASK_BLOCK_K = 32, 128


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    n, r = lora_b.shape
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    h = torch.empty((m, r), dtype=torch.float32, device=x.device)
    if m == 0:
        return y, h
    precision = _precision(x.dtype)
    with _on(x.device):
        machine = machine_of(x.device)
        few = few_tokens_config(machine, n, r, x.itemsize, precision == "tf32") if m <= FEW_TOKENS and n else None
        if few is not None:
            _few_tokens(few, x, weight, lora_a, lora_b, bias, scaling, p, state, y, h, precision)
            return y, h
        _shrink(machine, x, lora_a.stride(0), lora_a.stride(1), lora_a, h, 1.0 / (1.0 - p), p, state, precision)
        if n == 0:
            return y, h
        config = gemm_config(machine, next_power_of_2(m), n, r, x.itemsize, precision == "tf32", dropout=False)
        forward_kernel[(_blocks(m, config.block_rows) * _blocks(n, config.block_columns),)](
            x,
            weight,
            lora_b,
            bias,
            h,
            y,
            m,
            n,
            k,
            r,
            scaling,
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            weight.stride(1),
            lora_b.stride(0),
            lora_b.stride(1),
            0 if bias is None else bias.stride(0),
            BLOCK_M=config.block_rows,
            BLOCK_N=config.block_columns,
            BLOCK_K=config.block_sum,
            BLOCK_R=config.block_r,
            GROUP_M=config.group_m,
            EVEN_K=k % config.block_sum == 0,
            SPLIT=x.itemsize == 2,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return y, h


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden: Any = None
    grad_b = lora_b.new_empty(0)
    if h is not None:
        hidden, grad_b = dh_db(dy, lora_b, h, scaling)
    elif weight is not None or x is not None:
        hidden = dh(dy, lora_b, scaling)
    return (
        dy.new_empty(0) if weight is None else dx(dy, weight, hidden, lora_a, p, state),
        lora_a.new_empty(0) if x is None else da(hidden, x, lora_a, p, state),
        grad_b,
        dy.new_empty(0) if bias is None else dy.sum(0, dtype=bias.dtype),
    )


def dh(dy: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    out = torch.empty((dy.shape[0], lora_b.shape[1]), dtype=torch.float32, device=dy.device)
    with _on(dy.device):
        machine, precision = machine_of(dy.device), _precision(dy.dtype)
        _shrink(machine, dy, lora_b.stride(1), lora_b.stride(0), lora_b, out, scaling, 0.0, None, precision)
    return out


def dh_db(dy: Tensor, lora_b: Tensor, h: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    m, n = dy.shape
    r = lora_b.shape[1]
    out_dh = torch.empty((m, r), dtype=torch.float32, device=dy.device)
    out_db = torch.empty((n, r), dtype=lora_b.dtype, device=dy.device)
    if m == 0 or n == 0:
        return out_dh.zero_(), out_db.zero_()
    precision = _precision(dy.dtype)
    h = h.contiguous()
    with _on(dy.device):
        config = dh_db_config(machine_of(dy.device), next_power_of_2(m), n, r, dy.itemsize, precision == "tf32")
        dh_count, db_count = _blocks(n, config.block_n), _blocks(m, config.chunk_m)
        dh_parts = torch.empty((dh_count, m, r), dtype=torch.float32, device=dy.device)
        db_parts = torch.empty((db_count, n, r), dtype=torch.float32, device=dy.device)
        dh_db_kernel[(dh_count, db_count, _blocks(r, config.block_r))](
            dy,
            lora_b,
            h,
            dh_parts,
            db_parts,
            m,
            n,
            r,
            config.chunk_m,
            dy.stride(0),
            dy.stride(1),
            lora_b.stride(0),
            lora_b.stride(1),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=config.block_r,
            SPLIT=dy.itemsize == 2,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        reduce_kernel[(_blocks(m * r, _REDUCE_BLOCK) + _blocks(n * r, _REDUCE_BLOCK),)](
            dh_parts,
            db_parts,
            out_dh,
            out_db,
            m * r,
            n * r,
            dh_count,
            db_count,
            scaling,
            BLOCK=_REDUCE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out_dh, out_db


def dx(dy: Tensor, weight: Tensor, dh: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
    m, n = dy.shape
    r, k = lora_a.shape
    out = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    if m == 0 or k == 0:
        return out
    precision = _precision(dy.dtype)
    dh = dh.contiguous()
    with _on(dy.device):
        config = gemm_config(
            machine_of(dy.device), next_power_of_2(m), k, r, dy.itemsize, precision == "tf32", state is not None
        )
        dx_kernel[(_blocks(m, config.block_rows) * _blocks(k, config.block_columns),)](
            dy,
            weight,
            dh,
            lora_a,
            state,
            out,
            m,
            n,
            k,
            r,
            1.0 / (1.0 - p),
            dropout_threshold(p),
            dy.stride(0),
            dy.stride(1),
            weight.stride(0),
            weight.stride(1),
            lora_a.stride(0),
            lora_a.stride(1),
            BLOCK_M=config.block_rows,
            BLOCK_N=config.block_sum,
            BLOCK_K=config.block_columns,
            BLOCK_R=config.block_r,
            GROUP_M=config.group_m,
            EVEN_N=n % config.block_sum == 0,
            SPLIT=dy.itemsize == 2,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out


def da(dh: Tensor, x: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
    m, k = x.shape
    r = lora_a.shape[0]
    out = torch.empty((r, k), dtype=lora_a.dtype, device=x.device)
    if m == 0 or k == 0:
        return out.zero_()
    precision = _precision(x.dtype)
    dh = dh.contiguous()
    with _on(x.device):
        config = da_config(machine_of(x.device), k, r, x.itemsize, precision == "tf32")
        da_kernel[(_blocks(k, config.block_k), _blocks(r, config.block_r))](
            dh,
            x,
            state,
            out,
            m,
            k,
            r,
            1.0 / (1.0 - p),
            dropout_threshold(p),
            x.stride(0),
            x.stride(1),
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            SPLIT=x.itemsize == 2,
            PRECISION=precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out


def mask(state: Tensor, rows: int, columns: int, p: float) -> Tensor:
    out = torch.empty((rows, columns), dtype=torch.bool, device=state.device)
    if out.numel() == 0:
        return out
    with _on(state.device):
        mask_kernel[(_blocks(rows, _MASK_BLOCK_M), _blocks(columns, _MASK_BLOCK_K))](
            state,
            out,
            rows,
            columns,
            dropout_threshold(p),
            BLOCK_M=_MASK_BLOCK_M,
            BLOCK_K=_MASK_BLOCK_K,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _shrink(
    machine: Machine,
    x: Tensor,
    stride_ar: int,
    stride_ak: int,
    a: Tensor,
    out: Tensor,
    scale: float,
    p: float,
    state: Tensor | None,
    precision: str,
) -> None:
    """``out = scale (x * keep) aᵀ`` for x (M, K), a (R, K) by its strides, out (M, R)."""
    m, k = x.shape
    r = out.shape[1]
    if m == 0:
        return
    config = shrink_config(machine, next_power_of_2(m), r, x.itemsize, precision == "tf32")
    shrink_kernel[(_blocks(m, config.block_m), _blocks(r, config.block_r))](
        x,
        a,
        out,
        state,
        m,
        k,
        r,
        scale,
        dropout_threshold(p),
        x.stride(0),
        x.stride(1),
        stride_ar,
        stride_ak,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _few_tokens(
    config: FewTokensConfig,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
    y: Tensor,
    h: Tensor,
    precision: str,
) -> None:
    """y and h in one launch."""
    n, k = weight.shape
    few_tokens_kernel[(_blocks(n, config.block_n),)](
        x,
        weight,
        lora_a,
        lora_b,
        bias,
        state,
        h,
        y,
        x.shape[0],
        n,
        k,
        lora_a.shape[0],
        scaling,
        1.0 / (1.0 - p),
        dropout_threshold(p),
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        weight.stride(1),
        lora_a.stride(0),
        lora_a.stride(1),
        lora_b.stride(0),
        lora_b.stride(1),
        0 if bias is None else bias.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        EVEN_K=k % config.block_k == 0,
        SPLIT=x.itemsize == 2,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device: make it the tensors' one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _precision(dtype: torch.dtype) -> str:
    """How fp32 products are taken: "tf32" where torch allows it for its own matmuls on CUDA, else "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    # The older allow_tf32 raises where a program has used both that and this.
    setting = torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", setting)
    return "tf32" if setting == "tf32" else "ieee"
