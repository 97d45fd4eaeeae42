"""The Gluon kernels of a group themselves, on a GPU of compute capability 9.0: what the emulation runs, and streams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_kernels.backends.triton.choose.blocks import machine_of
from lora_kernels.backends.triton.choose.gluon import why_not
from numerics import check_all, same_bits, three_ways
from test_hopper_groups import CASES, Case, formulas, make, run

LARGE = [
    Case(m=m, k=k, ns=ns, rs=rs, p=p)
    for m, k, ns, rs in (
        (4096, 4096, (4096, 1024, 1024), (16, 16, 16)),
        (1104, 512, (1792, 1792), (64, 64)),
        (2048, 1024, (1024, 256, 264, 72), (8, 16, 16, 16)),
    )
    for p in (0.0, 0.1)
]


def on_device(case: Case) -> Case:
    """The case on the GPU, or a skip that says why the kernels do not run there."""
    machine = machine_of(torch.device("cuda"))
    if fault := why_not(machine.capability):
        pytest.skip(fault)
    return replace(case, device="cuda", machine=machine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_against_float64_and_twice_the_same(case: Case) -> None:
    case = on_device(case)
    i = make(case)
    exact, yardstick, errors = three_ways(case.dtype, lambda number: formulas(case, i, number))
    first, second = run(case, i), run(case, i)
    check_all(first, exact, yardstick, case.dtype, expected=errors)
    assert [name for name in first if not same_bits(first[name], second[name])] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", LARGE[:2], ids=str)
def test_two_streams_run_one_group(case: Case) -> None:
    """Counters belong to a call: no bit differs where two streams run the same group."""
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
