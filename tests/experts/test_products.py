"""The products of one projection of all experts, both ways, against float64: each expert's results alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels.dispatch import backend, select, use_backend
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, UnsupportedTransformError
from lora_kernels.experts.autograd import project
from lora_kernels.experts.problem import Adapter
from lora_kernels.experts.routing import Routing, combine
from lora_kernels.ops import operators
from lora_kernels.reference import adapter_dtype
from numerics import check_all, same_bits, three_ways
from random_examples import examples

WAYS = {
    "eager fp64": ("eager", torch.float64),
    "eager fp32": ("eager", torch.float32),
    "eager bf16": ("eager", torch.bfloat16),
    "eager fp16": ("eager", torch.float16),
    "native fp64": ("native", torch.float64),
    "native fp32": ("native", torch.float32),
    "native bf16": ("native", torch.bfloat16),
    "native fp16": ("native", torch.float16),
    "grouped fp32": ("grouped", torch.float32),
    "grouped bf16": ("grouped", torch.bfloat16),
    "triton fp32": ("triton", torch.float32),
    "triton fp16": ("triton", torch.float16),
    "triton bf16": ("triton", torch.bfloat16),
}
INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU, on which test_layer.py runs the kernels: nothing is interpreted"
)
EVERY_WAY = [pytest.param(way, marks=[INTERPRETED] * way.startswith("triton")) for way in WAYS]
ROUTINGS = {  # top_k_index (T, k), E
    "each": (torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 0]]), 4),
    "one expert has all": (torch.full((9, 1), 2), 4),
    "some have none": (torch.tensor([[1, 4], [4, 1], [1, 6]]), 8),
    "sentinels": (torch.tensor([[0, 4], [4, 4], [2, 9], [3, 1]]), 4),
    "sentinels alone": (torch.full((3, 2), 4), 4),
    "no token": (torch.empty((0, 2), dtype=torch.int64), 4),
    "many experts": ((torch.arange(48).reshape(6, 8) * 37) % 512, 512),
}
BRIEF = {"triton fp16": ("sentinels",), "triton bf16": ("some have none", "sentinels")}
PAIRS = [
    pytest.param(*way.values, routing, marks=way.marks)
    for way in EVERY_WAY
    for routing in BRIEF.get(str(way.values[0]), ROUTINGS)
]
FEWER = ((torch.arange(48).reshape(6, 8) * 37) % 11, 11)  # of as many as the interpreter takes a second for


def made(index: Tensor, experts: int, dtype: torch.dtype, r: int = 3, k: int = 24, n: int = 40) -> dict[str, Any]:
    """A problem whose adapter adds about as much as the base."""
    torch.manual_seed(5)
    slots = index.numel()
    return {
        "x": torch.randn(slots, k).to(dtype),
        "weight": (torch.randn(experts, n, k) / k**0.5).to(dtype),
        "a": torch.randn(experts, r, k) / k**0.5,
        "b": torch.randn(experts, n, r) / r**0.5,
        "dy": torch.randn(slots, n).to(dtype),
        "routing": Routing(index, experts, skips=False),
    }


def parts(routing: Routing) -> tuple[list[tuple[int, slice]], int]:
    """``(expert, its rows)`` of each expert that has any, and where the last one's end."""
    ends = routing.offsets.tolist()
    return [(e, slice(s, t)) for e, (s, t) in enumerate(zip([0, *ends], ends, strict=False)) if t > s], ends[-1]


