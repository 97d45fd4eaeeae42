"""Faults seeded into C++ sources, all of them in one library: a number says which of them is in force."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

Fault = tuple[str, str, str]  # file; what stands there, between « and » what goes (spaces aside); what comes instead

_FORCE = "lora_fault"


def seed(folder: Path, faults: Sequence[Fault]) -> tuple[str, ...]:
    """Writes each fault into the files of ``folder``, behind its number; returns the flags to compile them with.

    What ends with a semicolon is a statement, all else an expression. Without a fault, number 0, each is as it was.
    """
    for number, (name, text, wrong) in enumerate(faults, 1):
        before, right, after = re.split("[«»]", text)
        file = folder / name
        pattern = "({})({})({})".format(*map(_spaces_aside, (before, right, after)))
        source, count = re.subn(
            pattern, lambda m, n=number, w=wrong: m[1] + _either(n, w, m[2]) + m[3], file.read_text()
        )
        assert count == 1, f"{name} has {text!r} {count} times: the fault has to be seeded elsewhere."
        file.write_text(source)
    header = folder / "seeded.h"
    header.write_text(f'extern "C" {{ inline int {_FORCE} = 0; }}\n')
    return "-include", str(header)


def put_in_force(library: ctypes.CDLL, number: int) -> None:
    """The fault of this number, and no other."""
    ctypes.c_int.in_dll(library, _FORCE).value = number


def _either(number: int, wrong: str, right: str) -> str:
    if right.endswith(";"):
        return f"if ({_FORCE} == {number}) {{ {wrong} }} else {{ {right} }}"
    return f"({_FORCE} == {number} ? ({wrong}) : ({right}))"


def _spaces_aside(text: str) -> str:
    """A pattern for the text, which may begin and end with a space, or with none."""
    return r"\s*".join(re.escape(word) for word in re.split(r"\s+", text))
