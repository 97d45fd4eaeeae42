"""The weighted sum of a token's expert rows, and its gradients, by kernels of one pass: against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from lora_kernels import ops
from lora_kernels.backends.triton import combine_operators
from lora_kernels.dispatch import select, use_backend
from lora_kernels.errors import UnsupportedTransformError
from lora_kernels.experts import routing as of_routing
from lora_kernels.experts.routing import Routing, combine, spread_grad
from numerics import check_all, same_bits, three_ways
from random_examples import examples

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU, on which one test runs the kernels: nothing is interpreted"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FP32, FP32, FP32), (BF16, BF16, BF16), (FP16, FP16, FP16), (BF16, FP32, BF16), (BF16, FP32, FP32)]
INDICES = {  # top_k_index (T, k); there are 11 experts
    "one of one": torch.arange(9).reshape(9, 1) % 11,
    "three": torch.arange(18).reshape(6, 3) * 7 % 11,
    "eight": torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(i))[:8] for i in range(5)]),
    "sentinels": torch.tensor([[0, 11], [12, 11], [2, 10], [11, 1]]),
    "sentinels alone": torch.full((3, 2), 11),
    "no token": torch.empty((0, 2), dtype=torch.int64),
}
WIDTH = 75  # no multiple of a block, nor of 16 bytes


def made(
    index: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES[0], device: str = "cpu", width: int = WIDTH
) -> dict[str, Any]:
    """Rows and weights of sentinels are not finite: nothing of them may be seen."""
    torch.manual_seed(3)
    m, routing = index.numel(), Routing(index, 11, skips=True)
    rows, weights = torch.randn(m, width), torch.rand(index.shape) + 0.1
    rows[int(routing.offsets[-1]) :] = torch.tensor([float("nan"), float("inf"), -1.0])[torch.arange(width) % 3]
    weights[index >= 11] = float("nan")
    return {
        "rows": rows.to(dtypes[0]).to(device),
        "weights": weights.to(dtypes[1]).to(device),
        "dy": torch.randn(index.shape[0], width).to(dtypes[2]).to(device),
        "routing": Routing(index.to(device), 11, skips=True),
    }


def run(rows: Tensor, weights: Tensor, dy: Tensor, routing: Routing, name: str = "triton") -> dict[str, Tensor]:
    rows, weights = rows.clone().requires_grad_(), weights.clone().requires_grad_()
    with use_backend(name):
        y = combine(rows, weights, routing, dy.dtype)
    y.backward(dy)
    return {"y": y.detach(), "d_rows": rows.grad, "d_weights": weights.grad}


def compare(got: dict[str, Tensor], rows: Tensor, weights: Tensor, dy: Tensor, routing: Routing) -> None:
    """By the policy of fp32, in which all is computed before it is rounded once."""
    assert (got["y"].dtype, got["d_rows"].dtype, got["d_weights"].dtype) == (dy.dtype, rows.dtype, weights.dtype)
    present = routing.places < routing.offsets[-1]
    slots, k = present.nonzero().flatten(), weights.shape[1]
    assert not got["d_rows"][routing.places[~present]].any()
    assert not got["d_weights"].flatten()[~present].any()
    own = torch.where(present[:, None], rows[routing.places], 0.0).view(-1, k, rows.shape[1])
    factors = torch.where(present.view_as(weights), weights, 0.0)

    def formulas(number: Callable[[Tensor], Any]) -> dict[str, Any]:
        of_slots = number(dy.repeat_interleave(k, 0)[slots])
        return {
            "y": (number(own) * number(factors[:, :, None])).sum(1),
            "d_rows": of_slots * number(weights.flatten()[slots, None]),
            "d_weights": (of_slots * number(rows[routing.places[slots]])).sum(1),
        }

    exact, yardstick, errors = three_ways(FP32, formulas)
    seen = {"d_rows": got["d_rows"][routing.places[slots]], "d_weights": got["d_weights"].flatten()[slots]}
    check_all({"y": got["y"], **seen}, exact, yardstick, FP32, expected=errors)


def check_sum(problem: dict[str, Any]) -> None:
    got, again = run(**problem), run(**problem)
    compare(got, **problem)
    assert all(same_bits(got[name], again[name]) for name in got)


def check_spread(problem: dict[str, Any]) -> None:
    routing, rows, k = problem["routing"], problem["rows"], problem["weights"].shape[1]
    select(rows.device.type, rows.dtype, "triton")
    got = spread_grad(rows, routing.places, routing.offsets, k, "triton")
    present = routing.places < routing.offsets[-1]
    own = torch.where(present[:, None], rows[routing.places], 0.0).view(-1, k, rows.shape[1])
    exact, yardstick, errors = three_ways(FP32, lambda number: {"dx": number(own).sum(1)})
    check_all({"dx": got}, exact, yardstick, FP32, expected=errors)
    assert got.dtype is rows.dtype


@INTERPRETED
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: " ".join(str(d).removeprefix("torch.") for d in dtypes))
@pytest.mark.parametrize("index", INDICES)
def test_the_sum_and_its_gradients(index: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_sum(made(INDICES[index], dtypes))


@INTERPRETED
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("index", INDICES)
def test_the_gradient_of_spread_tokens(index: str, dtype: torch.dtype) -> None:
    check_spread(made(INDICES[index], (dtype,) * 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU and torch sees no CUDA device")
def test_all_of_it_on_a_gpu() -> None:
    """Rows narrower than a block, as wide as one or two, and of odd width."""
    for index, dtypes, width in itertools.product(INDICES.values(), DTYPES, (WIDTH, 2048, 5001)):
        problem = made(index, dtypes, "cuda", width)
        check_sum(problem)
        check_spread(problem)


@INTERPRETED
@pytest.mark.parametrize("name", ["rows", "weights"])
def test_each_gradient_alone(name: str) -> None:
    """The bits of both together; what is not due comes back empty, and rows are kept for the weights' alone."""
    problem = made(INDICES["sentinels"], (BF16, FP32, BF16))
    whole = run(**problem)
    tensors = {each: problem[each].clone().requires_grad_(each == name) for each in ("rows", "weights")}
    with use_backend("triton"):
        y = combine(**tensors, routing=problem["routing"], dtype=BF16)
    assert (y.grad_fn.saved_tensors[0] is None) == (name == "rows")
    y.backward(problem["dy"])
    assert same_bits(tensors[name].grad, whole[f"d_{name}"])
    routing = problem["routing"]
    given = None if name == "rows" else problem["rows"], problem["weights"], routing.places, routing.offsets
    due = BF16 if name == "rows" else None
    d_rows, d_weights = combine_operators.combine_grad(problem["dy"], *given, due)
    assert (d_rows if name == "weights" else d_weights).shape == (0,)
    assert (d_rows.dtype, d_weights.dtype) == (BF16, FP32)
    none = combine_operators.combine_grad(problem["dy"], None, *given[1:], None)
    assert [each.shape for each in none] == [(0,), (0,)]


