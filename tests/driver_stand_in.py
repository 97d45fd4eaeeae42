"""``native_host/cuda_driver.cpp`` compiled: a CUDA driver that writes down what it is asked for."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kernels.backends.native.toolchain import find_compiler

SOURCE = Path(__file__).parent / "native_host" / "cuda_driver.cpp"
NAME = "libcuda.so.1"


def compile_driver(folder: Path, *defines: str) -> Path:
    """The stand-in as ``libcuda.so.1`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", f"-Wl,-soname,{NAME}", *(f"-D{define}" for define in defines)]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [find_compiler("launch").path, *flags, str(SOURCE), "-o", str(path)]
    subprocess.run(command, check=True, env=environment)
    return path


class DriverStandIn:
    """The loaded stand-in; it is PyTorch's CUDA library too."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.stand_in_take.restype = ctypes.c_int64

    def take(self, *entries: str) -> list[list[str]]:
        """What was called since the last time, of these entry points or of all: a line's words."""
        size = self.library.stand_in_take(None, ctypes.c_int64(0)) + 1
        text = ctypes.create_string_buffer(size)
        self.library.stand_in_take(text, ctypes.c_int64(size))
        lines = [line.split() for line in text.value.decode().splitlines()]
        return [line for line in lines if not entries or line[0] in entries]

    def forget(self) -> None:
        """As at the start: nothing written down, no faults, the legacy stream, a driver of today."""
        self.library.stand_in_forget()

    def fail(self, entry: str, code: int, after: int = 0) -> None:
        """The call of ``entry`` after ``after`` more returns ``code``."""
        self.library.stand_in_fail(entry.encode(), after, code)

    def stream(self, device: int, stream: int) -> None:
        self.library.stand_in_stream(device, ctypes.c_void_p(stream))

    def capture(self, stream: int) -> None:
        """A graph is captured on this stream, and on no other."""
        self.library.stand_in_capture(ctypes.c_void_p(stream))

    def parameters(self, function: int, sizes: Sequence[int]) -> None:
        """How many bytes each parameter of a kernel has, so that they are written down."""
        self.library.stand_in_parameters(ctypes.c_void_p(function), (ctypes.c_int * len(sizes))(*sizes), len(sizes))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, f"stand_in_{name}")
