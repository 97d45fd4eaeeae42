"""What a backend says that it keeps is what autograd saves, hands to backward and reads in a double backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import dispatch, lora_linear, ops
from lora_kernels.kept import Kept, row_words
from lora_kernels.ops import Operators
from lora_kernels.packed_mask import pack, unpack
from numerics import same_bits

M, K, N, R = 9, 40, 24, 3


class _Scaled(Kept):
    """s h beside as many zeros, and the mask's words for every layer, or for none."""

    packs_mask = True

    def __init__(self, words: bool) -> None:
        self._words = words

    def scaled_h(self, h: Tensor, r: int, scaling: float) -> Tensor:
        return h[:, :r]

    def prefers_words(self, n: int) -> bool:
        return self._words


def keeping(true: Operators, words: bool, given: list[Any]) -> Operators:
    """``true`` that keeps as ``_Scaled`` says; ``given`` gets the state of each backward. s is a power of two."""

    def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Any, s: float, p: float, state: Any) -> Any:
        y, h, none = true.forward(x, weight, a, b, bias, s, p, state)
        return y, torch.cat([s * h, torch.zeros_like(h)], 1), none if state is None else pack(true.mask(state, M, K, p))

    def backward(dy: Tensor, x: Any, weight: Any, a: Tensor, b: Tensor, bias: Any, h: Any, *rest: Any) -> Any:
        s, p, state = rest
        given.append(state)
        if state is not None and state.dtype is torch.int32:
            state = unpack(state, K)
        return true.backward(dy, x, weight, a, b, bias, None if h is None else h[:, :R] / s, s, p, state)

    return replace(true, forward=forward, backward=backward, kept=_Scaled(words))


def problem(trains_a: bool = True) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    x, weight, a, b = (torch.randn(*s, generator=g).double() for s in ((M, K), (N, K), (R, K), (N, R)))
    return x.requires_grad_(trains_a), weight, a.requires_grad_(trains_a), b.requires_grad_()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("words", [False, True])
def test_what_is_kept_reaches_backward(words: bool, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.select("cpu", torch.float64, "eager")
    true, found, given = ops.operators("eager"), [], []
    for table in (true, keeping(true, words, given)):
        monkeypatch.setitem(ops._direct, "eager", table)
        torch.manual_seed(3)
        x, weight, a, b = problem()
        y = lora_linear(x, weight, a, b, None, 0.5, dropout_p=p, training=True, backend="eager")
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, a, b))])
    assert all(same_bits(left, right) for left, right in zip(*found, strict=True))
    (state,) = given
    assert state is None if not p else state.shape == ((M, row_words(K)) if words else (2,))


def test_a_double_backward_reads_the_kept_h(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where x is not kept, the gradient of B comes from h alone."""
    dispatch.select("cpu", torch.float64, "eager")
    true, found = ops.operators("eager"), []
    for table in (true, keeping(true, True, [])):
        monkeypatch.setitem(ops._direct, "eager", table)
        x, weight, a, b = problem(trains_a=False)
        y = lora_linear(x, weight, a, b, None, 0.5, backend="eager")
        found.append(torch.autograd.grad(y.square().sum(), b, create_graph=True)[0])
    assert same_bits(*found)
