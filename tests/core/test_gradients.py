"""Forward and every gradient of every backend, through the public function, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cases import BACKENDS, DOUBLE, MIXED, SHAPES, Case, expected, keep_mask, make, measures, run
from lora_kernels import lora_linear
from numerics import check_all, same_bits

BACKEND_IDS = [f"{name}-{device}" for name, device in BACKENDS]
PLAIN = [pair for pair in BACKENDS if pair[0] != "triton"]  # the backends that take float64
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=BACKEND_IDS)


@every_backend
@pytest.mark.parametrize("case", SHAPES + MIXED, ids=str)
def test_against_float64(case: Case, backend: str, device: str) -> None:
    inputs = make(case, device)
    actual = run(case, inputs, backend)
    mask = keep_mask(case, inputs, backend)
    exact, yardstick, errors = measures(case, inputs, mask)
    check_all(actual, exact, yardstick, case.dtype, expected=errors)


@pytest.mark.parametrize(("backend", "device"), PLAIN)
@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_double_against_float64(case: Case, backend: str, device: str) -> None:
    inputs = make(case, device)
    actual = run(case, inputs, backend)
    mask = keep_mask(case, inputs, backend)
    exact = expected(case, inputs, mask, torch.float64)
    check_all(actual, exact, exact, torch.float32 if case.adapter_dtype else torch.float64)


@every_backend
@pytest.mark.parametrize("case", [Case(p=0.3), Case(dtype=torch.bfloat16, adapter_dtype=torch.float32)], ids=str)
def test_dtypes_and_shapes_of_results(case: Case, backend: str, device: str) -> None:
    i = make(case, device)
    out = run(case, i, backend)
    assert out["y"].dtype == i.x.dtype
    for name, leaf in {"dx": i.x, "da": i.lora_a, "db": i.lora_b, "dbias": i.bias}.items():
        assert (out[name].dtype, out[name].shape) == (leaf.dtype, leaf.shape)


@every_backend
def test_the_same_bits_twice(backend: str, device: str) -> None:
    case = Case(m=70, dtype=torch.float16, p=0.2)
    first, second = (run(case, make(case, device), backend) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


@every_backend
def test_every_subset_of_gradients(backend: str, device: str) -> None:
    """Each subset of {x, weight, lora_a, lora_b, bias} that needs a gradient gets the same one as all together."""
    case = Case(m=9, k=12, n=10, r=2, p=0.25)
    i = make(case, device)
    names = ("x", "weight", "lora_a", "lora_b", "bias")

    def gradients(subset: tuple[str, ...]) -> dict[str, torch.Tensor]:
        leaves = {name: getattr(i, name).detach().requires_grad_(name in subset) for name in names}
        torch.manual_seed(1)
        y = lora_linear(**leaves, scaling=0.5, dropout_p=case.p, training=True, backend=backend)
        assert y.requires_grad == bool(subset)
        y.backward(i.dy) if subset else None
        assert all(leaves[name].grad is None for name in names if name not in subset)
        return {name: leaves[name].grad for name in subset}

    everything = gradients(names)
    exact, yardstick, errors = measures(case, i, keep_mask(case, i, backend))
    exact["dw"] = i.dy.double().t() @ i.x.detach().double()
    yardstick["dw"] = i.dy.t() @ i.x.detach()
    short = {"x": "dx", "weight": "dw", "lora_a": "da", "lora_b": "db", "bias": "dbias"}
    check_all({short[n]: g for n, g in everything.items()}, exact, yardstick, case.dtype, expected=errors)
    for size in range(5):
        for subset in itertools.combinations(names, size):
            for name, gradient in gradients(subset).items():
                check_all({short[name]: gradient}, exact, yardstick, case.dtype, expected=errors)


@every_backend
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_tokens(backend: str, device: str, p: float) -> None:
    case = Case(m=0, p=p)
    out = run(case, make(case, device), backend)
    assert out["y"].shape == (0, case.n)
    assert out["dx"].shape == (0, case.k)
    assert all(not out[name].any() for name in ("da", "db", "dbias"))


@every_backend
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 0, 3), (1, 2, 1, 3)], ids=str)
def test_any_number_of_leading_dimensions(backend: str, device: str, leading: tuple[int, ...]) -> None:
    case = Case(m=6)
    i = make(case, device)
    x = torch.randn(*leading, case.k, device=device, requires_grad=True)
    y = lora_linear(x, i.weight, i.lora_a, i.lora_b, i.bias, backend=backend)
    assert y.shape == (*leading, case.n)
    y.sum().backward()
    assert x.grad.shape == x.shape
    flat = lora_linear(x.detach().reshape(-1, case.k), i.weight, i.lora_a, i.lora_b, i.bias, backend=backend)
    assert same_bits(y.detach(), flat.detach().reshape(y.shape))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of (2, 3, F)
    "one piece": lambda t: t,
    "rows of a wider matrix": lambda t: torch.cat((t, t), 2)[..., : t.shape[2]],
    "every second batch": lambda t: torch.stack((t, -t), 1).flatten(0, 1)[::2],
    "tokens before batches": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "one row for all": lambda t: t[:1, :1].expand(2, 3, -1),
    "columns apart": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "behind an offset": lambda t: torch.cat((t[:1], t))[1:],
    "negated in place": lambda t: torch.complex(t, -t).conj().imag,
}


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_leading_dimensions_of_any_layout(backend: str, device: str, layout: str) -> None:
    """The rows that are read, and those of every gradient, are those of a matrix."""
    case = Case(m=6)
    i = make(case, device)
    parameters = (i.weight, i.lora_a, i.lora_b, i.bias)
    x = LAYOUTS[layout](torch.randn(2, 3, case.k, device=device))
    dy = LAYOUTS[layout](torch.randn(2, 3, case.n, device=device))

    leaf = x.detach().requires_grad_()
    y = lora_linear(leaf, *parameters, scaling=case.scaling, backend=backend)
    dx, da, db = torch.autograd.grad(y, (leaf, i.lora_a, i.lora_b), dy)
    assert y.shape == (2, 3, case.n)
    assert dx.shape == (2, 3, case.k)
    assert all(own.is_contiguous() for own in (y, dx, da, db))
    matrices = replace(i, x=x.clone().reshape(6, case.k), dy=dy.clone().reshape(6, case.n))
    exact, yardstick, errors = measures(case, matrices, None)
    found = {"y": y.detach().view(6, case.n), "dx": dx.view(6, case.k), "da": da, "db": db}
    check_all(found, exact, yardstick, case.dtype, expected=errors)
    with torch.no_grad():  # the way without a graph
        plain = lora_linear(x, *parameters, scaling=case.scaling, backend=backend)
    assert same_bits(plain, y.detach())
    plain += 1.0  # no view of another's memory


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_never_hidden(backend: str, device: str, bad: float) -> None:
    case = Case(m=20, bias=False)
    i = make(case, device)
    x = i.x.detach().clone()
    x[3, 5] = bad
    y = lora_linear(x, i.weight, i.lora_a, i.lora_b, backend=backend)
    assert not torch.isfinite(y[3]).any()
    assert torch.isfinite(y[[0, 1, 2, *range(4, 20)]]).all()
    lora_b = i.lora_b.detach().clone()
    lora_b[2, 1] = bad
    y = lora_linear(i.x.detach(), i.weight, i.lora_a, lora_b, backend=backend)
    assert not torch.isfinite(y[:, 2]).any()


@every_backend
def test_expanded_and_transposed_gradients_of_y(backend: str, device: str) -> None:
    case = Case()
    i = make(case, device)
    for dy in (torch.ones((), device=device).expand(case.m, case.n), torch.randn(case.n, case.m, device=device).t()):
        strided = make(case, device)
        actual = run(case, strided.__class__(**{**strided.__dict__, "dy": dy}), backend)
        exact, yardstick, errors = measures(case, replace(i, dy=dy), None)
        check_all(actual, exact, yardstick, case.dtype, expected=errors)
