"""The tolerance policy as the tests use it. Its numbers are in ``lora_kernels.accuracy``, for ``verify`` ships them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.accuracy import Accuracy, judge
from lora_kernels.rounding import Arithmetic, rounding_square


def check(
    name: str,
    actual: Tensor,
    exact: Tensor,
    yardstick: Tensor,
    dtype: torch.dtype,
    tf32: bool = False,
    expected: Tensor | None = None,
) -> Accuracy:
    """Asserts that ``actual`` passes the policy; returns the measured accuracy."""
    accuracy = judge(name, actual, exact, yardstick, dtype, tf32, expected=expected)
    assert accuracy.passed, str(accuracy)
    return accuracy


def check_all(
    actual: dict[str, Tensor | None],
    exact: dict[str, Tensor],
    yardstick: dict[str, Tensor],
    dtype: torch.dtype,
    tf32: bool = False,
    expected: Mapping[str, Tensor] | None = None,
) -> None:
    """Asserts that every result that is there passes; one message tells all that do not."""
    expected = expected or {}
    verdicts = [
        judge(name, value, exact[name], yardstick[name], dtype, tf32, expected=expected.get(name))
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


_SUMS = {"mm", "addmm", "bmm", "baddbmm"}
_ROUNDED = {
    *("add", "add_", "sub", "mul", "mul_", "div", "neg", "pow", "rsqrt", "mean", "sum", "index_add", "index_add_"),
    *("clamp", "sigmoid", "silu", "gelu", "tanh", "_softmax", "silu_backward", "gelu_backward", "sigmoid_backward"),
    "tanh_backward",
}


class _Roundings(TorchDispatchMode):
    """Adds to what float64 operations give the error that ``arithmetic`` expects of them, drawn at random."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.arithmetic = arithmetic

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not isinstance(found, Tensor) or found.dtype is not torch.float64 or name not in _SUMS | _ROUNDED:
            return found
        dtype = self.arithmetic.dtype
        square = torch.zeros_like(found)
        if name in _SUMS:
            left, right = args[-2:]
            terms = left.square() @ right.square()
            unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
            square += unit**2 / 3.0 * terms + self.arithmetic.of_sum(found, terms, left.shape[-1])
        if name in _ROUNDED or dtype.itemsize < 4:
            square += rounding_square(found, dtype)
        return found.add_(torch.randn_like(found) * square.sqrt())


def drawn_errors(
    dtype: torch.dtype, run: Callable[[], Mapping[str, Tensor]], exact: Mapping[str, Tensor], draws: int = 12
) -> dict[str, Tensor]:
    """The error to expect of each element of what ``run`` computes in float64, were it computed in ``dtype``.

    As ``lora_kernels.rounding`` derives it for one operation, but carried through by drawing: for formulas with
    functions and gradients that the module does not have. The root mean square over ``draws`` runs.
    """
    squares = {name: torch.zeros_like(value) for name, value in exact.items()}
    with torch.random.fork_rng(devices=[]):
        for draw in range(draws):
            torch.manual_seed(draw)
            with _Roundings(Arithmetic(dtype)):
                found = run()
            for name, value in exact.items():
                squares[name] += (found[name] - value).square() / draws
    return {name: square.sqrt() for name, square in squares.items()}


def check_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Asserts that ``y`` is x Wᵀ + bias by the policy, for x of at least two dimensions."""

    def formula(number: Callable[[Tensor], Any]) -> dict[str, Any]:
        product = number(x.flatten(0, -2)) @ number(weight).t()
        return {"y": product if bias is None else product + number(bias)}

    exact, yardstick, errors = three_ways(x.dtype, formula)
    check_all({"y": y.flatten(0, -2)}, exact, yardstick, x.dtype, expected=errors)