def run(way: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, dy: Tensor, routing: Routing, p: float = 0.0) -> Any:
    """y and the gradients, with s = 1.5."""
    x, a, b = (tensor.clone().requires_grad_() for tensor in (x, a, b))
    y = project(x, weight, Adapter(a, b, 1.5), routing, p, way=way)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def compare(got: dict[str, Tensor], problem: dict[str, Any], mask: Tensor | None = None, p: float = 0.0) -> None:
    """Each expert's results by the policy; what belongs to no token or expert is zero."""
    routing, dtype = problem["routing"], problem["x"].dtype
    wide = adapter_dtype(dtype)
    found, end = parts(routing)
    empty = set(range(len(routing.offsets))) - {e for e, _ in found}
    for e in empty:
        assert not got["da"][e].any()
        assert not got["db"][e].any()
    for name in ("y", "dx"):
        assert not got[name][end:].any()
    for e, rows in found:

        def formulas(number: Callable[[Tensor], Any], e: int = e, rows: slice = rows) -> dict[str, Any]:
            x, dy = number(problem["x"][rows]), number(problem["dy"][rows])
            w, a, b = number(problem["weight"][e]), number(problem["a"][e].to(wide)), number(problem["b"][e].to(wide))
            drop = None if mask is None else mask[rows].double() / (1.0 - p)
            dropped = x if drop is None else x * _like(drop, x)
            h = dropped @ a.t()
            dh = 1.5 * (dy @ b)
            low = dh @ a
            return {
                "y": x @ w.t() + 1.5 * (h @ b.t()),
                "dx": dy @ w + (low if drop is None else low * _like(drop, low)),
                "da": dh.t() @ dropped,
                "db": 1.5 * (dy.t() @ h),
            }

        exact, yardstick, errors = three_ways(dtype, formulas)
        actual = {"y": got["y"][rows], "dx": got["dx"][rows], "da": got["da"][e], "db": got["db"][e]}
        check_all(actual, exact, yardstick, dtype, expected=errors)


def _like(drop: Tensor, number: Any) -> Tensor:
    return drop.to(number.dtype) if isinstance(number, Tensor) else drop


@pytest.mark.parametrize(("way", "routing"), PAIRS)
def test_each_experts_products(way: str, routing: str) -> None:
    name, dtype = WAYS[way]
    fewer = routing == "many experts" and name.startswith("triton")
    problem = made(*(FEWER if fewer else ROUTINGS[routing]), dtype)
    compare(run(name, **problem), problem)


@pytest.mark.parametrize("way", [way for way in EVERY_WAY if way.values[0] != "triton fp32"])  # fp16 is the harder
def test_dropout_is_drawn_for_each_slot_from_one_seed(way: str) -> None:
    name, dtype = WAYS[way]
    problem = made(*ROUTINGS["each"], dtype)
    torch.manual_seed(8)
    got = run(name, **problem, p=0.4)
    torch.manual_seed(8)
    again = run(name, **problem, p=0.4)
    assert all(same_bits(got[each], again[each]) for each in got)
    torch.manual_seed(8)
    drawn = "eager" if name == "grouped" else name.split()[0]
    select("cpu", dtype, drawn)
    state = backend(drawn).dropout_state(problem["x"], 0.4)
    mask = operators(drawn).mask(state, *problem["x"].shape, 0.4)
    assert len({tuple(row.tolist()) for row in mask}) == mask.shape[0]
    compare(got, problem, mask, 0.4)


@pytest.mark.parametrize("way", EVERY_WAY)
def test_a_transposed_weight(way: str) -> None:
    name, dtype = WAYS[way]
    problem = made(*ROUTINGS["each"], dtype)
    problem["weight"] = problem["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    compare(run(name, **problem), problem)


@examples(50)
@given(data=st.data())
def test_any_routing(data: st.DataObject) -> None:
    """In small whole numbers, of which every sum is exact: the bits are those of float64."""
    experts, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 8))
    tokens, r = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    slots = st.lists(st.integers(0, experts + 1), min_size=tokens * k, max_size=tokens * k)
    problem = made(torch.tensor(data.draw(slots)).reshape(tokens, k), experts, torch.float32, r=r)
    whole = {name: problem[name].mul(3).round() for name in ("x", "weight", "a", "b", "dy")}
    wide = {name: tensor.double() for name, tensor in whole.items()}
    exact = run("eager", **wide, routing=problem["routing"])
    compare(exact, {**problem, **wide})
    for way in ("eager", "grouped", "native"):
        got = run(way, **whole, routing=problem["routing"])
        assert all(torch.equal(got[name].double(), exact[name]) for name in exact)


