"""A backward pass outside of what is active where it is called: a vmap that batches its gradients, or autocast.

The kernels have no batching rules. So under ``is_grads_batched``, or ``torch.vmap`` around ``autograd.grad``, the pass
runs once for each gradient of the batch. Autocast would cast some of what the pass multiplies: forward has done that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_surrounded", "run_outside"]

_functorch: Any = torch._C._functorch
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_of_older: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
_is_of_newer: Callable[[Tensor], bool] = _functorch.is_batchedtensor
_LEVEL = 1  # of the older vmap, which is_grads_batched uses and which nothing public nests
_MODE = "VmapMode"  # the older one's dispatch key, under which eager may not draw dropout's mask


def is_surrounded(gradients: Sequence[Any]) -> bool:
    """Whether one of them stands for several, or autocast acts on its device."""
    return _is_batched(gradients) or (_is_any_autocast_enabled() and any(map(_is_cast, gradients)))


def _is_batched(gradients: Sequence[Any]) -> bool:
    return any(g is not None and (_is_of_older(g) or _is_of_newer(g)) for g in gradients)


def _is_cast(gradient: Any) -> bool:
    # torch knows no autocast of meta
    return gradient is not None and not gradient.is_meta and torch.is_autocast_enabled(gradient.device.type)


class _Context:
    """Backward's context, whose saved tensors are unpacked once."""

    def __init__(self, ctx: Any, saved: Sequence[Any] | None) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors if saved is None else saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def run_outside(
    backward: Callable[..., Any], ctx: Any, gradients: Sequence[Any], saved: Sequence[Any] | None = None
) -> tuple[Any, ...]:
    """``backward(ctx, *gradients)``, where :func:`is_surrounded` is true of the gradients.

    ``saved``: what stands for ``ctx.saved_tensors``.
    """
    whole = _Context(ctx, saved)
    if _is_batched(gradients):
        return _one_by_one(backward, whole, gradients)
    device = next(g.device.type for g in gradients if g is not None)
    with torch.autocast(device, enabled=False):
        found: tuple[Any, ...] = backward(whole, *gradients)
    return found


def _one_by_one(backward: Callable[..., Any], whole: _Context, gradients: Sequence[Any]) -> tuple[Any, ...]:
    """With a batch of each gradient that is due."""
    torch_: Any = torch
    given = [g for g in gradients if g is not None]
    older = any(_is_of_older(g) for g in given)
    level = _LEVEL if older else max(_functorch.maybe_get_level(g) for g in given)
    taken_out = torch_._remove_batch_dim if older else _functorch._remove_batch_dim
    put_back = torch_._add_batch_dim if older else _functorch._add_batch_dim
    size = max(taken_out(g, level, 1, 0).shape[0] for g in given)  # one that is not batched counts as one
    apart = [None if g is None else taken_out(g, level, size, 0) for g in gradients]
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
