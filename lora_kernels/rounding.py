"""Arithmetic that carries the error to expect: a formula run on ``Noisy`` tells how wrong its results will be.

A ``Noisy`` holds what a tensor is in exact arithmetic (float64) and, for each element, the expected square of the error
that a computation in a coarser dtype has made so far. Errors of different operations are taken to be independent.

**One rounding.** The neighbours of a value v, 2^e <= |v| < 2^(e+1), lie 2 u 2^e apart, with u = eps / 2 of the dtype.
The error is uniform within u 2^e, so its square is u² 2^(2e) / 3 in the mean.

**One sum.** Let t_1 .. t_n be its terms, S their sum, Q the sum of their squares. Added one by one, each partial sum
s_j but the first is rounded: an error whose square is at most u² s_j² / 3 in the mean. In an order drawn at random

    E[s_j²] = Q j (n - j) / (n (n - 1)) + S² j (j - 1) / (n (n - 1)) <= max(Q, S²),

so with the roundings of n products E[error²] is at most

    u² / 3 ((n - 1) max(Q, S²) + Q).

This is what is expected here. In the mean over orders and significands it is about twice the error itself; but the
order and the values at hand are given, and a result of few numbers may have a bad one of both.

Sums in several lanes or blocks, as kernels add, make less. A sum of sums is one sum of all their terms, as a fused
kernel has them in one accumulator. Sums of 16-bit values are made in fp32 and then rounded, each by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TF32_EPS", "Arithmetic", "Noisy", "rounding_square"]

TF32_EPS = 2.0**-10


def rounding_square(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The expected square of the error of rounding float64 ``value`` to ``dtype``."""
    significand, _ = torch.frexp(value)  # 0, or from 0.5 to below 1 in magnitude
    step = torch.where(significand == 0.0, 0.0, value * (0.25 * torch.finfo(dtype).eps) / significand)
    return step.square() / 3.0