@INTERPRETED
@examples(3)
@given(data=st.data())
def test_any_routing_by_triton(data: st.DataObject) -> None:
    """The same; experts have more rows than a block, and ranks and columns are no multiples of one."""
    experts, tokens, r = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 14)), data.draw(st.integers(1, 40))
    slots = st.lists(st.integers(0, experts), min_size=tokens, max_size=tokens)
    problem = made(torch.tensor(data.draw(slots)).reshape(tokens, 1), experts, torch.float32, r, 36, 68)
    whole = {name: problem[name].mul(3).round() for name in ("x", "weight", "a", "b", "dy")}
    exact = run("eager", **{name: tensor.double() for name, tensor in whole.items()}, routing=problem["routing"])
    got = run("triton", **whole, routing=problem["routing"])
    assert all(torch.equal(got[name].double(), exact[name]) for name in exact)


def _exchange_two(problem: dict[str, Any]) -> None:
    problem["b"] = problem["b"][[1, 0, 2, 3]]


def _skip_the_last(problem: dict[str, Any]) -> None:
    problem["routing"].offsets[-1] = problem["routing"].offsets[-2]


@INTERPRETED
@pytest.mark.parametrize("fault", [_exchange_two, _skip_the_last])
def test_faults_are_seen_by_triton(fault: Callable[[dict[str, Any]], None]) -> None:
    problem, wrong = (made(*ROUTINGS["each"], torch.float32) for _ in range(2))
    fault(wrong)
    with pytest.raises(AssertionError, match=r"(?m)^y\b"):
        compare(run("triton", **wrong), problem)


@pytest.mark.parametrize("way", ["eager", "grouped", "native", pytest.param("triton", marks=INTERPRETED)])
def test_spread_tokens_are_those_that_were_repeated(way: Any) -> None:
    index, experts = ROUTINGS["sentinels"]
    problem = made(index, experts, torch.float32)
    routing, tokens = problem["routing"], torch.randn(len(index), 24)
    spread, repeated = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    adapter = Adapter(problem["a"], problem["b"], 1.5)
    left = project(spread, problem["weight"], adapter, routing, spread=True, way=way)
    right = project(repeated[routing.tokens], problem["weight"], adapter, routing, way=way)
    assert same_bits(left, right)
    left.backward(problem["dy"])
    right.backward(problem["dy"])
    slots = run(way, **{**problem, "x": tokens[routing.tokens]})["dx"]
    exact = torch.zeros(len(index), 24, dtype=torch.float64).index_add_(0, routing.tokens, slots.double())
    check_all({"dx": spread.grad}, {"dx": exact}, {"dx": repeated.grad}, torch.float32)


def test_over_fp16_h_keeps_fp32s_range() -> None:
    problem = made(*ROUTINGS["each"], torch.float16)
    problem["a"], problem["b"] = problem["a"] * 2.0**20, problem["b"] * 2.0**-20
    got = run("eager", **problem)
    plain = run("eager", **{**problem, "a": problem["a"] * 2.0**-20, "b": problem["b"] * 2.0**20})
    assert same_bits(got["y"], plain["y"])
    assert same_bits(got["dx"], plain["dx"])


def test_only_what_is_due_is_saved_and_computed() -> None:
    problem = made(*ROUTINGS["each"], torch.float32)
    x, b = problem["x"].requires_grad_(), problem["b"].requires_grad_()
    y = project(x, problem["weight"], Adapter(problem["a"], b, 1.5), problem["routing"], way="eager")
    saved = dict(zip(["x", "weight", "a", "b", "h", "state"], y.grad_fn.saved_tensors, strict=False))
    assert {name for name, tensor in saved.items() if tensor is None} == {"x", "state"}
    y.backward(problem["dy"])
    assert problem["a"].grad is None
    whole = run("eager", **{**problem, "x": x.detach(), "b": b.detach()})
    assert same_bits(x.grad, whole["dx"])
    assert same_bits(b.grad, whole["db"])


