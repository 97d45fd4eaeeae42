"""The plain composition: the library's GEMM (oneDNN, cuBLAS) and as few calls around it as there can be.

Always available, always a candidate, and the yardstick of every fused backend. Two orders of the same sum:

* *base first*, for few tokens: ``y = x Wᵀ + bias``, then ``y += s h Bᵀ`` in place.
* *LoRA first*, for many, and for dx: ``y = bias + s h Bᵀ``, then the large GEMM accumulates onto it (beta = 1).

``bench/results/*/eager-order.json`` holds both orders' times.

Dropout: on the CPU the mask is drawn again in backward by a private generator that the seed seeds; on CUDA such a
generator would have to read the seed back from the device, so the mask itself, one byte an element, is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Problem
from ..ops import OPERATOR_NAMES, register
from ..reference import dropout_threshold
from . import draw_seed

__all__ = ["BACKEND"]

# Below this many tokens the forms that dispatch least are quicker.
MANY_TOKENS = 64


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
    lora_a, lora_b = _as(lora_a, x.dtype), _as(lora_b, x.dtype)
    if bias is not None:
        bias = _as(bias, x.dtype)
    h = x @ lora_a.t() if state is None else _product(x * _keep(x, p, state), lora_a.t(), 1.0 / (1.0 - p))  # (M, R)
    if x.shape[0] < MANY_TOKENS:
        return F.linear(x, weight, bias).addmm_(h, lora_b.t(), alpha=scaling), h
    low_rank = _product(h, lora_b.t(), scaling) if bias is None else torch.addmm(bias, h, lora_b.t(), alpha=scaling)
    return low_rank.addmm_(x, weight.t()), h


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
    dh: Any = None
    if weight is not None or x is not None:
        dh = _product(dy, _as(lora_b, dy.dtype), scaling)  # (M, R)
    return (
        dy.new_empty(0) if weight is None else _dx(dy, weight, dh, lora_a, p, state),
        lora_a.new_empty(0) if x is None else _da(dh, x, lora_a, p, state),
        lora_b.new_empty(0) if h is None else _db(dy, h, lora_b, scaling),
        dy.new_empty(0) if bias is None else dy.sum(0, dtype=bias.dtype),
    )


def _db(dy: Tensor, h: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    if dy.shape[0] < MANY_TOKENS:
        db = _product(dy.t(), h, scaling)  # (N, R)
    else:
        db = _product(h.t(), dy, scaling).t().contiguous()  # (N, R): the quicker order of the product
    return _as(db, lora_b.dtype)


def _dx(dy: Tensor, weight: Tensor, dh: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
    lora_a = _as(lora_a, dy.dtype)
    if state is None:
        return (dh @ lora_a).addmm_(dy, weight)
    low_rank = _product(dh, lora_a, 1.0 / (1.0 - p))  # (M, K)
    return low_rank.mul_(_keep(low_rank, p, state)).addmm_(dy, weight)


def _da(dh: Tensor, x: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
    if state is None:
        return _as(dh.t() @ x, lora_a.dtype)
    return _as(_product(dh.t(), x * _keep(x, p, state), 1.0 / (1.0 - p)), lora_a.dtype)


def mask(state: Tensor, rows: int, columns: int, p: float) -> Tensor:
    return state.clone() if state.dtype is torch.bool else _draw_mask(state, rows, columns, p)


def _draw_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """16 random bits an element against a threshold: several times as quick as bernoulli_, which draws one by one."""
    generator = torch.Generator().manual_seed(int(seed[0]))
    words = torch.empty(-(-rows * columns // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: rows * columns].view(rows, columns)
    return bits >= dropout_threshold(p) - 32768


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``scaling * left @ right``, the scaling within the product; with beta = 0 the first argument is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the microseconds of a call that changes nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _keep(like: Tensor, p: float, state: Tensor) -> Tensor:
    """The keep mask of ``like``'s shape, to be multiplied with it; in its dtype on a CPU (mixed products crawl)."""
    if state.dtype is torch.bool:
        return state
    return _draw_mask(state, like.shape[0], like.shape[1], p).to(like.dtype)


class EagerBackend:
    """PyTorch's own operators; see the module's text."""

    name = "eager"

    def why_not(self, problem: Problem) -> list[str]:
        return []

    def why_not_automatic(self, problem: Problem) -> list[str]:
        return []

    def describe(self, problem: Problem) -> str:
        if problem.device_type == "cpu":
            dropout = "Dropout's mask is drawn again in backward from a 16-byte seed."
        else:
            dropout = "Dropout keeps its mask for backward, one byte an element of x."
        order = "PyTorch's products, one accumulating onto the other in place."
        return f"{order} {dropout}" if problem.dropout_p else order

    def register(self, device_type: str) -> None:
        implementations = {name: globals()[name] for name in OPERATOR_NAMES}
        register(self.name, implementations, hidden_dtype=lambda compute: compute)

    def dropout_state(self, x: Tensor, p: float) -> Tensor:
        if x.device.type == "cpu":
            return draw_seed(x)
        return torch.rand(x.shape, device=x.device) >= p


BACKEND = EagerBackend()
