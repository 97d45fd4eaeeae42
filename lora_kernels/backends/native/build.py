"""The one compile recipe of the native libraries: for ``setup.py``, for ``lora-kernels build`` and for the first use.

``setup.py`` loads this file by its path, where nothing of the package can be imported and torch may be absent: it and
``toolchain.py`` stand on the standard library alone.

========== ============================================================== =============================================
library    sources                                                        links
========== ============================================================== =============================================
``cpu``    ``csrc/cpu/*.cpp`` by a C++ compiler; ``kernels_*.cpp`` once   ``libtorch_cpu``
           for each of the compiler's CPU capabilities
``cuda``   ``csrc/cuda/*.cu`` and ``*.cpp`` by nvcc, for each             ``libtorch_cpu``, ``libtorch_cuda``, and the
           architecture that it knows, and PTX of the last                CUDA runtime statically
``launch`` ``csrc/launch/*.cpp`` by a C++ compiler                        ``libtorch_cpu``; the CUDA driver is opened at
                                                                          run time
========== ============================================================== =============================================

All use LibTorch's stable ABI for torch 2.11: one file serves every Python 3 and every torch from 2.11 on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .toolchain import BuildError, Compiler, Torch, c_library, find_compiler, find_torch, platform_tag

__all__ = ["KINDS", "BuildError", "Recipe", "Unit", "compile_library", "recipe", "requested_kinds"]

KINDS = ("cpu", "cuda", "launch")
BUILD_VARIABLE = "LORA_KERNELS_BUILD"  # described in env.py
INFO_NAME, LOG_NAME = "build_info.json", "build.log"
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11

_COMMON = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-std=c++17", "-O3")
_CPU = ("-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra", "-pthread")
_CUDA = ("-DUSE_CUDA", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
_AMX = ("-mamx-tile", "-mamx-bf16", *_AVX512_BF16)
_CAPABILITIES = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _AVX512_BF16, "amx": _AMX}
_PROBES = {"amx": 'void f() { asm("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'}  # an old assembler knows less than GCC
_ARCHITECTURES = ("80", "90", "100")
_SUFFIXES = {"cpu": (".cpp",), "cuda": (".cu", ".cpp"), "launch": (".cpp",)}
_MAIN = "operators"  # the file that registers them: sources without it are not whole
_HEADERS = (".h", ".cuh", ".inc")
_DLOPEN = ["-ldl"] if sys.platform == "linux" else []  # a library of its own before glibc 2.34
_VECTORS = "typedef float v __attribute__((vector_size(32))); v f(v a, v b) { return a < b ? a : a + b; }\n"

Progress = Callable[[str, int, int], None]
"""Called with what is running, how many of its steps are done, and how many there are."""


@dataclass(frozen=True)
class Unit:
    """One object file: its source, and the flags that only it is compiled with."""

    source: Path
    name: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out: equal recipes, equal ``key``, equal library."""

    kind: str
    sources: Path
    compiler: Compiler
    torch: Torch
    extra: tuple[str, ...] = ()

    @property
    def library_name(self) -> str:
        return f"liblora_kernels_{self.kind}{'.dylib' if sys.platform == 'darwin' else '.so'}"

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of every unit, without folders."""
        if self.kind != "cuda":
            return (*_COMMON, *_CPU, *self.extra)
        host = ("-ccbin", os.environ["CXX"]) if os.environ.get("CXX") else ()
        return (*_COMMON, *_CUDA, *host, *self.extra)

    @cached_property
    def digest(self) -> str:
        """Of the sources as they are when first asked, before a compile: an edit during it then makes no match."""
        return source_digest(self.kind, self.sources)

    @cached_property
    def key(self) -> str:
        """The build hash, 16 hex digits: of the sources, the flags, the compiler and the platform.

        Not of torch: the library keeps to the stable interface of ``TORCH_TARGET_VERSION``, and runs with any later
        one. What a compiler knows (capabilities, architectures) follows from its version and is asked only for a build.
        """
        known = [self.kind, *self.flags, *_link_flags(self), str(_CAPABILITIES), str(_ARCHITECTURES)]
        facts = [self.compiler.path, self.compiler.version, platform_tag(), c_library()]
        text = "\0".join([self.digest, *known, *facts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def capabilities(self) -> tuple[str, ...]:
        """For the CPU: the instruction sets that kernels are compiled for; for CUDA: the architectures."""
        if self.kind == "cuda":
            return cuda_architectures(self.compiler)
        if self.kind == "launch" or platform.machine().lower() not in ("x86_64", "amd64"):
            return ("portable",)
        accepted = (name for name in _CAPABILITIES if self.compiler.accepts(_CAPABILITIES[name], _PROBES.get(name, "")))
        return ("portable", *accepted)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The object files: by capability, the least demanding first, then by name.

        The linker keeps the first copy of an inline function that several objects hold; in this order that is one which
        runs wherever its callers do.
        """
        found = _unit_sources(self.kind, self.sources)
        if self.kind == "cuda":
            return tuple(Unit(path, path.name) for path in found)
        kernels = [path for path in found if path.name.startswith("kernels_")]
        have = tuple(f"-DLORA_HAVE_{name.upper()}" for name in self.capabilities if name != "portable")
        once = [Unit(path, path.name, have) for path in found if path not in kernels]
        return (*once, *(_kernel_unit(path, name, have) for name in self.capabilities for path in kernels))

    def compile_command(
        self, unit: Unit, target: Path, architectures: Sequence[str] | None = None, more: Sequence[str] = ()
    ) -> list[str]:
        """The command that compiles ``unit`` into the object file ``target``.

        ``architectures`` (CUDA: "80", "90", ...; None means all that nvcc knows) and ``more`` flags are for reports on
        a single architecture, as ``-Xptxas -v`` gives.
        """
        folders = [f"-I{self.sources}", "-isystem", str(self.torch.folder / "include")]
        machine: list[str] = []
        if self.kind == "cuda":
            machine = gencode_flags(self.capabilities if architectures is None else architectures)
        command = [self.compiler.path, *self.flags, *unit.flags, *machine, *more, *folders]
        return [*command, "-c", str(unit.source), "-o", str(target)]

    def link_command(self, objects: Sequence[Path], target: Path, stub: Path | None = None) -> list[str]:
        """The command that links ``objects``; ``stub`` is the folder of an empty ``libtorch_cuda.so``."""
        folders = [f"-L{stub}"] if stub else []
        libraries = ["-ltorch_cpu", *{"cuda": ["-ltorch_cuda"], "launch": _DLOPEN}.get(self.kind, [])]
        flags = [flag for flag in _link_flags(self) if stub is None or not flag.endswith("-z,defs")]
        return [
            *(self.compiler.path, "-shared", *flags, "-o", str(target), *map(str, objects)),
            *(f"-L{self.torch.folder / 'lib'}", *folders, *libraries),
        ]

    def info(self, library: Path) -> dict[str, Any]:
        """What ``build_info.json`` says of a library that this recipe has built."""
        return {
            "kind": self.kind,
            "library": library.name,
            "size": library.stat().st_size,
            "sha256": file_digest(library),
            "hash": self.key,
            "sources": self.digest,
            "compiler": self.compiler.path,
            "compiler_version": self.compiler.release,
            "flags": list(self.flags),
            "capabilities": list(self.capabilities),
            "torch": self.torch.version,
            "torch_target_version": TORCH_TARGET_VERSION,
            "platform": platform_tag(),
            "c_library": c_library(),
            "lora_kernels": _package_version(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def recipe(kind: str, sources: Path | None = None, extra: Sequence[str] = ()) -> Recipe:
    """The recipe of the library ``kind`` on this machine: nothing is compiled, the compiler is asked its version.

    Args:
        kind: "cpu", "cuda" or "launch".
        sources: the folder that holds ``cpu/`` and ``cuda/``; None takes the package's own.
        extra: further flags for compiling and linking, as a sanitizer needs.

    Raises:
        BuildError: no compiler, no torch or no sources; the sentence says what to do.
    """
    folder = sources_folder() if sources is None else sources
    if not any(path.stem == _MAIN for path in _unit_sources(kind, folder)):
        raise BuildError(
            f"the sources of the native {kind} library are not in {folder / kind}: install lora-kernels again, its "
            "wheel holds them."
        )
    return Recipe(kind, folder, find_compiler(kind), find_torch(), tuple(extra))


def requested_kinds(default: str) -> tuple[str, ...]:
    """The libraries that ``LORA_KERNELS_BUILD`` names: one, all, or off (none); ``default`` where it is unset or empty.

    Raises:
        BuildError: it has another value.
    """
    value = (os.environ.get(BUILD_VARIABLE) or default).lower()
    choices = {**{kind: (kind,) for kind in KINDS}, "all": KINDS, "off": (), "0": ()}
    if value not in choices:
        raise BuildError(
            f"{BUILD_VARIABLE}={value} was given: it must be {', '.join(KINDS)}, all or off (0). Set one of them, or "
            "unset it."
        )
    return choices[value]


def sources_folder() -> Path:
    """``csrc``: within the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def _kernel_unit(path: Path, capability: str, have: tuple[str, ...]) -> Unit:
    flags = (*have, f"-DLORA_CAPABILITY={capability}", *_CAPABILITIES.get(capability, ()))
    return Unit(path, f"{path.name}.{capability}", flags)


def _unit_sources(kind: str, sources: Path) -> list[Path]:
    return sorted(path for path in (sources / kind).glob("*") if path.suffix in _SUFFIXES[kind])


def source_files(kind: str, sources: Path) -> list[Path]:
    """Every file that the library depends on: the headers in ``csrc``, and all sources of ``csrc/<kind>``."""
    shared = [path for path in sources.glob("*") if path.suffix in _HEADERS]
    own = [p for p in (sources / kind).rglob("*") if p.suffix in (*_SUFFIXES[kind], *_HEADERS)]
    return sorted([*shared, *own])


def source_digest(kind: str, sources: Path) -> str:
    """SHA-256 over names and contents of the library's source files."""
    digest = hashlib.sha256()
    for path in source_files(kind, sources):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(sources).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cuda_architectures(nvcc: Compiler) -> tuple[str, ...]:
    """Those of sm_80, sm_90 and sm_100 that this nvcc knows.

    Raises:
        BuildError: it knows none.
    """
    listed = subprocess.run([nvcc.path, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = tuple(number for number in _ARCHITECTURES if f"compute_{number}" in listed)
    if not known:
        raise BuildError(f"{nvcc.name} compiles for none of sm_80, sm_90, sm_100: install CUDA 11.8 or later.")
    return known


def gencode_flags(architectures: Sequence[str]) -> list[str]:
    """nvcc's flags: machine code for each architecture, and PTX of the last for the devices after it."""
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    return [*codes, f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]


def _link_flags(of: Recipe) -> tuple[str, ...]:
    """Every symbol must be found when linking, where the linker can say so and a sanitizer does not forbid it."""
    strict = sys.platform == "linux" and not any(flag.startswith("-fsanitize") for flag in of.extra)
    if of.kind != "cuda":
        lookup = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-pthread",)
        return (*lookup, *(("-Wl,-z,defs",) if strict else ()), *of.extra)
    return ("-cudart", "static", "-Xlinker", "--no-as-needed", *(("-Xlinker=-z,defs",) if strict else ()), *of.extra)


def _package_version() -> str:
    text = (Path(__file__).resolve().parents[2] / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def compile_library(of: Recipe, folder: Path, progress: Progress | None = None) -> Path:
    """Compiles and links ``of`` within ``folder``: the library, ``build_info.json`` and ``build.log`` stay there.

    Returns:
        The library's path.

    Raises:
        BuildError: the compiler cannot be used or has failed; ``output`` holds what it said.
    """
    _check_vectors(of)
    objects = folder / "objects"
    objects.mkdir(parents=True)
    library, log = folder / of.library_name, folder / LOG_NAME
    log.write_text(f"native {of.kind} library, build {of.key}\n\n", encoding="utf-8")
    targets = {unit: objects / f"{unit.name}.o" for unit in of.units}
    environment = {**os.environ, "TMPDIR": str(objects), "LC_ALL": "C"}
    environment.pop("LD_PRELOAD", None)  # a sanitizer's runtime, meant for this process and not for the compiler

    def run(command: list[str]) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{shlex.join(command)}\n{done.stdout}{done.stderr}\n")
        if done.returncode != 0:
            raise BuildError(f"{of.compiler.name} failed with status {done.returncode}", done.stdout + done.stderr)

    try:
        _compile_all(of, targets, run, progress)
        stub = None
        if of.kind == "cuda" and not of.torch.has_cuda_library:
            stub = _make_stub(of, objects, run)
        run(of.link_command(list(targets.values()), library, stub))
    except OSError as error:
        raise BuildError(f"{of.compiler.name} could not be run ({error})") from error
    if not library.is_file():
        raise BuildError(f"{of.compiler.name} tells of no failure and wrote no library: name a C++ compiler by CXX")
    shutil.rmtree(objects)
    (folder / INFO_NAME).write_text(json.dumps(of.info(library), indent=2) + "\n")
    return library


def _compile_all(
    of: Recipe, targets: dict[Unit, Path], run: Callable[[list[str]], None], progress: Progress | None
) -> None:
    report = progress or (lambda label, done, total: None)
    report(of.kind, 0, len(targets))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(run, of.compile_command(unit, target)) for unit, target in targets.items()]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                report(of.kind, done, len(targets))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _make_stub(of: Recipe, folder: Path, run: Callable[[list[str]], None]) -> Path:
    """An empty ``libtorch_cuda.so`` to link against, for a CPU build of torch: the real one is found when loading."""
    empty, stub = folder / "empty.cpp", folder / "stub"
    empty.write_text("")
    stub.mkdir()
    shared = [of.compiler.path, "-shared", "-Xcompiler", "-fPIC", "-Xlinker", "-soname,libtorch_cuda.so"]
    run([*shared, "-cudart", "none", "-o", str(stub / "libtorch_cuda.so"), str(empty)])
    return stub


def _check_vectors(of: Recipe) -> None:
    if of.kind == "cpu" and not of.compiler.accepts(("-std=c++17",), _VECTORS):
        raise BuildError(
            f"{of.compiler.name} does not understand GCC's vector extensions, which the kernels are written in: name "
            "GCC or Clang by CXX."
        )
