"""What is said while the native library is compiled: what, where, how far and how long; or nothing."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest

from lora_kernels.backends.native import load, progress
from lora_kernels.cli import main
from lora_kernels.errors import BackendUnavailableError
from stand_in import StandIn


class Stderr(io.StringIO):
    """What is written to it, of a terminal or of a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def said(native: StandIn, monkeypatch: pytest.MonkeyPatch, awaited: str, terminal: bool = False) -> str:
    """What the first use says, whose compile is held until ``awaited`` was said."""
    stderr = Stderr(terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "_INTERVAL", 0.02)
    native.compiler.tell("wait")

    def release() -> None:
        deadline = time.monotonic() + 300
        while awaited not in stderr.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        native.compiler.tell("wait", on=False)

    thread = threading.Thread(target=release)
    thread.start()
    try:
        load.load("cpu")
    finally:
        thread.join()
    return stderr.getvalue()


def test_in_a_file_one_line_begins_and_one_ends(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = said(native, monkeypatch, "\n").splitlines()
    assert begun.startswith("lora_kernels: compiling the native cpu library")
    assert f", once, into {native.cache / 'native'}. `lora-kernels build cpu` does it beforehand; " in begun
    assert re.fullmatch(r"lora_kernels: compiled the native cpu library in \d+ s\.", ended)


def test_on_a_terminal_a_line_goes_on_between_the_two(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(native, monkeypatch, "0/1", terminal=True)
    begun, *states, last = text.split("\r")
    assert begun.startswith("lora_kernels: compiling the native cpu library")
    assert (begun.count("\n"), text.count("\n")) == (1, 2)
    assert "\x1b[Klora_kernels: 0/1 compiled, 0 s" in states
    assert all(re.fullmatch(r"\x1b\[Klora_kernels: [01]/[01] compiled, \d+ s", state) for state in states)
    assert re.fullmatch(r"\x1b\[Klora_kernels: compiled the native cpu library in \d+ s\.\n", last)


def test_what_fails_says_so_and_leaves_the_line(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    native.compiler.tell("fail")
    with pytest.raises(BackendUnavailableError, match="could not be compiled"):
        said(native, monkeypatch, "\n")
    assert (
        sys.stderr.getvalue()
        .splitlines()[-1]
        .startswith("lora_kernels: compiling the native cpu library has failed after ")
    )


@pytest.mark.parametrize("force", [False, True])
def test_what_is_quick_says_nothing(native: StandIn, force: bool, capsys: pytest.CaptureFixture[str]) -> None:
    load.compile_into_cache("cpu", force)
    load.load("cpu")
    assert capsys.readouterr().err == ""


def test_the_command_shows_the_same(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr(terminal=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert main(["build", "cpu"]) == 0
    begun, ended = stderr.getvalue().splitlines()
    assert begun.endswith(f", once, into {native.cache / 'native'}.")
    assert ended.startswith("lora_kernels: compiled the native cpu library in ")


@pytest.mark.parametrize("kind", ["none", "closed"])
def test_without_stderr_it_compiles_all_the_same(
    native: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stderr = None if kind == "none" else io.StringIO()
    if stderr is not None:
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert load.load("cpu").origin == "compiled just now"
    progress.say("a sentence")
    assert capsys.readouterr().out == ""