def test_a_weight_that_requires_a_gradient_is_refused() -> None:
    problem = made(*ROUTINGS["each"], torch.float32)
    with pytest.raises(InvalidTypeError, match="beside an adapter it is frozen"):
        run("eager", **{**problem, "weight": problem["weight"].requires_grad_()})


def test_second_derivatives_and_transforms_are_refused() -> None:
    problem = made(*ROUTINGS["each"], torch.float32)
    adapter = Adapter(problem["a"].requires_grad_(), problem["b"], 1.5)
    y = project(problem["x"], problem["weight"], adapter, problem["routing"])
    with pytest.raises(UnsupportedTransformError, match="create_graph=True"):
        torch.autograd.grad(y.sum(), adapter.a, create_graph=True)
    with pytest.raises(UnsupportedTransformError, match="vmap"):
        torch.vmap(lambda x: project(x, problem["weight"], adapter, problem["routing"]))(problem["x"].unsqueeze(0))


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (torch.tensor([[0, -1]]), InvalidArgumentError, "counted from 0"),
        (torch.tensor([[0.0, 1.0]]), InvalidTypeError, "integers"),
        (torch.tensor([0, 1]), InvalidArgumentError, "experts per token"),
    ],
)
def test_indices_that_name_no_expert(index: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Routing(index, 4, skips=False)


def test_triton_refuses_experts_without_an_adapter() -> None:
    problem = made(*ROUTINGS["each"], torch.float32)
    from lora_kernels.backends.triton.expert_operators import experts_forward

    with pytest.raises(InvalidArgumentError, match="without an adapter"):
        experts_forward(problem["x"], problem["weight"], None, None, problem["routing"].offsets, None, 1.0, 0.0, None)


@pytest.mark.parametrize("name", ["eager", "native", pytest.param("triton", marks=INTERPRETED)])
def test_the_backend_that_was_named_runs(name: str) -> None:
    """Each has bits of its own."""
    problem = made(*ROUTINGS["each"], torch.float32)
    with use_backend(name):
        got = run(None, **problem)
    expected = run(name, **problem)
    assert all(same_bits(got[each], expected[each]) for each in got)


@pytest.mark.parametrize("way", [way for way in EVERY_WAY if str(way.values[0]).endswith("fp32")])
@pytest.mark.parametrize("name", ["x", "weight", "a", "b", "dy"])
def test_negated_memory_keeps_its_sign(way: str, name: str) -> None:
    """Of the imaginary part of a conjugate."""
    problem = made(*ROUTINGS["each"], torch.float32)
    given = problem[name]
    negated = torch.complex(torch.zeros_like(given), -given).conj().imag
    assert negated.is_neg()
    leaves = {own: problem[own].clone().requires_grad_() for own in ("x", "a", "b")}
    own = {**problem, **leaves}
    if name != "dy":
        own[name] = torch.complex(torch.zeros_like(given), -own[name]).conj().imag
    y = project(own["x"], own["weight"], Adapter(own["a"], own["b"], 1.5), problem["routing"], way=WAYS[way][0])
    dy = negated if name == "dy" else problem["dy"]
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    compare(dict(zip(("y", "dx", "da", "db"), (y.detach(), *gradients), strict=True)), problem)


@INTERPRETED
def test_negated_weights_of_experts_keep_their_sign() -> None:
    routing = Routing(ROUTINGS["each"][0], 4, skips=False)
    rows, weights = torch.randn(10, 24), torch.rand(5, 2)
    negated = [torch.complex(torch.zeros_like(own), -own).conj().imag for own in (rows, weights)]
    for name in ("eager", "triton"):
        with use_backend(name):
            expected = combine(rows, weights, routing, torch.float32)
            torch.testing.assert_close(combine(*negated, routing, torch.float32), expected)
