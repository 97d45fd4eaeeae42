"""Numbers that a compiled graph takes as inputs, so that layers with other scalings or p need no graph of their own.

Dynamo makes a float symbolic once it has seen two values of it. Later a pass of PyTorch turns such a float into a 0-dim
tensor where products and sums take it, and where anything else takes it makes it a constant again: a graph for each
value. So each operator with numbers has an overload, ``.Tensor``, that takes 0-dim fp64 tensors in their place. A graph
calls that one where a number is symbolic, and the plain one elsewhere. The bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_numbers", "is_fixed", "tensor_schema", "with_numbers"]

_TENSOR = {"float ": "Tensor ", "float[] ": "Tensor[] "}
_KINDS = ("float", "List[float]")


def tensor_schema(schema: str) -> str | None:
    """``schema`` with tensors for numbers; None where it has none."""
    found = schema
    for number, tensor in _TENSOR.items():
        found = found.replace(number, tensor)
    return None if found == schema else found


def is_fixed(number: float) -> bool:
    """Whether ``number`` is a constant of the graph that is being traced; for code that is compiled."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a compiler has imported it

    return has_static_value(number)


def by_numbers(overload: Any) -> Callable[..., Any]:
    """The implementation of a ``.Tensor`` overload by the plain ``overload``."""
    places = _places(overload)

    def called(*arguments: Any) -> Any:
        given = list(arguments)
        for place in places:
            given[place] = _each(lambda tensor: tensor.item(), given[place])
        return overload(*given)

    return called


def with_numbers(plain: Any, by_tensors: Any) -> Callable[..., Any]:
    """What compiled code calls with numbers: ``plain`` if all are fixed, else ``by_tensors``."""
    places = _places(plain)

    def called(*arguments: Any) -> Any:
        numbers = [arguments[place] for place in places]
        if all(is_fixed(n) for number in numbers for n in (number if isinstance(number, (list, tuple)) else (number,))):
            return plain(*arguments)
        given = [_each(_as_tensor, argument) if i in places else argument for i, argument in enumerate(arguments)]
        return by_tensors(*given)

    return called


def _places(overload: Any) -> tuple[int, ...]:
    return tuple(i for i, argument in enumerate(overload._schema.arguments) if str(argument.type) in _KINDS)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of a number or of each of a list."""
    return [function(one) for one in value] if isinstance(value, (list, tuple)) else function(value)


def _as_tensor(number: float) -> Tensor:
    """A product is what the pass turns into a tensor; by 1 in fp64 it is exact."""
    return torch.ones((), dtype=torch.float64, device="cpu") * number
