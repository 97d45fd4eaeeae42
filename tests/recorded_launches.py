"""Runs both passes by each plan, and the part operators, three times for a described GPU, with a driver that records.

Run as a program, without ``TRITON_INTERPRET``; prints JSON. Triton compiles, binds and launches as ever, but for the
last step: so what the first call (bound by Triton) and the third (ready-made) hand to the device can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from cases import Case, make
from lora_kernels.backends.triton import code_operators, combine_operators, gated_operators, operators, part_operators
from lora_kernels.backends.triton.choose import blocks
from lora_kernels.backends.triton.choose.blocks import FEW_TOKENS
from lora_kernels.backends.triton.choose.plans import Cell, FewTokens
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES, backward_plans_of, plans_of
from lora_kernels.codes import Codes

CASES = [Case(m=m, k=256, n=128, r=16, dtype=torch.bfloat16, p=0.1) for m in (8, 128)]
STATE = torch.tensor([1, 2])
launched: list[dict[str, Any]] = []


class Recorder:
    """In the place of Triton's launcher: what one compiled kernel is called with."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.fixed = {"kernel": metadata.name, "pdl": metadata.launch_pdl, "scratch": metadata.global_scratch_size}
        if metadata.launch_cooperative_grid:
            self.fixed["cooperative"] = True

    def __call__(self, *arguments: Any) -> None:
        """Grid, stream, function and the kernel's own arguments; tensors as their shapes, dtypes and alignments."""
        grid, stream, function, own = arguments[:3], arguments[3], arguments[4], arguments[9:]
        told = [_told(value) for value in own]
        launched.append({**self.fixed, "grid": grid, "stream": stream, "function": function, "arguments": told})


def _told(value: Any) -> Any:
    return [str(value.dtype), list(value.shape), value.data_ptr() % 16] if isinstance(value, Tensor) else value


class Driver:
    launcher_cls = Recorder
    utils = SimpleNamespace(
        load_binary=lambda *arguments: (1, 2, 100, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": ARCHITECTURES[90].shared_memory},
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77


def _three_times(plan: object, run: Callable[[], object]) -> dict[str, Any]:
    calls = []
    for _ in range(3):
        launched.clear()
        run()
        calls.append(list(launched))
    return {"plan": str(plan), "first": calls[0], "third": calls[2]}


def _forward(case: Case) -> Iterator[dict[str, Any]]:
    i = make(case)
    tensors = [t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias)]
    cell = Cell("forward", case.m, case.k, case.n, case.r, "bfloat16", True)
    few = case.m <= FEW_TOKENS
    for plan in (plan for plan in plans_of(ARCHITECTURES[90], cell) if few == isinstance(plan, FewTokens)):
        given = (*tensors, case.scaling, case.p, STATE)
        yield _three_times(plan, lambda plan=plan, given=given: operators.run_plan(plan, *given))


def _backward(case: Case) -> Iterator[dict[str, Any]]:
    i = make(case)
    tensors = [t.detach() for t in (i.dy, i.x, i.weight, i.lora_a, i.lora_b, i.bias)]
    cell = Cell("backward", case.m, case.k, case.n, case.r, "bfloat16", True)
    for plan in backward_plans_of(ARCHITECTURES[90], cell):
        given = (*tensors, torch.ones(case.m, 2 * case.r, dtype=torch.bfloat16), case.scaling, case.p, STATE)
        yield _three_times(plan, lambda plan=plan, given=given: operators.run_backward(plan, *given))


def _parts(case: Case) -> Iterator[dict[str, Any]]:
    i = make(case)
    x, weight, a, b, bias = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias))
    gain, h = torch.ones(case.n), torch.ones(case.m, case.r + 8)[:, 8:]
    several = ([i.dy] * 2, [weight] * 2, [h] * 2, [a] * 2, case.p, [STATE] * 2)
    yield _three_times("product", lambda: part_operators.product(x, weight, b, h, bias, gain, case.scaling, True))
    yield _three_times("input_grad", lambda: part_operators.input_grad(*several))
    yield _three_times("gain_grad", lambda: part_operators.gain_grad(i.dy, i.dy, gain, bias))
    yield _three_times("gated", lambda: gated_operators.gated(i.dy, i.dy, 0))
    weights, offsets = torch.ones(case.m // 2, 2), torch.tensor([0, case.m], dtype=torch.int32)
    of = weights, torch.arange(case.m), offsets
    yield _three_times("combine", lambda: combine_operators.combine(i.dy, *of, 2, case.dtype))
    yield _three_times("combine_grad", lambda: combine_operators.combine_grad(i.dy[::2], i.dy, *of, case.dtype))
    yield _three_times("gated_grad", lambda: gated_operators.gated_grad(i.dy, i.dy, i.dy, 0, True))
    codes, absmax = torch.zeros(case.n * case.k // 2, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    nested = [codes, absmax, torch.ones(2), torch.ones(256), torch.ones(())]
    four_bits = code_operators.values
    yield _three_times("four_bits", lambda: four_bits(nested, Codes("nf4", 1, 64, 256), case.n, case.k, case.dtype))
    if case.m <= FEW_TOKENS:
        few = nested, Codes("nf4", 1, 64, 256), a, b, None, bias, None, case.scaling, case.p, STATE, False
        yield _three_times("few_codes pdl", lambda: code_operators.few_tokens(x, *few))
    yield _three_times("row_norms", lambda: part_operators.row_norms(weight, a, b, case.scaling))


def main() -> None:
    driver.set_active(Driver())
    blocks.machine_of = lambda device: ARCHITECTURES[90]
    results = [found for case in CASES for found in (*_forward(case), *_backward(case), *_parts(case))]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
