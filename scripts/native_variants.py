"""The native library's CPU tests over variants that the automatic choice does not take on this machine.

Usage: ``python scripts/native_variants.py VARIANT [pytest arguments]``. A variant is a way of compiling the library, or
of choosing within it:

============= ==========================================================================================================
sanitize      AddressSanitizer and UndefinedBehaviorSanitizer; any finding ends the run
wide          vectors of 64 bytes and bf16 in pairs, as AVX-512 has them, in the instructions of narrower machines
amx           the tiles of AMX, written out in C++ for each instruction set's bf16 kernels; then the same beside torch's
              own product, as a machine with AMX takes it for many tokens
amx-sanitize  amx under the sanitizers: tiles are as large as ever where matrices end
portable      the instruction set that every machine has, and the kernels' own products throughout
own           the kernels' own products, of any size
library       torch's own product, of any size
============= ==========================================================================================================

Tests of another backend and those marked ``one_library`` are left out. So are, where a variant changes one dtype's
kernels, those of the other dtypes, and with torch's own product those marked ``own_kernels``, which run as without.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    "tests/backends/native/test_native_cpu.py",
    "tests/backends/native/test_native_parts.py",
    "tests/core/test_philox.py",
    "tests/weights/test_four_bits.py",
    "tests/weights/test_eight_bits.py",
]
CAPABILITY, PRODUCT = "LORA_KERNELS_CPU_CAPABILITY", "LORA_KERNELS_CPU_PRODUCT"


@dataclass(frozen=True)
class Variant:
    """Flags to compile the library with (none: the ordinary library), and the environments to run it in."""

    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    products: tuple[str, ...] = ("own",)  # a run for each, all of one library
    dtype: str = ""  # W's dtype whose kernels are others; empty: every one's
    runtimes: tuple[str, ...] = ()  # the compiler's runtime libraries that Python must start with
    kinds: tuple[str, ...] = ("cpu",)  # the libraries that are compiled so


_SANITIZE = Variant(
    flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"),
    environment={
        # Python itself leaks at exit; memory that cannot be had is an error for the program to handle
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    },
    runtimes=("libasan.so", "libubsan.so"),
    kinds=("cpu", "launch"),
)
_TILES = "-DLORA_EMULATE_TILES"
_UNCALLED = """// In the place of the portable kernels, where better ones run: no function is there to be called.
#include "cpu/kernels.h"
namespace lora_kernels::portable {
extern const Kernels kernels_fp32{}, kernels_bf16{}, kernels_fp16{}, kernels_fp64{};
}
"""

VARIANTS = {
    "sanitize": _SANITIZE,
    "wide": Variant(flags=("-DLORA_VECTOR_BYTES=64", "-DLORA_PAIRS=1", "-O1")),
    "amx": Variant(flags=(_TILES, "-O2"), products=("own", "library"), dtype="bfloat16"),
    "amx-sanitize": replace(_SANITIZE, flags=(*_SANITIZE.flags, _TILES), kinds=("cpu",), dtype="bfloat16"),
    "portable": Variant(environment={CAPABILITY: "portable"}),
    "own": Variant(),
    "library": Variant(products=("library",)),
}


def main(arguments: list[str]) -> int:
    """Compiles the variant where it needs that, and runs the tests in fresh interpreters; returns the worst status."""
    name = arguments[0] if arguments else ""
    if name not in VARIANTS:
        print(f"variant {name!r} was given: name one of {', '.join(VARIANTS)}.", file=sys.stderr)
        return 2
    variant = VARIANTS[name]
    environment = {**os.environ, **variant.environment}
    with tempfile.TemporaryDirectory() as folder:
        libraries = {kind: _compile(kind, variant, Path(folder)) for kind in variant.kinds if variant.flags}
        if variant.runtimes:
            environment["LD_PRELOAD"] = " ".join(_runtime(runtime) for runtime in variant.runtimes)
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import native_variants as v; "
        code += f"sys.exit(v.run_tests({libraries!r}, {variant.dtype!r}, sys.argv[1:]))"
        command = [sys.executable, "-c", code, "-p", "no:cacheprovider", *(arguments[1:] or TESTS)]
        runs = (subprocess.run(command, env={**environment, PRODUCT: p}, cwd=ROOT) for p in variant.products)
        return max(run.returncode for run in runs)


def run_tests(libraries: dict[str, str], dtype: str, arguments: list[str]) -> int:
    """Runs pytest with ``libraries``, by kind, in the place of those that the package would find."""
    import pytest
    import torch

    from lora_kernels.backends.native import load

    for kind, library in libraries.items():
        torch.ops.load_library(library)
        load._loaded[kind] = load.Library(Path(library), "a variant for tests", {})
    return int(pytest.main(arguments, plugins=[_Selection(dtype)]))


class _Selection:
    """For pytest: leaves out what the variant does not change."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        left_out = [item for item in items if not self.concerns(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    def concerns(self, item: Any) -> bool:
        """Whether the variant runs in the test, in the dtype if its parameters name any."""
        if item.get_closest_marker("one_library"):
            return False
        if os.environ.get(PRODUCT) == "library" and item.get_closest_marker("own_kernels"):
            return False
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if {"triton", "eager"} & {value for value in given.values() if isinstance(value, str)}:
            return False
        dtype = given.get("dtype") or getattr(given.get("case"), "dtype", None)
        return not self.dtype or dtype is None or str(dtype).removeprefix("torch.") == self.dtype


def _compile(kind: str, variant: Variant, folder: Path) -> str:
    sys.path.insert(0, str(ROOT))
    from lora_kernels.backends.native.build import Recipe, Unit, compile_library, recipe

    uncalled = folder / "uncalled.cpp"
    uncalled.write_text(_UNCALLED)

    class ForHere(Recipe):
        """Without the kernels that this machine would not run: they are most of the compiler's work."""

        @cached_property
        def capabilities(self) -> tuple[str, ...]:
            known = super().capabilities
            return known[: known.index(_capability()) + 1] if self.kind == "cpu" else known

        @cached_property
        def units(self) -> tuple[Unit, ...]:
            """What calls the kernels is what no variant changes: it need not be fast, so it is compiled sooner."""
            found = [u if u.name.startswith("kernels_") else replace(u, flags=(*u.flags, "-O0")) for u in super().units]
            if self.capabilities == ("portable",):
                return tuple(found)
            return (Unit(uncalled, uncalled.name), *(u for u in found if not u.name.endswith(".portable")))

    whole = recipe(kind, extra=variant.flags)
    return str(compile_library(ForHere(kind, whole.sources, whole.compiler, whole.torch, whole.extra), folder / kind))


def _capability() -> str:
    """The instruction set whose kernels run here, by the ordinary library."""
    from lora_kernels.backends.native import load

    library = load.compile_into_cache("cpu")
    found = load.instruction_set(str(library.path))
    assert found is not None, f"{library.path} names no instruction set"
    return found["capability"]


def _runtime(name: str) -> str:
    """Where the compiler keeps one of its runtime libraries."""
    sys.path.insert(0, str(ROOT))
    from lora_kernels.backends.native.toolchain import find_compiler

    answer = [find_compiler("cpu").path, f"-print-file-name={name}"]
    return subprocess.run(answer, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
