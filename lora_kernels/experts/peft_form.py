"""A and B of stacked experts as PEFT's files have them: two matrices, with the experts in their ranks.

PEFT's lora_A is (E R, K), the expert the slowest of its rows; its lora_B is (N, R E), the expert the fastest of its
columns.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import InvalidArgumentError

__all__ = ["from_peft", "to_peft"]


def to_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's lora_A (E R, K) and lora_B (N, R E) of a (E, R, K) and b (E, N, R)."""
    return a.reshape(-1, a.shape[2]).contiguous(), b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()


def from_peft(lora_a: Tensor, lora_b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_peft`: a (E, R, K) and b (E, N, R).

    Raises:
        InvalidArgumentError: the ranks do not agree, or are no multiple of ``num_experts``.
    """
    rows, columns = lora_a.shape[0], lora_b.shape[1]
    if rows != columns or rows % num_experts:
        raise InvalidArgumentError(
            f"lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)} were given for {num_experts} experts: both "
            "must have the rank times the number of experts. The file belongs to another model."
        )
    a = lora_a.reshape(num_experts, -1, lora_a.shape[1])
    return a, lora_b.reshape(lora_b.shape[0], -1, num_experts).permute(2, 0, 1).contiguous()
