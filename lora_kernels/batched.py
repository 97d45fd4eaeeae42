"""A backward pass that is given a batch of gradients: ``is_grads_batched``, or ``torch.vmap`` around ``autograd.grad``.

The kernels have no batching rules. So the pass runs once for each gradient of the batch, outside of the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_batched", "one_by_one"]

_functorch: Any = torch._C._functorch
_LEVEL = 1  # of the older vmap, which is_grads_batched uses and which nothing public nests
_MODE = "VmapMode"  # the older one's dispatch key, under which eager may not draw dropout's mask


def is_batched(gradients: Sequence[Any]) -> bool:
    """Whether one of them stands for several."""
    return any(g is not None and (_is_of_older(g) or _functorch.is_batchedtensor(g)) for g in gradients)


def _is_of_older(gradient: Tensor) -> bool:
    older: bool = _functorch.is_legacy_batchedtensor(gradient)
    return older


class _Context:
    """Backward's context, whose saved tensors are unpacked once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def one_by_one(backward: Callable[..., Any], ctx: Any, gradients: Sequence[Any]) -> tuple[Any, ...]:
    """What ``backward(ctx, *gradients)`` gives of gradients that :func:`is_batched`, for all of the batch."""
    torch_: Any = torch
    given = [g for g in gradients if g is not None]
    older = any(_is_of_older(g) for g in given)
    level = _LEVEL if older else max(_functorch.maybe_get_level(g) for g in given)
    taken_out = torch_._remove_batch_dim if older else _functorch._remove_batch_dim
    put_back = torch_._add_batch_dim if older else _functorch._add_batch_dim
    size = max(taken_out(g, level, 1, 0).shape[0] for g in given)  # one that is not batched counts as one
    apart = [None if g is None else taken_out(g, level, size, 0) for g in gradients]
    whole = _Context(ctx)
    with _outside(older):
        found = [backward(whole, *(None if g is None else g[i] for g in apart)) for i in range(size)]
        joined = [None if of[0] is None else torch.stack(of) for of in zip(*found, strict=True)]
    return tuple(None if gradient is None else put_back(gradient, 0, level) for gradient in joined)


@contextmanager
def _outside(older: bool) -> Iterator[None]:
    """The block is not within the innermost vmap."""
    if not older:
        from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

        with temporarily_pop_interpreter_stack():
            yield
        return
    torch._C._dispatch_tls_set_dispatch_key_included(_MODE, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_included(_MODE, True)
