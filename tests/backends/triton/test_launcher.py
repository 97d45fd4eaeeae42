"""The launcher against a driver that writes down each call: parameters, descriptors, streams, memory, and errors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from driver_stand_in import SOURCE, DriverStandIn, compile_driver
from lora_kernels.backends.native import load
from lora_kernels.backends.triton.run import launcher
from lora_kernels.backends.triton.run.pass_words import (
    FORK,
    FORK_HIGH,
    JOIN,
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
)
from lora_kernels.errors import BackendUnavailableError
from numerics import same_bits
from stand_in import needs_a_compiler

F32, BF16 = torch.float32, torch.bfloat16
CPU = ("cpu", -1, 0)
POINTER = Place("tensor", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_a_compiler()
    return tmp_path_factory.mktemp("driver")


@pytest.fixture(scope="module")
def opened(folder: Path) -> tuple[DriverStandIn, launcher.Library]:
    stand_in = DriverStandIn(compile_driver(folder / "whole"))
    library = load._loaded.get("launch") or load.compile_into_cache("launch")
    torch.ops.load_library(str(library.path))
    return stand_in, launcher.Library(str(library.path), stand_in.path, stand_in.path)


@pytest.fixture
def driver(opened: tuple[DriverStandIn, launcher.Library]) -> DriverStandIn:
    stand_in, _ = opened
    stand_in.forget()
    stand_in.library.cuCtxSetCurrent(0xC000)
    stand_in.stream(0, 0x77)
    return stand_in


@pytest.fixture
def library(opened: tuple[DriverStandIn, launcher.Library], driver: DriverStandIn) -> launcher.Library:
    return opened[1]


def spec(tensor: Tensor | None) -> TensorSpec | None:
    if tensor is None:
        return None
    return TensorSpec(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.data_ptr() % 16 == 0)


def kernel(*arguments: Any, function: int = 0x700, **options: Any) -> Kernel:
    return Kernel(function, options.pop("grid", (3, 2, 1)), 128, 1024, arguments, **options)


def own(*sizes: int, dtype: torch.dtype = F32) -> Own:
    return Own(dtype, sizes, torch.empty(sizes, device="meta").stride())


def described(tensors: list[Tensor | None], steps: list[Step], **changes: Any) -> Pass:
    given: dict[str, Any] = {"device": CPU, "numbers": 0, "buffers": [own(4, 8)], "results": [0]}
    given |= {"tensors": [spec(tensor) for tensor in tensors], "steps": steps} | changes
    return Pass(**given)


def hexed(value: int, size: int = 8) -> str:
    return value.to_bytes(size, "little").hex()


def launches(driver: DriverStandIn) -> list[list[str]]:
    return driver.take("cuLaunchKernelEx")


# What a kernel is given


def test_parameters_grid_and_attributes(library: launcher.Library, driver: DriverStandIn) -> None:
    x = torch.zeros(4, 8)
    arguments = (POINTER, Place("buffer", 0, 16), Number(0, "fp32"), Constant(bytes([7, 0, 0, 0, 0, 0, 0, 128])))
    driver.parameters(0x100, (8, 8, 4, 8, 8))
    one = kernel(*arguments, Constant(bytes(8)), function=0x100, cluster=2, dependent=True, cooperative=True)
    ready = launcher.PreparedPass(library, described([x], [one], numbers=1), (x, 0.5))
    driver.take()
    (y,) = ready(x, -0.3)
    assert (y.shape, y.dtype, y.device.type) == ((4, 8), F32, "cpu")
    ((_, function, *sizes),) = launches(driver)
    grid_block_shared_stream_device = ["6", "2", "1", "128", "1", "1", "1024", str(0x77), "0"]
    assert (function, sizes[:9]) == (str(0x100), grid_block_shared_stream_device)
    assert sizes[9:13] == ["@6=01000000", "@2=01000000", "@4=" + hexed(2, 4) + hexed(1, 4) * 2, "@5=01000000"]
    number = torch.tensor([-0.3], dtype=F32).view(torch.int32).item() & 0xFFFFFFFF
    pointers = [hexed(x.data_ptr()), hexed(y.data_ptr() + 16)]
    assert sizes[13:] == [*pointers, hexed(int(number), 4), "0700000000000080", "00" * 8]


@pytest.mark.parametrize(("kind", "size"), [("fp32", 4), ("fp64", 8), ("i32", 4), ("i64", 8)])
def test_numbers_of_each_type(library: launcher.Library, driver: DriverStandIn, kind: str, size: int) -> None:
    x = torch.zeros(4, 8)
    driver.parameters(0x300, (size,))
    ready = launcher.PreparedPass(library, described([x], [kernel(Number(0, kind), function=0x300)], numbers=1), (x, 1))
    ready(x, -3)
    dtype = {"fp32": F32, "fp64": torch.float64, "i32": torch.int32, "i64": torch.int64}[kind]
    (line,) = launches(driver)
    assert line[-1] == bytes(torch.tensor([-3], dtype=dtype).view(torch.uint8).tolist()).hex()
    if kind.startswith("i"):
        for wrong in (0.5, 1e30, float("nan")):
            with pytest.raises(BackendUnavailableError, match="no integer that its kernel can take"):
                ready(x, wrong)
        assert launches(driver) == []


def test_lists_many_tensors_and_many_numbers(library: launcher.Library, driver: DriverStandIn) -> None:
    """Through the operator of lists: the same pass, in the order of the arguments."""
    tensors = [torch.zeros(4, 8) for _ in range(10)]
    driver.parameters(0x300, (8, 8, 4))
    arguments = (tensors[:4], None, 0.25, tensors[4:9], 2.0, tensors[9])
    flat = [*tensors[:4], None, *tensors[4:]]
    one = kernel(Place("tensor", 10), Place("tensor", 0), Number(1, "fp32"), function=0x300)
    ready = launcher.PreparedPass(library, described(flat, [one], numbers=2), arguments)
    ready(*arguments)
    (line,) = launches(driver)
    assert line[-3:] == [hexed(tensors[9].data_ptr()), hexed(tensors[0].data_ptr()), "00000040"]


def test_the_wide_cluster_is_allowed_once(library: launcher.Library, driver: DriverStandIn) -> None:
    x = torch.zeros(4, 8)
    ready = launcher.PreparedPass(library, described([x], [kernel(cluster=16)]), (x,))
    ready(x)
    assert driver.take("cuFuncSetAttribute") == [["cuFuncSetAttribute", str(0x700), "14", "1"]]


def test_more_parameters_than_a_kernel_takes_are_refused(library: launcher.Library) -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(BackendUnavailableError, match="more than 4096 bytes of parameters"):
        launcher.PreparedPass(library, described([x], [kernel(*[POINTER] * 513)]), (x,))


# TMA descriptors


def tma(tensor: Tensor, place: Place = POINTER, box: tuple[int, ...] = (2, 8), swizzle: int = 3) -> Descriptor:
    return Descriptor(place, 9, 2, swizzle, 1, tuple(tensor.shape), tensor.stride(), box)


def with_descriptor(library: launcher.Library, x: Tensor, **changes: Any) -> launcher.PreparedPass:
    one = kernel(DescriptorMap(0), function=0x400)
    return launcher.PreparedPass(library, described([x], [one], descriptors=[tma(x, **changes)]), (x,))


def test_a_descriptor_is_made_once_for_an_address(library: launcher.Library, driver: DriverStandIn) -> None:
    driver.parameters(0x400, (128,))
    x, other = (torch.zeros(6, 64, dtype=BF16)[:, :32] for _ in range(2))
    ready = with_descriptor(library, x)
    for tensor in (x, other, x):
        ready(tensor)
    made = driver.take()
    words = [line for line in made if line[0] == "cuTensorMapEncodeTiled"]
    dimensions = ["32", "128", "8", "1", "6", "0", "2", "1"]  # size, bytes apart, box, step; the innermost first
    assert words[0][1:] == ["9", "2", str(x.data_ptr()), "0", "3", "2", "1", *dimensions]
    assert [line[3] for line in words] == [str(x.data_ptr()), str(other.data_ptr())]
    sent = [line[-1] for line in made if line[0] == "cuLaunchKernelEx"]
    assert sent[0] == sent[2] != sent[1]
    assert sent[1].startswith(hexed(other.data_ptr()))


@pytest.mark.parametrize("change", ["shape", "strides", "box", "swizzle", "buffer"])
def test_the_same_address_with_another_shape_is_another_descriptor(
    library: launcher.Library, driver: DriverStandIn, change: str
) -> None:
    driver.parameters(0x400, (128,))
    memory = torch.zeros(4096, dtype=BF16)
    first = memory.as_strided((8, 32), (64, 1))
    second = {"shape": memory.as_strided((4, 32), (64, 1)), "strides": memory.as_strided((8, 32), (32, 1))}
    with_descriptor(library, first)(first)
    x = second.get(change, first)
    changes: dict[str, dict[str, Any]] = {"box": {"box": (4, 8)}, "swizzle": {"swizzle": 2}}
    with_descriptor(library, x, **changes.get(change, {}))(x)
    made, sent = driver.take(), []
    assert sum(line[0] == "cuTensorMapEncodeTiled" for line in made) == 2
    sent = [line[-1] for line in made if line[0] == "cuLaunchKernelEx"]
    assert (sent[0] == sent[1]) == (change == "buffer")


def test_one_pass_refuses_what_its_descriptors_do_not_describe(library: launcher.Library) -> None:
    memory = torch.zeros(4096, dtype=BF16)
    ready = with_descriptor(library, memory.as_strided((8, 32), (64, 1)))
    with pytest.raises(BackendUnavailableError, match="has another shape"):
        ready(memory.as_strided((4, 32), (64, 1)))


@pytest.mark.parametrize(("version", "rows", "cleared"), [(13010, 8, True), (13010, 4096, False), (13020, 8, False)])
def test_the_bit_that_older_drivers_set_wrongly(
    opened: tuple[DriverStandIn, launcher.Library], driver: DriverStandIn, version: int, rows: int, cleared: bool
) -> None:
    driver.parameters(0x400, (128,))
    driver.version(version)
    path = opened[1]._library._name
    try:
        old = launcher.Library(path, driver.path, driver.path)
        x = torch.zeros(rows, 32, dtype=BF16)
        with_descriptor(old, x)(x)
        (line,) = launches(driver)
        assert line[-1][16:32] == hexed(2**64 - 1 - (2**21 if cleared else 0))
    finally:
        driver.forget()
        launcher.Library(path, driver.path, driver.path)


def test_a_driver_without_descriptors_runs_the_other_passes(
    opened: tuple[DriverStandIn, launcher.Library], driver: DriverStandIn, folder: Path
) -> None:
    path = opened[1]._library._name
    old = compile_driver(folder / "without_encode", "WITHOUT_ENCODE")
    stand_in = DriverStandIn(old)
    x = torch.zeros(8, 32, dtype=BF16)
    try:
        without = launcher.Library(path, str(old), str(old))
        launcher.PreparedPass(without, described([x], [kernel(POINTER)]), (x,))(x)
        assert len(launches(stand_in)) == 1
        with pytest.raises(BackendUnavailableError, match="no entry point cuTensorMapEncodeTiled"):
            with_descriptor(without, x)
    finally:
        launcher.Library(path, driver.path, driver.path)


def test_a_driver_without_launches_is_named(
    opened: tuple[DriverStandIn, launcher.Library], driver: DriverStandIn, folder: Path
) -> None:
    path = opened[1]._library._name
    old = str(compile_driver(folder / "without_launch", "WITHOUT_LAUNCH"))
    with pytest.raises(BackendUnavailableError, match=r"no entry point cuLaunchKernelEx: .* CUDA 12 or later"):
        launcher.Library(path, old, driver.path)
    with pytest.raises(BackendUnavailableError, match=r"the CUDA driver cannot be opened .*no_such"):
        launcher.Library(path, "/no_such/libcuda.so.1", driver.path)
    with pytest.raises(BackendUnavailableError, match="PyTorch's CUDA library cannot be opened"):
        launcher.Library(path, driver.path, "libno_such_torch.so")


# What a pass refuses


CHANGES = {
    "dtype": lambda x: x.to(torch.float64),
    "shape": lambda x: x[:3],
    "strides": lambda x: x.t().contiguous().t(),
    "number of dimensions": lambda x: x[None],
    "16-byte boundary": lambda x: torch.zeros(33)[1:].view(4, 8),
    "device": lambda x: x.to("meta"),
    "missing": lambda x: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_pass_was_not_prepared_for_is_refused(
    library: launcher.Library, driver: DriverStandIn, change: str
) -> None:
    x = torch.zeros(4, 8)
    ready = launcher.PreparedPass(library, described([x, None], [kernel(POINTER)]), (x, None))
    with pytest.raises(BackendUnavailableError, match=f"tensor 0 of the call .*{change}"):
        ready(CHANGES[change](x), None)
    with pytest.raises(BackendUnavailableError, match="tensor 1 of the call is given"):
        ready(x, x)
    with pytest.raises(BackendUnavailableError, match=r"for 2 tensors; got more"):
        ready(x, None, x)
    assert launches(driver) == []
    assert len(ready(x, None)) == 1


def test_strides_that_no_address_uses_may_differ(library: launcher.Library) -> None:
    x = torch.zeros(1, 8)
    ready = launcher.PreparedPass(library, described([x], [kernel(POINTER)]), (x,))
    assert len(ready(x.as_strided((1, 8), (77, 1)))) == 1


def test_words_that_are_no_pass_are_refused(library: launcher.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prefix, each word put out of range, and words left over."""
    x = torch.zeros(4, 8, dtype=BF16)
    steps: list[Step] = [FORK, kernel(POINTER, DescriptorMap(0), Number(0, "fp32"), beside=True), JOIN]
    good = described([x], steps, numbers=1, descriptors=[tma(x)], buffers=[own(4, 8), Scratch(64)])
    words = good.words()

    def prepare(changed: list[int]) -> None:
        monkeypatch.setattr(Pass, "words", lambda self: changed)
        library.release(library.prepare(good))

    prepare(words)
    for length in range(len(words)):
        with pytest.raises(BackendUnavailableError, match="no prepared pass"):
            prepare(words[:length])
    with pytest.raises(BackendUnavailableError, match="left over"):
        prepare([*words, 0])
    for at in range(len(words)):
        for wrong in (-(2**63), 2**62):
            with suppress(BackendUnavailableError):  # an address or a stride may be any number
                prepare([*words[:at], wrong, *words[at + 1 :]])


