"""All of a mixture's experts in one operator a pass, against float64: projections, the gate, the sum over experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import ops, use_backend
from lora_kernels.accuracy import judge
from lora_kernels.activations import GATES
from lora_kernels.dispatch import select
from lora_kernels.drawn import drawn_errors
from lora_kernels.errors import UnsupportedTransformError
from lora_kernels.experts import mlp_autograd
from lora_kernels.experts.mlp_autograd import Stack, run_mlp
from lora_kernels.experts.problem import Adapter
from lora_kernels.experts.routing import Routing
from numerics import same_bits
from random_examples import examples

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
E, H, INNER, R = 11, 40, 24, 3
INDICES = {  # top_k_index (T, k)
    "one of one": torch.arange(9).reshape(9, 1) % E,
    "three": torch.arange(18).reshape(6, 3) * 7 % E,
    "one expert has all": torch.full((19, 1), 2),
    "twice the same": torch.tensor([[3, 3, 0], [3, 3, 3], [5, 1, 5]]),
    "sentinels": torch.tensor([[0, E], [E + 1, E], [2, 10], [E, 1]]),
    "sentinels alone": torch.full((3, 2), E),
    "no token": torch.empty((0, 2), dtype=torch.int64),
    "many rows": torch.arange(600).reshape(150, 4) * 5 % 3,
}
RESULTS = ("dx", "d_weights", "d_up_a", "d_up_b", "d_down_a", "d_down_b")


def made(index: Tensor, dtype: torch.dtype, weights_dtype: torch.dtype | None = None, across: bool = False) -> Any:
    """A problem whose adapters add about as much as the bases; weights of sentinels are not finite."""
    torch.manual_seed(5)
    t, k = index.shape

    def stack(n: int, c: int) -> Tensor:
        weight = (torch.randn(E, n, c) / c**0.5).to(dtype)
        return weight.transpose(1, 2).contiguous().transpose(1, 2) if across else weight

    weights = torch.rand(t, k) + 0.1
    weights[index >= E] = float("nan")
    return {
        "x": torch.randn(t, H).to(dtype),
        "up": (stack(2 * INNER, H), torch.randn(E, R, H) / H**0.5, torch.randn(E, 2 * INNER, R) / R**0.5),
        "down": (stack(H, INNER), torch.randn(E, R + 1, INNER) / INNER**0.5, torch.randn(E, H, R + 1) / R**0.5),
        "weights": weights.to(weights_dtype or dtype),
        "dy": torch.randn(t, H).to(dtype),
        "routing": Routing(index, E, skips=True),
    }


def run(
    x: Tensor, up: Any, down: Any, weights: Tensor, dy: Tensor, routing: Routing, number: int = 0, p: float = 0.0
) -> dict[str, Tensor]:
    """y and the gradients, with s = 1.5 and 0.75."""
    select("cpu", x.dtype, "native")
    x, weights = (tensor.detach().clone().requires_grad_() for tensor in (x, weights))
    (up_a, up_b), (down_a, down_b) = (
        [f.detach().clone().requires_grad_() for f in factors[1:]] for factors in (up, down)
    )
    stacks = Stack(up[0], Adapter(up_a, up_b, 1.5), p), Stack(down[0], Adapter(down_a, down_b, 0.75), p / 2)
    y = run_mlp(x, *stacks, weights, routing, number, dy.dtype, "native")
    y.backward(dy)
    grads = (x.grad, weights.grad, up_a.grad, up_b.grad, down_a.grad, down_b.grad)
    return {"y": y.detach(), **dict(zip(RESULTS, grads, strict=True))}


def written_out(
    problem: Any, dtype: torch.dtype, number: int = 0, drops: list[Tensor] | None = None, merged: bool = True
) -> dict[str, Tensor]:
    """The same in ``dtype``, expert by expert, by autograd; sums over experts in fp32 at least.

    In float64 by the weights W + s B A, where nothing is dropped and unless not ``merged``.
    """
    x, weights = (problem[name].detach().to(dtype).requires_grad_() for name in ("x", "weights"))
    routing, k = problem["routing"], problem["weights"].shape[1]
    # A and B are rounded at the product.
    up, down = ([f.detach().to(problem["x"].dtype).to(dtype) for f in problem[name]] for name in ("up", "down"))
    factors = [f.requires_grad_() for f in (*up[1:], *down[1:])]
    y = 0.0 * x.to(torch.promote_types(dtype, FP32))
    whole = merged and drops is None and dtype is FP64

    def project(rows: Tensor, stack: list[Tensor], e: int, s: float, drop: Any) -> Tensor:
        weight, a, b = (tensor[e] for tensor in stack)
        return rows @ (weight + s * b @ a).t() if whole else rows @ weight.t() + s * ((rows * drop) @ a.t() @ b.t())

    for e, (start, end) in enumerate(itertools.pairwise([0, *routing.offsets.tolist()])):
        if start == end:
            continue
        slots = routing.slots[start:end]
        up_drop, down_drop = (1.0, 1.0) if drops is None else (drop[start:end].to(dtype) for drop in drops)
        gate, beside = project(x[slots // k], up, e, 1.5, up_drop).chunk(2, 1)
        act = (F.silu(gate) if number == 0 else F.gelu(gate, approximate=("none", "tanh")[number - 1])) * beside
        rows = project(act, down, e, 0.75, down_drop)
        y = y.index_add(0, slots // k, (rows * weights.flatten()[slots, None]).to(y.dtype))
    y = y.to(dtype)
    y.backward(problem["dy"].to(dtype))
    leaves = zip(RESULTS, (x, weights, *factors), strict=True)
    found = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves}
    return {"y": y.detach(), **found, "d_weights": found["d_weights"].nan_to_num(0.0)}


def compare(got: dict[str, Tensor], problem: Any, number: int = 0, drops: list[Tensor] | None = None) -> None:
    """By the policy, and what belongs to no token or expert is zero."""
    routing, dtype = problem["routing"], problem["x"].dtype
    counts = routing.offsets.diff(prepend=routing.offsets.new_zeros(1))
    for name in RESULTS[2:]:
        assert not got[name][counts == 0].any(), name
    assert not got["d_weights"].flatten()[routing.slots[int(routing.offsets[-1]) :]].any()
    exact, yardstick = (written_out(problem, of, number, drops) for of in (FP64, dtype))
    expected = drawn_errors(dtype, lambda: written_out(problem, FP64, number, drops, merged=False), exact)
    verdicts = [
        judge(name, value, exact[name], yardstick[name], dtype, depth=2, expected=expected[name])
        for name, value in got.items()
        if value.numel()
    ]
    failed = [str(verdict) for verdict in verdicts if not verdict.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("index", INDICES)
def test_y_and_every_gradient(index: str, dtype: torch.dtype) -> None:
    problem = made(INDICES[index], dtype)
    got, again = run(**problem), run(**problem)
    compare(got, problem)
    assert all(same_bits(got[name], again[name]) for name in got)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("number", range(len(GATES)), ids=GATES)
def test_each_gate(number: int, dtype: torch.dtype) -> None:
    problem = made(INDICES["three"], dtype)
    compare(run(**problem, number=number), problem, number)


def test_weights_stored_transposed() -> None:
    problem = made(INDICES["three"], FP32, across=True)
    compare(run(**problem), problem)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_dropout_is_of_the_seeds_masks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    draw = mlp_autograd.draw_state
    monkeypatch.setattr(mlp_autograd, "draw_state", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    problem, p = made(INDICES["many rows"], dtype), 0.5
    got = run(**problem, p=p)
    m = problem["routing"].slots.shape[0]
    masks = [torch.ops.lora_kernels.native_mask(drawn[i], m, k, of) for i, k, of in ((0, H, p), (1, INNER, p / 2))]
    drops = [mask.double() / (1.0 - of) for mask, of in zip(masks, (p, p / 2), strict=True)]
    compare(got, problem, drops=drops)
    assert not torch.allclose(got["y"], run(**problem)["y"])


def test_y_in_fp32_is_not_rounded_to_16_bits() -> None:
    """As under autocast, where the rows are bf16 and what is given back is not; and weights may have another dtype."""
    problem = made(INDICES["many rows"], BF16, weights_dtype=FP32)
    problem["dy"] = problem["dy"].float()
    got = run(**problem)
    assert got["y"].dtype is got["d_weights"].dtype is FP32
    assert not torch.equal(got["y"], got["y"].bfloat16().float())
    compare(got, problem)


@pytest.mark.parametrize("due", range(16))
def test_what_is_not_due_is_not_made(due: int) -> None:
    select("cpu", FP32, "native")
    problem = made(INDICES["three"], FP32)
    routing = problem["routing"]
    given = (*problem["up"], *problem["down"], routing.offsets, routing.slots, problem["weights"])
    numbers = 1.5, 0.75, 0.0, 0.0, None, None, 0
    table: Any = ops.operators("native")
    y, joined, *hs = table.experts_mlp_forward(problem["x"], *given, *numbers, False)
    flags = [bool(due >> i & 1) for i in range(4)]
    found = table.experts_mlp_backward(problem["dy"], problem["x"], joined, *given, *hs, *numbers, *flags)
    all_of_them = run(**problem)
    assert same_bits(y, all_of_them["y"])
    for name, value, needed in zip(RESULTS, found, [*flags[:2], *[flags[2]] * 2, *[flags[3]] * 2], strict=True):
        assert same_bits(value, all_of_them[name]) if needed else value.shape == (0,), name


@pytest.mark.parametrize("index", ["three", "sentinels", "no token"])
def test_opcheck(index: str) -> None:
    select("cpu", FP32, "native")
    problem = made(INDICES[index], FP32)
    routing = problem["routing"]
    weights = problem["weights"].nan_to_num(0.0)
    given = (*problem["up"], *problem["down"], routing.offsets, routing.slots, weights)
    table: Any = ops._registered["native"]
    for wide in (False, True):
        numbers = 1.5, 0.75, 0.0, 0.0, None, None, 0
        torch.library.opcheck(table.experts_mlp_forward, (problem["x"], *given, *numbers, wide))
    _, joined, *hs = table.experts_mlp_forward(problem["x"], *given, *numbers, False)
    for flags in ((True, True, True, True), (False, True, False, True)):
        torch.library.opcheck(
            table.experts_mlp_backward, (problem["dy"], problem["x"], joined, *given, *hs, *numbers, *flags)
        )


@given(data=st.data())
@examples(25)
def test_drawn_routings(data: st.DataObject) -> None:
    t, k = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 4))
    index = torch.tensor(data.draw(st.lists(st.integers(0, E + 1), min_size=t * k, max_size=t * k)), dtype=torch.int64)
    dtype = data.draw(st.sampled_from([FP32, BF16, FP64]))
    problem = made(index.view(t, k), dtype)
    compare(run(**problem), problem)


FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a token's weight forgotten": lambda g: g.update(weights=g["weights"].index_fill(0, torch.tensor([1]), 1.0)),
    "two experts' B exchanged": lambda g: g.update(up_b=g["up_b"].index_select(0, _exchanged(3, 7))),
    "two experts' A exchanged": lambda g: g.update(down_a=g["down_a"].index_select(0, _exchanged(3, 7))),
    "two rows exchanged": lambda g: g.update(slots=g["slots"].index_select(0, _exchanged(4, 9, len(g["slots"])))),
    "the last expert skipped": lambda g: g.update(offsets=_without_last(g["offsets"])),
    "gate and up exchanged": lambda g: g.update(up_weight=torch.cat(g["up_weight"].chunk(2, 1)[::-1], 1)),
}


def _exchanged(i: int, j: int, count: int = E) -> Tensor:
    order = torch.arange(count)
    order[i], order[j] = j, i
    return order


def _without_last(offsets: Tensor) -> Tensor:
    last = int((offsets < offsets[-1]).sum())
    return torch.cat([offsets[:last], offsets[last - 1].expand(len(offsets) - last)])


@pytest.mark.parametrize(("given_to", "seen_in"), [("forward", "y"), ("backward", "dx")])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, given_to: str, seen_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = made(INDICES["three"], FP32)
    select("cpu", FP32, "native")
    table: Any = ops.operators("native")
    names = ["x", "up_weight", "up_a", "up_b", "down_weight", "down_a", "down_b", "offsets", "slots", "weights"]
    names = names if given_to == "forward" else ["dy", "x", "joined", *names[1:]]

    class Faulty:
        experts_mlp_forward, experts_mlp_backward = table.experts_mlp_forward, table.experts_mlp_backward

    def faulty(*given: Any) -> Any:
        changed = dict(zip(names, given, strict=False))
        FAULTS[fault](changed)
        return getattr(table, f"experts_mlp_{given_to}")(*changed.values(), *given[len(names) :])

    monkeypatch.setattr(Faulty, f"experts_mlp_{given_to}", staticmethod(faulty))
    monkeypatch.setattr(mlp_autograd, "operators", lambda name: Faulty)
    with pytest.raises(AssertionError, match=rf"(?m)^{seen_in} FAILS"):
        compare(run(**problem), problem)


def test_a_double_backward_is_refused() -> None:
    problem = made(INDICES["three"], FP32)
    select("cpu", FP32, "native")
    stacks = [Stack(w, Adapter(a.requires_grad_(), b, 1.0), 0.0) for w, a, b in (problem["up"], problem["down"])]
    y = run_mlp(problem["x"], *stacks, problem["weights"], problem["routing"], 0, FP32, "native")
    with pytest.raises(UnsupportedTransformError, match="first derivatives alone"):
        torch.autograd.grad(y.sum(), problem["up"][1], create_graph=True)


def test_only_gate_and_up_are_kept_of_what_has_a_row_for_each_slot() -> None:
    problem = made(INDICES["many rows"], FP32)
    m, kept = problem["routing"].slots.shape[0], []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), use_backend("native"):
        run(**problem)
    wide = sorted(tensor.shape[1] for tensor in kept if tensor.dim() == 2 and tensor.shape[0] == m)
    assert wide == [R, R + 1, 2 * INNER]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots must be int64"),
        ({"slots": torch.full((18,), 18)}, "slots must be places of weights"),
        ({"offsets": torch.full((E,), 19, dtype=torch.int32)}, "offsets must ascend to at most the number of rows"),
        ({"down_a": torch.zeros(E, R + 1, INNER - 1)}, "weight must be"),
        ({"x": torch.zeros(5, H)}, "x must be"),
        ({"number": 3}, "the gate's number must be 0, 1 or 2, and 3 was given"),
    ],
    ids=lambda of: next(iter(of)) if isinstance(of, dict) else "",
)
def test_the_operator_refuses_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    problem = made(INDICES["three"], FP32)
    routing = problem["routing"]
    given = {
        "x": problem["x"],
        **dict(zip(("up_weight", "up_a", "up_b"), problem["up"], strict=True)),
        **dict(zip(("down_weight", "down_a", "down_b"), problem["down"], strict=True)),
        "offsets": routing.offsets,
        "slots": routing.slots,
        "weights": problem["weights"],
    }
    select("cpu", FP32, "native")
    table: Any = ops.operators("native")
    given |= change
    number = given.pop("number", 0)
    with pytest.raises(RuntimeError, match=words):
        table.experts_mlp_forward(*given.values(), 1.0, 1.0, 0.0, 0.0, None, None, number, False)
