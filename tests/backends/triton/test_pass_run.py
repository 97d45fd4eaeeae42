"""Runs that become prepared passes: what is recorded, what cannot be, and when Python goes on launching."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton import knobs

from cases import Case, make
from driver_stand_in import DriverStandIn
from fake_kernels import CPU, STREAM, FakeKernel, kernel_of_one, launches, one_launch
from lora_kernels.backends.triton import operators
from lora_kernels.backends.triton.choose.blocks import Machine
from lora_kernels.backends.triton.choose.hidden_operand import hidden_operand
from lora_kernels.backends.triton.choose.plans import Ring, RingGrads
from lora_kernels.backends.triton.choose.ring import CONFIGS
from lora_kernels.backends.triton.run import cuda_kernels, launcher, pass_words, recording, ring, streams
from lora_kernels.backends.triton.run.call import Call
from lora_kernels.backends.triton.run.launcher import PassRun
from lora_kernels.backends.triton.run.pass_words import FORK, FORK_HIGH, JOIN, Kernel, Own, Product, Scratch
from lora_kernels.backends.triton.run.prepared import Launch
from lora_kernels.backends.triton.run.recording import Recorder
from lora_kernels.errors import BackendUnavailableError
from numerics import same_bits

pytestmark = pytest.mark.xdist_group("recorded launches")

FOLDER = Path(__file__).resolve().parents[2]
CUDA, CPU_DEVICE = torch.device("cuda", 0), torch.device("cpu")


def recorded(run: Callable[..., Any], *arguments: Any) -> tuple[Any, Recorder]:
    recorder = Recorder(CPU, STREAM, arguments)
    with recorder:
        results = run(STREAM, *recorder.arguments)
    return recorder.described(results if isinstance(results, tuple) else (results,)), recorder


# Against Triton's own launcher


@pytest.fixture(scope="module")
def compared_all(parts: tuple[DriverStandIn, str]) -> dict[str, dict[str, dict[str, Any]]]:
    folder = str(Path(parts[0].path).parent)
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LD_PRELOAD")}
    paths = [str(FOLDER), str(FOLDER.parent), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_LIBCUDA_PATH": folder}
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([folder, environment.get("LD_LIBRARY_PATH", "")])
    command = [sys.executable, str(FOLDER / "prepared_passes.py"), parts[1], folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return {kind: {found["name"]: found for found in of_kind} for kind, of_kind in told.items()}


@pytest.fixture(scope="module")
def compared(compared_all: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return compared_all["runs"]


def test_a_warm_call_of_each_operator_is_one_pass(compared_all: dict[str, dict[str, dict[str, Any]]]) -> None:
    """And launches what Python does where a profiler's hook is set: of one run each, forward and backward too."""
    operators = compared_all["operators"]
    assert len(operators) >= 60
    for name, found in operators.items():
        assert all(found["passes"]), (name, found["faults"])
        assert len(found["passes"]) <= 1, name
        assert found["differences"] == [], name
        assert found["launches"][0] == found["launches"][1] > 0, name
        assert found["shapes"], name
        known = name.removeprefix("group_").startswith(("forward", "backward"))
        assert found["known"] == int(known), name
    experts = {"forward": 3, "backward": 5}
    for name, count in experts.items():
        assert operators[f"experts_{name}, 256 tokens, dropout 0.1"]["launches"] == [count, count]
    for name in ("forward", "backward", "input_grad of two", "a_grad", *(f"experts_{each}" for each in experts)):
        assert operators[f"{name}, 256 tokens, dropout 0.1"]["passes"] == [True]
    for name in ("", " without weights", "_grad", "_grad of rows", "_grad of weights"):
        assert operators[f"combine{name}, 256 tokens, dropout 0.1"]["launches"] == [1, 1]
    for name in ("four bits", "four bits, nested", "few codes", "few codes with a gain"):
        assert operators[f"{name}, 8 tokens, dropout 0.0"]["passes"] == [True]