# Memory


def test_nothing_is_launched_where_memory_is_short(library: launcher.Library, driver: DriverStandIn) -> None:
    """All memory is had before the first launch; the caller then goes another way."""
    x = torch.zeros(4, 8)
    large = [own(4, 8), Own(F32, (2**52,), (1,))]
    ready = launcher.PreparedPass(library, described([x], [kernel(POINTER), kernel(POINTER)], buffers=large), (x,))
    driver.take()
    assert ready(x) == []
    assert driver.take() == []
    huge = launcher.PreparedPass(
        library, described([x], [kernel(Place("buffer", 1))], buffers=[own(4, 8), Scratch(2**47)]), (x,)
    )
    assert huge(x) == []
    assert launches(driver) == []


def scratch_of(steps: list[Step], sizes: list[int]) -> tuple[list[int], int]:
    buffers: list[Own | Scratch] = [Scratch(size) for size in sizes]
    offsets, total = Pass(CPU, [], 0, buffers, steps, []).scratch()
    return [offsets[i] for i in range(len(sizes))], total


def uses(*buffers: int, **options: Any) -> Kernel:
    return kernel(*(Place("buffer", buffer) for buffer in buffers), **options)


def test_scratch_that_is_never_in_use_at_once_shares_its_bytes() -> None:
    assert scratch_of([uses(0), uses(1)], [1000, 2000]) == ([0, 0], 2000)
    assert scratch_of([uses(0), uses(0, 1), uses(1)], [1000, 2000]) == ([2048, 0], 3048)
    assert scratch_of([uses(0, 1), uses(1, 2), uses(2)], [600, 500, 700]) == ([0, 768, 0], 1268)


