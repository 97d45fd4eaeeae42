"""What is shipped, and the house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lora_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the checkout gets no build folder."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("lora_kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "out",
        ".",
    ]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_is_pure_and_named_by_the_package_version(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None
    assert Path(wheel.filename).name == f"lora_kernels-{lora_kernels.__version__}-py3-none-any.whl"


def test_the_wheel_holds_every_module_and_the_marker_of_types(wheel: zipfile.ZipFile) -> None:
    expected = {str(path.relative_to(ROOT)) for path in SOURCES} | {"lora_kernels/py.typed"}
    tuned = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("tuned/*.json")}
    assert expected | tuned <= set(wheel.namelist())


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert folders == {"lora_kernels", f"lora_kernels-{lora_kernels.__version__}.dist-info"}


def test_the_wheel_needs_torch_to_run_and_not_to_build(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    needed = re.findall(r"^Requires-Dist: (.*)$", wheel.read(name).decode(), re.MULTILINE)
    always = sorted(re.split(r"[^a-z-]", line)[0] for line in needed if "extra ==" not in line)
    assert always == ["numpy", "torch", "triton"]
    assert "torch" not in re.search(r"\[build-system\](.*?)\n\[", PROJECT, re.DOTALL).group(1)
    assert "torch" not in "".join(
        line for line in (ROOT / "setup.py").read_text().splitlines() if "import " in line[:7]
    )


def test_the_installed_version_is_the_package_version() -> None:
    try:
        installed = metadata.version("lora-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("the package runs from a checkout that is not installed")
    assert installed == lora_kernels.__version__


def test_the_changelog_has_this_version_and_its_headings() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    section = re.split(r"^## ", text, flags=re.MULTILINE)[1]
    assert section.startswith(lora_kernels.__version__)
    assert {"Added", "Numerics", "Performance"} <= set(re.findall(r"^### (.*)$", section, re.MULTILINE))


def test_only_ops_knows_torch_library() -> None:
    knowing = {path.relative_to(PACKAGE).as_posix() for path in SOURCES if _names(path, "torch.library")}
    assert knowing <= {"ops.py"}


def _names(path: Path, dotted: str) -> bool:
    """Whether code, not text, of a file says ``dotted``."""
    tree = ast.parse(path.read_text())
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return dotted in {*attributes, *_imports(path)}


def _imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports at its top level (imports in functions are lazy on purpose)."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


LAYERS = ("nn", "functional", "autograd", "ops")  # and below all of them: backends


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_imports_upwards(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    upper = {"autograd": ("nn", "functional"), "functional": ("nn",), "ops": LAYERS[:3], "backends": LAYERS[:3]}
    upper |= dict.fromkeys(("reference", "errors", "env", "config"), (*LAYERS, "dispatch", "backends", "model"))
    upper |= {"dispatch": (*LAYERS, "backends", "model"), "nn": ("model",)}
    forbidden = {f"lora_kernels.{name}" for name in upper.get(part, ())}
    assert not forbidden & _imports(path)


def test_the_interpreter_of_shell_scripts_is_found() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, f"{script} is not executable"
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_setup_py_stays_small() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80