def test_a_pass_launches_what_triton_launches(compared: dict[str, dict[str, Any]]) -> None:
    """Each byte of each parameter, descriptors too; grid, block, shared memory, stream and attributes."""
    said = {name: found for name, found in compared.items() if found["fault"] is None}
    assert len(said) >= 11, compared
    for name, found in said.items():
        assert found["differences"] == [], name
        assert found["launches"][0] == found["launches"][1] > 0, name
        assert found["shapes"], name
    assert any(found["dependent"] for found in said.values())
    assert said["hopper forward"]["descriptors"] >= 5
    assert said["hopper forward"]["scratch"] > 0
    part = ["cuEventRecord event 0 main", "cuStreamWaitEvent beside event 0"]
    meet = ["cuEventRecord event 1 beside", "cuStreamWaitEvent main event 1"]
    mains = ["main"] * 4
    assert said["dx_hopper beside"]["order"] == [*mains, *part, "beside", *mains[:2], *meet]  # the draw in front
    assert said["dx_inside beside"]["order"] == ["main", *part, "beside", "main", *meet, *mains[:2]]
    assert said["base_first"]["products"] == 1
    assert said["with the mask's draw"]["launches"][0] == said["base_first"]["launches"][0] + 1
    assert said["dx_fused of a seed"]["launches"][0] == said["dx_fused"]["launches"][0] + 1


def test_each_pass_of_a_group_is_one_call(compared: dict[str, dict[str, Any]]) -> None:
    """Two to four layers; and launches what Triton does, with as many streams."""
    found = {name: of for name, of in compared.items() if name.endswith("layers") or " layers" in name}
    assert len(found) == 11
    assert [(name, of["fault"]) for name, of in found.items() if of["fault"]] == []
    part = ["cuEventRecord event 0 main", "cuStreamWaitEvent beside event 0"]
    meet = ["cuEventRecord event 1 beside", "cuStreamWaitEvent main event 1"]
    mains = ["main"] * 3
    assert found["forward of 3 layers"]["order"] == mains
    assert found["backward of 3 layers, words"]["order"] == mains * 2
    assert found["backward of 3 layers, seeds"]["order"] == mains * 3  # the draws in front
    assert found["backward of 4 layers beside"]["order"] == [*mains, *part, "beside", *mains[:2], *meet]


def test_what_a_pass_cannot_say_is_said(compared: dict[str, dict[str, Any]]) -> None:
    assert compared["with dbias"]["fault"] == "it calls aten.sum.dim_IntList"


# The first call, the next ones, and the way back to Python


def test_the_second_call_is_the_pass(driver: DriverStandIn) -> None:
    kernel = kernel_of_one()
    run = PassRun(one_launch(kernel), CUDA)
    x = torch.zeros(4, 8)
    first = run(x, 0.5)
    assert (len(kernel.launched), launches(driver)) == (1, 0)
    assert kernel.launched[0][2] == 0.5
    y, nothing = run(x, 0.25)
    assert (len(kernel.launched), launches(driver)) == (1, 1)
    assert nothing is None
    assert (y.shape, y.dtype) == (first[0].shape, first[0].dtype)
    assert run.fault is None
    assert recording.watching == 0


def test_one_tensor_is_returned_as_one(driver: DriverStandIn) -> None:
    weight = torch.randn(6, 8)
    run = PassRun(lambda stream, x, weight: torch.mm(x, weight.t()), CUDA)
    x = torch.randn(4, 8)
    for _ in range(3):
        assert same_bits(run(x, weight), torch.mm(x, weight.t()))
    assert run._pass is not None


def test_a_hook_of_triton_s_sees_all_launches(driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = kernel_of_one(), torch.zeros(4, 8)
    run = PassRun(one_launch(kernel), CUDA)
    run(x, 0.5)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        hook = lambda metadata: None  # noqa: E731 (it is added and removed)
        before = len(kernel.launched)
        chain.add(hook)
        try:
            run(x, 0.5)
        finally:
            chain.remove(hook)
        assert (len(kernel.launched), launches(driver)) == (before + 1, 0)
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, hook)
            run(x, 0.5)
            assert (len(kernel.launched), launches(driver)) == (before + 2, 0)
            patch.setattr(knobs.runtime, name, None)
            run(x, 0.5)
            assert (len(kernel.launched), launches(driver)) == (before + 2, 1)