@pytest.mark.parametrize("fork", [FORK, FORK_HIGH])
def test_what_runs_beside_or_early_shares_nothing(fork: str) -> None:
    beside = [fork, uses(0, beside=True), uses(1), JOIN, uses(2)]
    offsets, total = scratch_of(beside, [512, 512, 512])
    assert (sorted(offsets[:2]), total) == ([0, 512], 1024)
    before = [uses(0), fork, uses(1, beside=True), JOIN]
    assert scratch_of(before, [512, 512]) == ([0, 0], 512)
    early = [uses(0), uses(1, dependent=True), uses(2)]
    assert scratch_of(early, [512, 512, 512]) == ([0, 512, 1024], 1536)


def test_scratch_is_one_piece_and_goes_back(library: launcher.Library, driver: DriverStandIn) -> None:
    x = torch.zeros(4, 8)
    driver.parameters(0x500, (8, 8))
    buffers = [own(4, 8), Scratch(100), Scratch(300)]
    one = kernel(Place("buffer", 1), Place("buffer", 2), function=0x500)
    ready = launcher.PreparedPass(library, described([x], [one], buffers=buffers), (x,))
    ready(x)
    (line,) = launches(driver)
    first, second = (int.from_bytes(bytes.fromhex(word), "little") for word in line[-2:])
    assert first - second == 512


