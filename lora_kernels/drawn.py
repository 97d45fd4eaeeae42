"""Errors to expect, by drawing: for whole models, whose functions and gradients ``rounding`` has no formulas for.

A run in float64 gets, after each operation, the error that ``rounding`` expects of it in a coarser dtype, drawn at
random. What comes out differs from the exact results as a run in that dtype does, and the root mean square over a few
runs tells by how much. PyTorch's own operations are seen, in backward too. This package's operators are run by
``eager``'s formulas, but for those of another backend that draw masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import dispatch, ops
from .rounding import Arithmetic, rounding_square

__all__ = ["drawn_errors"]

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_ADDED_UP = {"sum", "mean"}
_ROUNDED = {
    *("add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "pow", "sqrt", "rsqrt", "reciprocal"),
    *("index_add", "index_add_", "clamp", "exp", "erf", "sigmoid", "silu", "gelu", "tanh", "_softmax"),
    *("silu_backward", "gelu_backward", "sigmoid_backward", "tanh_backward", "_softmax_backward_data"),
}
_primitive: set[Any] = set()  # PyTorch's operations that were found to be composed of no others


def drawn_errors(
    dtype: torch.dtype,
    run: Callable[[], Mapping[str, Tensor]],
    exact: Mapping[str, Tensor],
    tf32: bool = False,
    draws: int = 12,
) -> dict[str, Tensor]:
    """The root mean square error to expect of each element of what ``run`` computes in float64, were it in ``dtype``.

    Args:
        run: gives the results by name, each time of the same inputs.
        exact: what it gives.
        tf32: products round what enters them to TF32.
        draws: how many runs.

    Raises:
        ValueError: another run gives other results without any error: it draws anew, or adds to what was there.
    """
    before = {name: value.clone() for name, value in exact.items()}  # a run may have given what the next one adds to
    for name, value in run().items():
        if not (value - before[name]).norm() <= 1e-9 * value.norm():
            raise ValueError(f"{name} differs from run to run: each run must compute the same")
    squares = {name: torch.zeros_like(value) for name, value in before.items()}
    for draw in range(draws):
        with _Roundings(Arithmetic(dtype, tf32), draw):
            found = run()
        for name, value in before.items():
            squares[name] += (found[name] - value).square() / draws
    return {name: square.sqrt() for name, square in squares.items()}


class _Roundings(TorchDispatchMode):
    """Adds to what float64 operations give the error that ``arithmetic`` expects of them.

    Drawn by generators of its own: what ``run`` draws, dropout for one, is what it would draw without it.
    """

    def __init__(self, arithmetic: Arithmetic, seed: int) -> None:
        super().__init__()
        self.arithmetic, self.seed = arithmetic, seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _primitive:
            with self:
                if (formulas := _formulas(function, args)) is not None:
                    return formulas(*args, **kwargs)
                if (composed := function.decompose(*args, **kwargs)) is not NotImplemented:
                    return composed
            if function.namespace != ops.NAMESPACE:
                _primitive.add(function)
        found = function(*args, **kwargs)
        if not isinstance(found, Tensor) or found.dtype is not torch.float64:
            return found
        square = self._square(function, found, args, kwargs)
        if square is None:
            return found
        if found.device not in self.generators:
            self.generators[found.device] = torch.Generator(found.device).manual_seed(self.seed)
        drawn = torch.empty_like(found).normal_(generator=self.generators[found.device])
        return found.add_(drawn * square.sqrt())

    def _square(self, function: Any, found: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """The expected square of the error of one operation, None where it makes none."""
        name, by = function.overloadpacket.__name__, self.arithmetic
        if name in _ROUNDED:
            return rounding_square(found, by.dtype)
        if name in _PRODUCTS:
            left, right = args[-2:]
            square = by.of_products(terms := left.square() @ right.square())
            square = square + by.of_sum(found, terms, left.shape[-1])
            return square + rounding_square(found, by.dtype) if by.dtype.itemsize < 4 else square
        if name in _ADDED_UP:
            n = args[0].numel() // max(found.numel(), 1)
            terms = function(args[0].square(), *args[1:], **kwargs) / (n if name == "mean" else 1)
            return by.of_sum(found, terms, n) + rounding_square(found, by.dtype)
        if name == "linalg_vector_norm":  # half the relative error of the sum of the squares
            square = by.of_sum(found, found.square(), args[0].numel() // max(found.numel(), 1)) / 4.0
            return square + rounding_square(found, by.dtype)
        return None


def _formulas(function: Any, args: Any) -> Callable[..., Any] | None:
    """``eager``'s implementation of an operator of this package; None for others and where another backend drops."""
    if function.namespace != ops.NAMESPACE:
        return None
    backend, _, operator = function.overloadpacket.__name__.partition("_")
    named = {argument.name: value for argument, value in zip(function._schema.arguments, args, strict=False)}
    drops = named.get("state") is not None or bool(named.get("states"))
    if operator not in ops.OPERATOR_NAMES or (drops and backend != "eager"):
        return None
    eager: Any = dispatch.backend("eager")
    formulas: Callable[..., Any] = eager.operators()[operator]
    return formulas