@dataclass(frozen=True)
class Arithmetic:
    """What a dtype's operations lose.

    Attributes:
        dtype: of the values that are stored; sums are made in fp32 or, where it is finer, in ``dtype``.
        tf32: what enters a product is first rounded to TF32.
    """

    dtype: torch.dtype
    tf32: bool = False

    def of(self, exact: Tensor) -> Noisy:
        """``exact`` without an error."""
        value = exact.detach().double()
        return Noisy(value, torch.zeros_like(value), self)

    @property
    def _sums(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def stored(self, value: Tensor, square: Tensor) -> Noisy:
        return Noisy(value, square + rounding_square(value, self.dtype), self)

    def summed(self, value: Tensor, square: Tensor, terms: Tensor, n: int, products: bool) -> Noisy:
        """A sum of n terms whose squares add up to ``terms``; ``square`` is what their own errors come to."""
        if products:
            square = square + self.of_products(terms)
        if self.dtype == self._sums:
            return Noisy(value, square, self, terms, n)
        return self.stored(value, square + self.of_sum(value, terms, n))

    def of_products(self, terms: Tensor) -> Tensor:
        """The expected square of the error of making products whose squares add up to ``terms``."""
        operands = 2.0 * (TF32_EPS / 2.0) ** 2 if self.tf32 else 0.0
        return (self._unit**2 + operands) / 3.0 * terms

    def of_sum(self, value: Tensor, terms: Tensor, n: int) -> Tensor:
        """The expected square of the error of adding n terms up to ``value``."""
        return self._unit**2 / 3.0 * max(n - 1, 0) * torch.maximum(terms, value.square())

    @property
    def _unit(self) -> float:
        return torch.finfo(self._sums).eps / 2.0


class Noisy:
    """A tensor, float64, and the expected square of each element's error; made by :meth:`Arithmetic.of`.

    It has those of a tensor's operations that the formulas of this package are written in.
    """

    def __init__(
        self, value: Tensor, square: Tensor, arithmetic: Arithmetic, terms: Tensor | None = None, n: int = 1
    ) -> None:
        self.value, self.arithmetic = value, arithmetic
        self._square, self._terms, self._n = square, terms, n  # of a sum: without the error of adding up

    dtype = torch.float64

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def square(self) -> Tensor:
        """The expected square of each element's error."""
        if self._terms is None:
            return self._square
        return self._square + self.arithmetic.of_sum(self.value, self._terms, self._n)

    @property
    def error(self) -> Tensor:
        """The root mean square error to expect of each element."""
        return self.square.sqrt()

    def _view(self, of: Callable[[Tensor], Tensor]) -> Noisy:
        terms = None if self._terms is None else of(self._terms)
        return Noisy(of(self.value), of(self._square), self.arithmetic, terms, self._n)

    def t(self) -> Noisy:
        return self._view(lambda tensor: tensor.t())

    def __getitem__(self, index: Any) -> Noisy:
        return self._view(lambda tensor: tensor[index])

    def to(self, dtype: torch.dtype) -> Noisy:
        return self

    def _other(self, other: Noisy | Tensor | float) -> Noisy:
        if isinstance(other, Noisy):
            return other
        return self.arithmetic.of(other if isinstance(other, Tensor) else self.value.new_tensor(other))

    def __add__(self, other: Noisy | Tensor | float) -> Noisy:
        other = self._other(other)
        value = self.value + other.value
        if self._terms is not None or other._terms is not None:  # one sum of all terms
            left, right = (each.value.square() if each._terms is None else each._terms for each in (self, other))
            return Noisy(value, self._square + other._square, self.arithmetic, left + right, self._n + other._n)
        exact = (self.value == 0.0) | (other.value == 0.0)
        rounding = rounding_square(value, self.arithmetic.dtype).where(~exact, 0.0)
        return Noisy(value, self._square + other._square + rounding, self.arithmetic)

    def __mul__(self, other: Noisy | Tensor | float) -> Noisy:
        other = self._other(other)
        value = self.value * other.value
        exact = _power_of_two(self.value) | _power_of_two(other.value)
        rounding = rounding_square(value, self.arithmetic.dtype).where(~exact, 0.0)
        for total, factor in ((self, other), (other, self)):
            if total._terms is not None and not factor.square.any():  # a factor on each of its terms
                by = factor.value.square()
                return Noisy(value, total._square * by + rounding, self.arithmetic, total._terms * by, total._n)
        square = self.square * other.value.square() + self.value.square() * other.square
        return Noisy(value, square + rounding, self.arithmetic)

    def __matmul__(self, other: Noisy | Tensor) -> Noisy:
        other = self._other(other)
        a, b = self.value.square(), other.value.square()
        square = self.square @ b + a @ other.square
        return self.arithmetic.summed(self.value @ other.value, square, a @ b, self.shape[1], products=True)

    def sum(self, dim: int) -> Noisy:
        terms = self.value.square().sum(dim)
        return self.arithmetic.summed(self.value.sum(dim), self.square.sum(dim), terms, self.shape[dim], products=False)

    def norm(self, dim: int) -> Noisy:
        """√Σ v²: half the relative error of the sum."""
        total = (self * self).sum(dim)
        root = total.value.sqrt()
        return self.arithmetic.stored(root, (total.square / (4.0 * total.value)).where(total.value > 0.0, 0.0))

    def clamp(self, min: float) -> Noisy:
        return Noisy(self.value.clamp(min=min), self.square.where(self.value > min, 0.0), self.arithmetic)

    def __gt__(self, bound: float) -> Tensor:
        return self.value > bound

    def __neg__(self) -> Noisy:
        return Noisy(-self.value, self._square, self.arithmetic, self._terms, self._n)

    def __truediv__(self, by: float) -> Noisy:
        return self * (1.0 / by)

    def __sub__(self, other: Noisy | Tensor | float) -> Noisy:
        return self + (-self._other(other))

    def __rsub__(self, other: Tensor | float) -> Noisy:
        return self._other(other) - self

    __radd__, __rmul__ = __add__, __mul__

    def __rmatmul__(self, other: Tensor) -> Noisy:
        return self._other(other) @ self

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Noisy:
        """An elementwise function: the error goes through its derivative."""
        with torch.enable_grad():
            at = self.value.detach().requires_grad_()
            value = function(at)
            (slope,) = torch.autograd.grad(value.sum(), at)
        return self.arithmetic.stored(value.detach(), self.square * slope.square())

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """``torch.erf(noisy)``, ``tensor * noisy`` and the like."""
        name = function.__name__
        if name in ("erf", "exp", "sigmoid", "tanh") and not kwargs:
            return args[0]._mapped(function)
        if name == "ones_like":
            return torch.ones_like(args[0].value)
        operation = {"mul": "__rmul__", "add": "__radd__", "matmul": "__rmatmul__", "sub": "__rsub__"}.get(
            name.strip("_").removeprefix("r")
        )
        if operation is None or kwargs or isinstance(args[0], Noisy):
            return NotImplemented
        return getattr(args[1], operation)(args[0])


def _power_of_two(value: Tensor) -> Tensor:
    """Where a factor is 0 or a power of two: the product with it is exact."""
    significand = torch.frexp(value)[0].abs()
    return (significand == 0.5) | (significand == 0.0)
