"""A prepared pass as data, and as the words of 64 bits that ``csrc/launch/pass.cpp`` reads.

A pass is what one call does: which memory it allocates, which kernels it launches with which arguments, which products
it leaves to PyTorch, and what runs on the stream beside. Nothing here knows Triton or a device.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

__all__ = [
    "FORK",
    "FORK_HIGH",
    "JOIN",
    "Argument",
    "Constant",
    "Descriptor",
    "DescriptorMap",
    "Kernel",
    "Number",
    "Operand",
    "Own",
    "Pass",
    "Place",
    "Product",
    "Scratch",
    "Step",
    "TensorSpec",
    "places_of",
]

_VERSION = 3  # pass.cpp has the same
_ALIGNMENT = 256  # of scratch buffers: more than any kernel asks for
_DTYPES = {  # torch.headeronly.ScalarType
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
_NUMBERS = {"fp32": 0, "f32": 0, "fp64": 1, "i32": 2, "i64": 3}
# Steps between which kernels with ``beside`` run on a side stream, of normal or of high priority.
FORK, FORK_HIGH, JOIN = "fork", "fork_high", "join"


@dataclass(frozen=True)
class Place:
    """An address: ``offset`` bytes into tensor ``index`` of the call, or into buffer ``index`` of the pass."""

    memory: str  # "tensor" or "buffer"
    index: int
    offset: int = 0

    def words(self) -> list[int]:
        return [("tensor", "buffer").index(self.memory), self.index, self.offset]


@dataclass(frozen=True)
class Number:
    """Number ``index`` of the call times ``factor``, in fp64, as a parameter of Triton's ``type``: fp32, fp64, i32 or
    i64."""

    index: int
    type: str
    factor: float = 1.0


class Constant(NamedTuple):
    """A parameter that is the same in every call: its bytes, little-endian."""

    content: bytes


@dataclass(frozen=True)
class DescriptorMap:
    """Descriptor ``index`` of the pass: a TMA descriptor, by value."""

    index: int


Argument: TypeAlias = Place | Number | Constant | DescriptorMap


class TensorSpec(NamedTuple):
    """What a tensor of the call has to be; ``aligned``: it starts on a 16-byte boundary."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool


class Own(NamedTuple):
    """A buffer that is a tensor: it may be a result, and an operand of PyTorch's products."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Scratch(NamedTuple):
    """A buffer of so many bytes that no one sees."""

    size: int


class Descriptor(NamedTuple):
    """A TMA descriptor of memory; its sizes, strides (in elements) and box from the outermost dimension."""

    place: Place
    element_type: int
    element_bytes: int
    swizzle: int
    fill: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


class Operand(NamedTuple):
    """A matrix of PyTorch's product: the tensor at ``place``; with ``view``, its memory in these sizes and strides."""

    place: Place
    view: tuple[tuple[int, int], tuple[int, int]] | None = None


@dataclass(frozen=True)
class Product:
    """PyTorch's product, on the current stream: buffer ``out`` = left right, or with ``add`` += left right."""

    out: int
    add: bool
    left: Operand
    right: Operand


