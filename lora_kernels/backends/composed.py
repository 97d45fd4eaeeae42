"""The part operators of ``ops.py`` in PyTorch's own: eager's, and what a native library runs where it has no kernel.

*LoRA first*, for many tokens, ``bias + s h Bᵀ`` and then the large GEMM onto it (beta = 1); *base first*, for few,
``x Wᵀ + bias`` and then the low-rank product onto it, in place. ``bench/results/*/eager-order.json`` has both's times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import adapter_dtype
from ..tensors import as_dtype
from . import composed_fp16

__all__ = ["MANY_TOKENS", "Composition", "in_one_piece"]

# Below this many tokens the forms that dispatch least are quicker.
MANY_TOKENS = 64

# PyTorch's own 16-bit product on CPUs with AMX was seen to read past a row whose length is no multiple of its tiles. A
# release that does not tell of AMX is taken to run on such a CPU: a copy too many is right.
_READS_PAST_ROWS = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
_TILE_ROW = 32  # 16-bit values in a row of a tile

_NORM_ELEMENTS = 1 << 18  # of W, that are held in fp32 at once while norms are computed: they fit a core's cache


@dataclass(frozen=True)
class Composition:
    """``keep(like, p, state)``: the keep mask of ``like``'s shape, to be multiplied with it.

    Over fp16 what the adapters take part in is ``composed_fp16.py``'s.
    """

    keep: Callable[[Tensor, float, Tensor], Tensor]
    hidden_dtype: Callable[[torch.dtype], torch.dtype]

    @property
    def operators(self) -> dict[str, Callable[..., Any]]:
        methods: tuple[Callable[..., Any], ...] = (
            self.shrink, self.product, self.output_grads, self.input_grad, self.a_grad, self.gain_grad, self.row_norms,
            gated, gated_grad,
        )  # fmt: skip
        return {method.__name__: method for method in methods}

    def shrink(self, x: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
        if x.dtype is torch.float16:
            return composed_fp16.shrink(x, lora_a, p, state, self.keep)
        x, right = in_one_piece(x), as_dtype(lora_a, x.dtype).t()
        z = x @ right if state is None else scaled_product(x * self.keep(x, p, state), right, 1.0 / (1.0 - p))
        return as_dtype(z, self.hidden_dtype(x.dtype))

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        lora_b: Tensor,
        h: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        scaling: float,
        with_linear: bool,
    ) -> tuple[Tensor, Tensor]:
        added = None if gain is not None or bias is None else as_dtype(bias, x.dtype)
        linear = self._sum(x, weight, lora_b, h, added, scaling)
        if gain is None:
            return linear, x.new_empty(0)
        out = torch.empty_like(linear) if with_linear else linear
        if bias is None:
            torch.mul(linear, gain, out=out)
        else:
            torch.addcmul(as_dtype(bias, gain.dtype), linear, gain, out=out)
        return out, linear if with_linear else x.new_empty(0)

    def _sum(
        self, x: Tensor, weight: Tensor, lora_b: Tensor, h: Tensor, added: Tensor | None, scaling: float
    ) -> Tensor:
        """x Wᵀ + s h Bᵀ, and the bias where it is added to that."""
        x, few = in_one_piece(x), x.shape[0] < MANY_TOKENS
        if x.dtype is torch.float16:
            return composed_fp16.low_rank_sum(x, weight, lora_b, h, added, scaling, few)
        right, h = as_dtype(lora_b, x.dtype).t(), in_one_piece(as_dtype(h, x.dtype))
        if few:
            return F.linear(x, weight, added).addmm_(h, right, alpha=scaling)
        if added is None:
            return scaled_product(h, right, scaling).addmm_(x, weight.t())
        return torch.addmm(added, h, right, alpha=scaling).addmm_(x, weight.t())

    def output_grads(
        self, dy: Tensor, lora_b: Tensor, h: Tensor | None, bias: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if dy.dtype is torch.float16:
            dh, found = composed_fp16.output_grads(dy, lora_b, h, scaling)
            return dh, lora_b.new_empty(0) if found is None else as_dtype(found, lora_b.dtype), sum_of_rows(dy, bias)
        dy = in_one_piece(dy)
        dh = scaled_product(dy, as_dtype(lora_b, dy.dtype), scaling)
        if h is None:
            db = lora_b.new_empty(0)
        elif dy.shape[0] < MANY_TOKENS:
            db = scaled_product(dy.t(), in_one_piece(as_dtype(h, dy.dtype)), scaling)
        else:
            left = in_one_piece(as_dtype(h, dy.dtype)).t()  # the quicker order of the product
            db = scaled_product(left, dy, scaling).t().contiguous()
        return as_dtype(dh, self.hidden_dtype(dy.dtype)), as_dtype(db, lora_b.dtype), sum_of_rows(dy, bias)

    def input_grad(
        self,
        dys: list[Tensor],
        weights: list[Tensor],
        dhs: list[Tensor],
        lora_as: list[Tensor],
        p: float,
        states: list[Tensor],
    ) -> Tensor:
        dtype = dys[0].dtype
        if dtype is torch.float16:
            return composed_fp16.input_grad(
                [in_one_piece(dy) for dy in dys], weights, dhs, lora_as, p, states, self.keep
            )
        if not states:
            dh = in_one_piece(as_dtype(dhs[0] if len(dhs) == 1 else torch.cat(dhs, 1), dtype))
            lora_a = lora_as[0] if len(lora_as) == 1 else torch.cat([as_dtype(a, dtype) for a in lora_as])
            dx = dh @ as_dtype(lora_a, dtype)
        else:
            members = zip(dhs, lora_as, states, strict=True)
            terms = (self._dropped_input_grad(dh, a, dtype, p, state) for dh, a, state in members)
            dx = next(terms)
            for term in terms:
                dx += term
        for dy, weight in zip(dys, weights, strict=True):
            dx.addmm_(in_one_piece(dy), weight)
        return dx

    def _dropped_input_grad(self, dh: Tensor, lora_a: Tensor, dtype: torch.dtype, p: float, state: Tensor) -> Tensor:
        low_rank = scaled_product(in_one_piece(as_dtype(dh, dtype)), as_dtype(lora_a, dtype), 1.0 / (1.0 - p))
        return low_rank.mul_(self.keep(low_rank, p, state))

    def a_grad(self, dh: Tensor, x: Tensor, p: float, state: Tensor | None) -> Tensor:
        if x.dtype is torch.float16:
            return composed_fp16.a_grad(dh, x, p, state, self.keep)
        x, left = in_one_piece(x), in_one_piece(as_dtype(dh, x.dtype)).t()
        da = left @ x if state is None else scaled_product(left, x * self.keep(x, p, state), 1.0 / (1.0 - p))
        return as_dtype(da, self.hidden_dtype(x.dtype))

    def gain_grad(
        self, dy: Tensor, linear: Tensor | None, gain: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy = in_one_piece(dy)
        dlinear = torch.mul(dy, gain, out=torch.empty(dy.shape, dtype=dy.dtype, device=dy.device))
        if linear is None:
            dgain = gain.new_empty(0)
        else:
            wide = gain.dtype
            dgain = torch.zeros_like(gain, memory_format=torch.contiguous_format)
            rows = max(1, _NORM_ELEMENTS // max(1, dy.shape[1]))
            for part, own in zip(dy.split(rows), linear.split(rows), strict=True):
                dgain += (part.to(wide) * own).sum(0)
        return dlinear, dgain, sum_of_rows(dy, bias)

    def row_norms(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """‖w‖² + 2 s ⟨A w, b⟩ + s² ⟨(A Aᵀ) b, b⟩ of each row w of W and b of B."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        lora_a, lora_b = (t.to(adapter_dtype(weight.dtype)).to(wide) for t in (lora_a, lora_b))
        inner, squares = lora_b @ (lora_a @ lora_a.t()), []
        rows = max(1, _NORM_ELEMENTS // max(1, weight.shape[1]))
        if weight.device.type != "cpu":
            rows *= 64
        for part, b, c in zip(weight.split(rows), lora_b.split(rows), inner.split(rows), strict=True):
            part = part.to(wide)
            cross = torch.addmm(c, part, lora_a.t(), beta=scaling * scaling, alpha=2.0 * scaling)
            squares.append(torch.linalg.vector_norm(part, dim=1).square_() + (cross * b).sum(1))
        return torch.cat(squares).clamp_(min=0.0).sqrt_()


def gated(gate: Tensor, up: Tensor, number: int) -> Tensor:
    return _of_gate(gate, number).mul_(up)


def gated_grad(da: Tensor, gate: Tensor, up: Tensor, number: int, joined: bool) -> tuple[Tensor, Tensor]:
    m, f = gate.shape
    both = gate.new_empty((m, 2 * f) if joined else 0)
    dgate, dup = (both[:, :f], both[:, f:]) if joined else (gate.new_empty((m, f)), gate.new_empty((m, f)))
    torch.mul(da, _of_gate(gate, number), out=dup)
    outer = da * up
    if number == 0:
        torch.ops.aten.silu_backward.grad_input(outer, gate, grad_input=dgate)
    else:
        kind = "none" if number == 1 else "tanh"
        torch.ops.aten.gelu_backward.grad_input(outer, gate, approximate=kind, grad_input=dgate)
    return (both, gate.new_empty(0)) if joined else (dgate, dup)


def _of_gate(gate: Tensor, number: int) -> Tensor:
    """σ(gate), contiguous."""
    found = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if number == 0:
        return torch.ops.aten.silu.out(gate, out=found)  # type: ignore[no-any-return]
    return torch.ops.aten.gelu.out(gate, approximate="none" if number == 1 else "tanh", out=found)  # type: ignore[no-any-return]


def in_one_piece(matrix: Tensor) -> Tensor:
    """``matrix``, or a copy of it where PyTorch's product would read what lies between its rows, and where its elements
    share their place.

    Those of the gradient of ``y.sum()`` do. Each product would copy it for itself, to another layout than a compiled
    program's dy has: a library may sum the two in different orders.
    """
    if matrix.is_contiguous():
        return matrix
    if 0 in matrix.stride():
        return matrix.contiguous()
    if not _READS_PAST_ROWS or matrix.device.type != "cpu" or matrix.element_size() != 2:
        return matrix
    return matrix.contiguous() if matrix.stride(1) == 1 and matrix.shape[1] % _TILE_ROW else matrix


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``scaling * left @ right``, the scaling within the product; with beta = 0 the first argument is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def sum_of_rows(dy: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of ``bias`` in its dtype; empty without one."""
    return dy.new_empty(0) if bias is None else dy.sum(0, dtype=bias.dtype)
