"""The pages in docs/ are true: their Python runs and prints what they show, and what they name exists."""

from __future__ import annotations

import ast
import io
import re
from contextlib import redirect_stdout
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lora_kernels import LoRAConfig, cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*PAGES, ROOT / "README.md"]}
DOCS = {name: text for name, text in TEXTS.items() if name.startswith("docs/")}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNING = [name for name, text in DOCS.items() if "```python" in text]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
every_page = pytest.mark.parametrize("name", DOCS)


def printed(code: str, where: str, namespace: dict[str, Any]) -> str:
    """What ``code`` prints, run in ``namespace``."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, where, "exec"), namespace)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def exists(dotted: str) -> bool:
    """Whether ``dotted`` is a module, or a name within one."""
    found: Any = import_module("lora_kernels")
    path = "lora_kernels"
    for part in dotted.split(".")[1:]:
        path = f"{path}.{part}"
        if not hasattr(found, part):
            try:
                import_module(path)
            except ImportError:
                return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("name", RUNNING)
def test_python_runs_and_prints_what_is_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("peft", "safetensors", "rich"):
        pytest.importorskip(extra)
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {"__name__": "page"}
    out = ""
    for number, (language, body) in enumerate(BLOCK.findall(DOCS[name])):
        if language == "python":
            out = printed(body, f"{name}, block {number}", namespace)
        elif language == "text":
            assert out == body.rstrip()


def test_every_kind_of_block_is_known() -> None:
    assert {language for text in DOCS.values() for language, _ in BLOCK.findall(text)} <= {"python", "text", "bash"}


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", BLOCK.sub("", TEXTS[name]))
    missing = [link for link in links if "://" not in link and not ((ROOT / name).parent / link).exists()]
    assert not missing


def test_the_index_names_every_page() -> None:
    named = set(re.findall(r"\]\((\w[\w-]*\.md)\)", DOCS["docs/README.md"]))
    assert named == {path.name for path in PAGES} - {"README.md"}


@every_page
def test_every_name_of_the_package_exists(name: str) -> None:
    prose = re.sub(r"\]\([^)]*\)", "]", DOCS[name])
    named = re.findall(r"\blora_kernels(?:\.\w+)+", prose)
    assert [dotted for dotted in named if not exists(dotted)] == []


@every_page
def test_every_command_and_option_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command, arguments in re.findall(r"\blora-kernels ([a-z]+)([^\n`]*)", DOCS[name]):
        assert command in cli.COMMANDS
        assert cli.main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in re.findall(r"--[a-z-]+", arguments))


def test_every_option_of_the_configuration_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", DOCS["docs/options.md"], re.MULTILINE)
    assert rows == [field.name for field in fields(LoRAConfig)]


def test_every_answer_names_a_test_that_exists() -> None:
    text = DOCS["docs/asked-elsewhere.md"]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| asked", "| ---"))]
    assert [row for row in rows if not TEST.search(row)] == []
    for file, function in TEST.findall(text):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, file