@INTERPRETED
def test_any_strides() -> None:
    problem = made(INDICES["eight"])
    expected = run(**problem)
    apart = torch.zeros(40, 2 * WIDTH)[:, ::2].copy_(problem["rows"])
    turned = problem["weights"].t().contiguous().t()
    got = run(apart, turned, problem["dy"].t().contiguous().t(), problem["routing"])
    assert all(same_bits(got[name], expected[name]) for name in got)
    one = {**problem, "dy": torch.ones(()).expand(5, WIDTH)}  # as of a sum
    compare(run(**one), **one)


@INTERPRETED
@examples(5)
@given(data=st.data())
def test_any_routing(data: st.DataObject) -> None:
    """In small whole numbers, of which every sum is exact: the bits are those of the plain composition."""
    k, tokens, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    slots = st.lists(st.integers(0, 12), min_size=tokens * k, max_size=tokens * k)
    index = torch.tensor(data.draw(slots)).reshape(tokens, k)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    tensors = {"rows": (tokens * k, width), "weights": (tokens, k), "dy": (tokens, width)}
    whole = {name: torch.randint(-4, 5, size).float() for name, size in tensors.items()}
    routing = Routing(index, 11, skips=True)
    whole["rows"][int(routing.offsets[-1]) :] = 0.0
    got, expected = (run(**whole, routing=routing, name=name) for name in ("triton", "eager"))
    assert all(torch.equal(got[name], expected[name]) for name in got)


