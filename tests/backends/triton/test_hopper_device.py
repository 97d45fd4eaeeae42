"""The Gluon kernels themselves, on a GPU of compute capability 9.0: what the emulation runs, and two streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import Case as LayerCase
from cases import make as make_layer_case
from lora_kernels import FusedLoRALinear, use_backend
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose.blocks import machine_of
from lora_kernels.backends.triton.choose.gluon import why_not
from numerics import check_all, same_bits, three_ways
from test_cuda_graphs import captured
from test_hopper import CASES, Case, formulas, make, run
from test_hopper_plans import backward_plan, both, forward_plan, judge, layer_of, plan_by

LARGE = [
    Case(m=m, k=k, n=n, r=r, p=p)
    for m, k, n, r in ((4096, 4096, 1024, 16), (1104, 512, 768, 64), (2048, 1024, 2048, 128))
    for p in (0.0, 0.1)
]
FUSED = Case(m=4096, k=1024, n=4096, forward="fused", backward="fused")


def on_device(case: Case) -> Case:
    """The case on the GPU, or a skip that says why the kernels do not run there."""
    device = torch.device("cuda")
    machine = machine_of(device)
    if fault := why_not(machine.capability):
        pytest.skip(fault)
    return replace(case, device="cuda", machine=machine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*CASES, *LARGE, FUSED], ids=str)
def test_against_float64_and_twice_the_same(case: Case) -> None:
    case = on_device(case)
    i = make(case)
    exact, yardstick, errors = three_ways(case.dtype, lambda number: formulas(case, i, number))
    first, second = run(case, i), run(case, i)
    check_all(first, exact, yardstick, case.dtype, expected=errors)
    assert [name for name in first if not same_bits(first[name], second[name])] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [FUSED, LARGE[1]], ids=str)
def test_two_streams_run_one_layer(case: Case) -> None:
    """Kernels that wait for their own programs beside each other: none hangs, and no bit differs."""
    case = on_device(case)
    i = make(case)
    expected = run(case, i)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for _ in range(8):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(case, i))
    torch.cuda.synchronize()
    assert [name for one in found for name in one if not same_bits(one[name], expected[name])] == []


# ---- the plans, through the layer

LAYERS = [
    LayerCase(m=m, k=k, n=n, r=r, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=p)
    for m, k, n, r in ((1104, 512, 768, 16), (2048, 1024, 2048, 64))
    for p in (0.0, 0.1)
]
PAIRS = [("hopper", "dx_hopper"), ("hopper_small", "dx_hopper"), ("hopper_plain", "dx_inside")]
PAIRS += [("hopper_inside", "dx_inside")]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``device(case, names)``: the layer of the case takes the plans of these names, on two streams."""
    if fault := why_not(machine_of(torch.device("cuda")).capability):
        pytest.skip(fault)

    def choose(case: LayerCase, first: str, second: str) -> None:
        plans = forward_plan(first, case), backward_plan(second, case, beside=True)
        plan_by(monkeypatch, *(plan or both(case)[index] for index, plan in enumerate(plans)))

    yield choose
    monkeypatch.undo()
    operators.forget()


def step(layer: FusedLoRALinear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    with use_backend("triton"):
        y = layer(x)
    leaves = (x, layer.lora_A, layer.lora_B, layer.bias)
    gradients = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), **dict(zip(("dx", "da", "db", "dbias"), gradients, strict=True))}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_the_layer_by_each_plan(case: LayerCase, names: tuple[str, str], device: Callable[..., None]) -> None:
    """Against float64; twice the same bits, and so on two streams at once."""
    device(case, *names)
    i = make_layer_case(case, "cuda")
    layer = layer_of(case, i)
    torch.manual_seed(1)
    first = step(layer, i.x, i.dy)
    judge(first, case, i)
    torch.cuda.synchronize()
    found = []
    for stream in [torch.cuda.Stream() for _ in range(2)] * 3:
        with torch.cuda.stream(stream):
            torch.manual_seed(1)
            found.append(step(layer, i.x, i.dy))
    torch.cuda.synchronize()
    assert [name for one in found for name in one if not same_bits(one[name], first[name])] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_captured_step(case: LayerCase, names: tuple[str, str], device: Callable[..., None]) -> None:
    """Both streams are taken into the graph; its replays leave the bits of the calls, of dropout other ones."""
    device(case, *names)
    i = make_layer_case(case, "cuda")
    layer, out = layer_of(case, i), {}
    expected = step(layer, i.x, i.dy)
    graph = captured(lambda: out.update(step(layer, i.x, i.dy)))
    found = []
    for _ in range(2):
        graph.replay()
        found.append({name: value.clone() for name, value in out.items()})
    torch.cuda.synchronize()
    assert same_bits(found[0]["dbias"], expected["dbias"])
    if case.p:
        assert not same_bits(found[0]["y"], found[1]["y"])
    else:
        assert [name for one in found for name in one if not same_bits(one[name], expected[name])] == []
