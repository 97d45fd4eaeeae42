"""Runs plans and Gluon steps for a described GPU by Triton's own launcher and as prepared passes, and compares.

Run as a program, without ``TRITON_INTERPRET``, with the launcher's library and the folder of the driver's stand-in as
arguments and that folder in LD_LIBRARY_PATH; prints JSON. Triton compiles, binds and launches as on a GPU, by its own
C code: so each byte that a kernel is given, each grid and each attribute can be compared. With ``--time`` it times both
ways too: host time alone, for the stand-in's launches do nothing.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from cases import Case, make
from driver_stand_in import NAME, DriverStandIn
from lora_kernels.backends.triton import (
    code_operators,
    combine_operators,
    expert_operators,
    group_operators,
    operators,
    part_operators,
)
from lora_kernels.backends.triton.choose import blocks, hopper_blocks
from lora_kernels.backends.triton.choose.candidates import candidates
from lora_kernels.backends.triton.choose.group_plans import DxHopperGroup, HopperGroup
from lora_kernels.backends.triton.choose.plans import BaseFirst, Cell, DxHopper, DxInside
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES, backward_plans_of, plans_of
from lora_kernels.backends.triton.run import hopper, hopper_backward, hopper_group_passes, launcher, prepared, streams
from lora_kernels.backends.triton.run.backward import ready_backward
from lora_kernels.backends.triton.run.call import Call
from lora_kernels.backends.triton.run.forward import ready
from lora_kernels.backends.triton.run.group_call import GroupCall
from lora_kernels.backends.triton.run.hopper_group_passes import (
    flat_backward,
    flat_forward,
    ready_group_backward,
    ready_group_forward,
)
from lora_kernels.backends.triton.run.launcher import KnownPasses
from lora_kernels.backends.triton.run.recording import Recorder
from lora_kernels.codes import Codes
from lora_kernels.packed_mask import packed_keep_words

STREAM, HIGH, DEVICE = 0x77, 0x55, ("cpu", -1, 0)
WRITTEN = "cuLaunchKernelEx", "cuEventRecord", "cuStreamWaitEvent"
CACHES = operators._runs, operators._backward_runs, part_operators._steps, code_operators._runs
CACHES = *CACHES, expert_operators._runs, combine_operators._runs
CACHES = *CACHES, hopper_group_passes.forward_runs, hopper_group_passes.backward_runs
TIMED = "--time" in sys.argv
SIZES = {"i1": 1, "u1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}


class Driver(CudaDriver):
    """Triton's driver for CUDA, but for what it asks torch."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = STREAM
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @contextmanager
    def current(self, stream: int) -> Iterator[None]:
        """In the place of ``prepared._current``."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


class Stream:
    """In the place of torch's, and waits as that does: by an event of the driver."""

    events = 0x5000

    def __init__(self, stand_in: DriverStandIn, number: int) -> None:
        self.stand_in, self.cuda_stream = stand_in, number

    def wait_stream(self, other: Stream) -> None:
        Stream.events += 1
        event = ctypes.c_void_p(Stream.events)
        self.stand_in.library.cuEventRecord(event, ctypes.c_void_p(other.cuda_stream))
        self.stand_in.library.cuStreamWaitEvent(ctypes.c_void_p(self.cuda_stream), event, 0)


def roles(lines: list[list[str]]) -> list[list[str]]:
    """With the streams as "main" and "beside" and the events numbered: what each means in its own run."""
    events, found = dict[str, str](), list[list[str]]()
    for line in lines:
        told = list(line)
        at = {"cuLaunchKernelEx": 9, "cuEventRecord": 2, "cuStreamWaitEvent": 1}[line[0]]
        told[at] = "main" if line[at] == str(STREAM) else "beside"
        if line[0] != "cuLaunchKernelEx":
            event = 3 - at
            told[event] = events.setdefault(line[event], f"event {len(events)}")
        found.append(told)
    return found


def parameter_sizes(compiled: Any) -> list[int]:
    """What Triton's launcher makes of a signature, written a second time."""
    sizes: list[int] = []

    def add(kind: Any) -> None:
        if isinstance(kind, tuple):
            for each in kind:
                add(each)
        elif kind.startswith("tensordesc"):
            rank = re.search(r"\[([^\]]*)\]", kind)[1].count(",") + 1  # type: ignore[index]
            sizes.extend([128, *[4] * rank, *[8] * rank])
        elif kind != "constexpr":
            sizes.append(8 if kind.startswith("*") else SIZES[kind])

    for kind in compiled.src.signature.values():
        add(kind)
    return [*sizes, 8, 8]


