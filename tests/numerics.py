"""The tolerance policy as the tests use it. Its numbers are in ``lora_kernels.accuracy``, for ``verify`` ships them."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.accuracy import Accuracy, judge


def check(
    name: str, actual: Tensor, exact: Tensor, yardstick: Tensor, dtype: torch.dtype, tf32: bool = False
) -> Accuracy:
    """Asserts that ``actual`` passes the policy; returns the measured accuracy."""
    accuracy = judge(name, actual, exact, yardstick, dtype, tf32)
    assert accuracy.passed, str(accuracy)
    return accuracy


def check_all(
    actual: dict[str, Tensor | None],
    exact: dict[str, Tensor],
    yardstick: dict[str, Tensor],
    dtype: torch.dtype,
    tf32: bool = False,
) -> None:
    """Asserts that every result that is there passes; one message tells all that do not."""
    verdicts = [
        judge(name, value, exact[name], yardstick[name], dtype, tf32)
        for name, value in actual.items()
        if value is not None
    ]
    failed = [str(verdict) for verdict in verdicts if not verdict.passed]
    assert not failed, "\n".join(failed)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (NaN equals NaN)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
