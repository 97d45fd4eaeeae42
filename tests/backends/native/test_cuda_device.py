"""The CUDA library on a GPU: what the host run of its kernels (``test_cuda_kernels.py``) cannot show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import Case, keep_mask, make, measures, run
from lora_kernels import dispatch, ops
from lora_kernels.ops import Operators
from lora_kernels.reference import philox_keep_mask
from numerics import check_all, same_bits

HALF = (torch.float16, torch.bfloat16)
SIZES = [
    Case(m=1, k=4096, n=1024, r=16),
    Case(m=7, k=1000, n=520, r=8, p=0.1),
    Case(m=2048, k=1024, n=1024, r=16, p=0.1),
    Case(m=4096, k=520, n=264, r=64),
    Case(m=1000, k=1001, n=999, r=130, p=0.3),
]
CASES = [
    *[
        replace(case, dtype=dtype, adapter_dtype=adapter)
        for case in SIZES
        for dtype in HALF
        for adapter in (None, torch.float32)
    ],
    *[replace(case, dtype=torch.float32) for case in SIZES],
    Case(m=300, k=130, n=70, r=20, p=0.2, dtype=torch.float64),
]
SEED = (0x0123456789ABCDEF, -7)


@pytest.fixture
def native() -> Operators:
    """The operators as torch's dispatcher finds them; skips where they cannot run."""
    reasons = ["it needs a GPU and torch sees no CUDA device"] if not torch.cuda.is_available() else []
    if not reasons:
        reasons = dispatch.backend("native").why_not(dispatch.Problem("cuda", torch.float32))
    if reasons:
        pytest.skip(" ".join(reasons))
    dispatch.select("cuda", torch.float32, "native")
    return ops.operators("native")


def call(native: Operators, case: Case) -> dict[str, Tensor]:
    """h, y and the gradients by the operators themselves, from the same tensors and seed every time."""
    i = make(case, "cuda")
    state = torch.tensor(SEED, device="cuda") if case.p else None
    x, a, b, bias = (t.detach() for t in (i.x, i.lora_a, i.lora_b, i.bias))
    y, h, _ = native.forward(x, i.weight, a, b, bias, case.scaling, case.p, state)
    names = ("dx", "da", "db", "dbias")
    gradients = native.backward(i.dy, x, i.weight, a, b, bias, h, case.scaling, case.p, state)
    return {"h": h, "y": y, **dict(zip(names, gradients, strict=True))}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_pass_the_policy(native: Operators, case: Case) -> None:
    inputs = make(case, "cuda")
    mask = keep_mask(case, inputs, "native")
    exact, yardstick, errors = measures(case, inputs, mask)
    check_all(run(case, inputs, "native"), exact, yardstick, case.dtype, expected=errors)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_call_gives_the_same_bits(native: Operators, case: Case) -> None:
    """On another stream too, while the first one is busy."""
    first = call(native, case)
    with torch.cuda.stream(torch.cuda.Stream()):
        second = call(native, case)
    torch.cuda.synchronize()
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_is_the_reference_s(native: Operators, p: float) -> None:
    state = torch.tensor(SEED, device="cuda")
    assert torch.equal(native.mask(state, 333, 1001, p).cpu(), philox_keep_mask(state.cpu(), 333, 1001, p))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_gradients_that_are_not_due_are_empty(native: Operators, dtype: torch.dtype) -> None:
    i = make(Case(dtype=dtype), "cuda")
    a, b = i.lora_a.detach(), i.lora_b.detach()
    gradients = native.backward(i.dy, None, None, a, b, None, None, 0.5, 0.0, None)
    assert [(tuple(g.shape), g.dtype) for g in gradients] == [((0,), dtype)] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_unaligned_rows_give_the_same_bits(native: Operators, dtype: torch.dtype) -> None:
    """Rows at odd addresses take narrower loads; the skinny products see the same numbers."""
    i = make(Case(m=200, k=200, n=200, dtype=dtype), "cuda")
    a, b, bias = i.lora_a.detach(), i.lora_b.detach(), i.bias.detach()
    shifted = torch.nn.functional.pad(i.x.detach(), (1, 4))[:, 1:-4]
    _, h, _ = native.forward(i.x.detach(), i.weight, a, b, bias, 0.5, 0.0, None)
    _, moved, _ = native.forward(shifted, i.weight, a, b, bias, 0.5, 0.0, None)
    assert same_bits(h, moved)


@pytest.mark.gpu
def test_a_captured_graph_replays_the_same_bits(native: Operators) -> None:
    case = Case(m=256, k=256, n=256, r=16, dtype=torch.bfloat16)
    i = make(case, "cuda")
    arguments = (i.x.detach(), i.weight, i.lora_a.detach(), i.lora_b.detach(), i.bias.detach(), 0.5, 0.1)
    state = torch.tensor(SEED, device="cuda")
    expected_y, _, _ = native.forward(*arguments, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _, _ = native.forward(*arguments, state)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(y, expected_y)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(native: Operators) -> None:
    """x of 4.3 GB: the last row's h is that of the last row alone."""
    rows, columns = 2**20 + 3, 2048
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(8, columns, dtype=torch.bfloat16, device="cuda")
    a, b = torch.randn(4, columns, device="cuda"), torch.randn(8, 4, device="cuda")
    y, _, _ = native.forward(x, weight, a, b, None, 1.0, 0.0, None)
    alone, _, _ = native.forward(x[-64:], weight, a, b, None, 1.0, 0.0, None)
    exact = (x[-64:].double() @ a.bfloat16().double().t()) @ b.bfloat16().double().t()
    check_all({"y": y[-64:]}, {"y": exact}, {"y": alone}, torch.bfloat16)