def compare(stand_in: DriverStandIn, name: str, run: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The launches of Triton's third call and of the pass's second one, by another number than the recorded one."""
    run(STREAM, *arguments)
    recorder = Recorder(DEVICE, STREAM, arguments)
    with recorder:
        results = run(STREAM, *recorder.arguments)
    described = recorder.described(results if isinstance(results, tuple) else (results,))
    if described is None:
        return {"name": name, "fault": recorder.fault}
    for compiled in recorder.kept:
        stand_in.parameters(compiled.function, parameter_sizes(compiled))
    other = tuple(with_other_numbers(each) for each in arguments)
    ready_pass = launcher.PreparedPass(launcher.library(), described, arguments, recorder.kept)
    ready_pass(*other)
    stand_in.forget()
    stand_in.stream(0, STREAM)
    with Holding():
        expected_results = run(STREAM, *other)
    by_triton = roles(stand_in.take(*WRITTEN))
    found_results = ready_pass(*other)
    by_pass = roles(stand_in.take(*WRITTEN))
    known = {int(t.data_ptr()) for t in recorder.tensors if t is not None}
    same_shapes = [
        (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        for a, b in zip((t for t in as_tuple(expected_results) if t is not None), found_results, strict=True)
    ]
    return {
        "name": name,
        "fault": None,
        "launches": [len(by_triton), len(by_pass)],
        "differences": differences(by_triton, by_pass, known),
        "order": [line[9] if line[0] == "cuLaunchKernelEx" else " ".join(line) for line in by_pass],
        "shapes": all(same_shapes),
        "dependent": sum("@6=" in " ".join(line) for line in by_pass),
        "descriptors": len(described.descriptors),
        "products": sum(type(step).__name__ == "Product" for step in described.steps),
        "own": sum(type(buffer).__name__ == "Own" for buffer in described.buffers),
        "scratch": described.scratch()[1],
        "host": host(stand_in, run, ready_pass, other) if TIMED else None,
    }


def with_other_numbers(argument: Any) -> Any:
    if isinstance(argument, list):
        return [with_other_numbers(each) for each in argument]
    return 0.375 if isinstance(argument, float) else argument


def as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def differences(expected: list[list[str]], found: list[list[str]], known: set[int]) -> list[str]:
    """Words that differ: a call's own memory may lie elsewhere, but then the same for all launches."""
    wrong, moved = [], dict[str, str]()

    def one(a: str, b: str) -> bool:
        if a == b:
            return True
        if len(a) != len(b) or int.from_bytes(bytes.fromhex(a[:16]), "little") in known:
            return False
        if len(a) == 256:  # a descriptor: its address in front
            return a[16:] == b[16:] and one(a[:16], b[:16])
        return len(a) == 16 and moved.setdefault(a, b) == b

    for i, (line, other) in enumerate(zip(expected, found, strict=False)):
        if len(line) != len(other):
            wrong.append(f"launch {i}: {line} and {other}")
            continue
        wrong += [f"launch {i}: {a} and {b}" for a, b in zip(line, other, strict=True) if not one(a, b)]
    return wrong


def host(stand_in: DriverStandIn, run: Callable[..., Any], ready_pass: Any, arguments: tuple[Any, ...]) -> list[float]:
    """Microseconds of a call by Python and by the pass, in turn, the least of many."""
    stand_in.quiet()
    best = [float("inf")] * 2
    calls = (lambda: run(STREAM, *arguments)), (lambda: ready_pass(*arguments))
    for _ in range(30):
        for i, call in enumerate(calls):
            start = time.perf_counter_ns()
            for _ in range(100):
                call()
            best[i] = min(best[i], (time.perf_counter_ns() - start) / 1e5)
    stand_in.forget()
    stand_in.stream(0, STREAM)
    return [round(each, 2) for each in best]


def h_of(case: Case) -> torch.Tensor:
    """On such a device h is an operand: high and low parts."""
    return torch.ones(case.m, 2 * case.r, dtype=torch.bfloat16)


def of_plans() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    machine, seen = ARCHITECTURES[90], set[str]()
    for m in (8, 128):
        case = Case(m=m, k=256, n=128, r=16, dtype=torch.bfloat16, p=0.1)
        i, state = make(case), torch.tensor([1, 2])
        x, weight, a, b, bias, dy = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy))
        words, h = packed_keep_words(state, m, case.k, case.p), h_of(case)
        call = Call.forward(x, weight, a, b, bias, case.p, state)
        for plan in plans_of(machine, Cell("forward", m, case.k, case.n, case.r, "bfloat16", True)):
            name = f"{plan.kind} {getattr(plan, 'variant', '')}{' pdl' if getattr(plan, 'pdl', False) else ''}"
            name += f" {getattr(plan, 'splits', '')}"
            if name not in seen and (plan.kind == "few_tokens") == (m == 8):
                seen.add(name)
                yield name, ready(plan, call), (x, weight, a, b, bias, 0.5, words)
            if plan.kind == "lora_first" and "base_first" not in seen:
                seen.add("base_first")
                base_first = BaseFirst(plan.shrink, plan.expand)
                yield "base_first", ready(base_first, call), (x, weight, a, b, bias, 0.5, words)
                whole = operators._whole(base_first, call)
                yield "with the mask's draw", whole, (x, weight, a, b, bias, 0.5, state)
        if m == 8:
            continue
        call = Call.backward(dy, x, weight, a, b, bias, h, case.p, words)
        plan = backward_plans_of(machine, Cell("backward", m, case.k, case.n, case.r, "bfloat16", True))[0]
        yield "with dbias", ready_backward(plan, call, True, True, True), (dy, x, weight, a, b, h, 0.5, words)
        call = Call.backward(dy, x, weight, a, b, None, h, case.p, words)
        for plan in backward_plans_of(machine, Cell("backward", m, case.k, case.n, case.r, "bfloat16", True)):
            if plan.kind not in seen:
                seen.add(plan.kind)
                run = ready_backward(plan, call, True, True, True)
                yield plan.kind, run, (dy, x, weight, a, b, h, 0.5, words)
                run = operators._whole_backward(plan, call, (True, True, True), state)
                yield f"{plan.kind} of a seed", run, (dy, x, weight, a, b, h, 0.5, state)


