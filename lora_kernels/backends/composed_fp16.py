"""The adapters' products over fp16, in PyTorch's operators: in fp32, for fp16's range is too small for h, dh, A and B.

x and dy are widened a block of rows at a time, in backward again: neither is held in fp32 as a whole. Only the large
products, with W, stay fp16's. See ``reference.adapter_dtype``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["a_grad", "block_count", "input_grad", "low_rank_sum", "output_grads", "shrink"]

Keep = Callable[[Tensor, float, Tensor], Tensor]

_BLOCK_ELEMENTS = 1 << 20  # that are held in fp32 at once; on a GPU 16 times as many, which keep it busy


def shrink(x: Tensor, lora_a: Tensor, p: float, state: Tensor | None, keep: Keep) -> Tensor:
    """(x * D) Aᵀ, fp32."""
    right, mask, scale = lora_a.float().t(), _mask(x, p, state, keep), 1.0 / (1.0 - p)
    z = x.new_empty((x.shape[0], lora_a.shape[0]), dtype=torch.float32)
    for rows in _blocks(x):
        _product_into(z[rows], _widened(x, mask, rows), right, scale)
    return z


def low_rank_sum(
    x: Tensor, weight: Tensor, lora_b: Tensor, h: Tensor, bias: Tensor | None, scaling: float, few: bool
) -> Tensor:
    """x Wᵀ + s h Bᵀ + bias in fp16: of ``few`` tokens the base first, of many last, as in ``composed.py``."""
    right, h = lora_b.float().t(), h.float()
    if few:
        linear = F.linear(x, weight, bias)
        low_rank = h.new_empty(linear.shape)
        _product_into(low_rank, h, right, scaling)
        return linear.add_(low_rank)
    linear = x.new_empty((x.shape[0], weight.shape[0]))
    offset = None if bias is None else bias.float()
    for rows in _blocks(linear):
        if offset is None:
            low_rank = h.new_empty((rows.stop - rows.start, weight.shape[0]))
            _product_into(low_rank, h[rows], right, scaling)
        else:
            low_rank = torch.addmm(offset, h[rows], right, alpha=scaling)
        linear[rows] = low_rank
    return linear.addmm_(x, weight.t())


def output_grads(dy: Tensor, lora_b: Tensor, h: Tensor | None, scaling: float) -> tuple[Tensor, Tensor | None]:
    """dh = s dy B and, where h is there, db = s dyᵀ h, both fp32."""
    right = lora_b.float()
    dh = dy.new_empty((dy.shape[0], lora_b.shape[1]), dtype=torch.float32)
    db = None if h is None else dh.new_zeros((lora_b.shape[1], dy.shape[1]))  # transposed: the quicker order
    for rows in _blocks(dy):
        wide = dy[rows].float()
        _product_into(dh[rows], wide, right, scaling)
        if db is not None and h is not None:
            db.addmm_(h[rows].float().t(), wide, alpha=scaling)
    return dh, None if db is None else db.t().contiguous()


def input_grad(
    dys: list[Tensor],
    weights: list[Tensor],
    dhs: list[Tensor],
    lora_as: list[Tensor],
    p: float,
    states: list[Tensor],
    keep: Keep,
) -> Tensor:
    """Σ_i dy_i W_i + D_i * (dh_i A_i) in fp16."""
    dx, scale = dys[0].new_empty((dys[0].shape[0], weights[0].shape[1])), 1.0 / (1.0 - p)
    rights, masks = [a.float() for a in lora_as], [keep(dx, p, state) for state in states]
    for rows in _blocks(dx):
        total = torch.zeros(dx[rows].shape, dtype=torch.float32, device=dx.device)
        for i, (dh, right) in enumerate(zip(dhs, rights, strict=True)):
            if masks:
                low_rank = torch.empty_like(total)
                _product_into(low_rank, dh[rows].float(), right, scale)
                total += low_rank.mul_(masks[i][rows])
            else:
                total.addmm_(dh[rows].float(), right)
        dx[rows] = total
    for dy, weight in zip(dys, weights, strict=True):
        dx.addmm_(dy, weight)
    return dx


def a_grad(dh: Tensor, x: Tensor, p: float, state: Tensor | None, keep: Keep) -> Tensor:
    """dhᵀ (x * D), fp32."""
    mask, scale = _mask(x, p, state, keep), 1.0 / (1.0 - p)
    da = x.new_zeros((dh.shape[1], x.shape[1]), dtype=torch.float32)
    for rows in _blocks(x):
        da.addmm_(dh[rows].float().t(), _widened(x, mask, rows), alpha=scale)
    return da


def _blocks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = _block_rows(columns, matrix.is_cpu)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def block_count(rows: int, columns: int, on_cpu: bool) -> int:
    """How many blocks of rows a matrix is widened in."""
    return -(-rows // _block_rows(columns, on_cpu))


def _block_rows(columns: int, on_cpu: bool) -> int:
    return max(1, (_BLOCK_ELEMENTS if on_cpu else 16 * _BLOCK_ELEMENTS) // max(1, columns))


def _mask(x: Tensor, p: float, state: Tensor | None, keep: Keep) -> Tensor | None:
    return None if state is None else keep(x, p, state)


def _widened(x: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    wide = x[rows].float()
    return wide if mask is None else wide.mul_(mask[rows])


def _product_into(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """out = scaling * left right; with beta = 0 what ``out`` holds is not read."""
    torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)
