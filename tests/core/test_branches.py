"""Activations, gains and several branches of one x: values and every gradient of every backend against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from cases import BACKENDS, Case, make
from lora_kernels import LoRAKernelsError, dispatch, lora_linear, ops
from lora_kernels.accuracy import expected_errors, run_reference
from lora_kernels.activations import ACTIVATIONS
from lora_kernels.branches import Branch
from lora_kernels.gate import run_branches
from numerics import check, check_all, same_bits

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
PLAIN = [pair for pair in BACKENDS if pair[0] != "triton"]  # the backends that take float64


@dataclass(frozen=True)
class Group:
    """Branches of one x: a Case for x and the first, and each branch's N, R, gain and activation."""

    case: Case
    members: tuple[tuple[int, int, bool, str], ...]

    def __str__(self) -> str:
        return f"{self.case}|" + ",".join(f"n{n}r{r}{'g' * gain}{act}" for n, r, gain, act in self.members)


ALONE = [
    *[Group(Case(m=m, p=p, **of), ((56, 8, gain, act),))
      for m in (1, 24, 80) for p, of, gain, act in (
          (0.0, {}, True, "identity"), (0.1, {}, True, "gelu"), (0.0, {}, False, "relu"), (0.1, {}, False, "silu"))],
    Group(Case(dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1), ((56, 8, True, "silu"),)),
    Group(Case(dtype=torch.float16, bias=False), ((31, 17, True, "identity"),)),
    Group(Case(x_layout="transposed", m=40, k=129), ((31, 17, True, "gelu"),)),
]  # fmt: skip
SEVERAL = [
    Group(Case(), ((56, 8, False, "identity"), (24, 8, False, "identity"), (24, 3, False, "identity"))),
    Group(Case(p=0.1, bias=False), ((56, 8, False, "identity"), (24, 4, False, "identity"))),
    Group(Case(dtype=torch.bfloat16, adapter_dtype=torch.float32, m=80), ((40, 8, True, "relu"),
                                                                          (40, 5, False, "identity"))),
    Group(Case(m=1), ((40, 8, True, "identity"), (40, 5, False, "gelu"))),
    Group(Case(m=5, p=0.1, bias=False), ((56, 8, False, "identity"), (24, 4, False, "identity"))),
]  # fmt: skip


def draw(group: Group, device: str) -> tuple[Tensor, list[Branch], list[Tensor]]:
    """x, the branches and each one's dy; the gain is far from 1 and of both signs."""
    branches, dys = [], []
    for seed, (n, r, gained, activation) in enumerate(group.members):
        i = make(replace(group.case, n=n, r=r), device, seed)
        wide = torch.promote_types(group.case.dtype, torch.float32)
        gain = torch.linspace(-1.0, 2.0, n, dtype=wide, device=device).requires_grad_() if gained else None
        branches.append(Branch(i.weight, i.lora_a, i.lora_b, i.bias, group.case.scaling, gain, activation))
        dys.append(i.dy)
    return make(group.case, device).x, branches, dys


def leaves(x: Tensor, branches: list[Branch]) -> dict[str, Tensor]:
    """What requires a gradient, by the name of its gradient; ``da1`` is of the second branch."""
    named = {"dx": x}
    for i, b in enumerate(branches):
        own = {"da": b.lora_a, "db": b.lora_b, "dbias": b.bias, "dgain": b.gain}
        named |= {f"{name}{i}": tensor for name, tensor in own.items() if tensor is not None}
    return named


def run(group: Group, x: Tensor, branches: list[Branch], dys: list[Tensor], backend: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ys = run_branches(x, branches, group.case.p, backend)
    named = leaves(x, branches)
    gradients = torch.autograd.grad(ys, list(named.values()), dys)
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(named, gradients, strict=True))


def measures(
    group: Group, x: Tensor, branches: list[Branch], dys: list[Tensor], backend: str
) -> tuple[dict[str, Tensor], ...]:
    """Exact, the yardstick, and the error to expect of each element; dx's terms are the branches'."""
    torch.manual_seed(1)
    p, dtype = group.case.p, group.case.dtype
    states = [dispatch.backend(backend).dropout_state(x.detach(), p) for _ in branches] if p else []
    exact, yardstick, errors, dxs = {}, {}, {}, []
    for i, (b, dy) in enumerate(zip(branches, dys, strict=True)):
        mask = ops.operators(backend).mask(states[i], *x.shape, p) if p else None
        given = (x, b.weight, b.lora_a, b.lora_b, b.bias, dy, b.scaling, mask, p, b.gain, b.activation)
        owns = run_reference(torch.float64, *given), run_reference(dtype, *given), expected_errors(dtype, *given)
        dxs.append([own.pop("dx") for own in owns])
        for results, own in zip((exact, yardstick, errors), owns, strict=True):
            results |= {f"{name}{i}": value for name, value in own.items()}
    exact["dx"], yardstick["dx"] = (sum(values) for values in list(zip(*dxs, strict=True))[:2])
    errors["dx"] = torch.stack([dx[2] for dx in dxs]).norm(dim=0)
    return exact, yardstick, errors


@every_backend
@pytest.mark.parametrize("group", ALONE + SEVERAL, ids=str)
def test_against_float64(group: Group, backend: str, device: str) -> None:
    x, branches, dys = draw(group, device)
    actual = run(group, x, branches, dys, backend)
    exact, yardstick, errors = measures(group, x, branches, dys, backend)
    check_all(actual, exact, yardstick, group.case.dtype, expected=errors)
    named = leaves(x, branches)
    assert {name: actual[name].dtype for name in named} == {name: leaf.dtype for name, leaf in named.items()}


