"""The operators obey torch.library's contract: schema, fake, aliasing, and autograd left outside."""

from __future__ import annotations

import pytest
import torch

from cases import BACKENDS, Case, make
from lora_kernels import dispatch, ops

CASES = [
    Case(m=6, k=10, n=8, r=3),
    Case(m=1, k=10, n=8, r=3, bias=False),
    Case(m=0, k=10, n=8, r=3),
    Case(m=6, k=10, n=8, r=3, p=0.5, dtype=torch.bfloat16, adapter_dtype=torch.float32),
]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, backend: str, device: str) -> None:
    dispatch.select(device, case.dtype, backend)
    table = ops._registered[backend]  # behind the dispatcher
    i = make(case, device)
    x, a, b = i.x.detach(), i.lora_a.detach(), i.lora_b.detach()
    bias = None if i.bias is None else i.bias.detach()
    state = dispatch.backend(backend).dropout_state(x, case.p) if case.p else None
    _, h = table.forward(x, i.weight, a, b, bias, case.scaling, case.p, state)
    dh = table.dh(i.dy, b, case.scaling)
    assert h.dtype == dh.dtype == table.hidden_dtype(case.dtype)
    calls = {
        "forward": (x, i.weight, a, b, bias, case.scaling, case.p, state),
        "dh": (i.dy, b, case.scaling),
        "dh_db": (i.dy, b, h, case.scaling),
        "dx": (i.dy, i.weight, dh, a, case.p, state),
        "da": (dh, x, a, case.p, state),
        "mask": (state, case.m, case.k, case.p),
    }
    for name in ops.OPERATOR_NAMES:
        if name != "mask" or state is not None:
            torch.library.opcheck(getattr(table, name), calls[name])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nothing_given_is_written_to(backend: str, device: str) -> None:
    case = Case(p=0.2)
    dispatch.select(device, case.dtype, backend)
    table = ops._registered[backend]  # behind the dispatcher
    i = make(case, device)
    x, a, b, bias = i.x.detach(), i.lora_a.detach(), i.lora_b.detach(), i.bias.detach()
    state = dispatch.backend(backend).dropout_state(x, case.p)
    given = [x, i.weight, a, b, bias, i.dy, state]
    before = [tensor.clone() for tensor in given]
    _, h = table.forward(x, i.weight, a, b, bias, 0.5, case.p, state)
    dh, _ = table.dh_db(i.dy, b, h, 0.5)
    table.dx(i.dy, i.weight, dh, a, case.p, state)
    table.da(dh, x, a, case.p, state)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


def test_registering_twice_is_harmless() -> None:
    dispatch.select("cpu", torch.float32, "eager")
    before = ops.operators("eager")
    dispatch.backend("eager").register()
    assert ops.operators("eager") is before
