"""NVIDIA's run-time compiler: found, and asked to compile CUDA C++ without nvcc, a toolkit or a GPU.

PyTorch's CUDA wheels bring it (``nvidia-cuda-nvrtc``). What it compiles here includes nothing but files of
``csrc/cuda``, which are handed over as they are.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from ctypes.util import find_library
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .errors import BackendUnavailableError

__all__ = ["compiled", "path", "source", "version", "why_not"]

_PATTERN, _BUILTINS = "libnvrtc.so*", "libnvrtc-builtins.so*"


def why_not() -> str | None:
    """A sentence where there is no NVRTC; None where there is."""
    if path() is not None:
        return None
    return (
        "NVRTC was not found (in the package nvidia-cuda-nvrtc, beside PyTorch, in $CUDA_HOME): the Triton kernels "
        "run. PyTorch's CUDA wheels bring it; or pip install nvidia-cuda-nvrtc."
    )


@cache
def path() -> Path | None:
    """The library, without loading it."""
    for folder in _folders():
        found = sorted(file for file in folder.glob(_PATTERN) if ".alt." not in file.name)
        if found:
            return found[-1]
    return None


def _folders() -> Iterator[Path]:
    """Where it may lie: NVIDIA's wheels for CUDA 13 and 12, PyTorch's own folder, a toolkit."""
    nvidia, torch = find_spec("nvidia"), find_spec("torch")
    for folder in (nvidia.submodule_search_locations or ()) if nvidia else ():
        yield from sorted(Path(folder).glob("cu*/lib"), reverse=True)
        yield Path(folder) / "cuda_nvrtc" / "lib"
    for folder in (torch.submodule_search_locations or ()) if torch else ():
        yield Path(folder) / "lib"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name]) / "lib64"
    if named := find_library("nvrtc"):
        yield from (Path(folder) for folder in ("/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu") if named)


@cache
def _library() -> ctypes.CDLL:
    """Loaded. Its built-in functions lie beside it, and it would not look for them there."""
    found = path()
    if found is None:
        raise BackendUnavailableError(why_not() or "NVRTC was not found.")
    try:
        for builtins in sorted(found.parent.glob(_BUILTINS)):
            ctypes.CDLL(str(builtins))
        return ctypes.CDLL(str(found))
    except OSError as error:
        raise BackendUnavailableError(f"NVRTC cannot be loaded ({error}): install it anew, with PyTorch.") from error


def version() -> str:
    """``13.0``.

    Raises:
        BackendUnavailableError: it is not there, or does not load.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def source(name: str) -> str:
    """A file of ``csrc/cuda``: within the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "csrc" / "cuda" / name
    return (inside if inside.is_file() else package.parent / "csrc" / "cuda" / name).read_text(encoding="utf-8")


def compiled(entry: str, headers: Sequence[str], capability: int, defines: dict[str, int]) -> bytes:
    """The cubin of ``csrc/cuda/<entry>``, which includes ``headers``, for a compute capability (90: 9.0).

    Raises:
        BackendUnavailableError: NVRTC is not there, or does not know the GPU, or the source does not compile.
    """
    library, program = _library(), ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(source(name).encode() for name in headers))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17", *(f"-D{name}={defines[name]}" for name in defines)]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = library.nvrtcCreateProgram(
        ctypes.byref(program), source(entry).encode(), entry.encode(), len(headers), texts, names
    )
    try:
        code = code or library.nvrtcCompileProgram(program, len(options), given)
        if code:
            log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
            told = " | ".join(line for line in log.splitlines() if line.strip())[:400]
            raise BackendUnavailableError(
                f"NVRTC {version()} does not compile {entry} for compute capability {capability / 10}: {told}. "
                "Install a newer PyTorch for a newer GPU."
            )
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of: object, read: object, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))  # type: ignore[operator]
    content = ctypes.create_string_buffer(size.value)
    read(program, content)  # type: ignore[operator]
    return content.raw[: size.value]