# PyTorch's products


def test_products_are_torch_s(library: launcher.Library) -> None:
    x, weight = torch.randn(5, 8, dtype=BF16), torch.randn(6, 8, dtype=BF16)
    left, right = Operand(Place("tensor", 0)), Operand(Place("tensor", 1), ((8, 6), (1, 8)))
    once: list[Step] = [Product(0, False, left, right)]
    ready = launcher.PreparedPass(library, described([x, weight], once, buffers=[own(5, 6, dtype=BF16)]), (x, weight))
    (y,) = ready(x, weight)
    assert same_bits(y, torch.mm(x, weight.t()))
    twice = [*once, Product(0, True, left, right)]
    ready = launcher.PreparedPass(library, described([x, weight], twice, buffers=[own(5, 6, dtype=BF16)]), (x, weight))
    assert same_bits(ready(x, weight)[0], torch.mm(x, weight.t()).addmm_(x, weight.t()))
    (y,) = ready(x.clone(), weight[:, :].clone())
    assert same_bits(y, torch.mm(x, weight.t()).addmm_(x, weight.t()))


def test_a_part_of_a_tensor_is_multiplied_where_it_lies(library: launcher.Library) -> None:
    whole = torch.randn(10, 8)
    x, weight = whole[4:9], torch.randn(6, 8)
    left, right = Operand(Place("tensor", 0)), Operand(Place("tensor", 1), ((8, 6), (1, 8)))
    ready = launcher.PreparedPass(
        library, described([x, weight], [Product(0, False, left, right)], buffers=[own(5, 6)]), (x, weight)
    )
    assert same_bits(ready(x, weight)[0], torch.mm(x, weight.t()))


