"""Compiles every kernel for GPUs that are not there, and reports what the compiler made of it.

``python -m lora_kernels.backends.triton.offline.compile_report [--check] [--known FOLDER] [--json FOLDER]
[--quick | --all] [--arch 80]``

Each distinct call of ``compile_jobs`` is compiled for its target. With ``--known`` those that the same Triton compiled
before from the same sources are not, but for one in sixteen, which is compared. ``--check`` exits 1, a sentence each,
where registers spill (but for the few that the compiler gives up for one more block, ``_given_up``), where shared
memory exceeds the device's, where fp32 products are not summed block by block, where two roundings are made one, or
where an instruction that is meant does not appear: the tensor cores' (on Hopper in every K step), TMA's loads,
dependent launch's waits. All but the sums is read from the machine code.
"""

from __future__ import annotations

import argparse
import inspect
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
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from .... import env
from ..run.wrong_code import lanes_that_overflow
from .compile_jobs import ARCHITECTURES, CASES, QUICK, Case, Job, jobs_of
from .hopper_jobs import GLUON_KERNELS, hopper_jobs
from .sources import key_of, source_of

__all__ = ["Record", "compile_job", "faults", "jobs", "known_records", "main", "report"]

_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}
_SHOWN = (
    "PARTS",
    "PDL",
    "STAGES",
    "EXTRA",
    "R",
    "SPLIT",
    "MASKED",
    "DROP",
    "TRANS_W",
    "EPI_N",
    "NBUF",
    "GROUP_M",
)
_GEMMS = ("forward_kernel", "persistent_kernel", "dx_kernel", "dx_persistent_kernel")
_AGAIN = 16  # of the known kernels one in so many is compiled all the same
_GIVEN_UP = (32, 12)  # bytes of stack a thread, loads and stores in the code: at most
_BY_TMA = ("persistent_kernel", "dx_persistent_kernel")
_NO_PRODUCT = (
    "reduce_kernel",
    "draw_kernel",
    "mask_kernel",
    "sum_parts_kernel",
    "gain_grad_kernel",
    "gated_kernel",
    "gated_grad_kernel",
    "combine_kernel",
    "combine_grad_kernel",
    "e2m1_values_kernel",
    "eight_bit_values_kernel",
    "four_bit_values_kernel",
    "hopper_pack_kernel",
    "hopper_reduce_dh_kernel",
    "hopper_reduce_grads_kernel",
    "hopper_group_pack_kernel",
    "hopper_group_reduce_dh_kernel",
    "hopper_group_reduce_grads_kernel",
)
_ROUNDED_TWICE = ("four_bit_values_kernel",)  # a multiplication and an addition, as bitsandbytes has them
_BY_TMA_STORED = (
    "hopper_product_kernel",
    "hopper_product_h_kernel",
    "hopper_group_product_kernel",
    "hopper_group_dx_kernel",
)


