"""The plain composition: the library's GEMM (oneDNN, cuBLAS) and as few calls around it as there can be.

Always available, always a candidate, and the yardstick of every fused backend. Two orders of the same sum:

* *base first* (CPU): ``y = x Wᵀ + bias``, then ``y += s h Bᵀ`` in place.
* *LoRA first* (CUDA): ``y = bias + s h Bᵀ``, then the large GEMM accumulates onto it (beta = 1).

Dropout: on the CPU the mask is drawn again in backward by a private generator that the seed seeds; on CUDA such a
generator would have to read the seed back from the device, so the mask itself, one byte an element, is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Problem
from ..ops import OPERATOR_NAMES, register
from ..reference import dropout_threshold
from . import draw_seed

__all__ = ["BACKEND"]

# Below this many tokens the plain forms of the skinny products are quicker, for they dispatch less.
_MANY_TOKENS = 64


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
    if x.is_cuda:
        return _low_rank_first(x, weight, lora_b, bias, scaling, h), h
    y = F.linear(x, weight, bias)  # (M, N)
    return _add_product(y, h, lora_b, scaling), h


def dh(dy: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return _product(dy, _as(lora_b, dy.dtype), scaling)


def dh_db(dy: Tensor, lora_b: Tensor, h: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    if dy.shape[0] < _MANY_TOKENS:
        db = _product(dy.t(), h, scaling)  # (N, R)
    else:
        db = _product(h.t(), dy, scaling).t().contiguous()  # (N, R): the quicker order of the product
    return dh(dy, lora_b, scaling), _as(db, lora_b.dtype)


def dx(dy: Tensor, weight: Tensor, dh: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
    lora_a = _as(lora_a, dy.dtype)
    if state is None:
        if dy.is_cuda:
            return (dh @ lora_a).addmm_(dy, weight)
        return _add_product(dy @ weight, dh, lora_a.t(), 1.0)
    low_rank = _product(dh, lora_a, 1.0 / (1.0 - p))  # (M, K)
    return low_rank.mul_(_keep(low_rank, p, state)).addmm_(dy, weight)


def da(dh: Tensor, x: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
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


def _low_rank_first(
    x: Tensor, weight: Tensor, lora_b: Tensor, bias: Tensor | None, scaling: float, h: Tensor
) -> Tensor:
    if bias is None:
        return _product(h, lora_b.t(), scaling).addmm_(x, weight.t())
    return torch.addmm(bias, h, lora_b.t(), alpha=scaling).addmm_(x, weight.t())


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``scaling * left @ right``, the scaling within the product; with beta = 0 the first argument is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``out += scaling * left @ rightᵀ`` in place, for a skinny ``left`` (M, R) and ``right`` (N, R)."""
    if out.shape[0] < _MANY_TOKENS:
        return out.addmm_(left, right.t(), alpha=scaling)
    out.t().addmm_(right, left.t(), alpha=scaling)
    return out


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
        if problem.device_type != "cuda":
            return "Base product first, then the low-rank term added in place; dropout is drawn again in backward."
        kept = " Dropout keeps its mask for backward, one byte an element of x." if problem.dropout_p else ""
        return f"Low-rank term first, then the base product accumulates onto it.{kept}"

    def register(self) -> None:
        implementations = {name: globals()[name] for name in OPERATOR_NAMES}
        register(self.name, implementations, hidden_dtype=lambda compute: compute)

    def dropout_state(self, x: Tensor, p: float) -> Tensor:
        if x.device.type == "cpu":
            return draw_seed(x)
        return torch.rand(x.shape, device=x.device) >= p


BACKEND = EagerBackend()