def test_a_product_that_fails_leaves_the_call_to_the_caller(library: launcher.Library, driver: DriverStandIn) -> None:
    """And the streams have met by then: what runs beside reads memory that goes back."""
    x = torch.zeros(4, 8)
    wrong = Product(0, False, Operand(POINTER), Operand(POINTER))
    steps: list[Step] = [FORK, kernel(POINTER, beside=True), wrong, JOIN]
    ready = launcher.PreparedPass(library, described([x], steps), (x,))
    driver.take()
    assert ready(x) == []
    assert [line[0] for line in driver.take("cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernelEx")] == [
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuLaunchKernelEx",
        "cuEventRecord",
        "cuStreamWaitEvent",
    ]


# Streams


@pytest.mark.parametrize(("fork", "stream"), [(FORK, 0x1001), (FORK_HIGH, 0x1011)])  # no other test's
def test_the_streams_part_and_meet_by_events(
    library: launcher.Library, driver: DriverStandIn, fork: str, stream: int
) -> None:
    x = torch.zeros(4, 8)
    steps: list[Step] = [kernel(POINTER), fork, kernel(beside=True), kernel(), JOIN, kernel()]
    ready = launcher.PreparedPass(library, described([x], steps), (x,))
    driver.stream(0, stream)
    driver.take()
    ready(x)
    made = driver.take()
    assert [line for line in made if line[0] == "pool"] == [["pool", "0", str(int(fork == FORK_HIGH))]]
    assert [line[0] for line in made].count("cuEventCreate") == 2
    assert {line[1] for line in made if line[0] == "cuEventCreate"} == {"2"}
    ready(x)
    again = driver.take()
    record, wait, launch = "cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernelEx"
    assert [line[0] for line in again] == [launch, record, wait, launch, launch, record, wait, launch]
    streams = [line[9] for line in again if line[0] == launch]
    main, side = str(stream), streams[1]
    assert streams == [main, side, main, main]
    assert side != main
    (forked, joined) = (line[1] for line in again if line[0] == record)
    assert again[1:3] == [[record, forked, main], [wait, side, forked]]
    assert again[5:7] == [[record, joined, side], [wait, main, joined]]
    assert forked != joined


