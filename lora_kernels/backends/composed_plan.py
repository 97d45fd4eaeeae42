"""What the plain composition launches, in the order of ``eager.py``, ``composed.py`` and ``composed_fp16.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import traffic
from ..dispatch import Problem
from ..explaining.report import Launch, PassPlan
from . import composed_fp16
from .composed import MANY_TOKENS

__all__ = ["plans"]


def plans(problem: Problem, tokens: int) -> tuple[PassPlan, ...]:
    """Of both passes; adapters are fp32 over 16 bits, there is no bias, and dx, dA and dB are due."""
    half = problem.dtype is torch.float16
    sizes = _Sizes.of(problem, tokens)
    forward, backward = (_forward_fp16, _backward_fp16) if half else (_forward, _backward)
    few = tokens < MANY_TOKENS
    order = (
        "base first, the low-rank product onto it in place" if few else "LoRA first, then the base onto it (beta = 1)"
    )
    why = f"fixed: {'fewer than' if few else 'at least'} {MANY_TOKENS} tokens take this order; there is no other."
    if half:
        order += "; the adapters' products in fp32, a block of rows at a time"
    return (
        PassPlan("forward", order, "fixed", why, None, tuple(forward(sizes))),
        PassPlan("backward", "dh, dB, dx (the low-rank term, then dy W onto it), dA", "fixed",
                 "fixed: there is no other order.", None, tuple(backward(sizes))),
    )  # fmt: skip


@dataclass(frozen=True)
class _Sizes:
    """``c`` bytes an element of the compute dtype, ``a`` of an adapter."""

    m: int
    k: int
    n: int
    r: int
    c: int
    a: int
    dropout: bool
    on_cpu: bool

    @staticmethod
    def of(p: Problem, tokens: int) -> _Sizes:
        assert p.in_features is not None
        assert p.out_features is not None
        assert p.r is not None
        c = p.dtype.itemsize
        sizes = tokens, p.in_features, p.out_features, p.r
        return _Sizes(*sizes, c, max(c, 4), p.dropout_p > 0, p.device_type == "cpu")

    @property
    def x(self) -> int:
        return self.m * self.k

    @property
    def y(self) -> int:
        return self.m * self.n

    def base(self, what: str, accumulates: bool = False) -> Launch:
        written = (self.x if what.startswith("dy") else self.y) if accumulates else 0
        return Launch(what, traffic.large(self.m, self.k, self.n, self.c) + self.c * written)

    def skinny(self, what: str, elements: int) -> Launch:
        return Launch(what, traffic.skinny(self.m, elements, self.r, self.c))

    def cast(self, what: str, columns: int) -> list[Launch]:
        """Between an adapter's dtype and the compute dtype, where they differ; over fp16 they need not."""
        return [Launch(what, self.r * columns * (self.a + self.c))] if self.a != self.c else []

    def mask(self, kept: bool = False) -> list[Launch]:
        """Drawn anew on a CPU (bits, a comparison, a cast); elsewhere once, before forward, and ``kept``."""
        if not self.dropout or (kept and not self.on_cpu):
            return []
        if self.on_cpu:
            return [Launch("the mask of x is drawn", self.x * (6 + self.c), 3)]
        return [Launch("the mask of x is drawn, and kept", self.x * 9, 2)]

    def masked(self, what: str) -> list[Launch]:
        return [Launch(what, self.x * (2 * self.c + (self.c if self.on_cpu else 1)))] * self.dropout

    def blocks(self, columns: int) -> int:
        return composed_fp16.block_count(self.m, columns, self.on_cpu)

    def in_fp32(self, what: str, elements: int, calls: int, products: int = 1) -> Launch:
        """Of fp16: rows are widened, and what follows reads them in fp32; so many calls a block."""
        moved = elements * (self.c + 4) + products * traffic.skinny(self.m, elements, self.r, 4)
        return Launch(f"{what}, in blocks of rows", moved, calls * self.blocks(elements // self.m))


def _forward(s: _Sizes) -> list[Launch]:
    found = [*s.mask(), *s.masked("x times its mask"), *s.cast("A is cast", s.k), s.skinny("h = x Aᵀ", s.x)]
    cast = s.cast("B is cast", s.n)
    if s.m < MANY_TOKENS:
        return [*found, s.base("x Wᵀ + bias"), *cast, s.skinny("s h Bᵀ onto it", 2 * s.y)]
    return [*found, *cast, s.skinny("bias + s h Bᵀ", s.y), s.base("x Wᵀ onto it", True)]


def _backward(s: _Sizes) -> list[Launch]:
    found = [*s.cast("B is cast", s.n), s.skinny("dh = s dy B", s.y), s.skinny("dB = s dyᵀ h", s.y)]
    if s.m >= MANY_TOKENS:
        found.append(Launch("dB is turned", 2 * s.c * s.n * s.r))
    found += [*s.cast("dB is cast", s.n), *s.cast("A is cast", s.k), s.skinny("dh A", s.x)]
    found += [*s.mask(kept=True), *s.masked("times the mask"), s.base("dy W onto it", True)]
    found += [*s.mask(kept=True), *s.masked("x times its mask"), s.skinny("dA = dhᵀ x", s.x)]
    return [*found, *s.cast("dA is cast", s.k)]


def _forward_fp16(s: _Sizes) -> list[Launch]:
    found = [*s.mask(), s.in_fp32("h = x Aᵀ", s.x, 3 if s.dropout else 2)]
    if s.m < MANY_TOKENS:
        return [*found, s.base("x Wᵀ + bias"), Launch("s h Bᵀ onto it", traffic.skinny(s.m, s.y, s.r, 4) + 8 * s.y, 2)]
    return [*found, s.in_fp32("bias + s h Bᵀ", s.y, 2), s.base("x Wᵀ onto it", True)]


def _backward_fp16(s: _Sizes) -> list[Launch]:
    found = [Launch("zeros for dB", 4 * s.n * s.r), s.in_fp32("dh = s dy B and dB = s dyᵀ h", s.y, 3, 2)]
    found += [Launch("dB is turned", 8 * s.n * s.r), *s.mask(kept=True)]
    found += [s.in_fp32("dh A", s.x, 5 if s.dropout else 3), s.base("dy W onto it", True)]
    found += [*s.mask(kept=True), Launch("zeros for dA", 4 * s.k * s.r)]
    return [*found, s.in_fp32("dA = dhᵀ x", s.x, 3 if s.dropout else 2)]
