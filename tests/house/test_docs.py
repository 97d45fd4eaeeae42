"""The pages in docs/ are true: their Python runs and prints what they show, and what they name exists."""

from __future__ import annotations

import ast
import io
import re
from contextlib import redirect_stdout
from dataclasses import fields
from importlib import import_module
from typing import Any

import pytest

from documents import ROOT, Block, anchors, blocks, bodies, sentences, without_blocks
from lora_kernels import LoRAConfig, cli

PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*PAGES, ROOT / "README.md"]}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCS = {name: text for name, text in TEXTS.items() if name.startswith("docs/")}
RUNNING = [name for name, text in DOCS.items() if bodies(text, "python")]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
MOST_WORDS = 30  # of a sentence
every_page = pytest.mark.parametrize("name", DOCS)


def printed(block: Block, where: str, namespace: dict[str, Any]) -> str | None:
    """What ``block`` prints, run in ``namespace``; None where a package that it requires is not installed."""
    out = io.StringIO()
    with redirect_stdout(out):
        ran = block.run(where, namespace)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) if ran else None


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
    out: str | None = ""
    for number, block in enumerate(blocks(DOCS[name])):
        if block.language == "python":
            out = printed(block, f"{name}, block {number}", namespace)
        elif block.language == "text" and out is not None:
            assert out == block.body.rstrip()


def test_every_kind_of_block_is_known() -> None:
    for text in DOCS.values():
        assert {block.language for block in blocks(text)} <= {"python", "python file", "text", "bash", "yaml"}
        assert 2 * len(blocks(text)) == len(re.findall(r"^```", text, re.MULTILINE))  # none is left out


@pytest.mark.parametrize("name", [*TEXTS, "CONTRIBUTING.md"])
def test_no_sentence_is_long(name: str) -> None:
    text = TEXTS.get(name, CONTRIBUTING)
    assert [sentence for sentence in sentences(text) if len(sentence.split()) > MOST_WORDS] == []


def test_sentences_are_told_from_what_is_none() -> None:
    text = "# Head\n\nOne [two](a b.md) `three four`.\n- A list: its\n  item.\n\n| a | row |\n\n```bash\na word\n```\n"
    assert sentences(text) == ["Head", "One two code", "A list: its item"]
    assert sentences('<!-- model:memory -->\nMade.\n<!-- /model -->\nIs it? "Yes." (No.) End') == [
        "Is it",
        '"Yes',
        "(No",
        "End",
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_lead_to_files(name: str) -> None:
    missing = []
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", without_blocks(TEXTS[name])):
        path = (ROOT / name).parent / link if link else ROOT / name
        if "://" not in link and not (
            path.exists() and (not anchor or anchor in anchors(path.read_text(encoding="utf-8")))
        ):
            missing.append(f"{link}#{anchor}")
    assert missing == []


def test_the_index_names_every_page() -> None:
    named = set(re.findall(r"\]\((\w[\w-]*\.md)\)", DOCS["docs/README.md"]))
    assert named == {path.name for path in PAGES} - {"README.md"}


@every_page
def test_every_name_of_the_package_exists(name: str) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", DOCS[name])
    for body in bodies(text, "python file"):
        text = text.replace(body, "")  # they name what is written with them
    named = re.findall(r"\blora_kernels(?:\.\w+)+", text)
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
