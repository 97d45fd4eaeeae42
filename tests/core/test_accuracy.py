"""The numerics policy itself: what it expects of sums, and what it lets pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case, Inputs, make, measures
from lora_kernels.accuracy import expected_errors, judge, run_reference, sum_error
from lora_kernels.drawn import drawn_errors
from lora_kernels.rounding import Arithmetic, rounding_square
from made_models import acting
from numerics import three_ways

SUMS = 3000  # of which a mean of squares is taken: it is 3 % off


def one_by_one(terms: Tensor) -> Tensor:
    """The sums of the rows of fp32 ``terms``, each in an order of its own, added one by one."""
    order = torch.rand(terms.shape, generator=torch.Generator().manual_seed(2)).argsort(1)
    shuffled, total = terms.gather(1, order), torch.zeros(len(terms))
    for column in shuffled.unbind(1):
        total = total + column
    return total


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["cancels", "adds up"])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 300])
def test_a_sum_in_any_order_has_no_more_than_the_error_that_is_expected(n: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(n)
    left = torch.randn(SUMS, n, generator=generator) + shift
    right = torch.randn(n, 1, generator=generator).abs() + 0.5
    exact = (left.double() @ right.double()).squeeze(1)
    found = one_by_one(left * right.t()).double() - exact
    assert 0.4 < found.norm() / sum_error(left, right).norm() < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_rounding_has_the_error_that_is_expected(dtype: torch.dtype) -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = (values.to(dtype).double() - values).norm() / rounding_square(values, dtype).sum().sqrt()
    assert error == pytest.approx(1.0, abs=0.03)
    assert not rounding_square(torch.zeros(3, dtype=torch.float64), dtype).any()


AXES = {"y": "mn", "dx": "mk", "da": "rk", "db": "nr", "dbias": "n", "dgain": "n"}
ORDERS = 32


def in_another_order(
    case: Case, i: Inputs, mask: Tensor | None, gain: Tensor | None, activation: str, seed: int
) -> dict[str, Tensor]:
    """The reference's results in the case's dtype, with tokens, features and ranks exchanged and put back."""
    generator = torch.Generator().manual_seed(seed)
    m, k, n, r = (torch.randperm(size, generator=generator) for size in (*i.x.shape, *i.lora_b.shape))
    bias = None if i.bias is None else i.bias.detach()[n]
    tensors = i.x.detach()[m][:, k], i.weight[n][:, k], i.lora_a.detach()[r][:, k], i.lora_b.detach()[n][:, r], bias
    mask, gain = None if mask is None else mask[m][:, k], None if gain is None else gain[n]
    found = run_reference(case.dtype, *tensors, i.dy[m][:, n], case.scaling, mask, case.p, gain, activation)
    back = {"m": m.argsort(), "k": k.argsort(), "n": n.argsort(), "r": r.argsort()}
    for name in found:
        for dim, axis in enumerate(AXES[name]):
            found[name] = found[name].index_select(dim, back[axis])
    return found


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(m=1, bias=False),
        Case(m=3, k=17, n=5, r=1),
        Case(p=0.3, dtype=torch.bfloat16),
        Case(r=64, dtype=torch.float16),
    ],
    ids=str,
)
def test_plain_pytorch_makes_about_the_errors_that_are_expected(case: Case, gained: bool, activation: str) -> None:
    """In many orders: less, for it adds in lanes, and never much more, where errors of one value meet again."""
    i, generator = make(case), torch.Generator().manual_seed(0)
    mask = torch.rand(case.m, case.k, generator=generator) > case.p if case.p else None
    gain = torch.linspace(-1.0, 2.0, case.n) if gained else None
    given = (i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy, case.scaling, mask, case.p, gain, activation)
    exact, errors = run_reference(torch.float64, *given), expected_errors(case.dtype, *given)
    found = [in_another_order(case, i, mask, gain, activation, seed) for seed in range(ORDERS)]
    for name in exact:
        made = torch.stack([results[name].double() - exact[name] for results in found]).square().mean(0).sum().sqrt()
        least, most = (0.1, 1.0) if case.dtype is torch.float32 else (0.5, 1.5)  # many sums, or roundings of results
        assert not errors[name].any() or least < made / errors[name].norm() < most, (name, made / errors[name].norm())


def test_a_copy_is_expected_to_be_exact() -> None:
    case = Case(m=1)
    *_, errors = measures(case, make(case), None)
    assert not errors["dbias"].any()


def test_tf32_rounds_what_enters_a_product() -> None:
    left, right = torch.randn(40, 30), torch.randn(30, 20)
    numbers = (Arithmetic(torch.float32, tf32).of for tf32 in (False, True))
    fine, coarse = ((of(left) @ of(right)).error for of in numbers)
    assert (coarse > 100 * fine).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_yardstick_that_is_not_finite_is_an_error_and_no_verdict(bad: float) -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="the yardstick of y has values that are not finite"):
        judge("y", ones, ones.double(), ones * bad, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_yardsticks_are_computed_on_contiguous_copies(dtype: torch.dtype) -> None:
    """A gap between rows holds NaN: a product that reads past them would show it."""
    case = Case(m=35, k=37, n=33, r=3, dtype=dtype)
    i, wide = make(case), {}
    for name, tensor in vars(i).items():
        gapped = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 11), float("nan"), dtype=dtype)
        wide[name] = gapped[..., 3 : 3 + tensor.shape[-1]].copy_(tensor.detach())
    for apart, together in zip(measures(case, replace(i, **wide), None), measures(case, i, None), strict=True):
        assert all(torch.equal(apart[name], together[name]) for name in together)


def test_a_lucky_yardstick_does_not_fail_a_result_that_is_as_exact_as_can_be_expected() -> None:
    """Three products, one sum: with a yardstick that is exact by luck only the floor is left."""
    left, right = torch.tensor([[1.1, -2.3, 0.7]]), torch.tensor([[0.3], [0.9], [-1.7]])
    exact, lucky = left.double() @ right.double(), (left.double() @ right.double()).float()
    unlucky = lucky * (1 + 2.0**-23)
    assert not judge("y", unlucky * (1 + 2.0**-22), exact, lucky, torch.float32).passed
    assert judge("y", unlucky, exact, lucky, torch.float32, expected=sum_error(left, right)).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_that_are_drawn_are_those_that_are_derived(dtype: torch.dtype) -> None:
    """A product of a product, and its elementwise product: what both ways can do. Within a tenth, over all elements."""
    torch.manual_seed(4)
    given = [torch.randn(size).to(dtype) for size in ((64, 96), (96, 24), (24, 40), (64, 40))]

    def formula(number: Callable[[Tensor], Any]) -> dict[str, Any]:
        x, a, b, factor = map(number, given)
        return {"product": x @ a, "of both": (x @ a) @ b, "times": ((x @ a) @ b) * factor}

    exact, _, derived = three_ways(dtype, formula)
    drawn = drawn_errors(dtype, lambda: formula(Tensor.double), exact)
    for name, error in derived.items():
        ratio = drawn[name].norm() / error.norm()
        assert 0.9 < ratio < 1.1, (name, float(ratio))


def test_a_run_that_is_not_the_same_each_time_is_an_error_and_no_expectation() -> None:
    total = torch.zeros(3, dtype=torch.float64)
    adding = lambda: {"y": total.add_(1.0)}  # noqa: E731
    with pytest.raises(ValueError, match="y differs from run to run"):
        drawn_errors(torch.float32, adding, adding())


def test_errors_are_drawn_through_our_own_operators_too() -> None:
    """A layer's are those of its formula, whichever backend runs it."""
    torch.manual_seed(5)
    layer, x = acting(24, 16).double(), torch.randn(40, 24, dtype=torch.float64)

    def by_formula() -> dict[str, Tensor]:
        low = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
        return {"y": F.linear(x, layer.weight, layer.bias) + layer.scaling * low}

    by_the_layer = lambda: {"y": layer(x)}  # noqa: E731
    with torch.no_grad():
        ours, theirs = (drawn_errors(torch.float32, run, run())["y"].norm() for run in (by_the_layer, by_formula))
    assert 0.5 < ours / theirs < 2.0
