"""Gradients of random parts of the inputs, of layers of one x together and each by itself, first and second ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import gate, ops, reference
from lora_kernels.branches import Branch
from lora_kernels.errors import UnsupportedTransformError

PROBLEMS = 40
FLOAT64 = torch.float64


def one_by_one(x: Tensor, branches: Sequence[Branch], p: float) -> list[Tensor]:
    return [gate.run_plain(x, b.weight, b.lora_a, b.lora_b, b.bias, b.scaling, p, "native") for b in branches]


def together(x: Tensor, branches: Sequence[Branch], p: float) -> list[Tensor]:
    return gate.run_branches(x, branches, p, "native")


def by_formulas(x: Tensor, branches: Sequence[Branch], p: float) -> list[Tensor]:
    """The reference's, on a graph of PyTorch's own, with the masks that the others draw."""
    ys = []
    for b in branches:
        state = gate.draw_state(x, p, "native") if p else None
        rows = x.reshape(-1, x.shape[-1])
        mask = None if state is None else ops.operators("native").mask(state, *rows.shape, p)
        y, _ = reference.forward(rows, b.weight, b.lora_a, b.lora_b, b.bias, b.scaling, mask, p)
        ys.append(y.view(*x.shape[:-1], -1))
    return ys


@pytest.fixture
def by_group_operators(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets ``native`` have group operators, each layer by itself; how many layers each call had."""
    own: Any = ops.direct_operators("native")
    called: list[int] = []

    def forward(x: Tensor, *of: Any) -> Any:
        *tensors, p, states = of
        called.append(len(tensors[0]))
        members = enumerate(zip(*tensors, strict=True))
        found = [own.forward(x, *each, p, states[i] if states else None) for i, each in members]
        ys, hs, words = map(list, zip(*found, strict=True))
        return ys, hs, words if states else []

    def backward(dys: Any, x: Any, weights: Any, *of: Any) -> Any:
        lora_as, lora_bs, biases, hs, scalings, p, states = of
        nothing = [None] * len(dys)
        tensors = dys, weights or nothing, lora_as, lora_bs, biases, hs or nothing, scalings, states or nothing
        members = zip(*tensors, strict=True)
        found = [own.backward(dy, x, w, a, b, bias, h, s, p, state) for dy, w, a, b, bias, h, s, state in members]
        dxs, *others = map(list, zip(*found, strict=True))
        return sum(dxs) if weights else dys[0].new_empty(0), *others

    monkeypatch.setitem(ops._direct, "native", replace(own, group_forward=forward, group_backward=backward))
    monkeypatch.setattr(gate, "_kept_group_fault", lambda *facts: None)
    return called


def drawn(seed: int) -> tuple[Tensor, list[Branch], float]:
    """x, two to four branches, of whose tensors some train, and p."""
    chance = random.Random(seed)
    torch.manual_seed(seed)

    def tensor(*shape: int, trains: float = 0.5) -> Tensor:
        return torch.randn(shape, dtype=FLOAT64).requires_grad_(chance.random() < trains)

    k, trains_a = chance.choice([3, 8]), chance.choice([0.0, 0.5, 1.0])
    x = tensor(*chance.choice([(20,), (2, 9), (17,)]), k)
    branches = []
    for _ in range(chance.choice([2, 3, 4])):
        n, r = chance.choice([4, 7]), chance.choice([1, 3])
        bias = tensor(n) if chance.random() < 0.5 else None
        scaling = chance.choice([0.0, 0.5, -2.0])
        branches.append(Branch(tensor(n, k), tensor(r, k, trains=trains_a), tensor(n, r), bias, scaling))
    return x, branches, chance.choice([0.0, 0.4])


def gradients(run: Callable[..., list[Tensor]], seed: int, how: str) -> list[Any]:
    """Of some outputs by all that trains: at once, one output after the other, or with a graph and differentiated
    again. The sentence where that is refused."""
    x, branches, p = drawn(seed)
    due = [t for t in (x, *(own for b in branches for own in b.tensors)) if t is not None and t.requires_grad]
    torch.manual_seed(seed)
    ys = run(x, branches, p)
    dys = [torch.randn_like(y, requires_grad=how == "twice") for y in ys]
    chance = random.Random(seed)
    own_graph = [any(t is not None and t.requires_grad for t in (x, *b.tensors)) for b in branches]
    used = [i for i in range(len(ys)) if own_graph[i] and (chance.random() < 0.8 or i == 0)]
    if not used or not due:
        return [y.detach() for y in ys]
    outputs, given = [ys[i] for i in used], [dys[i] for i in used]
    if how == "one output after the other":
        for y, dy in zip(outputs, given, strict=True):
            y.backward(dy)
        return [t.grad for t in due]
    found: list[Any] = list(torch.autograd.grad(outputs, due, given, allow_unused=True, create_graph=how == "twice"))
    if how == "twice":
        total = sum((t * torch.randn_like(t)).sum() for t in found if t is not None and t.requires_grad)
        if isinstance(total, Tensor):
            found += torch.autograd.grad(total, [*due, *given], allow_unused=True)
    return [None if t is None else t.detach() for t in found]


@pytest.mark.parametrize("how", ["at once", "one output after the other", "twice"])
@pytest.mark.parametrize("way", ["one by one", "in parts", "by group operators"])
def test_they_are_those_of_the_formulas(way: str, how: str, request: pytest.FixtureRequest) -> None:
    called = request.getfixturevalue("by_group_operators") if way == "by group operators" else []
    run, refused = one_by_one if way == "one by one" else together, 0
    for seed in range(PROBLEMS):
        try:
            found = gradients(run, seed, how)
        except UnsupportedTransformError:
            refused += 1
            continue
        for one, exact in zip(found, gradients(by_formulas, seed, how), strict=True):
            if one is not None or exact is not None:  # where one is None the other has zeros
                pairs = ((one, exact), (exact, one))
                torch.testing.assert_close(*(torch.zeros_like(b) if a is None else a for a, b in pairs))
    assert refused < PROBLEMS / 2 if how == "twice" else refused == 0
    assert bool(called) == (way == "by group operators")
