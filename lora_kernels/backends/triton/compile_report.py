"""Compiles every kernel for GPUs that are not there, and reports what the compiler made of it.

``python -m lora_kernels.backends.triton.compile_report [--check] [--json FILE] [--quick] [--arch 80 90 100]``

The launch code itself runs, on meta tensors and for a described machine, with every launch replaced by a note of it: so
the block sizes, argument types and alignments are those of a real call. Forward and backward run by the best predicted
plan of each kind, the part operators as they come. Each distinct call is then compiled for its target. ``--check``
exits 1, a sentence each, where registers spill, where shared memory exceeds the device's, or where an instruction that
is meant does not appear: the tensor cores' (on Hopper in every K step), TMA's loads, the waits of dependent launch. All
is read from the machine code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import env
from . import configs
from .configs import FEW_TOKENS, Machine
from .plans import BackwardPlan, BaseFirst, Cell, DxBaseFirst, FewTokens, ForwardPlan, Fused, candidates

__all__ = ["ARCHITECTURES", "CASES", "Case", "Record", "faults", "main", "report"]

# A100, H200 and B200 by their data sheets; shared memory is what one program may use.
ARCHITECTURES = {
    80: Machine(capability=80, sm_count=108, shared_memory=166912, clock=1.41e9, bandwidth=2.0e12),
    90: Machine(capability=90, sm_count=132, shared_memory=232448, clock=1.98e9, bandwidth=4.8e12),
    100: Machine(capability=100, sm_count=148, shared_memory=232448, clock=1.96e9, bandwidth=8.0e12),
}
_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "i1",
}
_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}
_SHOWN = ("PARTS", "FLATTEN", "PDL")
_GEMMS = ("forward_kernel", "persistent_kernel", "dx_kernel", "dx_persistent_kernel")
_BY_TMA = ("persistent_kernel", "dx_persistent_kernel")
_NO_PRODUCT = ("reduce_kernel", "mask_kernel", "sum_parts_kernel", "gain_grad_kernel")


@dataclass(frozen=True)
class Case:
    """A layer to compile for: K = N = 4096 and ``m`` tokens; ``parts``: the part operators too."""

    dtype: torch.dtype
    r: int = 16
    p: float = 0.0
    adapter_dtype: torch.dtype | None = None
    tf32: bool = False
    m: int = 8192
    parts: bool = False

    def __str__(self) -> str:
        name = "tf32" if self.tf32 else _TYPE_NAMES[self.dtype]
        adapter = f" adapters {_TYPE_NAMES[self.adapter_dtype]}" if self.adapter_dtype else ""
        return f"{name} r={self.r} p={self.p} m={self.m}{adapter}"


_FP16, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = (
    Case(_BF16, parts=True),
    Case(_BF16, p=0.1),
    Case(_BF16, r=8, adapter_dtype=_FP32),
    Case(_BF16, r=32, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, r=64, p=0.1, adapter_dtype=_FP32, parts=True),
    Case(_BF16, r=128, p=0.1),
    Case(_BF16, r=300, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, m=512, r=16, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, m=8, r=16, p=0.1, adapter_dtype=_FP32),
    Case(_FP16, p=0.1),
    Case(_FP32, tf32=True),
    Case(_FP32, tf32=True, r=64, p=0.1),
    Case(_FP32, p=0.1, parts=True),
)
QUICK = (CASES[4], CASES[8])  # rank 64 with dropout, and few tokens


@dataclass(frozen=True)
class Job:
    """One call of one kernel, as ``triton.compile`` wants it."""

    kernel: str
    arch: int
    case: str
    exact: bool  # fp32 products in IEEE arithmetic: no tensor core does those
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]

    def key(self) -> str:
        constants = {name: str(value) for name, value in self.constants.items()}
        return json.dumps([self.kernel, self.arch, self.signature, constants, self.aligned, self.options])


@dataclass(frozen=True)
class Record:
    """What the compiler made of one job. ``stack`` and ``local`` are bytes a thread: spilled registers live there.

    ``products``, ``tma_loads`` and ``waits`` count HGMMA, UTMALDG and ACQBULK in the machine code, on sm_90 for GEMMs.
    """

    kernel: str
    arch: int
    case: str
    exact: bool
    registers: int
    stack: int
    local: int
    shared: int
    shared_limit: int
    instruction: str
    seconds: float
    blocks: dict[str, int] = field(default_factory=dict)
    products: int = 0
    tma_loads: int = 0
    waits: int = 0


def report(cases: tuple[Case, ...] = CASES, architectures: tuple[int, ...] = tuple(ARCHITECTURES)) -> list[Record]:
    """Compiles every distinct kernel call of ``cases`` for ``architectures``, on all cores.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is set, under which kernels cannot be compiled.
    """
    if env.triton_interpreter_requested():
        raise RuntimeError("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled. Unset it.")
    jobs: dict[str, Job] = {}
    for arch in architectures:
        for case in cases:
            for job in _jobs_of(case, arch):
                jobs.setdefault(job.key(), job)
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, jobs.values()))


def faults(records: list[Record]) -> list[str]:
    """A sentence for each record that breaks a rule."""
    sentences = []
    for r in records:
        where = f"{r.kernel} for sm_{r.arch} ({r.case})"
        if r.stack or r.local:
            sentences.append(f"{where} spills: {r.stack} bytes of stack, {r.local} of local memory.")
        if r.shared > r.shared_limit:
            sentences.append(f"{where} takes {r.shared} bytes of shared memory and the device has {r.shared_limit}.")
        if (wanted := _wanted_instruction(r)) and r.instruction not in wanted:
            sentences.append(f"{where} uses {r.instruction or 'no tensor core'} where {' or '.join(wanted)} is meant.")
        sentences += [f"{where} {lack}" for lack in _hopper_faults(r)]
    return sentences


def _wanted_instruction(record: Record) -> tuple[str, ...]:
    """The instructions that will do; none where products are IEEE fp32 or there are none."""
    if record.exact or record.kernel in _NO_PRODUCT:
        return ()
    if record.kernel == "row_norms_kernel" and record.case.startswith("tf32"):  # its products are IEEE's
        return ()
    # TF32 takes both operands in one order only, which dx's W is not in: there Triton keeps to mma.sync.
    tf32 = record.case.startswith("tf32")
    if record.kernel in _GEMMS and not tf32 and record.arch >= 90 and record.blocks["BLOCK_M"] >= 64:
        return ("wgmma",) if record.arch < 100 else ("tcgen05",)
    return tuple(_INSTRUCTIONS)


def _hopper_faults(record: Record) -> Iterator[str]:
    """What a GEMM for sm_90 lacks: one product for each 16 elements of a K step, TMA's loads, the wait for h."""
    if record.arch != 90 or record.kernel not in _GEMMS or record.instruction != "wgmma":
        return
    blocks = record.blocks
    tall = max(1, blocks["BLOCK_M"] // (16 * blocks["num_warps"]))
    depth = blocks["BLOCK_N" if record.kernel.startswith("dx_") else "BLOCK_K"]
    wanted = depth // (8 if record.case.startswith("tf32") else 16) * tall
    if record.products < wanted:
        yield f"has {record.products} HGMMA where a K step takes {wanted}."
    if record.kernel in _BY_TMA and not record.tma_loads:
        yield "has no UTMALDG: its operands do not come by TMA."
    if blocks.get("PDL") and not record.waits:
        yield "has no ACQBULK: it does not wait for the kernel before."


def plans_of(machine: Machine, cell: Cell) -> list[ForwardPlan]:
    """The best predicted forward plan of each kind and variant; of few tokens, with and without a split of K.

    ``BaseFirst`` only for few tokens: its kernels are ``LoraFirst``'s but for one load.
    """
    found: dict[tuple[object, ...], ForwardPlan] = {}
    for plan in candidates(machine, cell):
        if isinstance(plan, BaseFirst) and cell.tokens > FEW_TOKENS:
            continue
        variant = plan.variant if isinstance(plan, Fused) else isinstance(plan, FewTokens) and plan.splits > 1
        found.setdefault((plan.kind, variant), plan)
    return list(found.values())


def backward_plans_of(machine: Machine, cell: Cell) -> list[BackwardPlan]:
    """The best predicted backward plan of each kind and variant, and of each way to dh and db, and to da.

    ``DxBaseFirst`` as ``BaseFirst``: for few tokens.
    """
    found: dict[tuple[object, ...], BackwardPlan] = {}
    for plan in candidates(machine, cell):
        if isinstance(plan, DxBaseFirst) and cell.tokens > FEW_TOKENS:
            continue
        found.setdefault((plan.kind, getattr(plan, "variant", "")), plan)
        found.setdefault((plan.hidden.joint,), plan)
        found.setdefault(("da", plan.da.splits > 1), plan)
    return list(dict.fromkeys(found.values()))


def _jobs_of(case: Case, arch: int) -> Iterator[Job]:
    """The kernel calls of one layer, forward and backward by each kind of plan, from the launch code itself."""
    from . import launch, parts
    from .forward_plans import Call, ready_product
    from .prepared import precision_of

    m, k, n, r = case.m, 4096, 4096, case.r
    adapter, p = case.adapter_dtype or case.dtype, case.p

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy, weight = (meta(*shape, dtype=case.dtype) for shape in ((m, k), (m, n), (n, k)))
    lora_a, lora_b, bias = (meta(*shape, dtype=adapter) for shape in ((r, k), (n, r), (n,)))
    h, gain = (meta(*shape, dtype=torch.float32) for shape in ((m, r), (n,)))
    state = meta(2, dtype=torch.int64) if p else None
    states = [] if state is None else [state]
    dtype = "tf32" if case.tf32 else str(case.dtype).removeprefix("torch.")
    cell, machine = Cell("forward", m, k, n, r, dtype, state is not None), ARCHITECTURES[arch]
    back = replace(cell, direction="backward")
    calls: list[Job] = []
    with _recording(launch, case, arch, calls):
        for plan in plans_of(machine, cell):
            launch.run_plan(plan, x, weight, lora_a, lora_b, bias, 2.5, p, state)
        for backward in backward_plans_of(machine, back):
            launch.run_backward(backward, dy, x, weight, lora_a, lora_b, None, h, 2.5, p, state)
            launch.run_backward(backward, dy, x, weight, lora_a, lora_b, None, None, 2.5, p, state)
        if case.parts or r > 128:
            parts.row_norms(weight, lora_a, lora_b, 2.5)
        if case.parts:
            parts.gain_grad(dy, dy, gain, bias)
            parts.output_grads(dy, lora_b, h, bias, 2.5)
            parts.input_grad([dy, dy], [weight, weight], [h, h], [lora_a, lora_a], p, 2 * states)
            call = Call.of(machine, x, weight, None, lora_b, bias, 0.0, None, precision_of(x.dtype), h, gain)
            ways = {
                (plan.kind, getattr(plan, "variant", "")): plan for plan in parts.product_plans(x.device, call)[::-1]
            }
            for way in ways.values():
                ready_product(way, call)(None, x, weight, lora_b, bias, gain, h, None, dy, 2.5)
        if state is not None:
            launch.mask(state, m, k, p)
    yield from calls


@contextlib.contextmanager
def _recording(launch: Any, case: Case, arch: int, calls: list[Job]) -> Iterator[None]:
    """Within it ``launch`` sees the machine ``arch``, and launches are noted in the place of being done."""
    from .prepared import Launch, ScratchLaunch

    def note(self: Launch, stream: int | None, *arguments: Any) -> None:
        calls.append(_job(self, arguments, case, arch))

    kept = [(configs, "machine_of"), (Launch, "__call__"), (ScratchLaunch, "__call__")]
    values = [getattr(owner, name) for owner, name in kept]
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    launch.forget()
    for (owner, name), value in zip(kept, (lambda device: ARCHITECTURES[arch], note, note), strict=True):
        setattr(owner, name, value)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
        for (owner, name), value in zip(kept, values, strict=True):
            setattr(owner, name, value)
        launch.forget()


def _job(launch: Any, arguments: tuple[Any, ...], case: Case, arch: int) -> Job:
    """Types the arguments as Triton's launcher does: 1 and None are constants, multiples of 16 aligned."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, (*arguments, *launch.static), strict=True))
    parameters = {parameter.name: parameter for parameter in kernel.params}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for name, value in values.items():
        specialised = not parameters[name].do_not_specialize
        one = specialised and isinstance(value, int) and value == 1
        if parameters[name].is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPE_NAMES[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialised:
                aligned.append(name)
    exact = case.dtype == torch.float32 and not case.tf32
    options = {"enable_fp_fusion": True, **launch.options}
    return Job(kernel.__name__, arch, str(case), exact, signature, constants, tuple(aligned), options)


def _kernel(name: str) -> Any:
    from .kernels import backward, few_tokens, forward, gain, input_grad, persistent, philox

    modules = (backward, few_tokens, forward, gain, input_grad, persistent, philox)
    return next(getattr(module, name) for module in modules if name in module.__all__)


def _compile(job: Job) -> Record:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(job.kernel)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in job.aligned}
    source = ASTSource(fn=kernel, signature=job.signature, constexprs=job.constants, attrs=attributes)
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))
    seconds = time.perf_counter() - start
    usage = _resource_usage(compiled.asm["cubin"])
    instruction = next((name for name, text in _INSTRUCTIONS.items() if text in compiled.asm["ptx"]), "")
    code = _dump(compiled.asm["cubin"], "-sass") if job.arch == 90 and job.kernel in _GEMMS else ""
    return Record(
        kernel=job.kernel,
        arch=job.arch,
        case=job.case,
        exact=job.exact,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        shared_limit=ARCHITECTURES[job.arch].shared_memory,
        instruction=instruction,
        seconds=round(seconds, 2),
        blocks={
            **{name: value for name, value in job.constants.items() if name in _SHOWN or name.startswith("BLOCK")},
            **{name: value for name, value in job.options.items() if name != "enable_fp_fusion"},
        },
        products=code.count("HGMMA"),
        tma_loads=code.count("UTMALDG"),
        waits=code.count("ACQBULK"),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and SHARED of the one kernel in ``cubin``."""
    dumped = _dump(cubin, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", dumped)}


def _dump(cubin: bytes, what: str) -> str:
    """What Triton's ``cuobjdump`` says."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], check=True, capture_output=True, text=True).stdout


def _table(records: list[Record]) -> str:
    heading = f"{'kernel':20} {'sm':>4} {'regs':>4} {'stack':>5} {'local':>5} {'shared':>7} {'instruction':11}"
    lines = [f"{heading}  case; blocks"]
    for r in records:
        blocks = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in r.blocks.items())
        lines.append(
            f"{r.kernel:20} {r.arch:4} {r.registers:4} {r.stack:5} {r.local:5} {r.shared:7} {r.instruction or '-':11}  "
            f"{r.case}; {blocks}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 on a broken rule")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--quick", action="store_true", help="two cases instead of all")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    records = report(QUICK if options.quick else CASES, tuple(options.arch))
    print(_table(records))
    sentences = faults(records)
    print(f"{len(records)} kernels compiled in {time.perf_counter() - start:.0f} s; {len(sentences)} faults.")
    if options.json:
        options.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if options.check and sentences else 0


if __name__ == "__main__":
    sys.exit(main())