@dataclass(frozen=True)
class Kernel:
    """One launch of a compiled kernel; ``dependent`` is programmatic dependent launch."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Argument, ...]
    cluster: int = 1
    dependent: bool = False
    cooperative: bool = False
    beside: bool = False


Step: TypeAlias = Kernel | Product | str


@dataclass(frozen=True)
class Pass:
    """One call. ``device``: its type, the index that its tensors have, and its number for the driver."""

    device: tuple[str, int, int]
    tensors: Sequence[TensorSpec | None]
    numbers: int
    buffers: Sequence[Own | Scratch]
    steps: Sequence[Step]
    results: Sequence[int]
    descriptors: Sequence[Descriptor] = field(default=())

    def words(self) -> list[int]:
        """What ``lora_launch_prepare`` takes."""
        kind, index, ordinal = self.device
        offsets, total = self.scratch()
        words = [_VERSION, int(kind == "cuda"), index, ordinal, total, self.numbers]
        words += [len(self.tensors), *(word for spec in self.tensors for word in _tensor_words(spec))]
        words.append(len(self.buffers))
        for number, buffer in enumerate(self.buffers):
            words += [0, offsets[number]] if isinstance(buffer, Scratch) else [1, *_layout_words(buffer)]
        words += [len(self.descriptors), *(word for each in self.descriptors for word in _descriptor_words(each))]
        words += [len(self.steps), *(word for step in self.steps for word in _step_words(step))]
        return [*words, len(self.results), *self.results]

    def scratch(self) -> tuple[dict[int, int], int]:
        """Where each scratch buffer lies in the one piece that a call allocates, and how long that is.

        Buffers that are never in use at once share their bytes: large ones are placed first, each as low as it fits.
        """
        sizes = {i: b.size for i, b in enumerate(self.buffers) if isinstance(b, Scratch)}
        spans, offsets, total = self._spans(), dict[int, int](), 0
        for number in sorted(sizes, key=lambda i: -sizes[i]):
            first, last = spans.get(number, (0, len(self.steps)))
            at = 0
            for other in sorted(offsets, key=lambda i: offsets[i]):
                start, end = spans.get(other, (0, len(self.steps)))
                apart = end < first or last < start
                if not apart and offsets[other] < at + sizes[number] and at < offsets[other] + sizes[other]:
                    at = -(-(offsets[other] + sizes[other]) // _ALIGNMENT) * _ALIGNMENT
            offsets[number] = at
            total = max(total, at + sizes[number])
        return offsets, total

    def _spans(self) -> dict[int, tuple[int, int]]:
        """The first and the last step that use each buffer. What runs beside uses its memory until the streams meet;
        a dependent launch starts while the one before still reads, so that with one nothing is shared."""
        if any(isinstance(step, Kernel) and step.dependent for step in self.steps):
            return {}
        spans: dict[int, tuple[int, int]] = {}
        fork = 0
        for i, step in enumerate(self.steps):
            fork = i if step in (FORK, FORK_HIGH) else fork
            for number in places_of(step, self.descriptors, "buffer"):
                spans[number] = min(i, spans.get(number, (i, i))[0]), i
            if step == JOIN:
                for number, (first, last) in spans.items():
                    if last >= fork:
                        spans[number] = min(first, fork), i
        return spans


def places_of(step: Step, descriptors: Sequence[Descriptor], memory: str) -> Iterator[int]:
    """The tensors or buffers that a kernel's arguments point to, by number."""
    for argument in step.arguments if isinstance(step, Kernel) else ():
        place = descriptors[argument.index].place if isinstance(argument, DescriptorMap) else argument
        if isinstance(place, Place) and place.memory == memory:
            yield place.index


def _layout_words(of: Own | TensorSpec) -> list[int]:
    return [_DTYPES[of.dtype], len(of.sizes), *of.sizes, *of.strides]


def _tensor_words(spec: TensorSpec | None) -> list[int]:
    if spec is None:
        return [0]
    dtype, *layout = _layout_words(spec)
    return [1, dtype, int(spec.aligned), *layout]


def _descriptor_words(of: Descriptor) -> list[int]:
    fixed = [of.element_type, of.element_bytes, of.swizzle, of.fill]
    return [*of.place.words(), *fixed, len(of.sizes), *of.sizes, *of.strides, *of.box]


def _operand_words(operand: Operand) -> list[int]:
    sizes, strides = operand.view or ((0, 0), (0, 0))
    return [*operand.place.words(), int(operand.view is not None), *sizes, *strides]


def _argument_words(argument: Argument) -> list[int]:
    if isinstance(argument, Place):
        return [0, *argument.words()]
    if isinstance(argument, Number):
        return [1, argument.index, _NUMBERS[argument.type], *struct.unpack("<q", struct.pack("<d", argument.factor))]
    if isinstance(argument, Constant):
        (bits,) = struct.unpack("<q", argument.content.ljust(8, b"\0"))
        return [2, len(argument.content), bits]
    return [3, argument.index]


def _step_words(step: Step) -> list[int]:
    if isinstance(step, str):
        return [{FORK: 2, JOIN: 3, FORK_HIGH: 4}[step]]
    if isinstance(step, Product):
        return [1, step.out, int(step.add), *_operand_words(step.left), *_operand_words(step.right)]
    flags = [int(flag) for flag in (step.dependent, step.cooperative, step.beside)]
    handle = step.function if step.function < 2**63 else step.function - 2**64
    fixed = [handle, *step.grid, step.threads, step.shared, step.cluster, *flags]
    return [0, *fixed, len(step.arguments), *(word for each in step.arguments for word in _argument_words(each))]