def of_hopper() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    m, k, n, r = 200, 320, 264, 16
    c = hopper.HopperCall(ARCHITECTURES[90], torch.device("cpu"), torch.bfloat16, m, n, k, r, 0.1, True)
    x, weight = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16)
    lora_a, lora_b, state = torch.randn(r, k), torch.randn(n, r), torch.tensor([1, 2])
    shrink = hopper_blocks.shrink_configs(r)[0]
    count = hopper.shrink_counters(shrink, c, k)
    pack, h_step = hopper.pack_step(c, None, count), hopper.shrink_step(shrink, c)
    y_step = hopper.product_step(hopper_blocks.forward_configs()[1], c)

    def run(stream: int | None, *arguments: Any) -> Any:
        x, weight, lora_a, lora_b, scaling, state = arguments
        a, b, counters = pack(stream, lora_a, lora_b)
        h, words = h_step(stream, x, a, counters, state, scaling)
        return y_step(stream, x, weight, h, b), h, words

    yield "hopper forward", run, (x, weight, lora_a, lora_b, 0.5, state)


def of_hopper_backward() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """The plans that have dx on a stream of high priority."""
    r = 16
    outer, db = (hopper_blocks.outer_configs(r, masked)[0] for masked in (True, False))
    joint, inside = hopper_blocks.dh_db_configs(r)[0], hopper_blocks.product_h_configs(r)[0]
    plans = {0.1: DxHopper(joint, hopper_blocks.dx_configs(True)[0], outer, True), 0.0: DxInside(inside, db, db, True)}
    for p, plan in plans.items():
        case = Case(m=200, k=512, n=576, r=r, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=p)
        i, state = make(case), torch.tensor([1, 2]) if p else None
        x, weight, a, b, dy = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.dy))
        h = h_of(case)
        call = Call.backward(dy, x, weight, a, b, None, h, p, state)
        run = operators._whole_backward(plan, call, (True, True, True), state)
        yield f"{plan.kind} beside", run, (dy, x, weight, a, b, h, 0.5, state)