@pytest.mark.parametrize("fork", [FORK, FORK_HIGH])
def test_each_stream_has_its_own_beside_it(library: launcher.Library, driver: DriverStandIn, fork: str) -> None:
    """As a graph's capture needs it: its stream takes no other's launches."""
    x = torch.zeros(4, 8)
    ready = launcher.PreparedPass(library, described([x], [fork, kernel(beside=True), JOIN]), (x,))
    found = []
    for stream in (0x1002, 0x1003, 0x1002):
        driver.stream(0, stream)
        ready(x)
        found += [line[9] for line in launches(driver)]
    assert found[0] == found[2] != found[1]


def test_both_kinds_of_streams_in_one_pass(library: launcher.Library, driver: DriverStandIn) -> None:
    """In turn: each has events of its own, and what runs beside goes to the one of the fork before it."""
    x = torch.zeros(4, 8)
    steps: list[Step] = [FORK, kernel(beside=True), JOIN, FORK_HIGH, kernel(beside=True), JOIN, FORK]
    ready = launcher.PreparedPass(library, described([x], [*steps, kernel(beside=True), JOIN]), (x,))
    driver.stream(0, 0x1004)
    driver.take()
    ready(x)
    made = driver.take()
    assert [line[2] for line in made if line[0] == "pool"] == ["0", "1"]
    normal, high, again = (line[9] for line in made if line[0] == "cuLaunchKernelEx")
    assert normal == again != high
    events = [line[1] for line in made if line[0] == "cuEventRecord"]
    assert (len(set(events)), events[:2]) == (4, events[4:])


def test_streams_that_part_twice_are_refused(library: launcher.Library) -> None:
    x = torch.zeros(4, 8)
    for steps in ([FORK_HIGH, FORK], [FORK, FORK_HIGH], [FORK_HIGH, FORK, JOIN], [JOIN], [FORK_HIGH]):
        with pytest.raises(BackendUnavailableError, match="the streams part"):
            launcher.PreparedPass(library, described([x], [kernel(POINTER), *steps]), (x,))


