"""What the products of sorted tokens are given besides x and W, as data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Adapter", "Drop", "Gradients"]


class Adapter(NamedTuple):
    """A (E, R, K) and B (E, N, R) of all experts, and s."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def r(self) -> int:
        return self.a.shape[1]


class Drop(NamedTuple):
    """Dropout's mask of the sorted x: bool (M, K), True where it is kept; and 1 / (1 - p)."""

    mask: Tensor
    scale: float


class Gradients(NamedTuple):
    """Those that are due: dx (M, K), da (E, R, K), db (E, N, R)."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None
