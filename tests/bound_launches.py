"""Random calls of the launch code for a described GPU: is each ready-made launch the one that would be made anew?

Run as a program, without ``TRITON_INTERPRET``, with the number of calls; prints JSON. Nothing is compiled or launched:
of every launch it is noted what kernel Triton's own binder would take for its arguments (types, divisibility by 16,
ones, None), and its grid and static arguments. Each call is made twice, by what is kept and by empty caches.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from lora_kernels.backends.triton import operators, part_operators
from lora_kernels.backends.triton.choose import blocks
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES
from lora_kernels.backends.triton.run import prepared
from recorded_launches import Driver

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = (16, 17)  # not 1: a stride that no address uses may differ
noted: list[tuple[str, ...]] = []
kept: dict[int, tuple[Any, str]] = {}  # by id: each launch, held so that it stays the only one, and its first binding
again = 0
wrong: list[str] = []


def note(self: Any, stream: int | None, *arguments: Any) -> None:
    """In the place of a launch."""
    global again
    bind = self.kernel.device_caches[0][4]
    _, specialisation, options = bind(*arguments, *self.static, debug=False, instrumentation_mode="", **self.options)
    bound = f"{specialisation} {options}"
    noted.append((self.kernel.__name__, str(self.grid), str(self.static), bound))
    if id(self) not in kept:
        kept[id(self)] = self, bound
    elif kept[id(self)][1] != bound:
        wrong.append(f"{self.kernel.__name__}: bound to {kept[id(self)][1]}, and now it would be {bound}")
    else:
        again += 1


class Empty(dict[Any, Any]):
    """A cache that keeps nothing."""

    def keep(self, key: Any, ready: Any) -> Any:
        return ready


def twice(call: Callable[[], object]) -> None:
    """By what is kept, then with empty caches: the same launches."""
    owners = [(operators, "_runs"), (operators, "_backward_runs"), (part_operators, "_steps")]
    noted.clear()
    call()
    by_kept = list(noted)
    caches = [getattr(owner, name) for owner, name in owners]
    noted.clear()
    for owner, name in owners:
        setattr(owner, name, Empty())
    call()
    for (owner, name), cache in zip(owners, caches, strict=True):
        setattr(owner, name, cache)
    wrong.extend(f"{old} was kept, and anew it is {new}" for old, new in zip(by_kept, noted, strict=True) if old != new)


def matrix(draw: random.Random, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """In one of the layouts that kernels tell apart."""
    zeros = torch.zeros(2 * rows * columns + 8 * rows + 8 * columns, dtype=dtype)

    def strided(row: int, column: int, offset: int = 0) -> Tensor:
        return zeros.as_strided((rows, columns), (row, column), offset)

    layouts = [
        *[strided(columns, 1)] * 20,  # contiguous: mostly one tensor at most differs from what is kept
        strided(columns, 1, offset=1),  # off 16 bytes
        strided(1, rows),
        strided(2 * columns, 1),
        strided(columns + 3, 1, offset=3),
        strided(0, 1),
    ]
    return draw.choice(layouts)


def vector(draw: random.Random, size: int, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(2 * size + 1, dtype=dtype)
    return draw.choice([zeros[:size], zeros[:size], zeros[:size], zeros[1 : size + 1], zeros[: 2 * size : 2]])


def one(draw: random.Random) -> None:
    """One call of one operator."""
    m, k, n, r = draw.choice((16, 64)), draw.choice(SIZES), draw.choice(SIZES), draw.choice((2, 16))
    dtype, p = draw.choice([BF16, BF16, FP16, FP32]), draw.choice([0.0, 0.1])
    adapters, scaling = draw.choice([dtype, FP32]), draw.choice([1, 0.5])
    x, weight, dy = (matrix(draw, *shape, dtype) for shape in ((m, k), (n, k), (m, n)))
    a, b = matrix(draw, r, k, adapters), matrix(draw, n, r, adapters)
    h, gain = matrix(draw, m, r, FP32), vector(draw, n, FP32)
    bias = draw.choice([None, vector(draw, n, draw.choice([dtype, FP32]))])
    state = draw.choice([torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)[1:]]) if p else None
    states, due = [] if state is None else [state], [draw.random() < 0.7 for _ in range(3)]
    of_x, of_weight, of_h = (t if is_due else None for t, is_due in zip((x, weight, h), due, strict=True))
    linear, keep = draw.choice([None, dy]), draw.random() < 0.5
    calls: list[Callable[[], object]] = [
        *[lambda: operators.forward(x, weight, a, b, bias, scaling, p, state)] * 3,
        *[lambda: operators.backward(dy, of_x, of_weight, a, b, bias, of_h, scaling, p, state)] * 3,
        lambda: part_operators.shrink(x, a, p, state),
        *[lambda: part_operators.product(x, weight, b, h, bias, linear if linear is None else gain, scaling, keep)] * 3,
        lambda: part_operators.output_grads(dy, b, of_h, bias, scaling),
        lambda: part_operators.input_grad([dy], [weight], [h], [a], p, states),
        lambda: part_operators.input_grad([dy] * 2, [weight] * 2, [h] * 2, [a] * 2, p, states * 2),
        lambda: part_operators.a_grad(h, x, p, state),
        lambda: part_operators.gain_grad(dy, linear, gain, bias),
        lambda: part_operators.row_norms(weight, a, b, scaling),
    ]
    twice(draw.choice(calls))


def main(count: int) -> None:
    driver.set_active(Driver())
    blocks.machine_of = lambda device: ARCHITECTURES[90]
    for kind in (prepared.Launch, prepared.ScratchLaunch):
        kind.__call__ = note  # type: ignore[method-assign]
    draw = random.Random(0)
    for _ in range(count):
        one(draw)
    print(json.dumps({"again": again, "wrong": wrong[:5]}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