def of_groups() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Three layers of one x and four, with a bias and without; backward beside, of the words and of the seeds."""
    for ns, p in (((576, 192, 192), 0.1), ((576, 192), 0.0), ((512, 256, 256, 256), 0.0)):
        cases = [Case(m=200, k=512, n=n, r=16, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=p) for n in ns]
        made = [make(case, seed=i) for i, case in enumerate(cases)]
        x = made[0].x.detach()
        weights, lora_as, lora_bs, biases, dys = (
            [getattr(i, name).detach() for i in made] for name in ("weight", "lora_a", "lora_b", "bias", "dy")
        )
        states = [torch.tensor([1, i]) for i in range(len(ns))] if p else []
        scalings, absent = [0.5] * len(ns), [None] * len(ns)
        of = f"{len(ns)} layers"
        call = GroupCall.of(x, lora_as, lora_bs, biases, p, states, (x, *weights))
        forward = next(q for q in candidates(ARCHITECTURES[90], call.cell("forward")) if isinstance(q, HopperGroup))
        run = flat_forward(ready_group_forward(forward, call))
        yield f"forward of {of}", run, (x, weights, lora_as, lora_bs, biases, scalings, states)
        hs = [h_of(case) for case in cases]
        call = GroupCall.of(dys[0], lora_as, lora_bs, absent, p, states, (*dys, x, *weights, *hs))
        found = [q for q in candidates(ARCHITECTURES[90], call.cell("backward")) if isinstance(q, DxHopperGroup)]
        for beside in (True, False):
            plan = next(q for q in found if q.beside is beside)
            kinds = {"": states}
            if p:
                kinds = {", seeds": states, ", words": [packed_keep_words(state, 200, 512, p) for state in states]}
            for kind, given in kinds.items():
                run = flat_backward(ready_group_backward(plan, call, True, True, given), len(ns))
                name = f"backward of {of}{' beside' if beside else ''}{kind}"
                yield name, run, (dys, x, weights, lora_as, lora_bs, hs, scalings, given)


def flat(results: Any) -> tuple[Any, ...]:
    return tuple(each for kept in results for each in (kept if isinstance(kept, list) else [kept]))


def calls_of(m: int, p: float) -> tuple[dict[str, Callable[[float], Any]], list[torch.Tensor]]:
    """Each operator as a layer calls it, and the tensors that they are given."""
    bf16, state, states = torch.bfloat16, torch.tensor([1, 2]), [torch.tensor([3, 4]), torch.tensor([5, 6])]
    case = Case(m=m, k=256, n=128, r=16, dtype=bf16, p=p)
    i = make(case)
    x, weight, a, b, bias, dy = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy))
    of_x, h = (state if p else None), h_of(case)
    z, gain, linear = torch.ones(m, 16), torch.ones(128), torch.ones(m, 128, dtype=bf16)
    also, dz = torch.ones(128, 256, dtype=bf16), torch.ones(m, 16)
    wide = torch.ones(m, 40)[:, 8:24]  # as of one h that several members share
    codes, absmax = torch.zeros(128, 128, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    plain, nested = [codes, torch.ones(512)], [codes, absmax, torch.ones(2), torch.ones(256), torch.ones(())]
    four_bits, of = code_operators.values, (128, 256, bf16)
    given = [x, weight, a, b, bias, dy, h, z, gain, linear, also, dz, wide, state, *states, *plain, *nested[1:]]
    words = packed_keep_words(state, m, case.k, p) if p else None
    given += [] if words is None else [words]
    calls: dict[str, Callable[[float], Any]] = {
        "forward": lambda s: operators.forward(x, weight, a, b, bias, s, p, of_x),
        "forward without a bias": lambda s: operators.forward(x, weight, a, b, None, s, p, of_x),
        "backward": lambda s: operators.backward(dy, x, weight, a, b, None, h, s, p, of_x),
        "backward of the words": lambda s: operators.backward(dy, x, weight, a, b, None, h, s, p, words),
        "backward without dx": lambda s: operators.backward(dy, x, None, a, b, None, h, s, p, of_x),
        "backward of dx alone": lambda s: operators.backward(dy, None, weight, a, b, None, None, s, p, of_x),
        "shrink": lambda s: part_operators.shrink(x, a, p, of_x),
        "product": lambda s: part_operators.product(x, weight, b, wide, bias, None, s, False),
        "product with a gain": lambda s: part_operators.product(x, weight, b, z, bias, gain, s, True),
        "output_grads": lambda s: part_operators.output_grads(dy, b, wide, None, s),
        "output_grads of dh": lambda s: part_operators.output_grads(dy, b, None, None, s),
        "input_grad": lambda s: part_operators.input_grad([dy], [weight], [dz], [a], p, states[:1] if p else []),
        "input_grad of two": lambda s: part_operators.input_grad(
            [dy, linear], [weight, also], [dz, z], [a, a], p, states if p else []
        ),
        "a_grad": lambda s: part_operators.a_grad(dz, x, p, of_x),
        "gain_grad": lambda s: part_operators.gain_grad(dy, linear, gain, bias),
        "gain_grad of dl": lambda s: part_operators.gain_grad(dy, None, gain, None),
        "row_norms": lambda s: part_operators.row_norms(weight, a, b, s),
        "four bits": lambda s: four_bits(plain, Codes("nf4", 1, 64), *of),
        "four bits, nested": lambda s: four_bits(nested, Codes("fp4", 1, 64, 256), *of),
    }
    if m > 16:
        group = [weight, weight.clone()], [a, a.clone()], [b, b.clone()], [bias, None]
        members = states if p else []
        hs, group_words = [h, h.clone()], [words, words.clone()] if words is not None else []
        given += [each for kind in (*group, hs, group_words) for each in kind if each is not None]
        calls |= {
            "group_forward": lambda s: flat(group_operators.group_forward(x, *group, [s, 2 * s], p, members)),
            "group_backward": lambda s: flat(
                group_operators.group_backward([dy, linear], x, *group[:3], [None] * 2, hs, [s, 2 * s], p, group_words)
            ),
        }
    if m <= 16:
        few, nf4, fp4 = code_operators.few_tokens, Codes("nf4", 1, 64, 256), Codes("fp4", 1, 64)
        calls |= {
            "few codes": lambda s: few(x, nested, nf4, a, b, None, bias, None, s, p, of_x, False)[:2],
            "few codes with a gain": lambda s: few(x, plain, fp4, None, b, wide, bias, gain, s, 0.0, None, True)[::2],
        }
    return calls, given


def experts_calls(m: int, p: float) -> tuple[dict[str, Callable[[float], Any]], list[torch.Tensor]]:
    """The same of three experts."""
    bf16, state = torch.bfloat16, torch.tensor([1, 2]) if p else None
    x, dy, weight = (
        torch.ones(m // 2, 256, dtype=bf16),
        torch.ones(m, 128, dtype=bf16),
        torch.ones(3, 128, 256, dtype=bf16),
    )
    a, b, h = torch.ones(3, 16, 256), torch.ones(3, 128, 16), torch.ones(m, 16)
    offsets, tokens = torch.tensor([9, 9, m], dtype=torch.int32), torch.arange(m) // 2

    def forward(s: float) -> Any:
        return expert_operators.experts_forward(x, weight, a, b, offsets, tokens, s, p, state)

    def backward(s: float) -> Any:
        return expert_operators.experts_backward(dy, x, weight, a, b, offsets, tokens, h, s, p, state)

    calls = {"experts_forward": forward, "experts_backward": backward}
    given = [x, dy, weight, a, b, h, offsets, tokens]
    return calls, given if state is None else [*given, state]


def combine_calls(m: int) -> tuple[dict[str, Callable[[float], Any]], list[torch.Tensor]]:
    """Of two rows a token: the sum with weights and without, and each gradient alone and both."""
    bf16, tokens = torch.bfloat16, m // 2
    rows, dy, weights = torch.ones(m, 256, dtype=bf16), torch.ones(tokens, 256, dtype=bf16), torch.ones(tokens, 2)
    places, offsets = torch.arange(m), torch.tensor([9, 9, m], dtype=torch.int32)
    summed, grad = combine_operators.combine, combine_operators.combine_grad
    of = places, offsets
    calls: dict[str, Callable[[float], Any]] = {
        "combine": lambda s: summed(rows, weights, *of, 2, bf16),
        "combine without weights": lambda s: summed(rows, None, *of, 2, bf16),
        "combine_grad": lambda s: grad(dy, rows, weights, *of, bf16),
        "combine_grad of rows": lambda s: grad(dy, None, weights, *of, bf16),
        "combine_grad of weights": lambda s: grad(dy, rows, weights, *of, None),
    }
    return calls, [rows, dy, weights, places, offsets]


def compare_operator(
    stand_in: DriverStandIn, name: str, call: Callable[[float], Any], given: list[torch.Tensor]
) -> dict[str, Any]:
    """A warm call, and the same by Python as where a profiler has set a hook."""
    before = {id(run) for cache in CACHES for run in cache.values()}
    call(0.5)
    made = [run for cache in CACHES for run in cache.values() if id(run) not in before]
    made = [getattr(run, "passes", run) for run in made]
    for compiled in (compiled for run in made if run._pass for compiled in run._pass.kept):
        stand_in.parameters(compiled.function, parameter_sizes(compiled))
    call(0.5)
    stand_in.forget()
    stand_in.stream(0, STREAM)
    KNOWN.clear()
    results = [result for result in as_tuple(call(0.375)) if result.numel()]
    by_pass = stand_in.take("cuLaunchKernelEx")
    with Holding():
        expected = [result for result in as_tuple(by_python(call, 0.375)) if result.numel()]
    by_triton = stand_in.take("cuLaunchKernelEx")
    same = [
        (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) for a, b in zip(expected, results, strict=True)
    ]
    known = {int(tensor.data_ptr()) for tensor in given}
    return {
        "name": name,
        "passes": [run._pass is not None for run in made],
        "faults": [run.fault for run in made],
        "launches": [len(by_triton), len(by_pass)],
        "differences": differences(by_triton, by_pass, known),
        "shapes": all(same),
        "known": sum(KNOWN),
        "host": host(stand_in, lambda stream, s: by_python(call, s), call, (0.375,)) if TIMED else None,
    }


KNOWN: list[bool] = []  # of each question in turn, whether C++ knew the pass


def telling(ask: Callable[..., Any]) -> Callable[..., Any]:
    """``ask`` of ``KnownPasses``, which notes each answer in ``KNOWN``."""

    def told(known: KnownPasses, *arguments: Any) -> Any:
        found = ask(known, *arguments)
        KNOWN.append(len(found) > 0)
        return found

    return told


class Holding(TorchDispatchMode):
    """Holds all that is allocated, so that no address is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.held.append(func(*args, **(kwargs or {})))
        return self.held[-1]