@pytest.mark.parametrize("fork", [FORK, FORK_HIGH])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_launch_that_fails_is_a_sentence_and_the_streams_meet(
    library: launcher.Library, driver: DriverStandIn, after: int, fork: str
) -> None:
    """400: the module of the kernel was unloaded."""
    x = torch.zeros(4, 8)
    steps: list[Step] = [kernel(), fork, kernel(beside=True), kernel(), JOIN]
    ready = launcher.PreparedPass(library, described([x], steps), (x,))
    ready(x)
    driver.take()
    driver.fail("cuLaunchKernelEx", 400, after)
    words = r"a kernel could not be launched: CUDA_ERROR_INVALID_HANDLE \(400\), invalid resource handle\."
    with pytest.raises(BackendUnavailableError, match=words):
        ready(x)
    made = driver.take()
    entries = [line[0] for line in made]
    if after:
        (_, forked, _), (_, side, waited), (_, joined, met), last = *made[1:3], *made[-2:]
        assert (waited, met, last) == (forked, side, ["cuStreamWaitEvent", str(0x77), joined])
    assert entries.count("cuLaunchKernelEx") == after + 1
    assert entries.count("cuEventRecord") == entries.count("cuStreamWaitEvent") == (2 if after else 0)
    assert len(ready(x)) == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("cuEventRecord", "the streams cannot part: CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuStreamWaitEvent", "the streams cannot part"),
        ("cuTensorMapEncodeTiled", "a TMA descriptor cannot be made"),
    ],
)
def test_other_refusals_of_the_driver(library: launcher.Library, driver: DriverStandIn, entry: str, words: str) -> None:
    x = torch.zeros(8, 32, dtype=BF16)
    steps: list[Step] = [FORK, kernel(DescriptorMap(0), beside=True), JOIN]
    ready = launcher.PreparedPass(library, described([x], steps, descriptors=[tma(x)]), (x,))
    driver.fail(entry, 700)
    with pytest.raises(BackendUnavailableError, match=words):
        ready(x)
    assert len(ready(x)) == 1


# Devices and threads


def test_each_device_has_its_context_and_stream(library: launcher.Library, driver: DriverStandIn) -> None:
    x = torch.zeros(4, 8)
    driver.stream(1, 0x88)
    passes = [
        launcher.PreparedPass(library, described([x], [kernel()], device=("cpu", -1, ordinal)), (x,))
        for ordinal in (0, 1, 0)
    ]
    driver.take()
    for ready in passes:
        ready(x)
    made = driver.take()
    names = [line[0] for line in made]
    launch = "cuLaunchKernelEx"
    assert names == [launch, "cuCtxPushCurrent", launch, "cuCtxPopCurrent", launch]
    told = [(line[9], line[10]) for line in made if line[0] == launch]
    assert told == [(str(0x77), "0"), (str(0x88), "1"), (str(0x77), "0")]
    with pytest.raises(BackendUnavailableError, match="device 2 is not there"):
        launcher.PreparedPass(library, described([x], [kernel()], device=("cpu", -1, 2)), (x,))


def test_the_context_goes_back_when_a_launch_fails(library: launcher.Library, driver: DriverStandIn) -> None:
    x = torch.zeros(4, 8)
    ready = launcher.PreparedPass(library, described([x], [kernel()], device=("cpu", -1, 1)), (x,))
    driver.take()
    driver.fail("cuLaunchKernelEx", 400)
    with pytest.raises(BackendUnavailableError, match="INVALID_HANDLE"):
        ready(x)
    assert driver.take()[-1] == ["cuCtxPopCurrent"]


def test_a_fresh_thread_has_no_context_and_gets_one(library: launcher.Library, driver: DriverStandIn) -> None:
    x = torch.zeros(4, 8)
    ready = launcher.PreparedPass(library, described([x], [kernel()]), (x,))
    driver.take()
    thread = threading.Thread(target=lambda: ready(x))
    thread.start()
    thread.join()
    assert [line[0] for line in driver.take()] == ["cuCtxPushCurrent", "cuLaunchKernelEx", "cuCtxPopCurrent"]


def test_threads_run_one_pass_at_once(library: launcher.Library, driver: DriverStandIn) -> None:
    """Each call's launches hold that call's addresses; descriptors are made once for each address."""
    driver.parameters(0x600, (8, 128, 8))
    tensors = [torch.zeros(8, 32, dtype=BF16) for _ in range(4)]
    one = kernel(POINTER, DescriptorMap(0), Place("buffer", 0), function=0x600)
    x = tensors[0]
    ready = launcher.PreparedPass(library, described([x], [one], descriptors=[tma(x)]), (x,))
    driver.take()
    wrong: list[Exception] = []

    def work(tensor: Tensor) -> None:
        try:
            for _ in range(200):
                assert len(ready(tensor)) == 1
        except Exception as error:  # noqa: BLE001 (any error of a thread fails the test)
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(tensor,)) for tensor in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    lines = driver.take()
    sent = [line for line in lines if line[0] == "cuLaunchKernelEx"]
    assert len(sent) == 800
    assert all(line[-2].startswith(line[-3]) for line in sent)
    made = [line[3] for line in lines if line[0] == "cuTensorMapEncodeTiled"]
    assert sorted(made) == sorted(str(tensor.data_ptr()) for tensor in tensors)


