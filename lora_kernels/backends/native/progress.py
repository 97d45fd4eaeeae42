"""What a user is told on stderr while the native library is compiled: that it begins, how far it is, that it is done.

How far it is stands in one line that changes, on a terminal; elsewhere it is left out. Nothing is said of a compile
that is over within ``DELAY`` seconds, and nothing where stderr is closed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .build import Progress

__all__ = ["DELAY", "Progress", "say", "shown"]

DELAY = 1.0  # seconds until something is said
_INTERVAL = 0.5  # seconds between two states of the line on a terminal
_ERASE = "\r\x1b[K"


def say(sentence: str) -> None:
    """One line to the user, on stderr."""
    _write(f"lora_kernels: {sentence}\n")


@contextmanager
def shown(what: str, where: str, hint: str = "") -> Iterator[Progress]:
    """While the block runs, ``what`` is said to be compiled into ``where``; it is given each step that is done."""
    line = _Line(what, where, hint)
    thread = threading.Thread(target=line.run, name="lora_kernels progress", daemon=True)
    thread.start()
    outcome = f"compiling {what} has failed after"
    try:
        yield line.advance
        outcome = f"compiled {what} in"
    finally:
        line.over.set()
        thread.join()
        line.end(outcome)


class _Line:
    def __init__(self, what: str, where: str, hint: str) -> None:
        self.what, self.where, self.hint = what, where, hint
        self.over = threading.Event()
        self.begun, self.done, self.total = False, 0, 0
        self.start = time.monotonic()

    def advance(self, label: str, done: int, total: int) -> None:
        self.done, self.total = done, total

    def run(self) -> None:
        """Says that it has begun, once ``DELAY`` is over; on a terminal goes on with how far it is."""
        if self.over.wait(DELAY):
            return
        self.begun = True
        files = f" ({self.total} source files)" if self.total else ""
        say(f"compiling {self.what}{files}, once, into {self.where}. {self.hint}".rstrip())
        while _is_terminal():
            _write(f"{_ERASE}lora_kernels: {self.done}/{self.total} compiled, {self._elapsed()}")
            if self.over.wait(_INTERVAL):
                return

    def end(self, outcome: str) -> None:
        if self.begun:
            _write(_ERASE if _is_terminal() else "")
            say(f"{outcome} {self._elapsed()}.")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s"


def _write(text: str) -> None:
    if sys.stderr is not None:  # as under pythonw
        with suppress(OSError, ValueError):  # it is closed, or nobody reads it
            sys.stderr.write(text)
            sys.stderr.flush()


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (ValueError, AttributeError):  # closed, or another object in its place
        return False