def by_python(call: Callable[[float], Any], s: float) -> Any:
    asked = launcher._hooked
    launcher._hooked = lambda: True
    try:
        return call(s)
    finally:
        launcher._hooked = asked


def open_stand_in(path: str, folder: str) -> DriverStandIn:
    """The launcher's library over a driver that does nothing, in the place of a GPU of capability 9.0."""
    stand_in = DriverStandIn(Path(folder) / NAME)
    stand_in.stream(0, STREAM)
    torch.ops.load_library(path)
    launcher._found = launcher._Found(launcher.Library(path, stand_in.path, stand_in.path), None)
    ctypes.CDLL(stand_in.path).cuCtxSetCurrent(ctypes.c_void_p(0xC000))
    own = Driver()
    driver.set_active(own)
    prepared._current = own.current
    blocks.machine_of = lambda device: ARCHITECTURES[90]
    prepared._allocate = lambda size, alignment, stream: torch.empty(size, dtype=torch.int8)
    torch.cuda.current_stream = lambda index: Stream(stand_in, STREAM)
    streams._stream_beside = lambda index, main, priority: Stream(stand_in, HIGH if priority < 0 else 0)
    high = streams.PriorityStream(torch.device("cuda", 0))
    for module in (hopper_backward, hopper_group_passes):
        module.ahead_on = lambda device, beside: high if beside else streams.in_turn
    return stand_in


