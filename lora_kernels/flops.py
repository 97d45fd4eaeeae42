"""How many floating-point operations the operators of ``ops.py`` take, for ``torch.utils.flop_counter``.

As PyTorch counts: an (M, K) by (K, N) product is 2 M K N, and what works element by element counts nothing. Counted is
what is due by the formulas, whatever a backend adds: products in several parts, or a mask that is drawn twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["FORMULAS", "enter_formulas", "inform_counters"]

_COUNTING = "torch.utils.flop_counter"
_Shape = tuple[int, ...]


def _forward(x: _Shape, weight: _Shape, lora_a: _Shape, *_: Any, **__: Any) -> int:
    (m, k), n, r = x, weight[0], lora_a[0]
    return 2 * m * k * n + 2 * m * r * (k + n)


def _backward(
    dy: _Shape,
    x: _Shape | None,
    weight: _Shape | None,
    lora_a: _Shape,
    lora_b: _Shape,
    bias: _Shape | None,
    h: _Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    (m, n), (r, k) = dy, lora_a
    dh = 0 if x is None and weight is None else 2 * m * n * r
    dx = 0 if weight is None else 2 * m * n * k + 2 * m * r * k
    da = 0 if x is None else 2 * m * r * k
    db = 0 if h is None else 2 * m * n * r
    return dh + dx + da + db


def _shrink(x: _Shape, lora_a: _Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * lora_a[0]


def _product(x: _Shape, weight: _Shape, lora_b: _Shape, *_: Any, **__: Any) -> int:
    (n, r) = lora_b
    return 2 * x[0] * n * (x[1] + r)


def _output_grads(dy: _Shape, lora_b: _Shape, h: _Shape | None, *_: Any, **__: Any) -> int:
    one = 2 * dy[0] * dy[1] * lora_b[1]
    return one if h is None else 2 * one


def _input_grad(dys: list[_Shape], weights: list[_Shape], dhs: list[_Shape], *_: Any, **__: Any) -> int:
    k = weights[0][1]
    return sum(2 * dy[0] * k * (dy[1] + dh[1]) for dy, dh in zip(dys, dhs, strict=True))


def _a_grad(dh: _Shape, x: _Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * dh[1]


def _row_norms(weight: _Shape, lora_a: _Shape, *_: Any, **__: Any) -> int:
    """W Aᵀ, A Aᵀ and B (A Aᵀ)."""
    (n, k), r = weight, lora_a[0]
    return 2 * n * k * r + 2 * r * r * (k + n)


def _group_forward(x: _Shape, weights: list[_Shape], lora_as: list[_Shape], *_: Any, **__: Any) -> int:
    return sum(_forward(x, weight, lora_a) for weight, lora_a in zip(weights, lora_as, strict=True))


def _group_backward(
    dys: list[_Shape],
    x: _Shape | None,
    weights: list[_Shape],
    lora_as: list[_Shape],
    lora_bs: list[_Shape],
    biases: list[_Shape | None],
    hs: list[_Shape],
    *_: Any,
    **__: Any,
) -> int:
    of_members = [
        _backward(dy, x, weights[i] if weights else None, lora_as[i], lora_bs[i], biases[i], hs[i] if hs else None)
        for i, dy in enumerate(dys)
    ]
    return sum(of_members)


def _experts_forward(
    x: _Shape,
    weight: _Shape,
    lora_a: _Shape | None,
    lora_b: _Shape | None,
    offsets: _Shape,
    tokens: _Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    m = (x if tokens is None else tokens)[0]
    n, k = weight[1:]
    return 2 * m * n * k + (0 if lora_a is None else 2 * m * lora_a[1] * (n + k))


def _experts_backward(
    dy: _Shape,
    x: _Shape | None,
    weight: _Shape | None,
    lora_a: _Shape | None,
    lora_b: _Shape | None,
    offsets: _Shape,
    tokens: _Shape | None,
    h: _Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    if lora_a is None or lora_b is None:
        return 0 if weight is None else 2 * dy[0] * weight[1] * weight[2]
    return _backward(dy, x, weight, lora_a[1:], lora_b[1:], None, h)


def _experts_mlp_forward(
    x: _Shape,
    up_weight: _Shape,
    up_a: _Shape,
    up_b: _Shape,
    down_weight: _Shape,
    down_a: _Shape,
    down_b: _Shape,
    offsets: _Shape,
    slots: _Shape,
    *_: Any,
    **__: Any,
) -> int:
    rows = (slots[0], x[1]), (slots[0], down_weight[2])
    of_both = (rows[0], up_weight, up_a, up_b), (rows[1], down_weight, down_a, down_b)
    return sum(_experts_forward(*of, offsets, None) for of in of_both)


def _experts_mlp_backward(
    dy: _Shape,
    x: _Shape,
    joined: _Shape,
    up_weight: _Shape,
    up_a: _Shape,
    up_b: _Shape,
    down_weight: _Shape,
    down_a: _Shape,
    down_b: _Shape,
    offsets: _Shape,
    slots: _Shape,
    weights: _Shape,
    up_h: _Shape,
    down_h: _Shape,
    up_scaling: float,
    down_scaling: float,
    up_p: float,
    down_p: float,
    up_state: _Shape | None,
    down_state: _Shape | None,
    number: int,
    need_x: bool,
    need_weights: bool,
    need_up: bool,
    need_down: bool,
    *_: Any,
    **__: Any,
) -> int:
    m = slots[0]
    inward = need_x or need_up
    down = _of_due((m, dy[1]), down_weight, down_a, down_b, down_h, inward or need_weights, need_down)
    return down + (_of_due((m, joined[1]), up_weight, up_a, up_b, up_h, need_x, need_up) if inward else 0)


def _of_due(dy: _Shape, weight: _Shape, a: _Shape, b: _Shape, h: _Shape, need_x: bool, need_adapter: bool) -> int:
    x = (dy[0], weight[2])
    return _backward(
        dy, x if need_adapter else None, weight if need_x else None, a[1:], b[1:], None, h if need_adapter else None
    )


def _packed_product(
    x: _Shape, parts: Any, form: str, spec: str, rows: int, columns: int, lora_b: _Shape | None, *_: Any, **__: Any
) -> int:
    return 2 * x[0] * rows * (columns + (0 if lora_b is None else lora_b[1]))


def _packed_input_grad(
    dy: _Shape, parts: Any, form: str, spec: str, rows: int, columns: int, dh: _Shape | None, *_: Any, **__: Any
) -> int:
    return 2 * dy[0] * columns * (rows + (0 if dh is None else dh[1]))


# By the operators' names; each takes the operator's arguments, shapes in the place of tensors. ``mask``,
# ``gain_grad``, ``gated`` and ``gated_grad`` multiply no matrices.
FORMULAS: Mapping[str, Callable[..., int]] = {
    "forward": _forward,
    "backward": _backward,
    "shrink": _shrink,
    "product": _product,
    "output_grads": _output_grads,
    "input_grad": _input_grad,
    "a_grad": _a_grad,
    "row_norms": _row_norms,
    "group_forward": _group_forward,
    "group_backward": _group_backward,
    "experts_forward": _experts_forward,
    "experts_backward": _experts_backward,
    "experts_mlp_forward": _experts_mlp_forward,
    "experts_mlp_backward": _experts_mlp_backward,
    "packed_product": _packed_product,
    "packed_input_grad": _packed_input_grad,
}


def enter_formulas(packets: Mapping[str, Any]) -> None:
    """Enters the formulas of a backend's operators, by name, into PyTorch's registry, for counters made from now on.

    PyTorch's counter imports Triton, which takes 0.3 s. So nothing happens before somebody has imported the one, or
    the compiler, which imports the other.
    """
    if _COUNTING not in sys.modules and "torch._dynamo" not in sys.modules:
        return
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        if name in packets and packets[name] not in flop_registry:
            register_flop_formula(packets[name])(formula)


def inform_counters(packets: Mapping[str, Any]) -> None:
    """``enter_formulas``, and for the counters that are active too: one knows what was entered before it was made."""
    counting: Any = sys.modules.get(_COUNTING)
    if counting is None:
        return
    enter_formulas(packets)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, counting.FlopCounterMode):
            for name in FORMULAS.keys() & packets.keys():  # what the user gave as custom_mapping stays
                counter.flop_registry.setdefault(packets[name], counting.flop_registry[packets[name]])
