"""Compiles every kernel for GPUs that are not there, and reports what the compiler made of it.

``python -m lora_kernels.backends.triton.compile_report [--check] [--json FILE] [--quick] [--arch 80 90 100]``

The launch code itself runs, on meta tensors and for a described machine, with each kernel replaced by a recorder: so
the block sizes, argument types and alignments are those of a real call. Each distinct call is then compiled for its
target. ``--check`` exits 1, a sentence each, where registers spill, where shared memory exceeds the device's, or where
the tensor-core instruction that is meant does not appear. Registers and stack are what Triton's ``cuobjdump`` says.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import env
from .configs import Machine

__all__ = ["ARCHITECTURES", "CASES", "Case", "Record", "faults", "main", "report"]

# Multiprocessors and shared memory (bytes that one program may use) of A100, H100 / H200 and B200.
ARCHITECTURES = {
    80: Machine(capability=80, sm_count=108, shared_memory=166912),
    90: Machine(capability=90, sm_count=132, shared_memory=232448),
    100: Machine(capability=100, sm_count=148, shared_memory=232448),
}
_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "i1",
}
_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}
_GEMMS = ("forward_kernel", "dx_kernel")
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Case:
    """A layer to compile for: K = N = 4096 and ``m`` tokens."""

    dtype: torch.dtype
    r: int = 16
    p: float = 0.0
    adapter_dtype: torch.dtype | None = None
    tf32: bool = False
    m: int = 8192

    def __str__(self) -> str:
        name = "tf32" if self.tf32 else _TYPE_NAMES[self.dtype]
        adapter = f" adapters {_TYPE_NAMES[self.adapter_dtype]}" if self.adapter_dtype else ""
        return f"{name} r={self.r} p={self.p} m={self.m}{adapter}"


_FP16, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = (
    Case(_BF16),
    Case(_BF16, p=0.1),
    Case(_BF16, r=8, adapter_dtype=_FP32),
    Case(_BF16, r=32, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, r=64, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, r=128, p=0.1),
    Case(_BF16, r=300, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, m=512, r=16, p=0.1, adapter_dtype=_FP32),
    Case(_BF16, m=8, r=16, p=0.1, adapter_dtype=_FP32),
    Case(_FP16, p=0.1),
    Case(_FP32, tf32=True),
    Case(_FP32, tf32=True, r=64, p=0.1),
    Case(_FP32, p=0.1),
)
QUICK = (Case(_BF16, r=64, p=0.1, adapter_dtype=_FP32), Case(_BF16, m=8))


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
    """What the compiler made of one job. ``stack`` and ``local`` are bytes a thread: spilled registers live there."""

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
    return sentences


def _wanted_instruction(record: Record) -> tuple[str, ...]:
    """The instructions that will do; none where products are IEEE fp32 or there are none."""
    if record.exact or record.kernel in ("reduce_kernel", "mask_kernel"):
        return ()
    # TF32 takes both operands in one order only, which dx's W is not in: there Triton keeps to mma.sync.
    tf32 = record.case.startswith("tf32")
    if record.kernel in _GEMMS and not tf32 and record.arch >= 90 and record.blocks["BLOCK_M"] >= 64:
        return ("wgmma",) if record.arch < 100 else ("tcgen05",)
    return tuple(_INSTRUCTIONS)


def _jobs_of(case: Case, arch: int) -> Iterator[Job]:
    """The kernel calls of one layer's forward and backward, from the launch code itself."""
    from . import launch

    m, k, n, r = case.m, 4096, 4096, case.r
    adapter = case.adapter_dtype or case.dtype

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy, weight = (meta(*shape, dtype=case.dtype) for shape in ((m, k), (m, n), (n, k)))
    lora_a, lora_b, bias = (meta(*shape, dtype=adapter) for shape in ((r, k), (n, r), (n,)))
    state = meta(2, dtype=torch.int64) if case.p else None
    calls: list[Job] = []
    with _recording(launch, case, arch, calls):
        _, h = launch.forward(x, weight, lora_a, lora_b, bias, 2.5, case.p, state)
        dh, _ = launch.dh_db(dy, lora_b, h, 2.5)
        launch.dh(dy, lora_b, 2.5)
        launch.dx(dy, weight, dh, lora_a, case.p, state)
        launch.da(dh, x, lora_a, case.p, state)
        if state is not None:
            launch.mask(state, m, k, case.p)
    yield from calls


@contextlib.contextmanager
def _recording(launch: Any, case: Case, arch: int, calls: list[Job]) -> Iterator[None]:
    """Within it ``launch`` sees the machine ``arch`` and, in the place of each kernel, what notes its calls."""
    names = [name for name in vars(launch) if name.endswith("_kernel")]
    kept = {name: getattr(launch, name) for name in [*names, "machine_of"]}
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    launch.machine_of = lambda device: ARCHITECTURES[arch]
    for name in names:
        setattr(launch, name, _Recorder(kept[name], case, arch, calls))
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
        for name, value in kept.items():
            setattr(launch, name, value)


@dataclass(frozen=True)
class _Recorder:
    kernel: Any
    case: Case
    arch: int
    calls: list[Job]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._record

    def _record(self, *args: Any, **named: Any) -> None:
        """Types the arguments as Triton's launcher does: 1 and None are constants, multiples of 16 aligned."""
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        parameters = {parameter.name: parameter for parameter in self.kernel.params}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned = []
        for name in self.kernel.arg_names:
            value, specialised = values[name], not parameters[name].do_not_specialize
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
        exact = self.case.dtype == torch.float32 and not self.case.tf32
        kernel = self.kernel.__name__
        self.calls.append(Job(kernel, self.arch, str(self.case), exact, signature, constants, tuple(aligned), options))


def _compile(job: Job) -> Record:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import launch

    kernel = getattr(launch, job.kernel)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in job.aligned}
    source = ASTSource(fn=kernel, signature=job.signature, constexprs=job.constants, attrs=attributes)
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))
    seconds = time.perf_counter() - start
    usage = _resource_usage(compiled.asm["cubin"])
    instruction = next((name for name, text in _INSTRUCTIONS.items() if text in compiled.asm["ptx"]), "")
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
            **{name: value for name, value in job.constants.items() if name.startswith("BLOCK")},
            **{name: value for name, value in job.options.items() if name != "enable_fp_fusion"},
        },
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and SHARED of the one kernel in ``cubin``."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", done.stdout)}


def _table(records: list[Record]) -> str:
    heading = f"{'kernel':18} {'sm':>4} {'regs':>4} {'stack':>5} {'local':>5} {'shared':>7} {'instruction':11}"
    lines = [f"{heading}  case; blocks"]
    for r in records:
        blocks = " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in r.blocks.items())
        lines.append(
            f"{r.kernel:18} {r.arch:4} {r.registers:4} {r.stack:5} {r.local:5} {r.shared:7} {r.instruction or '-':11}  "
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