def test_a_pass_goes_with_its_object(library: launcher.Library) -> None:
    x = torch.zeros(4, 8)
    count = library._library.lora_launch_count
    gc.collect()
    before = count()
    ready = launcher.PreparedPass(library, described([x], [kernel()]), (x,))
    assert count() == before + 1
    del ready
    gc.collect()
    assert count() == before
    with pytest.raises(RuntimeError, match="there is no prepared pass 0"):
        library.launch(0, 0.0, x)


def test_the_types_are_those_of_cuda_h(folder: Path) -> None:
    """Against the header that Triton's wheel brings."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not (include / "cuda.h").exists():
        pytest.skip("this Triton brings no cuda.h")
    source = folder / "types.cpp"
    source.write_text(
        f'#include "cuda.h"\n#include "{SOURCE.parents[2] / "csrc/launch/cuda_api.h"}"\n'
        "using namespace lora_kernels::launch;\n"
        "#define SAME(a, b) static_assert(static_cast<long>(a) == static_cast<long>(b), #a)\n"
        "#define AT(ours, mine, theirs) SAME(offsetof(LaunchConfig, mine), offsetof(CUlaunchConfig, theirs))\n"
        "SAME(sizeof(TensorMap), sizeof(CUtensorMap));\nSAME(sizeof(LaunchConfig), sizeof(CUlaunchConfig));\n"
        "static_assert(alignof(TensorMap) >= alignof(CUtensorMap));\n"
        "SAME(sizeof(Attribute), sizeof(CUlaunchAttribute));\n"
        "SAME(offsetof(Attribute, value), offsetof(CUlaunchAttribute, value));\n"
        "AT(0, grid_x, gridDimX);\nAT(0, block_z, blockDimZ);\nAT(0, shared_bytes, sharedMemBytes);\n"
        "AT(0, stream, hStream);\nAT(0, attributes, attrs);\nAT(0, attribute_count, numAttrs);\n"
        "SAME(ATTRIBUTE_COOPERATIVE, CU_LAUNCH_ATTRIBUTE_COOPERATIVE);\n"
        "SAME(ATTRIBUTE_CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);\n"
        "SAME(ATTRIBUTE_CLUSTER_SCHEDULING, CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE);\n"
        "SAME(ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);\n"
        "SAME(CLUSTER_SCHEDULING_SPREAD, CU_CLUSTER_SCHEDULING_POLICY_SPREAD);\n"
        "SAME(FUNCTION_NON_PORTABLE_CLUSTER, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED);\n"
        "SAME(EVENT_DISABLE_TIMING, CU_EVENT_DISABLE_TIMING);\n"
        "SAME(L2_PROMOTION_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);\n"
        "SAME(INTERLEAVE_NONE, CU_TENSOR_MAP_INTERLEAVE_NONE);\n"
    )
    compiler = load.recipe("launch").compiler.path
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_library_loads_where_there_is_no_gpu() -> None:
    """Under a PyTorch for CPUs, without libcuda: nothing of it is linked."""
    needs_a_compiler()
    library = load.compile_into_cache("launch")
    code = f"import torch; torch.ops.load_library({str(library.path)!r}); print(torch.ops.lora_kernels.launch.default)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "lora_kernels.launch.default", done.stderr


@pytest.fixture(scope="module", autouse=True)
def _objects_of_before() -> Iterator[None]:
    """What other files left is not searched after each test here: that takes most of a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_leftover(_objects_of_before: None) -> Iterator[None]:
    yield
    gc.collect()
