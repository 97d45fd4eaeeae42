"""``make test-quick``: every folder has its tests, every test its folder, and what is printed is what runs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import test_quick as quick

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted({path.parent for path in (ROOT / "lora_kernels").rglob("*.py")} | set((ROOT / "csrc").glob("*/")))
EVERY = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("folder", [str(path.relative_to(ROOT)) for path in FOLDERS])
def test_every_folder_of_the_package_has_a_row(folder: str) -> None:
    assert f"{folder}/" in quick.TESTS


@pytest.mark.parametrize("row", quick.TESTS)
def test_a_row_names_what_is_there(row: str) -> None:
    assert (ROOT / row).is_dir() if row.endswith("/") else (ROOT / row).is_file()
    assert [test for test in quick.TESTS[row] if not (ROOT / test).exists()] == []


def test_a_folder_of_tests_whose_folder_has_a_row_is_in_it() -> None:
    """So that a new test file beside the others runs; the rest is named file by file, for the minute's sake."""
    for name in ("models", "peft", "checkpoint", "benchmark", "tuning", "verify"):
        assert f"tests/{name}" in quick.TESTS[f"lora_kernels/{name}/"]


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("lora_kernels/peft/layer.py", "lora_kernels/peft/"),
        ("lora_kernels/peft", "lora_kernels/peft/"),
        ("lora_kernels/nn.py", "lora_kernels/nn.py"),
        ("lora_kernels/ops.py", "lora_kernels/"),
        ("lora_kernels/backends/triton/choose/tuned/h100.json", "lora_kernels/backends/triton/choose/"),
        ("lora_kernels/backends/eager.py", "lora_kernels/backends/"),
        ("csrc/common.h", "csrc/"),
        ("LICENSE", None),
    ],
)
def test_the_longest_row_counts(path: str, row: str | None) -> None:
    assert quick.row_of(path) == row


def test_paths_are_of_the_checkout_or_of_the_package() -> None:
    given = ["lora_kernels/peft/", "backends/triton", "csrc", "nn.py", "tests/house/test_cli.py"]
    meant = ["lora_kernels/peft", "lora_kernels/backends/triton", "csrc", "lora_kernels/nn.py", given[-1]]
    assert [quick.named(text) for text in given] == meant
    with pytest.raises(SystemExit, match="no-such-folder is neither in the checkout nor in lora_kernels/"):
        quick.named("no-such-folder")


def ran(monkeypatch: pytest.MonkeyPatch, arguments: list[str], git: str = "") -> list[str]:
    """The paths that pytest is given; ``git`` is what its commands print."""
    given: list[str] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        if command[0] == "git":
            return SimpleNamespace(returncode=0, stdout=git if command[1] == "diff" else "")
        given.extend(part for part in command if part.startswith("tests/"))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(quick.subprocess, "run", run)
    assert quick.main(arguments) == (3 if given else 0)
    return given


def test_what_is_printed_is_what_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(monkeypatch, ["peft", "demo"]) == ["tests/peft", quick.ALWAYS, "tests/house/test_demo.py"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"lora_kernels/peft (row lora_kernels/peft/): tests/peft {quick.ALWAYS}"
    assert shown[1] == f"lora_kernels/demo (row lora_kernels/demo/): tests/house/test_demo.py {quick.ALWAYS}"


def test_without_a_folder_what_git_sees_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = "docs/peft.md\ntests/house/test_cli.py\ntests/house/test_that_is_gone.py\nLICENSE\n"
    assert ran(monkeypatch, [], touched) == ["tests/house/test_docs.py", "tests/house/test_cli.py"]
    assert ran(monkeypatch, [], "") == []


def test_where_git_says_nothing_a_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 128, stdout="", stderr="fatal: not a git repository")
    monkeypatch.setattr(quick.subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(SystemExit, match="Name a folder: FOLDER=peft"):
        quick.changed()
