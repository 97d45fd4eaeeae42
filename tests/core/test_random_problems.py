"""Random problems, numbered: shapes, strides, dtypes, ranks, dropout, which gradients are due, all against float64.

A number makes a problem, always the same one. ``pytest tests/core/test_random_problems.py --random-problems 50000``
runs the first so many in the place of 1000, ``--random-problems 17:18`` those from 17 to below 18, as a failure says.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from cases import BACKENDS, CUDA, Case, keep_mask, make, measures
from lora_kernels import dispatch, lora_linear
from lora_kernels.accuracy import judge, sum_error
from lora_kernels.console import one_thread
from lora_kernels.verify.cases import Inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LEAVES = {"dx": "x", "dw": "weight", "da": "lora_a", "db": "lora_b", "dbias": "bias"}
PARTS = 5  # so that a failure names the fifth that it is in, and workers share them
TRITON_EVERY = 20 if CUDA else 100  # compiled for new sizes, or interpreted: one takes as long as so many others


def problem(number: int) -> tuple[Case, tuple[str, ...], list[int]]:
    """The case, the gradients that are due, and how x's rows are laid out in leading dimensions."""
    draw = random.Random(number)
    dtype = draw.choice(DTYPES)
    case = Case(
        m=draw.choice([0, 1, 2, *(draw.randint(3, 80) for _ in range(9))]),
        k=draw.randint(8, 70),
        n=draw.randint(8, 70),
        r=draw.choice([2, 4, 8, draw.randint(2, 40)]),
        dtype=dtype,
        adapter_dtype=draw.choice([None, None, torch.float32, torch.bfloat16]),
        p=draw.choice([0.0, 0.0, 0.1, 0.5]),
        bias=draw.random() < 0.5,
        scaling=draw.choice([0.25, 1.0, 2.0, -1.5]),
        x_layout=draw.choice(["contiguous", "contiguous", "rows", "transposed"]),
    )
    names = [name for name in LEAVES if name != "dbias" or case.bias]
    due = tuple(name for name in names if draw.random() < 0.6) or ("da", "db")
    halves = [2, case.m // 2] if case.m and case.m % 2 == 0 and draw.random() < 0.5 else [case.m]
    return case, due, halves


def solve(i: Inputs, case: Case, due: tuple[str, ...], rows: list[int], backend: str, seed: int) -> dict[str, Tensor]:
    """y and the gradients that are due; nothing else requires one."""
    leaves = {name: getattr(i, LEAVES[name]) for name in LEAVES}
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf.requires_grad_(name in due)
    torch.manual_seed(seed)
    x = i.x.unflatten(0, rows) if len(rows) > 1 else i.x
    y = lora_linear(x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, case.p, case.p > 0, backend)
    gradients = torch.autograd.grad(y, [leaves[name] for name in due], i.dy.view_as(y))
    return {"y": y.detach().flatten(0, -2), **dict(zip(due, gradients, strict=True))}


def wrong(number: int, backend: str, device: str) -> list[str]:
    """The results that do not pass, each as a sentence."""
    case, due, rows = problem(number)
    i = make(case, device, seed=number)
    found = solve(i, case, due, rows, backend, number)
    mask = keep_mask(case, i, backend, number)

    exact, yardstick, errors = measures(case, i, mask)
    dy, x = i.dy.contiguous(), i.x.detach().contiguous()
    exact["dw"], yardstick["dw"] = dy.double().t() @ x.double(), dy.t() @ x
    errors["dw"] = sum_error(dy.t(), x, case.dtype)
    judged = [
        judge(name, found[name], exact[name], yardstick[name], case.dtype, expected=errors[name]) for name in found
    ]
    failed = [str(one) for one in judged if not one.passed]
    told = f"--random-problems {number}:{number + 1} (backend {backend} on {device}, {case}, due {', '.join(due)})"
    return [f"{told}: {sentence}" for sentence in failed]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_no_problem_fails(backend: str, device: str, part: int, random_problems: range) -> None:
    chosen = dispatch.backend(backend)
    numbers = [n for n in random_problems if n % PARTS == part]
    if backend == "triton" and len(random_problems) > 1:
        numbers = [n for n in numbers if n // PARTS % TRITON_EVERY == 0]
    numbers = [n for n in numbers if not chosen.why_not(dispatch.Problem(device, problem(n)[0].dtype))]
    with one_thread():
        failed = [sentence for number in numbers for sentence in wrong(number, backend, device)]
    assert not failed, "\n".join(failed)
