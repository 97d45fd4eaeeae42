"""Fixtures, and the one switch to set before Triton is imported: without a GPU its kernels are interpreted.

Which tests a GPU changes something about is decided here alone: ``--on-gpu`` runs those and no others. They are marked
``gpu``, or take the fixture ``triton_device``, or have "cuda" among their parameters. Without a GPU
``LORA_KERNELS_TESTS_PRETEND_GPU=1 pytest tests --on-gpu --collect-only`` lists them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if not torch.cuda.is_available() and os.environ.get("LORA_KERNELS_TESTS_PRETEND_GPU") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import common_passes  # noqa: F401  a small x is for passes in common too

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    import quick_interpreter

    quick_interpreter.install()

if TYPE_CHECKING:
    from stand_in import StandIn


for devices in (torch.cuda, torch.xpu, torch.mtia):
    if not devices.is_available():  # a seed waits for one, with the stack of who gave it, which takes 2 ms
        vars(devices)["manual_seed_all"] = lambda seed: None

PRETENDED = os.environ.get("LORA_KERNELS_TESTS_PRETEND_GPU") == "1"  # collect as where there is a GPU; run nothing
NAMES_A_GPU = re.compile(r"\bmark\.gpu\b|\btriton_device\b|\bBACKENDS\b|\"cuda\"")
COSTLY = ("inductor",)  # of the parameters: what compiles for long goes first
# The longest files first: a process that begins one when the others have nothing left keeps them all waiting.
LONGEST = (
    "test_distributed.py",
    "test_cuda_faults.py",
    "test_few_tokens.py",
    "test_trainer_distributed.py",
    "test_examples.py",
    "test_compile_models.py",
    "test_trainers.py",
    "test_hopper_group_plans.py",
)


class Ledger:
    """Which tests have passed, one a line: a run that is cut off goes on with the others.

    The file is read, and what passes now goes into another one, NAME.new, until the next run begins: processes of one
    run that read it must all find the same.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.fresh = path.with_name(f"{path.name}.new")
        if writes and self.fresh.is_file():
            with path.open("a", encoding="utf-8") as file:
                file.write(self.fresh.read_text(encoding="utf-8"))
            self.fresh.unlink()
        self.passed = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
        self.writes = writes

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.writes and report.when == "call" and report.passed:
            with self.fresh.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed:
            session.exitstatus = pytest.ExitCode.OK  # all of them have passed before

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.passed])
        items[:] = [item for item in items if item.nodeid not in self.passed]


def pytest_configure(config: pytest.Config) -> None:
    if config.option.passed is not None:
        writes = not hasattr(config, "workerinput") and not config.option.collectonly
        config.pluginmanager.register(Ledger(config.option.passed, writes))
    if not PRETENDED:
        return
    if not config.option.collectonly:
        raise pytest.UsageError("LORA_KERNELS_TESTS_PRETEND_GPU is for --collect-only: there is no GPU to run on.")
    from lora_kernels.backends.triton.choose import blocks
    from lora_kernels.benchmark.roofline import MACHINES

    gpu = MACHINES["h100"].gpu
    assert gpu is not None
    blocks.machine_of = lambda device: gpu


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --on-gpu, files that name no GPU are not even imported; None leaves the choice to others."""
    if not config.option.on_gpu or not collection_path.match("test_*.py"):
        return None
    return True if not NAMES_A_GPU.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest goes first. With --on-gpu, deselects what a GPU changes nothing about."""
    if not config.option.on_gpu:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(places)))
        return
    config.hook.pytest_deselected(items=[item for item in items if not concerns_a_gpu(item)])
    items[:] = sorted(filter(concerns_a_gpu, items), key=lambda item: not is_costly(item))


def concerns_a_gpu(item: pytest.Item) -> bool:
    """Whether a GPU changes something about the test."""
    named = "triton_device" in getattr(item, "fixturenames", ()) or "cuda" in parameters(item)
    return named or item.get_closest_marker("gpu") is not None


def is_costly(item: pytest.Item) -> bool:
    """Whether the test starts NCCL or torch's compiler, which takes a GPU machine a minute the first time."""
    return item.get_closest_marker("xdist_group") is not None or bool(set(COSTLY) & parameters(item))


def parameters(item: pytest.Item) -> set[str]:
    """The texts among the values that the test is parametrised with."""
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    return {value for value in values if isinstance(value, str)}


_dead: list[str] = []  # the tests that left the process without a CUDA context


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes a test that failed because, or so that, the device takes no more work from this process."""
    report = yield
    if report.failed and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _dead.append(item.nodeid)
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """One of several test processes ends there: another takes its place, and the tests after it are not blamed."""
    if nodeid in _dead and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, metavar="FILE", help="leave out the tests that FILE names, and add to it")
    parser.addoption("--on-gpu", action="store_true", help="only the tests that a GPU changes something about")
    parser.addoption(
        "--random-problems",
        default="1000",
        metavar="N",
        help="how many random problems to solve, or FIRST:END (default: 1000; see tests/core/test_random_problems.py)",
    )


@pytest.fixture(scope="session")
def random_problems(request: pytest.FixtureRequest) -> range:
    """The numbers of the random problems to solve."""
    first, colon, end = request.config.getoption("--random-problems").partition(":")
    return range(int(first), int(end)) if colon else range(int(first))


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton kernels run: on the GPU, or on the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fixed_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU too, the blocks and plans that Triton's interpreter gets: which kernels are launched is then known."""
    from lora_kernels.backends.triton import operators
    from lora_kernels.backends.triton.choose import blocks

    monkeypatch.setattr(blocks, "machine_of", lambda device: blocks.INTERPRETER)
    operators.forget()
    yield
    operators.forget()


@pytest.fixture
def without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where NVRTC is missing: the plans of Triton and the library alone, on every machine the same."""
    from lora_kernels import nvrtc
    from lora_kernels.backends.triton.choose import candidates, ranking

    monkeypatch.setattr(nvrtc, "path", lambda: None)
    for remembered in (candidates.candidates, candidates.predicted, ranking.plans_for):
        remembered.cache_clear()
    yield
    for remembered in (candidates.candidates, candidates.predicted, ranking.plans_for):
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A tiny native library in the place of the real one, with sources, a compiler and a cache of its own."""
    import stand_in

    stand_in.needs_a_compiler()
    return stand_in.StandIn(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """What one test compiled is no other test's: past its limit of recompilations Dynamo skips a function for good."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
