"""The same products on a CPU by the native library's operators of a linear layer, an expert at a time.

Base and low-rank part of an expert's rows are one call, as in ``FusedLoRALinear``: so experts cost no more than a loop
over such layers. Dropout's mask is drawn for all slots at once, and :mod:`.loop` takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import select
from ..ops import operators
from ..tensors import as_dtype
from . import loop
from .problem import Adapter, Drop, Gradients
from .routing import Routing

__all__ = ["backward", "forward", "runs"]

_BACKEND = "native"


def runs(x: Tensor, adapter: Adapter | None, p: float) -> bool:
    """Whether this is the way for x (M, K): the backend that is chosen for x's dtype is native, and nothing drops."""
    return x.is_cpu and adapter is not None and p == 0.0 and select("cpu", x.dtype, None) == _BACKEND


def forward(
    x: Tensor, weight: Tensor, adapter: Adapter | None, drop: Drop | None, routing: Routing
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.loop.forward`; h (M, R) without the rows of sentinels, in the dtype that the library keeps it in."""
    parts = routing.parts()
    if adapter is None or drop is not None or not parts:
        return loop.forward(x, weight, adapter, drop, routing)
    y, hs, run = x.new_empty((x.shape[0], weight.shape[1])), [], operators(_BACKEND).forward
    for e, rows in parts:
        a, b, w = adapter.a[e], adapter.b[e], as_dtype(weight[e], x.dtype)
        y[rows], h, _ = run(x[rows], w, a, b, None, adapter.scaling, 0.0, None)
        hs.append(h)
    y[routing.ends[-1] :] = 0.0
    return y, torch.cat(hs)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter | None,
    h: Tensor | None,
    drop: Drop | None,
    routing: Routing,
) -> Gradients:
    """As :func:`.loop.backward`."""
    parts = routing.parts()
    if adapter is None or drop is not None or not parts:
        return loop.backward(dy, x, weight, adapter, h, drop, routing)
    dx = None if weight is None else dy.new_empty((dy.shape[0], weight.shape[2]))
    da = None if x is None else torch.zeros_like(adapter.a)
    db = None if h is None else torch.zeros_like(adapter.b)
    run = operators(_BACKEND).backward
    for e, rows in parts:
        x_e, h_e = (None if tensor is None else tensor[rows] for tensor in (x, h))
        w = None if weight is None else as_dtype(weight[e], dy.dtype)
        found = run(dy[rows], x_e, w, adapter.a[e], adapter.b[e], None, h_e, adapter.scaling, 0.0, None)
        for into, where, part in ((dx, rows, found[0]), (da, e, found[1]), (db, e, found[2])):
            if into is not None:
                into[where] = part
    if dx is not None:
        dx[routing.ends[-1] :] = 0.0
    return Gradients(dx, da, db)
