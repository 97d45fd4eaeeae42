"""The library ``launch`` is found, compiled and loaded as the others are; where it cannot be, Python launches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels import info
from lora_kernels.backends.native import build, command, load
from lora_kernels.backends.triton import BACKEND
from lora_kernels.backends.triton.run import launcher, pass_words
from lora_kernels.dispatch import Problem
from stand_in import OtherProcess, StandIn

SCRIPT = (
    "import torch; torch.version.cuda = '13.0'; from lora_kernels.backends.native import load; "
    "print(load.load('launch').path)"
)


@pytest.fixture
def for_cuda(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in's library, in what says that it is a CUDA build of PyTorch."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(launcher, "_found", None)
    return native


def described() -> str:
    """What ``explain`` and ``info`` tell of the Triton backend on a GPU."""
    return BACKEND.describe(Problem("cuda", torch.bfloat16))


def test_a_pytorch_for_cpus_needs_no_launcher(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(launcher, "_found", None)
    assert launcher.library() is None
    assert "this build of torch is not for CUDA" in str(launcher.obstacle())
    assert "Python launches its kernels one by one" in described()
    assert native.compiler.calls == 0


def test_info_says_whether_it_is_there(for_cuda: StandIn) -> None:
    told = info.collect()["native_library"]["launch"]
    assert (told["state"], told["path"], told["reasons"]) == ("would be compiled at first use", None, [])
    assert "it is one call into C++; the library launch would be compiled at first use by" in described()
    library = load.load("launch")
    assert f"one call into C++; the library launch is {library.path}." in described()
    for_cuda.forget()
    told = info.collect()["native_library"]["launch"]
    assert (told["state"], told["path"]) == ("found", str(library.path))
    assert library.path.parent == for_cuda.home_of("launch")


def test_another_library_in_its_place_is_no_launcher(for_cuda: StandIn) -> None:
    """Loaded, and without the entry points: Python launches, and the reason is kept."""
    assert launcher.library() is None
    assert "lora_launch_prepare" in str(launcher.obstacle())
    told = info.collect()["native_library"]["launch"]
    assert told["state"] == "found, but cannot be used here"
    assert "lora_launch_prepare" in str(told["reasons"])
    assert "Python launches its kernels one by one" in described()
    assert "lora_launch_prepare" in described()
    assert for_cuda.compiler.calls == 1
    assert launcher.library() is None
    assert for_cuda.compiler.calls == 1


def test_a_compile_that_fails_leaves_python_to_launch(for_cuda: StandIn) -> None:
    for_cuda.compiler.tell("fail")
    assert launcher.library() is None
    assert "no space left in this compiler" in str(launcher.obstacle())


def test_the_variable_forbids_to_compile_it(for_cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, forbidden in (("cpu", True), ("off", True), ("launch", False), ("all", False)):
        monkeypatch.setenv("LORA_KERNELS_BUILD", value)
        assert bool(load.why_not("launch")) is forbidden
    monkeypatch.setenv("LORA_KERNELS_BUILD", "cpu")
    assert launcher.library() is None
    assert "LORA_KERNELS_BUILD=cpu forbids" in str(launcher.obstacle())
    assert for_cuda.compiler.calls == 0


def test_two_processes_compile_it_once(native: StandIn, tmp_path: Path) -> None:
    """The second waits for the first, and loads what it has made."""
    other = OtherProcess(tmp_path / "other")
    native.compiler.tell("wait")
    first = other.start(("-c", SCRIPT))
    other.wait_for(lambda: native.compiler.calls, first)
    second = other.start(("-c", SCRIPT))
    other.wait_for(lambda: "waiting for it" in other.said(second), second)
    native.compiler.tell("wait", on=False)
    assert other.finish(first) == other.finish(second)
    assert native.compiler.calls == 1


def test_what_is_built_where_pytorch_is_for_cuda(for_cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(kind: str) -> None:
        raise build.BuildError("no nvcc was found.")

    monkeypatch.setattr(command, "find_compiler", none)
    assert command._default_kinds() == ("cpu", "launch")
    monkeypatch.setattr(command, "find_compiler", lambda kind: None)
    assert command._default_kinds() == ("cpu", "cuda", "launch")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert command._default_kinds() == ("cpu",)


def test_it_is_linked_without_cuda(native: StandIn) -> None:
    recipe = build.recipe("launch")
    linked = {word for word in recipe.link_command([], Path("l.so")) if word.startswith("-l")}
    assert linked <= {"-ltorch_cpu", "-ldl"}
    assert recipe.capabilities == ("portable",)
    assert recipe.key != build.recipe("cpu").key


def test_words_have_one_version() -> None:
    """C++ and Python hold the same number."""
    text = (build.sources_folder() / "launch" / "pass.cpp").read_text()
    assert f"WORDS_VERSION = {pass_words._VERSION};" in text
