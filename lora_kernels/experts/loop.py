"""The products of sorted tokens by a loop over the experts that have any: on every device, in every dtype.

The adapter's product is added onto the base's while that is in the cache. Over fp16 what the adapters take part in is
in fp32 (``reference.adapter_dtype``), an expert's rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import adapter_dtype
from ..tensors import as_dtype
from .problem import Adapter, Drop, Gradients
from .routing import Routing

__all__ = ["backward", "forward"]


def forward(
    x: Tensor, weight: Tensor, adapter: Adapter | None, drop: Drop | None, routing: Routing
) -> tuple[Tensor, Tensor | None]:
    """``(y, h)`` of x (M, K), weight (E, N, K): y (M, N) in x's dtype, h (M, R); see :mod:`.autograd`."""
    y = x.new_empty((x.shape[0], weight.shape[1]))
    wide = adapter_dtype(x.dtype)
    h = None if adapter is None else x.new_empty((x.shape[0], adapter.r), dtype=wide)
    for e, rows in routing.parts():
        torch.mm(x[rows], as_dtype(weight[e], x.dtype).t(), out=y[rows])
        if adapter is None or h is None:
            continue
        a, b = as_dtype(adapter.a[e], wide), as_dtype(adapter.b[e], wide)
        _product_into(h[rows], _dropped(x[rows], rows, drop, wide), a.t(), _scale(drop))
        _add_product(y[rows], h[rows], b.t(), adapter.scaling)
    y[routing.ends[-1] :] = 0.0
    return y, h


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    adapter: Adapter | None,
    h: Tensor | None,
    drop: Drop | None,
    routing: Routing,
) -> Gradients:
    """dx where ``weight`` is there, da where ``x`` is, db where ``h`` is; see :mod:`.autograd`."""
    wide = adapter_dtype(dy.dtype)
    dx = None if weight is None else dy.new_empty((dy.shape[0], weight.shape[2]))
    da = None if adapter is None or x is None else torch.zeros_like(adapter.a)
    db = None if adapter is None or h is None else torch.zeros_like(adapter.b)
    for e, rows in routing.parts():
        dy_e = dy[rows]
        if dx is not None and weight is not None:
            torch.mm(dy_e, as_dtype(weight[e], dy.dtype), out=dx[rows])
        if adapter is None:
            continue
        wide_dy = as_dtype(dy_e, wide)
        dh = _product(wide_dy, as_dtype(adapter.b[e], wide), adapter.scaling)
        if dx is not None:
            a = as_dtype(adapter.a[e], wide)
            if drop is None:
                _add_product(dx[rows], dh, a, 1.0)
            else:
                dx[rows].add_(_product(dh, a, drop.scale).mul_(drop.mask[rows]))
        if da is not None and x is not None:
            da[e] = _product(dh.t(), _dropped(x[rows], rows, drop, wide), _scale(drop))
        if db is not None and h is not None:
            db[e] = _product(h[rows].t(), wide_dy, adapter.scaling).t()  # the quicker order of the product
    if dx is not None:
        dx[routing.ends[-1] :] = 0.0
    return Gradients(dx, da, db)


def _scale(drop: Drop | None) -> float:
    return 1.0 if drop is None else drop.scale


def _dropped(x: Tensor, rows: slice, drop: Drop | None, wide: torch.dtype) -> Tensor:
    """x * mask in ``wide``; what is kept is not scaled yet."""
    x = as_dtype(x, wide)
    return x if drop is None else x * drop.mask[rows]


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def _product_into(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """out = scaling * left right; with beta = 0 what ``out`` holds is not read."""
    torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """out += scaling * left right, in the wider of their dtypes."""
    if out.dtype is left.dtype:
        torch.addmm(out, left, right, alpha=scaling, out=out)  # addmm_ is one that counters of flops do not know
    else:
        out.add_(left @ right, alpha=scaling)
