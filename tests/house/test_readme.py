"""The README and CONTRIBUTING say what is true: their commands exist and their snippets run."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from documents import ROOT, blocks, bodies
from lora_kernels import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
MOST_LINES, WIDTH = 150, 120  # of README.md; tables may be wider
ORDER = (  # what a reader meets first, and what then
    "<!-- model:headline -->",
    "fuse_peft(model)",
    "FusedLoRALinear(",
    "make demo",
    "pip install",
    "First use",
    "SFTTrainer",
    "docs/h200.svg",
    "<!-- brief:",
    "## What is guaranteed",
    "## Limits",
    "## Where to go on",
)


def make_targets(text: str) -> set[str]:
    """Targets that are named as commands, in blocks or in `make …`; variables set on the line are left out."""
    lines = [line.split("#")[0] for block in bodies(text, "bash") for line in block.splitlines()]
    lines += re.findall(r"`(make\b[^`]*)`", text)
    words = [word for line in lines if line.startswith("make") for word in line.split()[1:]]
    return {word for word in words if re.fullmatch(r"[a-z-]+", word)}


def test_it_is_read_in_a_minute() -> None:
    lines = README.splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > WIDTH and not line.startswith("|")] == []


def test_what_is_needed_first_comes_first() -> None:
    places = [README.index(text) for text in ORDER]
    assert places == sorted(places)


def test_one_picture_and_one_table_of_about_eight_measured_rows() -> None:
    assert re.findall(r"!\[[^\]]*\]\(([^)]*)\)", README) == ["docs/h200.svg"]
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert 6 <= len(rows) - 2 <= 10
    assert "predicted" not in (ROOT / "docs" / "h200.svg").read_text(encoding="utf-8").lower()


def test_the_first_commands_are_those_for_a_clone() -> None:
    first = bodies(README, "bash")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_make_target_that_is_named_exists(text: str) -> None:
    named = make_targets(text)
    assert named
    assert named <= TARGETS


def test_make_lists_its_targets() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} >= TARGETS - {"set-up"}


def test_continuous_integration_runs_the_readme_command() -> None:
    assert re.search(r"^step make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_every_command_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"(?:lora-kernels|python -m lora_kernels) ([a-z]+)", README))
    assert named == set(cli.COMMANDS)
    for command in named:
        assert cli.main([command, "--help"]) == 0
        assert f"lora-kernels {command}" in capsys.readouterr().out


def test_every_file_that_is_named_exists() -> None:
    for text in (README, CONTRIBUTING):
        named = re.findall(r"`((?:lora_kernels|tests|bench|examples|scripts|backends)/[\w./-]*)`", text)
        missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "lora_kernels" / name).exists()]
        assert not missing


def test_python_snippets_run_one_after_the_other() -> None:
    pytest.importorskip("peft", reason="the first example is a PEFT model, and PEFT is not here")
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks(README)):
        if block.language == "python":
            block.run(f"README.md, block {number}", namespace)


def test_extras_that_are_named_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(
        re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
    )
    named = {name for group in re.findall(r'pip install "\.\[([\w,]+)\]"', README) for name in group.split(",")}
    assert named <= extras


def test_every_table_is_closed() -> None:
    opened = re.findall(r"<!-- (\w+):", README)
    assert opened == re.findall(r"<!-- /(\w+) -->", README)