@pytest.mark.parametrize(("backend", "device"), PLAIN)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_by_finite_differences(p: float, activation: str, backend: str, device: str) -> None:
    case = Case(m=3, k=5, dtype=torch.float64, p=p)
    x, branches, _ = draw(Group(case, ((4, 2, True, activation), (3, 2, False, activation))), device)
    named = leaves(x, branches)

    def run_from(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        given = dict(zip(named, tensors, strict=True))
        own = [
            replace(b, lora_a=given[f"da{i}"], lora_b=given[f"db{i}"], bias=given[f"dbias{i}"],
                    gain=given.get(f"dgain{i}"))
            for i, b in enumerate(branches)
        ]  # fmt: skip
        return tuple(run_branches(given["dx"], own, p, backend))

    arguments = tuple(tensor.detach().requires_grad_() for tensor in named.values())
    assert torch.autograd.gradcheck(run_from, arguments)
    if activation != "relu" and backend == "eager":  # its second derivative is a jump
        assert torch.autograd.gradgradcheck(run_from, arguments)


@every_backend
def test_one_branch_is_the_plain_layer(backend: str, device: str) -> None:
    i = make(Case(), device)
    x = i.x.detach().reshape(2, 12, -1)
    (y,) = run_branches(x, [Branch(i.weight, i.lora_a, i.lora_b, i.bias, 0.5)], 0.0, backend)
    plain = lora_linear(x, i.weight, i.lora_a, i.lora_b, i.bias, 0.5, backend=backend)
    wide = [t.detach().double() for t in (x.flatten(0, 1), i.weight, i.lora_a, i.lora_b, i.bias)]
    exact = partial(lora_linear, *wide, 0.5, backend="eager")
    check("y", y.flatten(0, 1), exact, plain.flatten(0, 1), torch.float32)


@pytest.mark.parametrize("backend", [name for name, device in BACKENDS if device == "cpu"])
@pytest.mark.parametrize(("m", "count"), [(24, 1), (16, 2)])
def test_plain_branches_of_few_tokens_are_plain_layers(m: int, count: int, backend: str) -> None:
    x, (first, second), _ = draw(replace(SEVERAL[1], case=Case(m=m)), "cpu")
    branches = [first, second][:count]
    torch.manual_seed(1)
    together = run_branches(x, branches, 0.3, backend)
    torch.manual_seed(1)
    alone = [lora_linear(x, b.weight, b.lora_a, b.lora_b, b.bias, b.scaling, 0.3, True, backend) for b in branches]
    assert all(same_bits(y, other) for y, other in zip(together, alone, strict=True))
    assert [y.grad_fn.name() for y in together] == [y.grad_fn.name() for y in alone]


@every_backend
def test_members_of_a_group_draw_masks_of_their_own(backend: str, device: str) -> None:
    i = make(Case(zeroed="weight", bias=False), device)
    branch = Branch(i.weight, i.lora_a, i.lora_b)
    first, second = run_branches(i.x, [branch, branch], 0.5, backend)
    assert not torch.equal(first, second)


@every_backend
def test_the_same_bits_twice(backend: str, device: str) -> None:
    group = SEVERAL[1]
    drawn = draw(group, device)
    first, second = (run(group, *drawn, backend) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


@every_backend
@pytest.mark.parametrize("names", [{"dx"}, {"da0"}, {"db0"}, {"dbias0"}, {"dgain0"}, {"da1", "dx"}, {"db1", "dgain0"}])
def test_each_gradient_alone(names: set[str], backend: str, device: str) -> None:
    """What is not due is not needed: the values are right without it."""
    group = SEVERAL[2]
    x, branches, dys = draw(group, device)
    exact, yardstick, errors = measures(group, x, branches, dys, backend)
    for name, leaf in leaves(x, branches).items():
        leaf.requires_grad_(name in names)
    named = {name: leaf for name, leaf in leaves(x, branches).items() if name in names}
    ys = run_branches(x, branches, group.case.p, backend)
    gradients = torch.autograd.grad(ys, list(named.values()), dys)
    check_all(dict(zip(named, gradients, strict=True)), exact, yardstick, group.case.dtype, expected=errors)


@every_backend
def test_an_output_that_nobody_uses(backend: str, device: str) -> None:
    x, branches, dys = draw(SEVERAL[0], device)
    first, *_ = run_branches(x, branches, 0.0, backend)
    da, other = torch.autograd.grad(first, [branches[0].lora_a, branches[1].lora_a], dys[0], materialize_grads=True)
    assert torch.isfinite(da).all()
    assert not other.any()


def test_compiles_in_one_graph() -> None:
    x, branches, dys = draw(SEVERAL[2], "cpu")

    def step(x: Tensor) -> list[Tensor]:
        return run_branches(x, branches, 0.0, "eager")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    named = leaves(x, branches)
    wanted = torch.autograd.grad(step(x), list(named.values()), dys)
    found = torch.autograd.grad(compiled(x), list(named.values()), dys)
    assert all(same_bits(left, right) for left, right in zip(wanted, found, strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"activation": "tanh"}, "activation='tanh' was given: it must be one of"),
        ({"gain": torch.ones(3)}, r"a gain \(3,\)"),
        ({"lora_a": torch.ones(8, 3)}, "shapes that do not fit"),
    ],
)
def test_bad_branches_are_refused(change: dict[str, object], sentence: str) -> None:
    i = make(Case())
    branch = replace(Branch(i.weight, i.lora_a, i.lora_b), **change)
    with pytest.raises(LoRAKernelsError, match=sentence):
        run_branches(i.x, [branch], 0.0)


def test_bad_activation_of_the_function() -> None:
    i = make(Case())
    with pytest.raises(LoRAKernelsError, match="activation='tanh'"):
        lora_linear(i.x, i.weight, i.lora_a, i.lora_b, activation="tanh")