@dataclass(frozen=True)
class Record:
    """What the compiler made of one job. ``stack`` and ``local`` are bytes a thread: spilled registers live there.

    ``products``, ``tma_loads``, ``tma_stores``, ``waits`` and ``spills`` count HGMMA, UTMALDG, UTMASTG, ACQBULK, and
    STL and LDL in the machine code, on sm_90 for GEMMs and the Gluon kernels, and wherever there is a stack.
    ``chained``: of the sums over blocks of IEEE products the compiler has made one chain. ``overflows``: of
    ``run.wrong_code``. ``fused``: FFMA where two roundings are meant. ``key``: ``sources.key_of``.
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
    chained: bool = False
    tma_stores: int = 0
    spills: int = 0
    overflows: int = 0
    fused: int = 0
    key: str = ""


def jobs(
    cases: tuple[Case, ...] = CASES, architectures: tuple[int, ...] = tuple(ARCHITECTURES), gluon: str = "some"
) -> list[Job]:
    """Every distinct kernel call of ``cases`` for ``architectures``; ``gluon``: the extent of the Gluon kernels.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is set, under which kernels cannot be compiled.
    """
    if env.triton_interpreter_requested():
        raise RuntimeError("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled. Unset it.")
    found: dict[str, Job] = {}
    for arch in architectures:
        for case in cases:
            for job in jobs_of(case, arch):
                found.setdefault(job.key(), job)
    for job in hopper_jobs(architectures, gluon):
        found.setdefault(job.key(), job)
    return list(found.values())


def report(found: list[Job], known: dict[str, Record]) -> list[Record]:
    """The records of ``found``: those of ``known`` by their keys, the others by compiling, on all cores.

    Of ``known`` one in :data:`_AGAIN` is compiled all the same: :func:`faults` compares.
    """
    keys = {_key_of(job): job for job in found}
    due = {key: job for key, job in keys.items() if key not in known or int(key, 16) % _AGAIN == 0}
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        made = dict(zip(due, pool.map(compile_job, due.values()), strict=True))
    return [replace(made.get(key) or known[key], case=job.case, key=key) for key, job in keys.items()]


def _key_of(job: Job) -> str:
    return key_of(job, inspect.getsource(compile_job) + inspect.getsource(lanes_that_overflow))


def known_records(folder: Path) -> dict[str, Record]:
    """The records of this release of Triton in ``folder``, by their keys; none where it has no file of it."""
    path = folder / f"triton-{version('triton')}.json"
    if not path.exists():
        return {}
    records = [Record(**record) for record in json.loads(path.read_text())]
    return {record.key: record for record in records}


def faults(records: list[Record], known: dict[str, Record]) -> list[str]:
    """A sentence for each record that breaks a rule, or that is another than the known one."""
    sentences = []
    for r in records:
        where = f"{r.kernel} for sm_{r.arch} ({r.case})"
        if other := _other_than(r, known.get(r.key, r)):
            sentences.append(
                f"{where} is not what the known record says: {other}. Remove the file of records, and write it anew."
            )
        if (r.stack or r.local or r.spills) and not _given_up(r):
            spilled = f"{r.stack} bytes of stack, {r.local} of local memory, {r.spills} loads and stores"
            sentences.append(f"{where} spills: {spilled}.")
        if r.shared > r.shared_limit:
            sentences.append(f"{where} takes {r.shared} bytes of shared memory and the device has {r.shared_limit}.")
        if (wanted := _wanted_instruction(r)) and r.instruction not in wanted:
            sentences.append(f"{where} uses {r.instruction or 'no tensor core'} where {' or '.join(wanted)} is meant.")
        if r.chained:
            sentences.append(f"{where} adds all its products up in one chain, where blocks are meant to be summed.")
        if r.overflows:
            sentences.append(f"{where} is compiled wrongly: {r.overflows} offsets are carried into others.")
        if r.fused:
            sentences.append(f"{where} has {r.fused} multiply-adds where two roundings are meant.")
        sentences += [f"{where} {lack}" for lack in _hopper_faults(r)]
    return sentences


def _other_than(record: Record, known: Record) -> str:
    """What they differ in; the time that it took, and which case came first, do not count."""
    pairs = zip(asdict(record).items(), asdict(known).values(), strict=True)
    differences = [(name, own, other) for (name, own), other in pairs if name not in ("case", "seconds")]
    return ", ".join(f"{name} {own} where {other} was" for name, own, other in differences if own != other)


def _given_up(record: Record) -> bool:
    """Whether the compiler had registers left, and keeps a few values on the stack so that one more block fits.

    It rounds down to such a count by itself: 128 registers where 132 are needed let two blocks of 8 warps stand on a
    multiprocessor, not one. One more block is worth more than a few loads that hit the first cache. Where it took all
    that it may (255, or ``maxnreg``), or gives up more, the block is too large: that is a fault.
    """
    stack, accesses = _GIVEN_UP
    lacks = record.registers >= record.blocks.get("maxnreg", 255) - 1
    return not (lacks or record.local or record.stack > stack or record.spills > accesses)


def _wanted_instruction(record: Record) -> tuple[str, ...]:
    """The instructions that will do; none where products are IEEE fp32 or there are none."""
    if record.exact or record.kernel in _NO_PRODUCT:
        return ()
    if record.kernel == "sum_four_bits_kernel" and record.blocks["R"] == 0:  # without an adapter
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
    if record.kernel in GLUON_KERNELS:
        if not record.products or record.instruction != "wgmma":
            yield "has no HGMMA."
        if not record.tma_loads:
            yield "has no UTMALDG: its operands do not come by TMA."
        if record.kernel in _BY_TMA_STORED and not record.tma_stores:
            yield "has no UTMASTG: y does not leave by TMA."
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


def compile_job(job: Job) -> Record:
    """Compiles one call in this process, and reads the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = source_of(job)
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))
    seconds = time.perf_counter() - start
    usage = _resource_usage(compiled.asm["cubin"])
    instruction = next((name for name, text in _INSTRUCTIONS.items() if text in compiled.asm["ptx"]), "")
    twice = job.kernel in _ROUNDED_TWICE
    read = usage["STACK"] > 0 or twice or (job.arch == 90 and job.kernel in (*_GEMMS, *GLUON_KERNELS))
    code = _dump(compiled.asm["cubin"], "-sass") if read else ""
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
        chained=job.exact and compiled.asm["ttgir"].count("arith.addf") < compiled.asm["ttgir"].count("= tt.dot "),
        tma_stores=code.count("UTMASTG"),
        spills=code.count("STL") + code.count("LDL"),
        overflows=lanes_that_overflow(compiled.asm["ptx"]),
        fused=code.count("FFMA") if twice else 0,
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
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write the records there, in triton-VERSION.json")
    parser.add_argument(
        "--known", type=Path, metavar="FOLDER", help="take what this Triton compiled from its file there"
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="two cases instead of all")
    extent.add_argument("--all", action="store_true", help="every configuration of the Gluon kernels of every rank")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    gluon = "quick" if options.quick else "all" if options.all else "some"
    found = jobs(QUICK if options.quick else CASES, tuple(options.arch), gluon)
    known = known_records(options.known) if options.known else {}
    records = report(found, known)
    sentences = faults(records, known)
    print(_table(records))
    took, old = time.perf_counter() - start, sum(record.key in known for record in records)
    print(f"{len(records)} kernels, {old} of them known, in {took:.0f} s; {len(sentences)} faults.")
    if options.json:
        path = options.json / f"triton-{version('triton')}.json"
        path.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if options.check and sentences else 0


if __name__ == "__main__":
    sys.exit(main())