def take_the_cpu_s_tensors() -> None:
    """For a GPU's, by the operators."""
    launcher.index_of, launcher._device_words = (lambda device: 0), (lambda index: DEVICE)
    launcher.current_stream, torch.cuda.current_device = (lambda index: STREAM), (lambda: 0)
    torch.cuda.is_current_stream_capturing = lambda: False


def main(path: str, folder: str) -> None:
    stand_in = open_stand_in(path, folder)
    found = [compare(stand_in, *each) for each in (*of_plans(), *of_hopper(), *of_hopper_backward(), *of_groups())]
    KnownPasses.__call__ = telling(KnownPasses.__call__)  # type: ignore[method-assign]
    KnownPasses.many = telling(KnownPasses.many)  # type: ignore[method-assign]
    take_the_cpu_s_tensors()
    operators_found = []
    for m, p in ((8, 0.0), (8, 0.1), (256, 0.0), (256, 0.1)):
        calls, given = calls_of(m, p)
        if (m, p) == (256, 0.1):
            for_experts = experts_calls(m, p)
            of_slots = combine_calls(m)
            calls, given = calls | for_experts[0] | of_slots[0], given + for_experts[1] + of_slots[1]
        for name, call in calls.items():
            operators_found.append(compare_operator(stand_in, f"{name}, {m} tokens, dropout {p}", call, given))
    print(json.dumps({"runs": found, "operators": operators_found}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
