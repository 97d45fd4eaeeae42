"""The worked examples of docs/adding.md: a copy of the package with their files in it passes their tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
FILE = re.compile(r"^(At the end of )?`([\w/]+\.py)`:\n\n```python file\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^```bash\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def part(title: str) -> str:
    """The page's part under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its tests."""
    for name in ("lora_kernels", "tests", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def follow(title: str, copy: Path) -> None:
    """Writes the files that a part shows."""
    for appended, path, code in FILE.findall(part(title)):
        assert (copy / path).is_file() == bool(appended), path
        with (copy / path).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}" if appended else code)


def run(command: str, copy: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=copy, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_kernel_s_files_pass_their_test(copy: Path) -> None:
    follow("A kernel", copy)
    (test,) = (path for _, path, _ in FILE.findall(part("A kernel")) if path.startswith("tests/"))
    assert test in part("A kernel").split("```python file")[-1].split("```")[1]
    assert "6 passed" in run(f"python -m pytest -q -p no:cacheprovider {test}", copy)


def test_the_backend_s_files_pass_the_tests_of_every_backend(copy: Path) -> None:
    follow("A backend", copy)
    *prepare, test = COMMAND.findall(part("A backend"))
    for command in prepare:
        run(command, copy)
    assert re.search(r"\d+ passed", run(f"{test} -q -p no:cacheprovider", copy))


def test_every_file_that_the_page_names_is_there() -> None:
    """Of the two examples that are there already; the others' files are written by the tests above."""
    said = part("A form of the weight") + part("A PEFT feature")
    missing = [
        path
        for path in re.findall(r"`([\w/]+\.(?:py|md))`", said)
        if not any((ROOT / folder / path).exists() for folder in ("", "lora_kernels", "lora_kernels/checkpoint"))
    ]
    assert missing == []
