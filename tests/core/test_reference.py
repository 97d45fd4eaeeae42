"""The reference is the specification: its hand-derived gradients are autograd's, its Philox is the published one."""

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


def test_philox_is_the_published_generator() -> None:
    """Random123's known answer for philox4x32 with 7 rounds, counter 0 and key 0."""
    zero = _words(torch.tensor([0, 0]))
    assert zero == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def _words(seed: torch.Tensor) -> list[int]:
    """The four output words of counter (0, 0, stream), read back from the mask's 16-bit decisions by bisection."""
    halves = []
    for column in range(8):
        low, high = 0, 65536  # find the smallest threshold that drops the element
        while high - low > 1:
            middle = (low + high) // 2
            kept = reference.philox_keep_mask(seed, 1, 8, middle / 65536)[0, column]
            low, high = (middle, high) if kept else (low, middle)
        halves.append(low)
    return [halves[2 * i] | halves[2 * i + 1] << 16 for i in range(4)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_keeps_the_fraction_it_should(p: float) -> None:
    mask = reference.philox_keep_mask(torch.tensor([123456789, -5]), 512, 515, p)
    kept, expected = int(mask.sum()), (1 - p) * mask.numel()
    assert abs(kept - expected) < 5 * (p * expected) ** 0.5  # five standard deviations
    assert abs(int(mask.sum(0).max()) - 512 * (1 - p)) < 6 * (512 * p * (1 - p)) ** 0.5  # no column is favoured


def test_mask_changes_with_key_stream_row_and_column() -> None:
    def mask(seed: list[int]) -> torch.Tensor:
        return reference.philox_keep_mask(torch.tensor(seed), 8, 64, 0.5)

    base = mask([1, 2])
    assert torch.equal(base, mask([1, 2]))
    assert not torch.equal(base, mask([2, 2]))
    assert not torch.equal(base, mask([1, 3]))
    assert len({tuple(row) for row in base.tolist()}) == 8
    assert torch.equal(reference.philox_keep_mask(torch.tensor([1, 2]), 4, 64, 0.5), base[:4])


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (0.5, 32768), (0.1, 6554), (0.9999999, 65535)])
def test_threshold(p: float, threshold: int) -> None:
    assert reference.dropout_threshold(p) == threshold