def test_without_a_library_python_launches(driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_found", launcher._Found(None, "there is none."))
    kernel, x = kernel_of_one(), torch.zeros(4, 8)
    run = PassRun(one_launch(kernel), CUDA)
    for _ in range(3):
        run(x, 0.5)
    assert (len(kernel.launched), run.fault) == (3, "there is none.")


def test_on_the_cpu_nothing_is_recorded(driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "library", lambda: pytest.fail("it was asked for"))
    run = PassRun(lambda stream, x: torch.mm(x, x), torch.device("cpu"))
    for _ in range(2):
        run(torch.ones(2, 2))


def test_where_the_device_refuses_the_pass_python_launches(driver: DriverStandIn) -> None:
    kernel, x = kernel_of_one(), torch.zeros(4, 8)
    driver.fail("cuDevicePrimaryCtxRetain", 700)
    run = PassRun(one_launch(kernel), CUDA)
    for _ in range(3):
        run(x, 0.5)
    assert len(kernel.launched) == 3
    assert "device 0 has no context: CUDA_ERROR_ILLEGAL_ADDRESS" in str(run.fault)


def test_where_memory_is_short_python_tries_and_raises_torch_s_own_error(driver: DriverStandIn) -> None:
    large = [torch.empty(1)]

    def run(stream: int | None, x: Tensor) -> tuple[Tensor, ...]:
        return torch.mm(x, x), torch.empty(2**52) if large[0] is None else torch.empty(3)

    wrapped, x = PassRun(run, CUDA), torch.ones(2, 2)
    wrapped(x)
    ready = wrapped._pass
    assert ready is not None
    ready.call = lambda *arguments: []
    assert len(wrapped(x)) == 2
    large[0] = None  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match=r"memory|storage"):
        wrapped(x)


