"""One name, one class in each library: two of a name are one to the linker, which takes the functions of either."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[3] / "csrc"
CLASS = re.compile(r"^(?:struct|class) (?:alignas\(\d+\) )?(\w+)(?: final)?(?: : [\w:<>, ]+)? \{", re.MULTILINE)
UNNAMED = re.compile(r"^namespace \{$.*?^\}  // namespace$", re.MULTILINE | re.DOTALL)


def classes(text: str) -> list[str]:
    """Those that other files can see; of a template the first definition alone."""
    return CLASS.findall(UNNAMED.sub("", text))


@pytest.mark.parametrize("library", ["cpu", "cuda", "launch"])
def test_no_two_classes_have_one_name(library: str) -> None:
    files = [*CSRC.glob("*.h"), *(CSRC / library).iterdir()]
    found = Counter(name for path in files for name in set(classes(path.read_text())))
    assert len(found) > 5
    assert [name for name, count in found.items() if count > 1] == []


def test_what_counts() -> None:
    text = "struct A {\n};\nnamespace {\nclass B {\n};\n}  // namespace\nstruct C;\nclass D : public A {\n};\n"
    assert classes(text) == ["A", "D"]
