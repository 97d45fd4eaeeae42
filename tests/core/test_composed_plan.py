"""What ``explain`` tells of the plain composition is what PyTorch is asked for: counted call by call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import Case, make
from lora_kernels import explain, traffic, use_backend
from lora_kernels.backends import composed, composed_fp16, eager
from lora_kernels.benchmark.roofline import kernels
from lora_kernels.benchmark.workloads import Workload
from lora_kernels.dispatch import Problem

# Views, memory, the seed and the reading of it: they launch nothing, or next to nothing.
FREE = ("view", "t", "transpose", "slice", "select", "split", "alias", "detach", "expand", "_local_scalar_dense")
FREE += ("empty", "new_empty", "empty_like", "empty_strided", "randint", "set_", "as_strided", "_unsafe_view", "unbind")


class Counter(TorchDispatchMode):
    """The operators that compute, by name; a cast that changes nothing is none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("m", [1, 63, 64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_its_launches_are_those_that_run(dtype: torch.dtype, m: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed_fp16, "_BLOCK_ELEMENTS", 1000)  # several blocks
    adapters = torch.float64 if dtype is torch.float64 else torch.float32
    i = make(Case(m=m, k=64, n=96, r=4, dtype=dtype, adapter_dtype=adapters, bias=False, p=p))
    problem = Problem("cpu", dtype, 64, 96, 4, p)
    tensors = (i.x.detach(), i.weight, i.lora_a.detach(), i.lora_b.detach())
    state = torch.tensor([3, 4]) if p else None
    with use_backend("eager"):
        plans = explain(problem, m).plans
    with Counter() as forward:
        _, h, _ = eager.forward(*tensors, None, 2.0, p, state)
    with Counter() as backward:
        eager.backward(i.dy, *tensors, None, h, 2.0, p, state)
    counted = [forward.names, backward.names]
    told = [[launch.what for launch in plan.launches for _ in range(launch.times)] for plan in plans]
    assert list(map(len, told)) == list(map(len, counted)), (told, counted)


@pytest.mark.parametrize("tokens", [8, 512])
def test_its_bytes_are_the_roofline_s(tokens: int) -> None:
    """Of the same kernels under other names; but dx begins with its low-rank term, however few the tokens."""
    assert composed.MANY_TOKENS == 64
    provider = "addmm" if tokens < composed.MANY_TOKENS else "lora_first"
    plans = told(tokens)[: 1 if tokens < composed.MANY_TOKENS else 2]
    for direction, plan in zip(("forward", "backward"), plans, strict=False):
        workload = Workload(direction, tokens, 256, 128, 8, "float32", 0.0)
        work = kernels(provider, workload)
        assert work is not None
        turned = sum(launch.bytes for launch in plan.launches if launch.what == "dB is turned")
        assert plan.bytes - turned == sum(kernel.bytes for kernel in work)


def told(tokens: int) -> Any:
    with use_backend("eager"):
        return explain(Problem("cpu", torch.float32, 256, 128, 8), tokens).plans


def test_on_a_gpu_the_mask_is_drawn_once() -> None:
    from lora_kernels.backends import composed_plan

    plans = composed_plan.plans(Problem("cuda", torch.bfloat16, 256, 128, 8, 0.1), 512)
    drawn = [[launch.what for launch in plan.launches if "drawn" in launch.what] for plan in plans]
    assert drawn == [["the mask of x is drawn, and kept"], []]


def test_traffic() -> None:
    assert traffic.large(3, 5, 7, 2) == 2 * (15 + 35 + 21)
    assert traffic.skinny(3, 15, 2, 4) == 4 * (15 + 2 * 5 + 2 * 3)
    assert traffic.skinny(0, 0, 2, 4) == 0
