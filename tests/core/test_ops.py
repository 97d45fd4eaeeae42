"""The operators obey torch.library's contract: schema, fake, aliasing, and autograd left outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import BACKENDS, Case, contract, make, measures
from lora_kernels import dispatch, lora_linear, ops
from lora_kernels.verify.cases import Inputs
from numerics import check_all

CASES = [
    Case(m=6, k=10, n=8, r=3),
    Case(m=6, k=10, n=8, r=3, p=0.5, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(m=1, k=10, n=8, r=3, bias=False),
    Case(m=0, k=10, n=8, r=3),
]
DUE = ("dx", "da", "db", "dbias")


def _arguments(case: Case, backend: str, device: str) -> tuple[ops.Operators, Inputs, Tensor | None, Tensor]:
    """The operators behind the dispatcher, detached inputs, the dropout state, and h."""
    dispatch.select(device, case.dtype, backend)
    table = ops._registered[backend]
    i = make(case, device)
    i = Inputs(*(None if t is None else t.detach() for t in vars(i).values()))
    state = dispatch.backend(backend).dropout_state(i.x, case.p) if case.p else None
    _, h, _ = table.forward(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, case.p, state)
    return table, i, state, h


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, backend: str, device: str) -> None:
    table, i, state, h = _arguments(case, backend, device)
    assert h.dtype == table.kept.hidden_dtype(case.dtype)
    arguments = (i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, case.p, state)
    packets, checks = ops._packets[backend], contract(CASES.index(case), backend)
    torch.library.opcheck(packets["forward"].default, arguments, test_utils=checks)
    for x, weight, hidden in ((i.x, i.weight, h), (None, i.weight, None), (i.x, None, h)):
        arguments = (i.dy, x, weight, i.lora_a, i.lora_b, i.bias, hidden, case.scaling, case.p, state)
        torch.library.opcheck(packets["backward"].default, arguments, test_utils=checks)
    if state is not None:
        torch.library.opcheck(table.mask, (state, case.m, case.k, case.p), test_utils=checks)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("m", [5, 80])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_each_gradient_alone_and_each_one_left_out(m: int, p: float, backend: str, device: str) -> None:
    """Those that are due pass; the others are empty, in the dtype that they would have had."""
    case = Case(m=m, p=p, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    table, i, state, h = _arguments(case, backend, device)
    mask = None if state is None else table.mask(state, case.m, case.k, p)
    exact, yardstick, errors = measures(case, i, mask)
    dtypes = {"dx": case.dtype, "da": torch.float32, "db": torch.float32, "dbias": case.dtype}
    for due in [set(DUE), set(), *({name} for name in DUE), *(set(DUE) - {name} for name in DUE)]:
        given = {"dx": i.weight, "da": i.x, "db": h, "dbias": i.bias}
        weight, x, hidden, bias = (tensor if name in due else None for name, tensor in given.items())
        out = table.backward(i.dy, x, weight, i.lora_a, i.lora_b, bias, hidden, case.scaling, p, state)
        results = dict(zip(DUE, out, strict=True))
        assert {name: result.dtype for name, result in results.items()} == dtypes
        assert {name for name, result in results.items() if result.shape == (0,)} == set(DUE) - due
        check_all({name: results[name] for name in due}, exact, yardstick, case.dtype, expected=errors)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nothing_given_is_written_to(backend: str, device: str) -> None:
    case = Case(p=0.2)
    table, i, state, h = _arguments(case, backend, device)
    given = [*vars(i).values(), state, h]
    before = [tensor.clone() for tensor in given]
    table.forward(i.x, i.weight, i.lora_a, i.lora_b, i.bias, 0.5, case.p, state)
    table.backward(i.dy, i.x, i.weight, i.lora_a, i.lora_b, i.bias, h, 0.5, case.p, state)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_gradients_share_no_memory(backend: str, device: str) -> None:
    """Not with what was given, nor with each other: torch.library's contract for functional operators."""
    _, i, _, h = _arguments(Case(m=1, n=1), backend, device)
    table = ops.operators(backend)
    given = [*vars(i).values(), h]
    results = table.backward(i.dy, i.x, i.weight, i.lora_a, i.lora_b, i.bias, h, 0.5, 0.0, None)
    addresses = [tensor.untyped_storage().data_ptr() for tensor in (*given, *results)]
    assert len(set(addresses)) == len(addresses)


def test_registering_twice_is_harmless() -> None:
    dispatch.select("cpu", torch.float32, "eager")
    before = ops.operators("eager")
    dispatch.backend("eager").register("cpu")
    assert ops.operators("eager") is before


@pytest.mark.parametrize(("backend", "device"), [pair for pair in BACKENDS if pair[0] != "triton"])
def test_fake_tensors_outside_of_their_mode_have_the_layer_s_shapes(backend: str, device: str) -> None:
    """Nobody watches there, and the operator is given x as it is. Triton's functions read addresses, and take none."""
    case = Case(m=6, k=10, n=8, r=3)
    dispatch.select(device, case.dtype, backend)
    i, mode = make(case, device), FakeTensorMode()
    x, *parameters = (mode.from_tensor(t.detach()) for t in (i.x, i.weight, i.lora_a, i.lora_b))
    x = x.view(2, 3, case.k).requires_grad_()
    y = lora_linear(x, *parameters, backend=backend)
    assert y.shape == (2, 3, case.n)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape
