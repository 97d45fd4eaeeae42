"""Turns a run into a prepared pass by watching it once: what it allocates, launches, multiplies and returns.

A run (``forward.Run``, ``backward.BackwardRun``, a step) is Python that depends on its call's sizes alone, which its
key holds; so what it does once it does in every call of that key, with other addresses and other numbers. Tensors are
told apart by their addresses, the call's numbers by a class of their own. Whatever a pass cannot say is a fault: then
the run stays as it is.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .pass_words import (
    FORK,
    FORK_HIGH,
    JOIN,
    Argument,
    Constant,
    Descriptor,
    DescriptorMap,
    Kernel,
    Number,
    Operand,
    Own,
    Pass,
    Place,
    Product,
    Scratch,
    Step,
    TensorSpec,
    places_of,
)

__all__ = ["Recorder", "current", "plain"]

watching = 0  # recorders at work, in whichever thread: a launch that is ready asks only this
_ACTIVE = threading.local()
_lock = threading.Lock()
_INTEGERS = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8}
_FLOATS = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}
_TF32 = 11  # CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
_aten = torch.ops.aten
_ALLOCATES = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default}
_PASSES = {_aten.record_stream.default, _aten.detach.default}


def current() -> Recorder | None:
    """The recorder that watches this thread."""
    return getattr(_ACTIVE, "recorder", None)


def plain(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With the call's numbers as numbers."""
    return tuple(float.__pos__(each) if isinstance(each, Given) else each for each in arguments)


class _Unsayable(Exception):
    """What a pass cannot say; the message ends "the run stays in Python: ..."."""


class Given(float):
    """A number of the call, times ``factor``. A kernel may take it as it is, or times one number that the run's key
    fixes, as 1 / (1 - p); any other use in Python would be lost, and is a fault."""

    recorder: Recorder
    index: int
    factor: float | None = None

    def _times(self, other: Any) -> float:
        if self.factor is not None or type(other) is not float:
            return float(_used("__mul__")(self, other))
        found = Given(float.__mul__(self, other))
        found.recorder, found.index, found.factor = self.recorder, self.index, other
        return found

    __mul__ = __rmul__ = _times  # type: ignore[assignment]


def _used(name: str) -> Callable[..., Any]:
    plain = getattr(float, name)

    def use(self: Given, *others: Any) -> Any:
        self.recorder.note_fault(f"a number of the call is used in Python ({name})")
        return plain(self, *others)

    return use


for _name in ("add", "sub", "truediv", "floordiv", "mod", "pow"):
    setattr(Given, f"__{_name}__", _used(f"__{_name}__"))
    setattr(Given, f"__r{_name}__", _used(f"__r{_name}__"))
for _name in ("neg", "pos", "abs", "float", "int", "bool", "round", "trunc", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Given, f"__{_name}__", _used(f"__{_name}__"))
Given.__hash__ = _used("__hash__")  # type: ignore[method-assign, assignment]


class Recorder(TorchDispatchMode):
    """Watches one call of a run, within ``with``; ``described`` then tells its pass.

    Args:
        device: the device's type, the index that its tensors have, and its number for the driver.
        stream: the raw stream that the call runs on; launches on another one run beside.
        arguments: the call's arguments as the run takes them, tensors, None, lists of tensors, and numbers.
    """

    def __init__(self, device: tuple[str, int, int], stream: int | None, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.device, self.stream, self.fault = device, stream, None
        self.tensors: list[Tensor | None] = []
        self.numbers: list[Given] = []
        self.arguments = tuple(self._argument(argument) for argument in arguments)
        self.buffers: list[Own | Scratch] = []
        self.memory: list[Tensor | None] = []  # what the buffers are in this call, held so that addresses stay apart
        self.steps: list[Step] = []
        self.descriptors: list[Descriptor] = []
        self.kept: list[Any] = []  # compiled kernels

    fault: str | None

    def __enter__(self) -> Recorder:
        global watching
        with _lock:
            watching += 1
        _ACTIVE.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        global watching
        super().__exit__(*error)
        _ACTIVE.recorder = None
        with _lock:
            watching -= 1

    def note_fault(self, what: str) -> None:
        """The first fault counts."""
        self.fault = self.fault or what

    def described(self, results: tuple[Tensor | None, ...]) -> Pass | None:
        """The pass, whose results are the run's without those that are None; None where there was a fault."""
        if self.fault is None:
            self._guard(self._close, results)
        if self.fault is not None:
            return None
        indices = [self._own_index(result) for result in results if result is not None]
        read = self._read_by_kernels()
        specs = [None if tensor is None else _spec(tensor, i in read) for i, tensor in enumerate(self.tensors)]
        buffers = [
            buffer if isinstance(buffer, Scratch) or i in indices or self._multiplied(i) else Scratch(_bytes(buffer))
            for i, buffer in enumerate(self.buffers)
        ]  # what no step uses, as memory that Triton asked for, is none
        used = {i for step in self.steps for i in places_of(step, self.descriptors, "buffer")}
        buffers = [b if isinstance(b, Own) or i in used else Scratch(0) for i, b in enumerate(buffers)]
        return Pass(self.device, specs, len(self.numbers), buffers, self.steps, indices, self.descriptors)

    # What the run does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._guard(self._note_operator, func, args, kwargs or {}, result)
        return result

    def note_kernel(
        self, compiled: Any, grid: tuple[int, int, int], stream: int | None, arguments: tuple[Any, ...]
    ) -> None:
        """A launch: of the kernel that Triton has compiled, with all its arguments in the signature's order."""
        self._guard(self._note_kernel, compiled, grid, stream, arguments)

    def note_fork(self, high: bool = False) -> None:
        """What is launched on another stream, until the join, runs beside; ``high``: on one of high priority."""
        self.steps.append(FORK_HIGH if high else FORK)

    def note_join(self) -> None:
        self.steps.append(JOIN)

    def _guard(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except _Unsayable as fault:
            self.note_fault(str(fault))

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)([self._argument(each) for each in argument])
        if argument is None or isinstance(argument, Tensor):
            self.tensors.append(argument)
            return argument
        given = Given(argument)
        given.recorder, given.index = self, len(self.numbers)
        self.numbers.append(given)
        return given

    def _note_operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func in _ALLOCATES:
            self._allocate(result)
        elif func is _aten.mm.default:
            self.steps.append(Product(self._allocate(result), False, *map(self._operand, args)))
        elif func is _aten.addmm_.default and len(args) == 3 and not kwargs:
            self.steps.append(Product(self._own_index(args[0]), True, *map(self._operand, args[1:])))
        elif func not in _PASSES and not func.is_view:
            raise _Unsayable(f"it calls {func}")

    def _allocate(self, tensor: Tensor) -> int:
        self.buffers.append(Own(tensor.dtype, tuple(tensor.shape), tensor.stride()))
        self.memory.append(tensor)
        return len(self.buffers) - 1

    def _own_index(self, tensor: Any) -> int:
        """The buffer that ``tensor`` is, whole."""
        for i, memory in enumerate(self.memory):
            if memory is not None and isinstance(tensor, Tensor) and _identity(memory) == _identity(tensor):
                return i
        raise _Unsayable("a tensor that is returned or added to is not one that it allocated")

    def _read_by_kernels(self) -> set[int]:
        """The tensors of the call whose memory a kernel is given."""
        return {index for step in self.steps for index in places_of(step, self.descriptors, "tensor")}

    def _multiplied(self, buffer: int) -> bool:
        """Whether PyTorch's products need the buffer as a tensor."""
        products = [step for step in self.steps if isinstance(step, Product)]
        operands = {o.place for p in products for o in (p.left, p.right)}
        return any(p.out == buffer for p in products) or Place("buffer", buffer) in operands

    def _operand(self, tensor: Tensor) -> Operand:
        place = self._place(tensor.data_ptr())
        whole = self.tensors[place.index] if place.memory == "tensor" else self.memory[place.index]
        if whole is None or place.offset or whole.dtype != tensor.dtype or tensor.dim() != 2 or tensor.is_conj():
            raise _Unsayable("it multiplies a part of a tensor")
        if (whole.shape, whole.stride()) == (tensor.shape, tensor.stride()):
            return Operand(place)
        rows, columns = tensor.shape
        return Operand(place, ((rows, columns), (tensor.stride(0), tensor.stride(1))))

    def _place(self, address: int) -> Place:
        """Where an address lies: the start of a tensor or a buffer, or else within exactly one of them."""
        known = {"tensor": self.tensors, "buffer": self.memory}
        spans = [
            (kind, i, tensor.data_ptr(), _span(tensor))
            for kind, tensors in known.items()
            for i, tensor in enumerate(tensors)
            if tensor is not None
        ]
        starts = [Place(kind, i) for kind, i, start, _ in spans if start == address]
        within = [Place(kind, i, address - start) for kind, i, start, size in spans if start <= address < start + size]
        for found in (starts, within):
            if len(found) == 1 and address != 0:
                return found[0]
        raise _Unsayable("an address belongs to none of its tensors, or to several")

    # A launch

    def _note_kernel(
        self, compiled: Any, grid: tuple[int, int, int], stream: int | None, arguments: tuple[Any, ...]
    ) -> None:
        if not hasattr(compiled, "packed_metadata") or not getattr(compiled, "function", None):
            raise _Unsayable("Triton's interpreter runs it, or a release of Triton that works in another way")
        metadata = compiled.metadata
        warps, cluster, shared = compiled.packed_metadata[:3]
        if getattr(metadata, "profile_scratch_size", 0):
            raise _Unsayable("a kernel is instrumented for a profile")
        self.kept.append(compiled)
        if 0 in grid:
            return
        signature = list(compiled.src.signature.values())
        if len(signature) != len(arguments):
            raise _Unsayable("a kernel has arguments that are not given")
        described = list(getattr(metadata, "tensordesc_meta", None) or ())
        flat = [each for pair in zip(signature, arguments, strict=True) for each in self._parameters(*pair, described)]
        flat += [self._triton_scratch(metadata, grid, cluster), Constant(bytes(8))]
        self.steps.append(
            Kernel(
                compiled.function,
                grid,
                32 * warps,
                shared,
                tuple(flat),
                cluster,
                bool(metadata.launch_pdl),
                bool(metadata.launch_cooperative_grid),
                beside=stream != self.stream,
            )
        )

    def _triton_scratch(self, metadata: Any, grid: tuple[int, int, int], cluster: int) -> Argument:
        size = metadata.global_scratch_size * cluster * grid[0] * grid[1] * grid[2]
        if not size:
            return Constant(bytes(8))
        self.buffers.append(Scratch(size))
        self.memory.append(None)
        return Place("buffer", len(self.buffers) - 1)

    def _parameters(self, kind: Any, value: Any, described: list[Any]) -> list[Argument]:
        """What Triton's own launcher makes of one argument."""
        if kind == "constexpr":
            if isinstance(value, Given):
                raise _Unsayable("a number of the call is compiled into a kernel")
            return []
        if isinstance(kind, tuple):
            if len(kind) != len(value):
                raise _Unsayable("a tuple does not fit its kernel")
            return [each for pair in zip(kind, value, strict=True) for each in self._parameters(*pair, described)]
        if kind.startswith("tensordesc"):
            return self._described(value, described.pop(0) if described else None)
        if kind.startswith("*"):
            return [Constant(bytes(8)) if value is None else self._place(value.data_ptr())]
        if isinstance(value, Given):
            if kind not in ("fp32", "f32", "fp64"):
                raise _Unsayable(f"a number of the call is a parameter of type {kind}")
            return [Number(value.index, kind, 1.0 if value.factor is None else value.factor)]
        if kind in _INTEGERS:
            size = _INTEGERS[kind]
            return [Constant((int(value) & (1 << 8 * size) - 1).to_bytes(size, "little"))]
        if kind in _FLOATS:
            return [Constant(struct.pack(_FLOATS[kind], value))]
        raise _Unsayable(f"a kernel has a parameter of type {kind}")

    def _described(self, value: Any, metadata: Any) -> list[Argument]:
        """A TMA descriptor, then the shape and the strides, as Triton's launcher passes them."""
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        if not metadata or metadata["fp4_padded"]:
            raise _Unsayable("a descriptor is none of TMA's, or is of fp4")
        tf32 = getattr(value, "round_f32_to_tf32", False)
        element = _TF32 if tf32 else TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]]
        fill = int(value.padding == "nan")
        sizes, strides, box = tuple(value.shape), tuple(value.strides), tuple(metadata["block_size"])
        place = self._place(value.base.data_ptr())
        found = Descriptor(place, element, metadata["elem_size"], metadata["swizzle"], fill, sizes, strides, box)
        if found not in self.descriptors:
            self.descriptors.append(found)
        shape = [Constant((size & 0xFFFFFFFF).to_bytes(4, "little")) for size in sizes]
        steps = [Constant(stride.to_bytes(8, "little", signed=True)) for stride in strides]
        return [DescriptorMap(self.descriptors.index(found)), *shape, *steps]

    def _close(self, results: tuple[Tensor | None, ...]) -> None:
        indices = [self._own_index(result) for result in results if result is not None]
        if not indices or len(set(indices)) < len(indices):
            raise _Unsayable("it returns nothing, or a tensor twice")
        given = [tensor for tensor in self.tensors if tensor is not None]
        if any(tensor.layout != torch.strided or tensor.numel() == 0 for tensor in given):
            raise _Unsayable("a tensor is empty or not strided")


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _bytes(own: Own) -> int:
    last = sum((size - 1) * stride for size, stride in zip(own.sizes, own.strides, strict=True))
    return (last + 1) * own.dtype.itemsize


def _spec(tensor: Tensor, in_kernel: bool) -> TensorSpec:
    """PyTorch's products take any address."""
    aligned = in_kernel and tensor.data_ptr() % 16 == 0
    return TensorSpec(tensor.dtype, tuple(tensor.shape), tensor.stride(), aligned)
