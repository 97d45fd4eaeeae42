"""The plain composition: the library's GEMM (oneDNN, cuBLAS) and as few calls around it as there can be.

Always available, always a candidate, and the yardstick of every fused backend; the products are in ``composed.py``.

Dropout: on the CPU the mask is drawn again in backward by a private generator that the seed seeds; on CUDA such a
generator would have to read the seed back from the device, so the mask itself, one byte an element, is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Problem
from ..explaining.report import PassPlan
from ..kept import Kept, no_words
from ..ops import register
from ..reference import adapter_dtype, dropout_threshold
from . import composed_experts, draw_seed
from .composed import Composition, in_one_piece, sum_of_rows

__all__ = ["BACKEND"]


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = in_one_piece(x)  # once for both
    h = _composition.shrink(x, lora_a, p, state)
    y, _ = _composition.product(x, weight, lora_b, h, bias, None, scaling, False)
    return y, h, no_words(x.device)


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
    dy = in_one_piece(dy)
    dx, da, db = dy.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if weight is None and x is None and h is None:
        return dx, da, db, sum_of_rows(dy, bias)
    dh, db, dbias = _composition.output_grads(dy, lora_b, h, bias, scaling)
    if weight is not None:
        dx = _composition.input_grad([dy], [weight], [dh], [lora_a], p, [] if state is None else [state])
    if x is not None:
        da = _composition.a_grad(dh, x, p, state).to(lora_a.dtype)
    return dx, da, db, dbias


def mask(state: Tensor, rows: int, columns: int, p: float) -> Tensor:
    return state.clone() if state.dtype is torch.bool else _draw_mask(state, rows, columns, p)


def _draw_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """16 random bits an element against a threshold: several times as quick as bernoulli_, which draws one by one."""
    generator = torch.Generator("cpu").manual_seed(int(seed[0]))
    words = torch.empty(-(-rows * columns // 4), dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: rows * columns].view(rows, columns)
    return bits >= dropout_threshold(p) - 32768


def _keep(like: Tensor, p: float, state: Tensor) -> Tensor:
    """In ``like``'s dtype on a CPU, where mixed products crawl."""
    if state.dtype is torch.bool:
        return state
    return _draw_mask(state, like.shape[0], like.shape[1], p).to(like.dtype)


_composition = Composition(_keep, adapter_dtype)


class _Kept(Kept):
    def hidden_dtype(self, compute: torch.dtype) -> torch.dtype:
        return adapter_dtype(compute)


class EagerBackend:
    """PyTorch's own operators; see the module's text."""

    name = "eager"

    def why_not(self, problem: Problem) -> list[str]:
        return []

    def why_not_automatic(self, problem: Problem) -> list[str]:
        return []

    def describe(self, problem: Problem) -> str:
        if problem.experts:
            return _of_experts(problem)
        if problem.device_type == "cpu":
            dropout = "Dropout's mask is drawn again in backward from a 16-byte seed."
        else:
            dropout = "Dropout keeps its mask for backward, one byte an element of x."
        order = "PyTorch's own operators: one product by W, one for the adapter, added in place."
        return f"{order} {dropout}" if problem.dropout_p else order

    def plan(self, problem: Problem, tokens: int) -> tuple[PassPlan, ...]:
        from . import composed_plan

        return composed_plan.plans(problem, tokens)

    def register(self, device_type: str) -> None:
        register(self.name, self.operators(), _Kept())

    def operators(self) -> dict[str, Callable[..., Any]]:
        """Its implementations of the operators of ``ops.py``, by name."""
        experts = composed_experts.operators(mask)
        return {"forward": forward, "backward": backward, "mask": mask, **_composition.operators, **experts}

    def dropout_state(self, x: Tensor, p: float) -> Tensor:
        if x.device.type == "cpu":
            return draw_seed(x)
        return torch.rand(x.shape, device=x.device) >= p


def _of_experts(problem: Problem) -> str:
    if problem.device_type == "cuda" and problem.dtype is torch.bfloat16:
        return "PyTorch's grouped_mm for each product of all experts, where rows are aligned to 16 bytes; else a loop."
    waits = " The host waits for the routing." if problem.device_type == "cuda" else ""
    return f"PyTorch's own operators, expert after expert.{waits}"


BACKEND = EagerBackend()
