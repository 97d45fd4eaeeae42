"""Compiles the CUDA library for GPUs that are not there, and reports what the compiler made of each kernel.

``python -m lora_kernels.backends.native.cuda_report [--check] [--json FILE] [--library FILE]``

The library is that of ``lora-kernels build cuda``: compiled into the user's cache, for sm_80, sm_90 and sm_100, unless
it is there; no GPU and no CUDA build of torch is needed. ``--check`` exits 1, a sentence each, where registers spill, a
stack is used, shared memory exceeds what every device gives, an architecture or a kernel is missing, or a kernel for
16-bit numbers has no tensor-core instruction. Where nvcc, or cuobjdump to look into the library, is missing it says so
in a sentence and exits 3.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ...errors import BackendUnavailableError
from . import load
from .toolchain import BuildError, find_compiler

__all__ = ["ARCHITECTURES", "TENSOR_KERNELS", "Record", "faults", "main", "report"]

ARCHITECTURES = (80, 90, 100)
TENSOR_KERNELS = ("Shrink", "Gradient", "Expand", "DhDb")  # their 16-bit instances multiply on tensor cores
PLAIN_KERNELS = ("Reduce", "ColumnSum", "Mask")
SHARED_LIMIT = 48 * 1024  # bytes that a block has without asking for more
RESERVED_SHARED = 1024  # bytes that the system takes on top from sm_90 on, and that cuobjdump counts in
EXIT_NO_TOOLS = 3

_NUMBERS = {"f": "fp32", "d": "fp64", "NS0_4HalfE": "fp16", "NS0_8BFloat16E": "bf16"}
_ENTRY = re.compile(r"5entryINS0_\d+([A-Z][A-Za-z]*?)(?:I(NS0_\d+\w+?E|[fd])(?:Li(\d+)E)?E)?EEEvNT_")
_USAGE = re.compile(r"\b(REG|STACK|LOCAL|SHARED):(\d+)")


@dataclass(frozen=True)
class Record:
    """One kernel for one architecture. ``stack`` and ``local`` are bytes a thread: spilled registers live there.

    Attributes:
        kernel: the class in ``csrc/cuda`` that it is compiled from.
        number: its compute dtype, or what it sums in; empty where it has none.
        ranks: how many ranks a block takes; 0 where there is one instance.
        arch: the architecture's number.
        registers, stack, local: of a thread; the latter two in bytes.
        shared: bytes of a block, all of them static, without what the system reserves.
        tensor_instructions: how many matrix multiplications its machine code holds.
    """

    kernel: str
    number: str
    ranks: int
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    tensor_instructions: int

    def __str__(self) -> str:
        arguments = ", ".join(filter(None, [self.number, str(self.ranks or "")]))
        return f"{self.kernel}<{arguments}>" if arguments else self.kernel


def report(library: Path) -> list[Record]:
    """What each kernel of ``library`` uses, by architecture.

    Raises:
        BuildError: there is no cuobjdump.
        subprocess.CalledProcessError: it cannot read the library.
    """
    tool = find_cuobjdump()
    usage = _output(tool, "--dump-resource-usage", library)
    return list(parse(usage, _output(tool, "-sass", library)))


def parse(usage: str, machine_code: str) -> Iterator[Record]:
    """The records in what cuobjdump prints: resources a kernel, and disassembly."""
    instructions = _count_tensor_instructions(machine_code)
    arch = 0
    name = ""
    for line in usage.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif name and (amounts := dict(_USAGE.findall(line))):
            if entry := _ENTRY.search(name):
                yield Record(
                    kernel=entry[1],
                    number=_NUMBERS.get(entry[2] or "", entry[2] or ""),
                    ranks=int(entry[3] or 0),
                    arch=arch,
                    registers=int(amounts["REG"]),
                    stack=int(amounts["STACK"]),
                    local=int(amounts["LOCAL"]),
                    shared=int(amounts["SHARED"]) - (RESERVED_SHARED if arch >= 90 and int(amounts["SHARED"]) else 0),
                    tensor_instructions=instructions.get((arch, name), 0),
                )
            name = ""


def faults(records: list[Record]) -> list[str]:
    """A sentence for each rule that is broken."""
    sentences = []
    for r in records:
        where = f"{r} for sm_{r.arch}"
        if r.stack or r.local:
            sentences.append(f"{where} spills: {r.stack} bytes of stack, {r.local} of local memory.")
        if r.shared > SHARED_LIMIT:
            sentences.append(f"{where} takes {r.shared} bytes of shared memory and a block has {SHARED_LIMIT}.")
        if r.kernel in TENSOR_KERNELS and r.number in ("fp16", "bf16") and not r.tensor_instructions:
            sentences.append(f"{where} has no tensor-core instruction where HMMA is meant.")
    for arch in ARCHITECTURES:
        there = {(r.kernel, r.number) for r in records if r.arch == arch}
        wanted = [(kernel, number) for kernel in TENSOR_KERNELS for number in _NUMBERS.values()]
        missing = [f"{kernel}<{number}>" for kernel, number in wanted if (kernel, number) not in there]
        missing += [kernel for kernel in PLAIN_KERNELS if kernel not in {name for name, _ in there}]
        if missing:
            sentences.append(
                f"sm_{arch} is without {', '.join(missing)}: this nvcc may not know it, or it was left out."
            )
    return sentences


def find_cuobjdump() -> str:
    """On PATH, beside nvcc, or in Triton's wheel.

    Raises:
        BuildError: it is nowhere.
    """
    beside = [str(Path(find_compiler("cuda").path).resolve().parent / "cuobjdump")]
    spec = find_spec("triton")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    wheels = [str(Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump") for folder in folders]
    for candidate in ("cuobjdump", *beside, *wheels):
        if found := shutil.which(candidate):
            return found
    raise BuildError(
        "no cuobjdump was found (PATH, beside nvcc, Triton's wheel), and without it nothing can be said of the machine "
        "code: install the CUDA toolkit's binary utilities, or Triton."
    )


def _count_tensor_instructions(machine_code: str) -> dict[tuple[int, str], int]:
    counts: dict[tuple[int, str], int] = {}
    arch = 0
    name = ""
    for line in machine_code.splitlines():
        if "HMMA" in line:
            counts[arch, name] = counts.get((arch, name), 0) + 1
        elif found := re.match(r"\s*code for sm_(\d+)|\s*Function : (\S+)", line):
            arch = int(found[1]) if found[1] else arch
            name = found[2] or name
    return counts


def _output(tool: str, option: str, library: Path) -> str:
    return subprocess.run([tool, option, str(library)], check=True, capture_output=True, text=True).stdout


def _table(records: list[Record]) -> str:
    heading = f"{'kernel':22} {'sm':>4} {'regs':>4} {'stack':>5} {'local':>5} {'shared':>6} {'HMMA':>4}"
    rows = (
        f"{r!s:22} {r.arch:4} {r.registers:4} {r.stack:5} {r.local:5} {r.shared:6} {r.tensor_instructions:4}"
        for r in sorted(records, key=lambda r: (str(r), r.arch))
    )
    return "\n".join([heading, *rows])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cuda_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 on a broken rule")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--library", type=Path, metavar="FILE", help="look at this library and compile nothing")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        find_compiler("cuda")
        library = options.library or load.compile_into_cache("cuda").path
        records = report(library)
    except BuildError as error:
        print(error, file=sys.stderr)
        return EXIT_NO_TOOLS
    except BackendUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    print(_table(records))
    sentences = faults(records)
    print(f"{len(records)} kernels of {library}; {time.perf_counter() - start:.0f} s; {len(sentences)} faults.")
    if options.json:
        options.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if options.check and sentences else 0


if __name__ == "__main__":
    sys.exit(main())
