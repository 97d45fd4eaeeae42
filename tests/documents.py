"""What the tests of README.md and docs/ read: blocks of code, and sentences of prose."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```(\w+(?: file)?)(?: requires=(\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"<!-- (\w+):\S+ -->.*?<!-- /\1 -->", re.DOTALL)  # by bench/tables.py
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_CODE = re.compile(r"`[^`]+`")
# A list's item, a heading and a blank line begin a new sentence, whatever stands before them.
_STARTS = re.compile(r"\n\s*\n|(?:^|\n)\s*(?:[-*]|\d+\.|#+) ")
_ENDS = re.compile(r"[.!?][)\"”*]*(?=\s)")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``requires`` names a package that it needs beside those of the development set-up.

    "python file" is the text of a file that a reader is to write: its page's own test does so.
    """

    language: str
    requires: str
    body: str

    def run(self, where: str, namespace: dict[str, Any]) -> bool:
        """Runs Python in ``namespace``; where what it requires is not installed, compiles it and says False."""
        code = compile(self.body, where, "exec")
        if self.requires and not _is_installed(self.requires):
            return False
        exec(code, namespace)
        return True


def _is_installed(package: str) -> bool:
    """A folder of that name that happens to be on the path is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def blocks(text: str) -> list[Block]:
    return [Block(*found) for found in _BLOCK.findall(text)]


def bodies(text: str, language: str) -> list[str]:
    return [block.body for block in blocks(text) if block.language == language]


def without_blocks(text: str) -> str:
    return _BLOCK.sub("\n\n", text)


def anchors(text: str) -> set[str]:
    """What the headings of ``text`` are linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(text: str) -> str:
    """``text`` without blocks, tables, what is generated, and the addresses of links."""
    text = _GENERATED.sub("\n\n", without_blocks(text))
    text = "\n".join("" if line.startswith("|") else line for line in text.splitlines())
    return _LINK.sub(r"\1", text)


def sentences(text: str) -> list[str]:
    """The sentences of ``text``'s prose, whatever colons and semicolons they have; a piece of code is one word."""
    found = []
    for part in _STARTS.split(_CODE.sub("code", prose(text))):
        found += [" ".join(sentence.split()) for sentence in _ENDS.split(f"{part} ")]
    return [sentence for sentence in found if sentence]
