"""What is on this machine to build with: the C++ compiler, nvcc, and torch, which is looked at without importing it.

Like ``build.py`` it stands on the standard library alone, for ``setup.py``.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["BuildError", "Compiler", "Torch", "c_library", "find_compiler", "find_torch", "platform_tag"]

MINIMUM_TORCH = (2, 11)
USUAL_NVCC = ("/usr/local/cuda/bin/nvcc",)


class BuildError(RuntimeError):
    """No library can be built here; the message is a sentence, ``output`` what the compiler said."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Compiler:
    """A compiler's path and what ``--version`` says."""

    path: str
    version: str

    @property
    def name(self) -> str:
        """One line for people: ``/usr/bin/c++ (Debian 12.2.0-14) 12.2.0``."""
        return f"{self.path} ({self.release})"

    @property
    def release(self) -> str:
        """The line of ``--version`` that holds the number."""
        lines = self.version.splitlines() or [""]
        return next((line for line in lines if "release" in line), lines[0]).strip()

    def accepts(self, flags: Sequence[str], code: str = "") -> bool:
        """Whether it compiles and assembles ``code`` under ``flags``."""
        command = [self.path, *flags, "-c", "-x", "c++", "-", "-o", os.devnull]
        return subprocess.run(command, input=code, text=True, capture_output=True).returncode == 0


@dataclass(frozen=True)
class Torch:
    """An installed torch, looked at without importing it."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def has_cuda_library(self) -> bool:
        return (self.folder / "lib" / "libtorch_cuda.so").exists()


def platform_tag() -> str:
    """System and processor: ``linux-x86_64``."""
    return f"{sys.platform}-{platform.machine().lower()}"


def c_library() -> str:
    """The C library's name and version, ``glibc 2.36``; a library runs with its own version and later ones."""
    return " ".join(filter(None, platform.libc_ver()))


def find_torch() -> Torch:
    """The torch that this Python would import.

    Raises:
        BuildError: there is none, or it is older than 2.11.
    """
    spec = find_spec("torch")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    text = (Path(folders[0]) / "version.py").read_text() if folders else ""
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    if version is None:
        raise BuildError(
            "torch is not installed for this Python, and the native library is compiled against its headers: install "
            "torch 2.11 or later first (with pip: add --no-build-isolation)."
        )
    if tuple(int(part) for part in re.findall(r"\d+", version[1])[:2]) < MINIMUM_TORCH:
        raise BuildError(f"torch {version[1]} is installed: the native library needs 2.11 or later. Upgrade torch.")
    cuda = re.search(r"^cuda\b.*= '([^']+)'", text, re.MULTILINE)
    return Torch(Path(folders[0]), version[1], cuda[1] if cuda else None)


def find_compiler(kind: str) -> Compiler:
    """The C++ compiler, or nvcc.

    Raises:
        BuildError: there is none, or it does not run.
    """
    if sys.platform == "win32":
        raise BuildError(
            "The native library is not built on Windows yet: run within use_backend('triton') or use_backend('eager')."
        )
    variable = "CUDACXX" if kind == "cuda" else "CXX"
    named = os.environ.get(variable)
    path = _first_program([named] if named else _candidates(kind))
    if path is None and named:
        raise BuildError(
            f"{variable}={named} was given, and there is no such program: it must be one compiler, without arguments, "
            "on PATH or with its folder. Set it so, or unset it."
        )
    if path is None and kind != "cuda":
        raise BuildError(
            "no C++ compiler was found (CXX is not set, and no c++, g++ or clang++ is on PATH): install GCC or Clang "
            "(Debian, Ubuntu: apt install g++), or name one by CXX."
        )
    if path is None:
        raise BuildError(
            "no nvcc was found (in $CUDA_HOME/bin, on PATH, in the package nvidia-cuda-nvcc): install the CUDA "
            "toolkit, or name its nvcc by CUDACXX."
        )
    return _asked(path, os.stat(path).st_mtime_ns)


def _candidates(kind: str) -> list[str]:
    if kind != "cuda":
        return ["c++", "g++", "clang++"]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    spec = find_spec("nvidia")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    wheels = [path for folder in folders for path in Path(folder).glob("*/bin/nvcc")]
    return [*(f"{home}/bin/nvcc" for home in homes), "nvcc", *map(str, sorted(wheels)), *USUAL_NVCC]


def _first_program(candidates: Sequence[str]) -> str | None:
    return next((found for name in candidates if (found := shutil.which(name))), None)


@lru_cache(maxsize=8)
def _asked(path: str, modified: int) -> Compiler:
    """The compiler at ``path``, asked once for its version as long as the file is the same."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {path} does not run ({error}): name another one.") from error
    if answer.returncode != 0:
        raise BuildError(
            f"{path} is not a compiler that can be used here (`{path} --version` fails): GCC or Clang is needed, and "
            "nvcc for CUDA. Name one by CXX or CUDACXX."
        )
    return Compiler(path, answer.stdout.strip())
