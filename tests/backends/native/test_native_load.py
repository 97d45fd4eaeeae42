"""Finding, building and loading the native library: once, whole or not at all, and a sentence for what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lora_kernels import dispatch, explain, telling, use_backend
from lora_kernels.backends.native import build, cache, load, progress
from lora_kernels.dispatch import Problem
from lora_kernels.errors import BackendUnavailableError, LoRAKernelsWarning
from stand_in import OtherProcess, StandIn

CPU = Problem("cpu", torch.float32, 8, 8, 2)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("lora_kernels: ") for line in said), said
    return said


def test_first_use_compiles_once(native: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    library = load.load("cpu")
    assert (library.path.parent, library.origin) == (native.home, "compiled just now")
    assert {path.name for path in native.home.iterdir()} == {library.path.name, "build_info.json", "build.log"}
    native.forget()
    assert load.load("cpu").path == library.path
    assert (native.compiler.calls, lines(capsys)) == (1, [])


def test_asking_compiles_nothing(native: StandIn) -> None:
    assert load.why_not("cpu") == []
    assert load.status("cpu")["state"] == "would be compiled at first use"
    assert explain(CPU).backend == "native"
    assert str(native.compiler.path) in explain(CPU).description
    assert not native.cache.exists()
    load.load("cpu")
    assert load.status("cpu")["state"] == "loaded"
    native.forget()
    assert load.status("cpu")["state"] == "found"


def test_shapes_alone_compile_nothing(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(dispatch, "_choices", {})
    with FakeTensorMode():
        assert dispatch.select("cpu", torch.float32) == "native"
    assert dispatch.select("meta", torch.float32) == "eager"
    assert dispatch.select("meta", torch.float32, "native") == "native"
    assert not native.cache.exists()
    assert dispatch.select("cpu", torch.float32) == "native"
    assert native.compiler.calls == 1


def test_many_threads_load_once(native: StandIn) -> None:
    found: list[load.Library] = []
    threads = [threading.Thread(target=lambda: found.append(load.load("cpu"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len({id(library) for library in found}) == 1
    assert native.compiler.calls == 1


def test_without_a_compiler_there_is_a_sentence_and_eager_runs(
    native: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(telling, "_told", set())
    with pytest.warns(LoRAKernelsWarning, match="'eager' runs"):
        assert dispatch.select("cpu", torch.float32) == "eager"
    assert "No C++ compiler was found" in explain(CPU).reasons["native"][0]
    with pytest.raises(BackendUnavailableError, match=r"'native', named by the argument.*No C\+\+ compiler"):
        dispatch.select("cpu", torch.float32, "native")


def test_without_a_compiler_the_cache_serves_all_the_same(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    path = load.load("cpu").path
    native.forget()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert load.load("cpu").path == path
    native.forget()
    (native.sources / "common.h").write_text("#define LORA_STAND_IN 2\n")
    with pytest.raises(BackendUnavailableError, match="no C\\+\\+ compiler"):
        load.load("cpu")


def test_the_variable_forbids_to_compile(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("off", "cuda"):
        monkeypatch.setenv("LORA_KERNELS_BUILD", value)
        assert f"LORA_KERNELS_BUILD={value} forbids" in load.why_not("cpu")[0]
    monkeypatch.setenv("LORA_KERNELS_BUILD", "sometimes")
    assert "it must be cpu, cuda, launch, all or off" in load.why_not("cpu")[0]
    assert load.compile_into_cache("cpu").path.exists()
    assert load.why_not("cpu") == []


@pytest.mark.parametrize(
    ("variable", "word"), [("LORA_KERNELS_CPU_CAPABILITY", "avx512"), ("LORA_KERNELS_CPU_PRODUCT", "own")]
)
def test_a_choice_that_the_library_does_not_know_is_not_passed_over(
    variable: str, word: str, native: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "sse")
    with pytest.raises(BackendUnavailableError, match=f"{variable}=sse was given: .*{word}"):
        load.load("cpu")
    native.forget()
    monkeypatch.setenv(variable, word)
    assert load.why_not("cpu") == []


def test_a_failed_compile_warns_once_and_the_next_backend_runs(
    native: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    (native.sources / "cpu" / "operators.cpp").write_text("#error this cannot be\n")
    monkeypatch.setattr(dispatch, "_choices", {})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert dispatch.select("cpu", torch.float32) == "eager"
        assert dispatch.select("cpu", torch.float64) == "eager"
    (warning,) = warned
    assert str(warning.message).startswith(
        "backend 'native' is passed over: the native cpu library could not be compiled"
    )
    (log,) = native.cache.glob("native/*-failed.log")
    (reason,) = explain(CPU).reasons["native"]
    assert f"The log {log} says: " in reason
    assert "#error this cannot be" in reason
    assert "-fPIC" in log.read_text()
    log.unlink()
    with use_backend("native"), pytest.raises(BackendUnavailableError, match="this cannot be"):
        dispatch.select("cpu", torch.float32)
    assert native.compiler.calls == 1


def test_a_failed_compile_is_not_tried_by_the_next_process_but_by_the_command(native: StandIn) -> None:
    native.compiler.tell("fail")
    with pytest.raises(BackendUnavailableError, match="no space left in this compiler"):
        load.load("cpu")
    native.forget()
    with pytest.raises(BackendUnavailableError, match=r"no space left.*`lora-kernels build cpu`, which tries again"):
        load.load("cpu")
    assert native.compiler.calls == 1
    native.compiler.tell("fail", on=False)
    load.compile_into_cache("cpu")
    assert not list(native.cache.glob("native/*-failed.log"))
    assert not list(native.cache.glob("native/*.part-*"))


def test_force_compiles_again(native: StandIn) -> None:
    load.compile_into_cache("cpu")
    load.compile_into_cache("cpu")
    assert native.compiler.calls == 1
    load.compile_into_cache("cpu", force=True)
    assert native.compiler.calls == 2
    assert [path.name for path in (native.cache / "native").iterdir() if path.is_dir()] == [native.home.name]


def test_sources_that_change_during_the_compile_are_no_match(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(label: str, done: int, total: int) -> None:
        (native.sources / "common.h").write_text("#define LORA_STAND_IN 2\n")

    monkeypatch.setattr(cache, "shown", lambda *_: nullcontext(edit))
    words = r"its sources differ.*Were sources changed meanwhile\? Build again"
    with pytest.raises(BackendUnavailableError, match=words):
        load.compile_into_cache("cpu")
    assert load.load("cpu").info["sources"] == build.source_digest("cpu", native.sources)


def test_a_library_that_was_built_after_a_failure_is_loaded_by_the_same_process(native: StandIn) -> None:
    native.compiler.tell("fail")
    with pytest.raises(BackendUnavailableError):
        load.load("cpu")
    native.compiler.tell("fail", on=False)
    load.compile_into_cache("cpu")
    assert load.load("cpu").origin == "cache"


def test_another_torch_takes_the_same_library(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load.load("cpu").path
    native.forget()
    found = build.find_torch()
    monkeypatch.setattr(build, "find_torch", lambda: type(found)(found.folder, "2.99.0", found.cuda))
    assert load.load("cpu").path == first
    assert native.compiler.calls == 1


def rewrite(path: Path, **changes: object) -> None:
    info = path / "build_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | changes))


def overwrite(path: Path, content: bytes) -> None:
    library = next(path.glob("lib*"))
    library.unlink()
    library.write_bytes(content)


def size(path: Path) -> int:
    return next(path.glob("lib*")).stat().st_size


FAULTS = {
    "truncated": (lambda home: overwrite(home, b"\x7fELF"), "truncated"),
    "empty": (lambda home: overwrite(home, b""), "truncated"),
    "garbage": (lambda home: overwrite(home, os.urandom(size(home))), "corrupt"),
    "foreign": (lambda home: overwrite(home, Path(sys.executable).resolve().read_bytes()), "foreign"),
    "missing": (lambda home: next(home.glob("lib*")).unlink(), "cannot be read"),
    "no description": (lambda home: (home / "build_info.json").unlink(), "build_info.json cannot be read"),
    "no JSON": (lambda home: (home / "build_info.json").write_text("{"), "build_info.json cannot be read"),
    "not a description": (lambda home: (home / "build_info.json").write_text("[]"), "no description"),
    "another machine": (lambda home: rewrite(home, platform="linux-s390x"), "its platform differ"),
    "another kind": (lambda home: rewrite(home, kind="cuda"), "its kind differ"),
    "other sources": (lambda home: rewrite(home, sources="0"), "its sources differ"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_cached_library_is_compiled_again_with_one_line(
    native: StandIn, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = FAULTS[fault]
    load.compile_into_cache("cpu")
    spoil(native.home)
    library = load.load("cpu")
    (said,) = lines(capsys)
    assert words in said
    assert str(native.home) in said
    assert native.compiler.calls == 2
    assert load._checked(native.home, "cpu", "cache").path == library.path


def test_a_library_that_the_linker_refuses_is_compiled_again_with_one_line(
    native: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    load.compile_into_cache("cpu")
    overwrite(native.home, b"not a library")
    path = next(native.home.glob("lib*"))
    rewrite(native.home, size=path.stat().st_size, sha256=build.file_digest(path))
    load.load("cpu")
    (said,) = lines(capsys)
    assert "cannot be loaded" in said
    assert native.compiler.calls == 2


def install(native: StandIn) -> Path:
    folder = native.folder / "installed" / "cpu"
    folder.parent.mkdir()
    build.compile_library(build.recipe("cpu"), folder)
    return folder


def test_the_installed_library_comes_first(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(native)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    library = load.load("cpu")
    assert (library.path.parent, library.origin) == (folder, "installed")
    assert not native.cache.exists()


def test_an_installed_library_of_other_sources_is_passed_over_with_one_line(
    native: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = install(native)
    (native.sources / "common.h").write_text("#define LORA_STAND_IN 2\n")
    assert load.load("cpu").path.parent == native.home
    (said,) = lines(capsys)
    assert f"{folder} is passed over: its sources differ" in said


def test_cuda_on_a_cpu_build_of_torch_is_a_sentence_before_the_linker_is_asked(
    native: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this is a CPU build of torch" in load.why_not("cuda")[0]
    with pytest.raises(BackendUnavailableError, match="CPU build of torch"):
        load.load("cuda")
    assert load.status("cuda")["state"] == "none"
    assert "no native library for device type 'mps'" in load.why_not("mps")[0]


def no_folder_can_be_made_in(path: Path) -> Path:
    """A path below a file: even root cannot write there, whom permissions do not stop."""
    path.write_text("")
    return path / "cache"


def test_a_read_only_home_is_stood_in_for_by_a_private_folder_and_that_is_one_message(
    native: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(no_folder_can_be_made_in(native.folder / "file")))
    monkeypatch.setattr(tempfile, "tempdir", str(native.folder))
    library = load.load("cpu")
    begun, ended = lines(capsys)
    private = native.folder / f"lora_kernels-{os.getuid()}"
    assert library.path.parent.parent == private / "native"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert f"into {private / 'native'}. The cache {native.folder / 'file' / 'cache'} cannot be written to; " in begun
    assert "LORA_KERNELS_CACHE names another one." in begun
    assert ended.startswith("lora_kernels: compiled")
    native.forget()
    assert load.load("cpu").path == library.path


@pytest.mark.parametrize("trap", ["open to others", "a link"])
def test_a_temporary_folder_that_others_may_have_made_is_not_trusted(
    native: StandIn, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(no_folder_can_be_made_in(native.folder / "file")))
    monkeypatch.setattr(tempfile, "tempdir", str(native.folder))
    theirs = native.folder / f"lora_kernels-{os.getuid()}"
    if trap == "a link":
        (native.folder / "elsewhere").mkdir(mode=0o700)
        theirs.symlink_to(native.folder / "elsewhere")
    else:
        theirs.mkdir()
        theirs.chmod(0o777)
    assert theirs not in load.load("cpu").path.parents
    assert theirs / "native" not in cache.folders()
    shutil.rmtree(load.load("cpu").path.parents[2])


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LORA_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(load, "_loaded", {})  # whatever earlier tests have loaded
    assert cache.folders() == []
    assert load.status("cpu")["state"] in ("none", "would be compiled at first use")
    cache._stand_in.cache_clear()
    assert cache.writable_folder() == tmp_path / f"lora_kernels-{os.getuid()}" / "native"
    cache._stand_in.cache_clear()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"LORA_KERNELS_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/lora_kernels"),
        ({"HOME": "/h"}, "/h/.cache/lora_kernels"),
    ],
)
def test_where_the_cache_is(variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORA_KERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.folders()[0] == Path(folder) / "native"


def test_two_processes_at_once_compile_once(native: StandIn, tmp_path: Path) -> None:
    other = OtherProcess(tmp_path / "other")
    native.compiler.tell("wait")
    first = other.start()
    other.wait_for(lambda: "compiling the native cpu library (1 source files), once, into " in other.said(first), first)
    second = other.start()
    waits = f"another process compiles the native cpu library into {native.cache / 'native'}; waiting for it.\n"
    other.wait_for(lambda: other.said(second) == f"lora_kernels: {waits}", second)
    native.compiler.tell("wait", on=False)
    assert other.finish(first) == other.finish(second)
    assert native.compiler.calls == 1


def test_a_compile_that_was_killed_leaves_nothing_that_is_taken_for_a_library(native: StandIn, tmp_path: Path) -> None:
    other = OtherProcess(tmp_path / "other")
    native.compiler.tell("wait")
    killed = other.start()
    other.wait_for(lambda: native.compiler.calls, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    left = {path.name.split(".")[-1].split("-")[0] for path in (native.cache / "native").iterdir()}
    native.compiler.tell("wait", on=False)
    path = Path(other.finish(other.start()))
    assert left == {"lock", "part"}
    assert path.parent.parent == native.cache / "native"
    assert {p.suffix for p in path.parent.parent.iterdir()} == {"", ".lock"}


def test_a_forked_child_uses_what_its_parent_loaded(native: StandIn, tmp_path: Path) -> None:
    script = (
        "import ctypes, os; from lora_kernels.backends.native import load\n"
        "library = load.load('cpu')\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(ctypes.CDLL(str(load.load('cpu').path)).lora_stand_in() + 6)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    other = OtherProcess(tmp_path / "other")
    parent = other.start(("-c", script))
    assert other.finish(parent) == "7"
    assert native.compiler.calls == 1


def test_a_child_forked_while_another_thread_compiles_is_not_locked_out(native: StandIn, tmp_path: Path) -> None:
    script = (
        "import os, threading, time; from lora_kernels.backends.native import load\n"
        f"calls, wait = {str(native.compiler.folder / 'calls')!r}, {str(native.compiler.folder / 'wait')!r}\n"
        "thread = threading.Thread(target=load.load, args=('cpu',)); thread.start()\n"
        "while thread.is_alive() and not os.path.exists(calls): time.sleep(0.05)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(7 if load._lock.acquire(timeout=5) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "os.unlink(wait); thread.join()\n"
    )
    native.compiler.tell("wait")
    other = OtherProcess(tmp_path / "other")
    assert other.finish(other.start(("-c", script))) == "7"