def test_a_kernel_whose_module_was_unloaded_is_launched_by_python(driver: DriverStandIn) -> None:
    """Which compiles it anew, and records it again; any other refusal of the driver is a sentence."""
    kernel, x = kernel_of_one(), torch.zeros(4, 8)
    run = PassRun(one_launch(kernel), CUDA)
    run(x, 0.5)
    driver.fail("cuLaunchKernelEx", 400)
    run(x, 0.5)
    assert len(kernel.launched) == 2
    assert run._pass is not None
    driver.take()
    run(x, 0.5)
    assert (len(kernel.launched), launches(driver)) == (2, 1)
    driver.fail("cuLaunchKernelEx", 700)
    with pytest.raises(BackendUnavailableError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        run(x, 0.5)


def test_a_capture_is_not_recorded_and_names_what_must_be_compiled(
    driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel, x = kernel_of_one(), torch.zeros(4, 8)
    run = PassRun(one_launch(kernel), CUDA)
    run(x, 0.5)
    assert run._pass is None

    def compiles(stream: int | None, x: Tensor) -> None:
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    with pytest.raises(BackendUnavailableError, match="compiled or loaded, and the stream is being captured"):
        PassRun(compiles, CUDA)(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match=r"^Triton Error"):
        PassRun(compiles, CUDA)(x)
    run(x, 0.5)  # the launch was ready, and is recorded all the same
    assert run._pass is not None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = len(kernel.launched)
    run(x, 0.5)
    assert (len(kernel.launched), launches(driver)) == (before, 1)


def test_threads_record_once_and_do_not_see_each_other(driver: DriverStandIn) -> None:
    """While one thread records, the others launch by Python, and their launches are not its."""
    kernel, x = kernel_of_one(), torch.zeros(4, 8)
    inside, go = threading.Event(), threading.Event()
    plain = one_launch(kernel)

    def run(stream: int | None, x: Tensor, scaling: float) -> Any:
        if not go.is_set() and recording.current() is not None:
            inside.set()
            assert go.wait(30)
        return plain(stream, x, scaling)

    wrapped = PassRun(run, CUDA)
    thread = threading.Thread(target=wrapped, args=(x, 0.5))
    thread.start()
    assert inside.wait(30)
    wrapped(x.clone(), 0.25)
    go.set()
    thread.join()
    assert wrapped._pass is not None
    driver.take()
    wrapped(x, 0.5)
    assert launches(driver) == 1


def test_what_cannot_be_recorded_does_not_ask_for_a_capture(
    driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes host time on every call."""
    run, asked = PassRun(lambda stream, x: x, CUDA), list[bool]()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(asked.append(True)))
    for _ in range(launcher._ATTEMPTS + 3):
        run(X)
    assert (len(asked), run._attempts) == (launcher._ATTEMPTS, 0)


# The kernel for few tokens


class Entered:
    """In the place of ``torch.cuda.device``."""

    current, entered = 0, list[int]()

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None:
        self.before, Entered.current = Entered.current, self.index
        Entered.entered.append(self.index)

    def __exit__(self, *error: Any) -> None:
        Entered.current = self.before


@pytest.fixture
def few(driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch) -> tuple[PassRun, tuple[Any, ...], list[int]]:
    """The kept run of one token, its arguments, and the workspaces that Python's launches had."""
    machine = Machine(capability=90, sm_count=6, shared_memory=232448)
    case = Case(m=1, k=1024, n=48, r=16, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    i, by_python = make(case), list[int]()
    tensors = tuple(t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias))
    driver.parameters(0x7F0, [8] * 9)
    for name in ("_workspaces", "_ready"):
        monkeypatch.setattr(ring, name, {})
    monkeypatch.setattr(cuda_kernels, "_loaded", lambda *_: 0x7F0)
    monkeypatch.setattr(cuda_kernels.CudaLaunch, "_launch", lambda *given: by_python.append(given[3][8].data_ptr()))
    monkeypatch.setattr(launcher, "index_of", lambda device: 0)
    call = replace(Call.forward(*tensors, 0.0, None), machine=machine, operand=hidden_operand(torch.bfloat16, 16))
    run = operators._kept_run(Ring(CONFIGS[0], 1, 4, 1, True), call)
    return run, (*tensors, 0.5, None), by_python


def test_few_tokens_are_one_pass_with_the_stream_s_workspace(
    few: tuple[PassRun, tuple[Any, ...], list[int]], driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python launches the first call alone; a call on another stream has its own workspace, by the same pass."""
    run, arguments, by_python = few
    first, found = run(*arguments), list[int]()
    for stream in (STREAM, 0x99, STREAM):
        monkeypatch.setattr(launcher, "current_stream", lambda index, stream=stream: stream)
        y, h, words = run(*arguments)
        (line,) = driver.take("cuLaunchKernelEx")
        found.append(int.from_bytes(bytes.fromhex(line[-1]), "little"))
        assert [t.shape for t in (y, h, words)] == [t.shape for t in first]
        assert words is first[2]
    assert (len(by_python), run.fault) == (1, None)
    assert found[0] == found[2] == by_python[0] == ring._workspaces[0, STREAM].data_ptr()
    assert found[1] == ring._workspaces[0, 0x99].data_ptr() != found[0]


def test_the_workspace_of_few_tokens_is_of_their_device(
    few: tuple[PassRun, tuple[Any, ...], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which capture its stream is in, and on which device its zeros are, torch answers for the current device."""
    run, arguments, _ = few
    run(*arguments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: Entered.current)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(Entered, "entered", [])
    asked: list[int] = []
    run._workspace = lambda stream: (asked.append(Entered.current), ring.workspace(CPU_DEVICE, stream))[1]
    run(*arguments)
    monkeypatch.setattr(Entered, "current", 1)
    run(*arguments)
    assert (asked, Entered.entered, Entered.current) == ([0, 0], [0], 1)


def test_a_workspace_that_a_capture_does_not_allow_is_a_sentence(
    few: tuple[PassRun, tuple[Any, ...], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, arguments, _ = few
    run(*arguments)

    def refused(stream: int | None) -> Tensor:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run._workspace = refused
    with pytest.raises(BackendUnavailableError, match="the stream is being captured: make one call"):
        run(*arguments)


# What is recorded


def test_temporaries_become_scratch_and_results_stay(driver: DriverStandIn) -> None:
    first, second = (
        Launch(FakeKernel("*fp32", "*fp32"), (1, 1, 1), ()),
        Launch(FakeKernel("*fp32", "*fp32", scratch=64), (3, 2, 1), ()),
    )

    def run(stream: int | None, x: Tensor) -> tuple[Tensor, None]:
        parts = torch.empty(2, 4, 8)
        first(stream, x, parts)
        y = torch.empty(4, 8)
        second(stream, parts[1], y)
        return y, None

    described, recorder = recorded(run, torch.zeros(4, 8))
    assert recorder.fault is None
    sizes = [buffer.size if isinstance(buffer, Scratch) else buffer.sizes for buffer in described.buffers]
    assert sizes == [2 * 4 * 8 * 4, (4, 8), 64 * 6]
    of_second = described.steps[1].arguments
    assert (of_second[0], of_second[2]) == (pass_words.Place("buffer", 0, 128), pass_words.Place("buffer", 2))


def test_what_runs_beside_is_told_from_the_rest(driver: DriverStandIn) -> None:
    launch = Launch(FakeKernel("*fp32"), (1, 1, 1), ())

    def run(stream: int | None, x: Tensor) -> Tensor:
        recorder = recording.current()
        assert recorder is not None
        recorder.note_fork()
        launch(0x99, x)
        y = torch.mm(x, x)
        recorder.note_join()
        launch(stream, y)
        return y

    described, _ = recorded(run, torch.zeros(4, 4))
    kinds = [step if isinstance(step, str) else type(step).__name__ for step in described.steps]
    assert kinds == [FORK, "Kernel", "Product", JOIN, "Kernel"]
    assert [step.beside for step in described.steps if isinstance(step, Kernel)] == [True, False]


def test_the_side_stream_tells_the_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        cuda_stream = 5
        priority = 0

        def wait_stream(self, other: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: Stream())
    monkeypatch.setattr(torch.cuda, "Stream", lambda index, priority=0: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(streams, "_streams", {})
    recorder = Recorder(CPU, STREAM, ())
    with recorder:
        streams.SideStream(CUDA)(STREAM, lambda stream: torch.empty(1), lambda stream: (None,))
    assert (recorder.steps, recorder.fault) == ([FORK, JOIN], None)
    with recorder:
        streams.PriorityStream(CUDA)(STREAM, lambda stream: torch.empty(1), lambda stream: (None,))
    assert (recorder.steps, recorder.fault) == ([FORK, JOIN, FORK_HIGH, JOIN], None)


def test_a_sum_in_place_is_a_product_that_adds(driver: DriverStandIn) -> None:
    def run(stream: int | None, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.mm(x, weight.t())
        return y.addmm_(x, weight.t())

    described, _ = recorded(run, torch.zeros(4, 8), torch.zeros(6, 8))
    assert [(step.out, step.add) for step in described.steps if isinstance(step, Product)] == [(0, False), (0, True)]
    assert described.buffers == [Own(torch.float32, (4, 6), (6, 1))]


def test_a_number_may_have_a_factor_that_the_key_fixes(driver: DriverStandIn) -> None:
    """As s / (1 - p): multiplied in fp64, as Python does, and then rounded."""
    driver.parameters(0x700, (8, 8, 4))
    kernel, x = FakeKernel("*fp32", "*fp32", "fp32"), torch.zeros(4)
    launch = Launch(kernel, (1, 1, 1), ())

    def run(stream: int | None, x: Tensor, scaling: float) -> Tensor:
        y = torch.empty(4)
        launch(stream, x, y, (1 / 0.9) * scaling)
        return y

    wrapped = PassRun(run, CUDA)
    wrapped(x, 0.5)
    assert kernel.launched[0][2] == (1 / 0.9) * 0.5
    driver.take()
    for scaling in (0.5, 0.3, -7.0):
        wrapped(x, scaling)
        (line,) = driver.take("cuLaunchKernelEx")
        assert line[-1] == struct.pack("<f", (1 / 0.9) * scaling).hex()
    assert len(kernel.launched) == 1


def _launch(kernel: FakeKernel, *static: Any) -> Callable[..., Any]:
    ready = Launch(kernel, (1, 1, 1), static)

    def run(stream: int | None, *arguments: Any) -> Tensor:
        y = torch.empty(4)
        ready(stream, *arguments, y)
        return y

    return run


X, STRANGER = torch.zeros(4, 4), torch.zeros(4)
ALIKE = FakeKernel("*fp32", "*fp32", "*fp32")
FAULTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "another operator": (lambda stream, x: torch.empty(4).fill_(1), (X,), "it calls aten.fill_"),
    "a copy": (lambda stream, x: x.clone(), (X,), "it calls aten.clone"),
    "a scaled product": (lambda stream, x: torch.mm(x, x).addmm_(x, x, beta=0.5), (X,), "it calls aten.addmm_"),
    "arithmetic with a number": (lambda stream, s: torch.empty(int(s * 2)), (2.0,), "a number of the call is used"),
    "two factors of a number": (lambda stream, s: 0.5 * s * 3.0, (2.0,), "a number of the call is used"),
    "a number times a number": (lambda stream, s: s * s, (2.0,), "a number of the call is used"),
    "a branch by a number": (lambda stream, s: torch.empty(4) if s else None, (2.0,), "a number of the call is used"),
    "a number in a constant": (_launch(FakeKernel("constexpr", "*fp32")), (2.0,), "compiled into a kernel"),
    "a number as an int": (_launch(FakeKernel("i32", "*fp32")), (2.0,), "a parameter of type i32"),
    "its own argument returned": (lambda stream, x: x, (X,), "not one that it allocated"),
    "a part of it returned": (lambda stream, x: torch.mm(x, x)[1:], (X,), "not one that it allocated"),
    "returned twice": (lambda stream, x: (torch.mm(x, x),) * 2, (X,), "a tensor twice"),
    "one tensor for two": (_launch(ALIKE), (X, X), "or to several"),
    "a stranger": (lambda stream, x: _launch(ALIKE)(stream, x, torch.zeros(4)), (X,), "it calls aten.zeros"),
    "an unknown stranger": (lambda stream, x: _launch(ALIKE)(stream, x, STRANGER), (X,), "none of its"),
    "an unknown type": (_launch(FakeKernel("fp8", "*fp32")), (2.0,), "a parameter of type fp8"),
    "Triton's interpreter": (lambda stream, x: None, (X,), "interpreter"),
    "a profile": (_launch(FakeKernel("*fp32", "*fp32", profile_scratch_size=8)), (X,), "instrumented"),
    "missing arguments": (_launch(FakeKernel("*fp32")), (X,), "arguments that are not given"),
    "an empty tensor": (lambda stream, x, e: torch.mm(x, x), (X, torch.zeros(0)), "empty"),
}


class Interpreted:
    __name__ = "interpreted"

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: None


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_said_stays_in_python(driver: DriverStandIn, case: str) -> None:
    run, arguments, words = FAULTS[case]
    if case == "Triton's interpreter":
        run = _launch(Interpreted())  # type: ignore[arg-type]
    described, recorder = recorded(run, *arguments)
    assert described is None
    assert words in str(recorder.fault)
    wrapped = PassRun(run, CUDA)
    for _ in range(launcher._ATTEMPTS + 1):
        wrapped(*arguments)
    assert (wrapped._pass, wrapped._attempts) == (None, 0)
    assert words in str(wrapped.fault)


def test_one_memory_in_one_call_is_none_in_the_next(driver: DriverStandIn) -> None:
    run = PassRun(_launch(FakeKernel("*fp32", "*fp32", "*fp32")), CUDA)
    run(X, X)
    assert run._pass is None
    run(X, torch.zeros(4, 4))
    assert run._pass is not None
    run(X, X)
    assert launches(driver) == 1


def test_parts_of_one_tensor_are_told_apart(driver: DriverStandIn) -> None:
    """As the columns of one h that several layers share: they start apart, and span each other."""
    whole = torch.zeros(4, 32)
    described, _ = recorded(_launch(FakeKernel("*fp32", "*fp32", "*fp32")), whole[:, :16], whole[:, 16:])
    places = described.steps[0].arguments[:2]
    assert places == (pass_words.Place("tensor", 0), pass_words.Place("tensor", 1))


def test_the_gradients_of_few_tokens_are_one_pass(driver: DriverStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python launches the first call alone; the next are two launches of one call, the second a dependent one."""
    machine = Machine(capability=90, sm_count=6, shared_memory=232448)
    case = Case(m=2, k=1024, n=48, r=16, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    i, by_python, functions = make(case), list[str](), {"few_tokens_first_grads": 0x7F2, "few_tokens_last_grads": 0x7F3}
    x, w, a, b, bias, dy = (t.detach() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias, i.dy))
    driver.parameters(0x7F2, [8] * 8 + [4] * 11 + [8] * 2)
    driver.parameters(0x7F3, [8] * 7 + [4] * 11 + [8] * 2)
    monkeypatch.setattr(cuda_kernels, "_loaded", lambda source, name, *_: functions[name])
    monkeypatch.setattr(cuda_kernels.CudaLaunch, "_launch", lambda launch, *_: by_python.append(launch.name))
    monkeypatch.setattr(launcher, "index_of", lambda device: 0)
    monkeypatch.setattr(launcher, "current_stream", lambda index: STREAM)
    operand = hidden_operand(torch.bfloat16, 16)
    h = operand.pack(torch.randn(2, 16))
    call = replace(Call.backward(dy, x, w, a, b, bias, h, 0.0, None), machine=machine, operand=operand)
    whole = operators._whole_backward(RingGrads(2, 1, True), call, (True, True, True), None)
    run = PassRun(whole, call.device, operators._not_due(call))
    arguments = (dy, x, w, a, b, h, 0.5, None)
    first, second = run(*arguments), run(*arguments)
    assert run.fault is None
    assert by_python == list(functions)
    assert len(driver.take("cuLaunchKernelEx")) == 2
    assert [(t.shape, t.dtype) for t in second] == [(t.shape, t.dtype) for t in first]
    assert [tuple(t.shape) for t in second] == [(2, 1024), (16, 1024), (48, 16), (48,)]
