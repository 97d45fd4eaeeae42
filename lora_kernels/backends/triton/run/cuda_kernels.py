"""Kernels in CUDA C++ that NVRTC compiles: from the cache, loaded and launched by the CUDA driver.

A ``CudaLaunch`` is called as a ``prepared.Launch`` is, and a recorder sees it as one: with the library ``launch`` its
calls go through C++. By itself it launches by ctypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .... import nvrtc
from ....errors import BackendUnavailableError
from ...native import cache as build_cache
from . import recording

__all__ = ["CudaLaunch", "Source", "capture_number", "cubin"]

_DRIVER = "libcuda.so.1"
_MAX_DYNAMIC_SHARED, _CLUSTER, _DEPENDENT = 8, 4, 6  # CUfunction_attribute, CUlaunchAttributeID
_POINTER = "*"
_FORMATS = {_POINTER: "<Q", "fp32": "<f", "i32": "<i"}


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Source:
    """What a kernel is compiled from: files of ``csrc/cuda``, and macros as pairs."""

    entry: str
    headers: tuple[str, ...]
    defines: tuple[tuple[str, int], ...]

    def key(self, capability: int) -> str:
        """By what the cache knows the cubin."""
        texts = [nvrtc.source(name) for name in (self.entry, *self.headers)]
        text = "\0".join([*texts, repr(self.defines), str(capability), nvrtc.version()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def cubin(source: Source, capability: int) -> bytes:
    """The machine code, from the user's cache or compiled into it, which takes NVRTC about a second.

    Raises:
        BackendUnavailableError: see ``nvrtc.compiled``.
    """
    name = f"{Path(source.entry).stem}-{source.key(capability)}.cubin"
    for folder in build_cache.folders():
        with suppress(OSError):
            found = (folder / name).read_bytes()
            if found.startswith(b"\x7fELF"):
                return found
    code = nvrtc.compiled(source.entry, source.headers, capability, dict(source.defines))
    with suppress(OSError):  # without a cache the next process compiles anew
        part = build_cache.writable_folder(lambda _: None) / f"{name}.{os.getpid()}-{threading.get_ident()}.part"
        part.write_bytes(code)
        part.replace(part.with_name(name))
    return code


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL(_DRIVER)


def _checked(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"an unknown error").decode()
        raise BackendUnavailableError(f"{what} ({said}). Where a kernel failed before, start the process anew.")


@cache
def _loaded(source: Source, name: str, capability: int, shared_bytes: int, device: int) -> int:
    """The function, in the context of ``device``, which is the current one."""
    module, function, code = ctypes.c_void_p(), ctypes.c_void_p(), cubin(source, capability)
    torch.cuda.current_stream(device)  # the context is there
    _checked(_driver().cuModuleLoadData(ctypes.byref(module), code), f"{name} cannot be loaded")
    _checked(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"{name} is not there")
    code_of = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
    _checked(code_of, f"{name} does not get its {shared_bytes} bytes of shared memory")
    return function.value or 0


def capture_number(stream: int) -> int | None:
    """Which capture ``stream`` is in; None where the driver does not tell."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    try:
        code = _driver().cuStreamGetCaptureInfo(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if code or not status.value else number.value


class CudaLaunch:
    """One kernel with its grid, in clusters of ``cluster`` blocks; a call adds the leading arguments.

    Args:
        source, name: what it is compiled from, and what the kernel is called there.
        signature: the parameters' kinds, ``*`` a pointer, ``i32`` and ``fp32``, all but the two that end every launch.
        grid: in blocks.
        static: the arguments that follow those of a call.
        dependent: whether it may start while the kernel before it ends.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        signature: Sequence[str],
        grid: int,
        static: tuple[Any, ...],
        *,
        capability: int,
        threads: int,
        shared_bytes: int,
        cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        self.source, self.name, self.grid, self.static, self.cluster = source, name, grid, static, cluster
        self.signature, self.capability = tuple(signature), capability
        self.threads, self.shared_bytes, self.dependent = threads, shared_bytes, dependent

    def __call__(self, stream: int | None, *arguments: Any) -> None:
        function = _loaded(self.source, self.name, self.capability, self.shared_bytes, torch.cuda.current_device())
        given = (*arguments, *self.static)
        recorder = recording.current() if recording.watching else None
        if recorder is not None:
            recorder.note_kernel(self.described(function), (self.grid // self.cluster, 1, 1), stream, given)
        self._launch(function, stream, recording.plain(given))

    def described(self, function: int) -> Any:
        """As a recorder knows a kernel that Triton has compiled."""
        metadata = SimpleNamespace(
            global_scratch_size=0, launch_pdl=self.dependent, launch_cooperative_grid=False, profile_scratch_size=0
        )
        packed = (self.threads // 32, self.cluster, self.shared_bytes)
        signature: Mapping[str, str] = {str(i): kind for i, kind in enumerate(self.signature)}
        src = SimpleNamespace(signature=signature)
        return SimpleNamespace(function=function, packed_metadata=packed, metadata=metadata, src=src)

    def parameters(self, arguments: Sequence[Any]) -> list[bytes]:
        """What the driver is given, a parameter each."""
        found = []
        for kind, value in zip(self.signature, arguments, strict=True):
            if kind == _POINTER:
                value = 0 if value is None else value.data_ptr()
            found.append(struct.pack(_FORMATS[kind], value))
        return [*found, bytes(8), bytes(8)]

    def _launch(self, function: int, stream: int | None, arguments: Sequence[Any]) -> None:
        given = [ctypes.create_string_buffer(content, len(content)) for content in self.parameters(arguments)]
        pointers = (ctypes.c_void_p * len(given))(*(ctypes.addressof(each) for each in given))
        attributes = (_Attribute * 2)()
        count = 0
        if self.cluster > 1:
            attributes[count].id, attributes[count].value[:3] = _CLUSTER, (self.cluster, 1, 1)
            count += 1
        if self.dependent:
            attributes[count].id, attributes[count].value[0] = _DEPENDENT, 1
            count += 1
        config = _Config(self.grid, 1, 1, self.threads, 1, 1, self.shared_bytes, stream or 0, attributes, count)
        code = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
        _checked(code, f"{self.name} cannot be launched")
