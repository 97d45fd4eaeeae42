"""The tolerance policy as the tests use it. Its numbers are in ``lora_kernels.accuracy``, for ``verify`` ships them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kernels.accuracy import Accuracy, judge
from lora_kernels.drawn import drawn_errors
from lora_kernels.rounding import Arithmetic


def check(
    name: str,
    actual: Tensor,
    exact: Tensor | Callable[[], Tensor],
    yardstick: Tensor,
    dtype: torch.dtype,
    tf32: bool = False,
    expected: Tensor | None = None,
) -> Accuracy:
    """Asserts that ``actual`` passes the policy; returns the measured accuracy.

    ``exact`` as a function runs PyTorch's own operations in float64: where the error of one rounding is exceeded, the
    error to expect is drawn by it.
    """
    run = None if isinstance(exact, Tensor) else exact
    exact = exact if isinstance(exact, Tensor) else exact().detach()
    accuracy = judge(name, actual, exact, yardstick, dtype, tf32, expected=expected)
    if run is not None and not accuracy.passed:
        drawn = drawn_errors(dtype, lambda: {name: run().detach()}, {name: exact}, tf32)
        accuracy = judge(name, actual, exact, yardstick, dtype, tf32, expected=drawn[name])
    assert accuracy.passed, str(accuracy)
    return accuracy


def check_all(
    actual: Mapping[str, Tensor | None],
    exact: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]],
    yardstick: Mapping[str, Tensor],
    dtype: torch.dtype,
    tf32: bool = False,
    expected: Mapping[str, Tensor] | None = None,
    depth: int = 1,
) -> None:
    """Asserts that every result that is there passes; one message tells all that do not. ``exact`` as for ``check``."""
    run = None if isinstance(exact, Mapping) else exact
    exact = exact if isinstance(exact, Mapping) else exact()

    def failures(expected: Mapping[str, Tensor]) -> list[str]:
        verdicts = [
            judge(name, value, exact[name], yardstick[name], dtype, tf32, depth, expected.get(name))
            for name, value in actual.items()
            if value is not None
        ]
        return [str(verdict) for verdict in verdicts if not verdict.passed]

    failed = failures(expected or {})
    if run is not None and failed:
        failed = failures(drawn_errors(dtype, run, exact, tf32))
    assert not failed, "\n".join(failed)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (NaN equals NaN)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def alike_as_printed(left: list[str], right: list[str]) -> bool:
    """Whether printed numbers are the same but for one in the last digit, for each was rounded by itself."""
    return all(abs(int(a.replace(".", "")) - int(b.replace(".", ""))) <= 1 for a, b in zip(left, right, strict=True))


def three_ways(
    dtype: torch.dtype, formulas: Callable[[Callable[[Tensor], Any]], dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Exact, the yardstick in ``dtype``, and the error to expect of each element of it.

    ``formulas(number)`` computes every result by name from what ``number`` makes of tensors: float64, ``dtype``, or
    numbers that carry their expected error.
    """
    numbers: tuple[Callable[[Tensor], Any], ...] = (
        lambda tensor: tensor.detach().double().contiguous(),
        lambda tensor: tensor.detach().to(dtype).contiguous(),
        Arithmetic(dtype).of,
    )
    exact, yardstick, noisy = map(formulas, numbers)
    return exact, yardstick, {name: value.error for name, value in noisy.items()}


def check_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Asserts that ``y`` is x Wᵀ + bias by the policy, for x of at least two dimensions."""

    def formula(number: Callable[[Tensor], Any]) -> dict[str, Any]:
        product = number(x.flatten(0, -2)) @ number(weight).t()
        return {"y": product if bias is None else product + number(bias)}

    exact, yardstick, errors = three_ways(x.dtype, formula)
    check_all({"y": y.flatten(0, -2)}, exact, yardstick, x.dtype, expected=errors)
