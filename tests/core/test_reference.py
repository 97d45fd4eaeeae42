"""The reference is the specification: its hand-derived gradients are autograd's. Its mask: test_packed_mask.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case, make
from lora_kernels import reference
from lora_kernels.activations import ACTIVATIONS
from numerics import check


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [Case(), Case(m=1, k=3, n=2, r=1), Case(m=0), Case(m=5, k=7, n=3, r=9)], ids=str)
def test_hand_derived_gradients_are_autograds(shape: Case, activation: str, p: float) -> None:
    case = Case(m=shape.m, k=shape.k, n=shape.n, r=shape.r, dtype=torch.float64)
    i = make(case)
    mask = torch.rand(i.x.shape) >= p if p else None
    weight = i.weight.requires_grad_()
    gain = torch.linspace(-1.0, 2.0, case.n, dtype=torch.float64, requires_grad=True)
    y, _ = reference.forward(i.x, weight, i.lora_a, i.lora_b, i.bias, 0.7, mask, p, gain, activation)
    leaves = (i.x, weight, i.lora_a, i.lora_b, i.bias, gain)
    by_autograd = torch.autograd.grad(y, leaves, i.dy)
    by_hand = reference.backward(i.dy, i.x, weight, i.lora_a, i.lora_b, 0.7, mask, p, gain, activation)
    for name, hand, auto in zip(by_hand._fields, by_hand, by_autograd, strict=True):
        check(name, hand, auto, auto, torch.float64)


def test_forward_is_the_formula_written_out() -> None:
    x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    a, b = torch.tensor([[5.0, 6.0]]), torch.tensor([[7.0]])
    y, h = reference.forward(x, w, a, b, torch.tensor([0.5]), scaling=2.0)
    assert h.item() == 1 * 5 + 2 * 6
    assert y.item() == 1 * 3 + 2 * 4 + 0.5 + 2 * (17 * 7)


@pytest.mark.parametrize(("activation", "torchs"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)])
def test_activations_are_torchs(activation: str, torchs: Callable[[Tensor], Tensor]) -> None:
    z = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64).unsqueeze(1)
    one = torch.ones(1, 1, dtype=torch.float64)
    _, h = reference.forward(z, one, one, one, activation=activation)
    check("h", h, torchs(z), torchs(z), torch.float64)


def test_dropped_elements_reach_only_the_base_term() -> None:
    x, w, a, b = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 1)
    y, _ = reference.forward(x, w, a, b, mask=torch.tensor([[True, False]]), p=0.5)
    assert y.item() == 2.0  # 1 / (1 - 0.5), the second element gone
