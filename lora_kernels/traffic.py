"""Bytes that a product moves from and to memory, every tensor once: for all cost models and explanations."""

from __future__ import annotations

__all__ = ["large", "skinny"]


def large(m: int, k: int, n: int, size: int) -> int:
    """x Wᵀ of (m, k) and (n, k), or dy W; ``size`` bytes an element."""
    return size * (m * k + n * k + m * n)


def skinny(m: int, elements: int, r: int, size: int) -> int:
    """A product with R on one side: ``elements`` of what is (m, wide), an adapter, and h or dh (m, r)."""
    wide = elements // m if m else 0
    return (elements + r * (wide + m)) * size
