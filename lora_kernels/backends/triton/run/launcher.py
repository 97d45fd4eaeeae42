"""Runs whose calls are one call into C++: the ``launch`` library, and what stands in where it is not there.

``PassRun`` takes a run's place: the first call runs it, watched by a ``Recorder``; the next ones run its prepared pass.
Python goes on running it where there is no library, where a Triton launch hook is set (a profiler wants to see the
launches), in Triton's interpreter, for a run that a pass cannot say, and once a kernel's module was unloaded.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from ....errors import BackendUnavailableError
from ...native import load
from .pass_words import Pass
from .prepared import current_stream
from .recording import Recorder

__all__ = [
    "KnownPasses",
    "Library",
    "PassRun",
    "PreparedPass",
    "index_of",
    "launched",
    "library",
    "obstacle",
    "without_library",
]

_MESSAGE = 1024
_FIXED = 8  # tensors that the operator ``launch`` takes; ``launch_many`` takes any number
_ATTEMPTS = 3  # of recording a run: two of its tensors may be one memory in one call and not in the next
# What a launch says of a kernel whose module was unloaded, or of a pass that another thread has let go of for that.
_UNLOADED = ("CUDA_ERROR_INVALID_HANDLE", "CUDA_ERROR_NOT_FOUND", "there is no prepared pass")
_DRIVER, _TORCH_CUDA = "libcuda.so.1", "libtorch_cuda.so"


class Library:
    """The opened launcher.

    Args:
        path: the library ``launch``, which torch has loaded.
        driver, torch_cuda: where the CUDA driver and PyTorch's C shim for CUDA are.

    Raises:
        BackendUnavailableError: one of them is not there, or lacks an entry point.
    """

    def __init__(self, path: str, driver: str = _DRIVER, torch_cuda: str = _TORCH_CUDA) -> None:
        self._library = ctypes.CDLL(path)
        self._library.lora_launch_prepare.restype = ctypes.c_int64
        self._library.lora_launch_open.restype = ctypes.c_int64
        self._checked(self._library.lora_launch_open, driver.encode(), torch_cuda.encode())
        self.launch = _bare(torch.ops.lora_kernels.launch.default)
        self.launch_many = _bare(torch.ops.lora_kernels.launch_many.default)
        self.launch_known = _bare(torch.ops.lora_kernels.launch_known.default)
        self.launch_known_many = _bare(torch.ops.lora_kernels.launch_known_many.default)
        self.enter_pass = _bare(torch.ops.lora_kernels.enter_pass.default)

    def prepare(self, described: Pass) -> int:
        """The pass's handle, until ``release``.

        Raises:
            BackendUnavailableError: the device or the driver cannot run it.
        """
        words = described.words()
        array = (ctypes.c_int64 * len(words))(*words)
        return self._checked(self._library.lora_launch_prepare, array, ctypes.c_int64(len(words)))

    def release(self, handle: int) -> None:
        self._library.lora_launch_release(ctypes.c_int64(handle))

    def forget(self, table: int) -> None:
        self._library.lora_launch_forget(ctypes.c_int64(table))

    def _checked(self, function: Any, *arguments: Any) -> int:
        message = ctypes.create_string_buffer(_MESSAGE)
        found = int(function(*arguments, message, ctypes.c_int64(_MESSAGE)))
        if found < 0:
            raise BackendUnavailableError(f"the launcher cannot be used: {message.value.decode(errors='replace')}")
        return found


def _bare(operator: Any) -> Callable[..., list[Tensor]]:
    """The operator without the half microsecond of its Python method, where this PyTorch shows it."""
    found: Callable[..., list[Tensor]] = getattr(operator, "_op", operator)
    return found


class _Found(NamedTuple):
    library: Library | None
    obstacle: str | None


_found: _Found | None = None
_lock = threading.Lock()


def library() -> Library | None:
    """The launcher, found, compiled or loaded at the first question; None where it cannot be had: see ``obstacle``."""
    return _search().library


def obstacle() -> str | None:
    """Why Python launches in this process: a sentence; None where it need not."""
    return _search().obstacle


@contextmanager
def without_library() -> Iterator[None]:
    """Python launches what is made ready meanwhile: for who measures that."""
    global _found
    before = _found
    _found = _Found(None, "It is left out here.")
    try:
        yield
    finally:
        _found = before


def _search() -> _Found:
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                try:
                    _found = _Found(Library(str(load.load("launch").path)), None)
                except (BackendUnavailableError, OSError, AttributeError) as error:
                    load.give_up("launch", str(error))
                    _found = _Found(None, str(error))
    return _found


class PreparedPass:
    """A pass that is ready: called with its tensors (and None, and lists of them) and numbers, in the run's order.

    Args:
        opened: the launcher.
        described: the pass.
        arguments: those of one call, by whose kinds and places the next calls' are taken.
        kept: what has to live as long as the pass, as the compiled kernels.
    """

    __slots__ = ("__weakref__", "call", "handle", "kept")

    def __init__(self, opened: Library, described: Pass, arguments: Sequence[Any], kept: Sequence[Any] = ()) -> None:
        handle = opened.prepare(described)
        weakref.finalize(self, opened.release, handle).atexit = False
        self.handle, self.kept = handle, kept
        self.call: Callable[..., list[Tensor]] = _bound(opened, handle, arguments)

    def __call__(self, *arguments: Any) -> list[Tensor]:
        """The results; none where memory could not be had, and then the pass has changed nothing that is seen.

        Raises:
            BackendUnavailableError: a tensor is not what the pass was prepared for, or the driver refused a launch.
        """
        try:
            return self.call(*arguments)
        except RuntimeError as error:
            raise _refused(error) from error


def _bound(opened: Library, handle: int, arguments: Sequence[Any]) -> Callable[..., list[Tensor]]:
    """``call(*arguments)`` by the operator with fixed arguments where they fit it."""
    launch, launch_many = opened.launch, opened.launch_many
    numbers = [i for i, argument in enumerate(arguments) if isinstance(argument, (int, float))]
    lists = any(isinstance(argument, (list, tuple)) for argument in arguments)
    if len(numbers) > 1 or lists or len(arguments) - len(numbers) > _FIXED:
        return lambda *given: launch_many(handle, *_split(given))
    if not numbers:
        return lambda *given: launch(handle, 0.0, *given)
    (at,) = numbers
    after = at + 1
    return lambda *given: launch(handle, given[at], *given[:at], *given[after:])


def _split(arguments: Sequence[Any]) -> tuple[list[float], list[Tensor | None]]:
    numbers: list[float] = []
    tensors: list[Tensor | None] = []
    for argument in arguments:
        if isinstance(argument, (int, float)):
            numbers.append(argument)
        elif isinstance(argument, (list, tuple)):
            inner = _split(argument)
            numbers += inner[0]
            tensors += inner[1]
        else:
            tensors.append(argument)
    return numbers, tensors


def _refused(error: RuntimeError) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{str(error).splitlines()[0]} Where the device was reset, or a kernel failed before, start the process anew."
    )


class PassRun:
    """``run`` on the current stream, from its second call on in one call into C++: same arguments, same results.

    Args:
        run: ``run(stream, *arguments)`` -> a tensor, or a tuple of tensors and None. It may depend on its arguments'
            sizes, strides, dtypes and alignments alone, which whoever keeps it has in its key.
        device: where its tensors are; it need not be the current one.
        absent: what is returned in the place of each None of the tuple.
    """

    __slots__ = ("_absent", "_attempts", "_index", "_lock", "_pass", "_run", "_shaped", "fault", "present")

    def __init__(self, run: Callable[..., Any], device: torch.device, absent: tuple[Any, ...] | None = None) -> None:
        self._run, self._index, self._absent, self._lock = run, index_of(device), absent, threading.Lock()
        self._pass: PreparedPass | None = None
        self._attempts = _ATTEMPTS if self._index >= 0 else 0
        self._shaped: Callable[[list[Tensor]], Any] = tuple
        self.fault: str | None = None
        self.present: tuple[bool, ...] = ()  # which results the pass has; () once it is known, or before there is one

    def __call__(self, *arguments: Any) -> Any:
        ready = self._pass
        if ready is None or _hooked():
            return self._by_python(arguments)
        try:
            results = ready.call(*arguments)
        except RuntimeError as error:
            if not any(words in str(error) for words in _UNLOADED):
                raise _refused(error) from error
            self._pass, self.fault = None, str(error)
            return self._by_python(arguments)
        if not results:  # PyTorch's own error, or other memory: the run frees some of it on its way
            return self._filled(launched(self._run, self._index, *arguments))
        return self._shaped(results)

    def _filled(self, results: Any) -> Any:
        """With what stands for None."""
        if self._absent is None:
            return results
        return tuple(absent if found is None else found for found, absent in zip(results, self._absent, strict=True))

    def _by_python(self, arguments: tuple[Any, ...]) -> Any:
        may_record = self._attempts and not _hooked() and not torch.cuda.is_current_stream_capturing()
        if not may_record or not self._lock.acquire(blocking=False):
            return self._filled(launched(self._run, self._index, *arguments))
        try:
            return self._filled(launched(self._recorded, self._index, *arguments))
        finally:
            self._lock.release()

    def _recorded(self, stream: int | None, *arguments: Any) -> Any:
        self._attempts -= 1
        opened = library()
        if opened is None:
            self._attempts, self.fault = 0, obstacle()
            return self._run(stream, *arguments)
        recorder = Recorder(_device_words(self._index), stream, arguments)
        with recorder:
            results = self._run(stream, *recorder.arguments)
        several = results if isinstance(results, tuple) else (results,)
        described = recorder.described(several)
        self.fault = recorder.fault
        if described is None:
            return results
        try:
            made = PreparedPass(opened, described, arguments, recorder.kept)
        except BackendUnavailableError as error:
            self._attempts, self.fault = 0, str(error)
            return results
        self._shaped = _shaper(results, self._absent)
        self.present = tuple(found is not None for found in several)
        self._pass = made
        return results

    def take_pass(self) -> tuple[PreparedPass, tuple[bool, ...]] | None:
        """The pass, and which results it has; once, for who enters it among known passes."""
        ready, present = self._pass, self.present
        if ready is None or not present:
            return None
        self.present = ()
        return ready, present


class KnownPasses:
    """The warm calls of one operator: C++ finds their pass by what their tensors are, and Python asks nothing of them.

    Called as ``known(number, p, kind, *tensors)`` with at most eight tensors, or None; ``many`` takes lists. The
    tensors may have any number of dimensions, and the results of rows then have the first one's. Nothing is returned
    where no pass is known by such tensors, or where it cannot run now. ``kind`` is a number for what a run depends on
    beyond them.
    """

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self._table = next(self._numbers)
        self._opened: Library | None = None

    def __call__(self, number: float, p: float, kind: int, *tensors: Tensor | None) -> Sequence[Tensor]:
        opened = self._opened
        if opened is None or _hooked():
            return ()
        try:
            return opened.launch_known(self._table, number, p, kind, *tensors)
        except RuntimeError:  # whoever asks goes the long way, which meets the same and tells it
            return ()

    def many(self, numbers: Sequence[float], p: float, kind: int, tensors: Sequence[Tensor | None]) -> Sequence[Tensor]:
        opened = self._opened
        if opened is None or _hooked():
            return ()
        try:
            return opened.launch_known_many(self._table, numbers, p, kind, tensors)
        except RuntimeError:
            return ()

    def enter(
        self,
        run: PassRun,
        p: float,
        kind: int,
        tensors: Sequence[Tensor | None],
        absent: Sequence[Tensor],
        eager_only: bool,
        of_rows: int = 1,
    ) -> None:
        """Has the run's pass known by the tensors that it was just called with.

        Args:
            absent: what stands for each result, where the pass has it not.
            eager_only: a graph that is being captured takes another run.
            of_rows: how many results, from the first on, have a row for each of the first tensor's.
        """
        opened, taken = _search().library, run.take_pass()
        if opened is None or taken is None:
            return
        ready, present = taken
        filled = [None if there else other for there, other in zip(present, absent, strict=True)]
        opened.enter_pass(self._table, ready.handle, p, kind, eager_only, of_rows, filled, list(tensors))
        self._opened = opened

    def clear(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.forget(self._table)


def launched(run: Callable[..., Any], index: int, *arguments: Any) -> Any:
    """``run(stream, *arguments)`` by Python, on the current stream of device ``index``, below 0 the CPU.

    Raises:
        BackendUnavailableError: a kernel must still be compiled or loaded, and the stream is being captured.
    """
    if index >= 0 and index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(index):
            return launched(run, index, *arguments)
    try:
        return run(current_stream(index), *arguments)
    except RuntimeError as error:
        if index >= 0 and "captur" in str(error) and torch.cuda.is_current_stream_capturing():
            raise BackendUnavailableError(
                "a kernel of this call must still be compiled or loaded, and the stream is being captured: make "
                f"one call with such tensors before the capture. The driver says: {str(error).rstrip('.')}."
            ) from error
        raise


def _shaper(results: Any, absent: tuple[Any, ...] | None) -> Callable[[list[Tensor]], Any]:
    """What makes of a pass's list of tensors what the run returned, with ``absent`` in the place of None."""
    if not isinstance(results, tuple):
        return itemgetter(0)
    fill = absent or (None,) * len(results)
    present = tuple(found is not None for found in results)
    count = sum(present)
    if all(present[:count]):
        rest = fill[count:]
        return lambda tensors: (*tensors, *rest)

    def shaped(tensors: list[Tensor]) -> tuple[Any, ...]:
        left = iter(tensors)
        return tuple(next(left) if there else other for there, other in zip(present, fill, strict=True))

    return shaped


def index_of(device: torch.device) -> int:
    """The number of a CUDA device, the current one where it has none; below 0 for the CPU."""
    if device.type != "cuda":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index


def _device_words(index: int) -> tuple[str, int, int]:
    return "cuda", index, index


def _hooked() -> bool:
    runtime = knobs.runtime
    return _is_set(runtime.launch_enter_hook) or _is_set(runtime.launch_exit_hook)


def _is_set(hook: Any) -> bool:
    """Triton's chains of hooks are there when empty; a program may also put a function, or None, in their place."""
    return hook is not None and bool(getattr(hook, "calls", True))
