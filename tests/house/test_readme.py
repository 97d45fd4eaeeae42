"""The README and CONTRIBUTING say what is true: their commands exist and their snippets run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lora_kernels import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def make_targets(text: str) -> set[str]:
    """Targets that are named as commands, in blocks or in `make …`; variables set on the line are left out."""
    lines = [line.split("#")[0] for block in blocks(text, "bash") for line in block.splitlines()]
    lines += re.findall(r"`(make\b[^`]*)`", text)
    words = [word for line in lines if line.startswith("make") for word in line.split()[1:]]
    return {word for word in words if re.fullmatch(r"[a-z-]+", word)}


def test_the_readme_leads_with_the_two_commands() -> None:
    first = blocks(README, "bash")[0].splitlines()
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
    namespace: dict[str, object] = {}
    for number, snippet in enumerate(blocks(README, "python")):
        exec(compile(snippet, f"README.md, python block {number}", "exec"), namespace)


def test_extras_that_are_named_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(
        re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
    )
    named = {name for group in re.findall(r'pip install "\.\[([\w,]+)\]"', README) for name in group.split(",")}
    assert named <= extras


def test_every_table_is_closed() -> None:
    assert README.count("<!-- table:") == README.count("<!-- /table -->")