def _shift(problem: dict[str, Any]) -> None:
    problem["routing"].places = problem["routing"].places.roll(1)


def _skip_the_last(problem: dict[str, Any]) -> None:
    problem["routing"].offsets = problem["routing"].offsets.clone().fill_(problem["routing"].offsets[-1] - 1)


def _exchange(problem: dict[str, Any]) -> None:
    problem["weights"] = problem["weights"].flip(1)


@INTERPRETED
@pytest.mark.parametrize("fault", [_shift, _skip_the_last, _exchange])
def test_faults_are_seen(fault: Callable[[dict[str, Any]], None]) -> None:
    problem, wrong = (made(INDICES["eight"]) for _ in range(2))
    fault(wrong)
    with pytest.raises(AssertionError, match=r"(?m)^y\b"):
        compare(run(**wrong), **problem)


@INTERPRETED
@pytest.mark.parametrize("index", ["sentinels", "no token"])
def test_opcheck(index: str) -> None:
    select("cpu", BF16, "triton")
    table, problem = ops._registered["triton"], made(INDICES[index], (BF16, FP32, BF16))
    rows, weights, dy, routing = problem["rows"].nan_to_num(0, 0, 0), problem["weights"], *list(problem.values())[2:]
    of = routing.places, routing.offsets
    for own in (weights, None):
        torch.library.opcheck(table.combine, (rows, own, *of, 2, BF16))
    for kept, due in ((rows, BF16), (None, BF16), (rows, None)):
        torch.library.opcheck(table.combine_grad, (dy, kept, weights.nan_to_num(0), *of, due))


@INTERPRETED
def test_one_graph_for_every_number_of_tokens() -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def plain(rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return combine(rows, weights, Routing(index, 11, skips=True), BF16)

    compiled = torch.compile(plain, backend=backend, fullgraph=True, dynamic=True)
    for index in (INDICES["eight"], INDICES["eight"][:3]):
        problem = made(index, (BF16, FP32, BF16))
        expected = run(**problem)
        rows, weights = (problem[name].requires_grad_() for name in ("rows", "weights"))
        with use_backend("triton"):
            y = compiled(rows, weights, index)
        y.backward(problem["dy"])
        got = {"y": y.detach(), "d_rows": rows.grad, "d_weights": weights.grad}
        assert all(same_bits(got[name], expected[name]) for name in got)
    assert len(graphs) == 1


@INTERPRETED
def test_compiled_gradients() -> None:
    torch.compiler.reset()
    problem = made(INDICES["sentinels"], (BF16, FP32, BF16))
    expected = run(**problem)
    rows, weights = (problem[name].requires_grad_() for name in ("rows", "weights"))
    with use_backend("triton"):
        y = torch.compile(combine, fullgraph=True, backend="aot_eager")(rows, weights, problem["routing"], BF16)
    y.backward(problem["dy"])
    assert same_bits(y.detach(), expected["y"])
    assert same_bits(rows.grad, expected["d_rows"])


@INTERPRETED
def test_what_fp32_does_not_hold_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = made(INDICES["three"], (BF16, torch.float64, BF16))
    monkeypatch.setattr(of_routing, "_CombineInOnePass", None)
    with use_backend("triton"):
        y = combine(problem["rows"], problem["weights"], problem["routing"], torch.float64)
    assert same_bits(y, run(**{**problem, "dy": problem["dy"].double()}, name="eager")["y"])


@INTERPRETED
def test_second_derivatives_are_refused() -> None:
    problem = made(INDICES["three"])
    rows = problem["rows"].requires_grad_()
    with use_backend("triton"):
        y = combine(rows, problem["weights"], problem["routing"], FP32)
    with pytest.raises(UnsupportedTransformError, match="create_graph=True"):
        torch.autograd.grad(y.sum(), rows, create_graph=True)
