"""Launches made ready once: the kernel compiled, the grid and every argument that a shape fixes already in place.

Triton's own ``kernel[grid](...)`` binds names, specialises each argument and looks the kernel up on every call. Here
the first call does that; the following ones hand their few tensors to the compiled kernel's runner. What Triton would
specialise on (equal to 1, divisible by 16, the types) has to be in the key that the caller keeps a ``Launch`` by.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import set_allocator
from triton.runtime import driver

from ....accuracy import tf32_allowed
from . import recording
from .wrong_code import check_code

__all__ = [
    "Cache",
    "Launch",
    "ScratchLaunch",
    "alignment",
    "current_stream",
    "first_that_runs",
    "matrix",
    "precision_of",
]

_LIMIT = 4096
_Ready = TypeVar("_Ready")
_Result = TypeVar("_Result")


class Launch:
    """One kernel with its grid; a call adds the leading arguments, ``static`` are all that follow in the signature."""

    __slots__ = ("_runner", "grid", "kernel", "options", "static")

    def __init__(self, kernel: Any, grid: tuple[int, int, int], static: tuple[Any, ...], **options: Any) -> None:
        self.kernel, self.grid, self.static, self.options = kernel, grid, static, options
        self._runner: Callable[..., None] | None = None

    def __call__(self, stream: int | None, *arguments: Any) -> None:
        if self._runner is None or recording.watching:
            with _current(stream):
                self._first(stream, *arguments)
        else:
            self._runner(*arguments, *self.static, stream=stream)

    def _first(self, stream: int | None, *arguments: Any) -> None:
        recorder = recording.current()
        given = arguments if recorder is None else recording.plain(arguments)
        options = {"enable_fp_fusion": True, **self.options}
        compiled = self.kernel.warmup(*given, *self.static, grid=self.grid, **options)  # launches nothing
        check_code(self.kernel.__name__, compiled)
        compiled = self.kernel[self.grid](*given, *self.static, **options)
        if recorder is not None:
            recorder.note_kernel(compiled, self.grid, stream, (*arguments, *self.static))
        # Triton's interpreter returns None, and so could a release that works differently: both stay with this way.
        if hasattr(compiled, "packed_metadata") and hasattr(type(compiled), "__getitem__"):
            self._runner = compiled[self.grid]


def _current(stream: int | None) -> AbstractContextManager[None]:
    """Triton's first launch goes to the current stream: make it the one that is meant."""
    if stream is None or stream == driver.active.get_current_stream(driver.active.get_current_device()):
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream))


class ScratchLaunch(Launch):
    """For kernels that make TMA descriptors on the device, which live in memory that Triton asks an allocator for.

    ``triton.set_allocator`` sets a context variable. Here it is set in a copy of the context, for this launch alone: an
    allocator that the program has set stays as it is, and so does its absence.
    """

    __slots__ = ()

    def __call__(self, stream: int | None, *arguments: Any) -> None:
        copy_context().run(self._with_allocator, stream, arguments)

    def _with_allocator(self, stream: int | None, arguments: tuple[Any, ...]) -> None:
        set_allocator(_allocate)
        super().__call__(stream, *arguments)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """From torch's allocator on the current stream, which is the one launched on: it may be freed after the launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Cache(dict[Hashable, _Ready]):
    """What was made ready, by key. A full one is emptied: a program that meets so many shapes pays for some anew."""

    def keep(self, key: Hashable, ready: _Ready) -> _Ready:
        if len(self) >= _LIMIT:
            self.clear()
        self[key] = ready
        return ready


def alignment(*tensors: Tensor | None) -> int | tuple[bool, ...]:
    """0 where all storages start on 16-byte boundaries, else which do: it belongs to every key."""
    found = 0
    for tensor in tensors:
        if tensor is not None:
            found |= tensor.data_ptr()
    if found & 15 == 0:
        return 0
    return tuple(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def current_stream(index: int) -> int | None:
    """The raw stream that ``index``'s kernels are launched on now; None on the CPU."""
    return None if index < 0 else driver.active.get_current_stream(index)


# What a RuntimeError says where a plan cannot be compiled, or where the driver refuses to launch a kernel before any
# of it has run: of a cooperative launch, programs that are not all resident at once (fewer multiprocessors than the
# device has, under MPS or a green context), or a device that makes none; resources; a descriptor of TMA; a kernel in
# CUDA C++ that NVRTC does not compile; and what ``wrong_code`` says.
_STEPPED_OVER = (
    "PassManager",
    "too many blocks in cooperative launch",
    "too many resources requested for launch",
    "operation not supported",
    "Failed to create tensor map descriptor",
    "NVRTC",
    "Triton has compiled",
)


def first_that_runs(runs: Sequence[_Ready], attempt: Callable[[_Ready], _Result]) -> tuple[_Ready, _Result]:
    """The first of ``runs`` that can be compiled and has room on the device, and what ``attempt`` made of it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    for run in runs:
        try:
            return run, attempt(run)
        except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
            told = not isinstance(error, RuntimeError) or any(words in str(error) for words in _STEPPED_OVER)
            if run is runs[-1] or not told:
                raise
    raise AssertionError("a machine has at least one way")


def matrix(tensor: Tensor) -> tuple[Any, ...]:
    """What a launch depends on of a tensor, but for its alignment."""
    return tensor.get_device(), tensor.dtype, tensor.shape, tensor.stride()


def precision_of(dtype: torch.dtype) -> str:
    """How fp32 products are taken: "tf32" where torch allows it for its own matmuls on CUDA, else "ieee"."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"
