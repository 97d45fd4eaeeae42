"""What is shipped, and the house rules that a machine can check."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lora_kernels
from stand_in import needs_a_compiler, write_sources

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lora_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = (ROOT / "pyproject.toml").read_text()


CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
BUILD_META = "from setuptools import build_meta; print(build_meta.build_{what}('out'))"


def copy_of_the_checkout(folder: Path) -> Path:
    """What a build reads, so that the checkout itself gets no build folder."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("lora_kernels", "tests", "bench", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """This Python in ``folder``, where it finds a torch that cannot be imported: no build imports it."""
    broken = folder.parent / f"{folder.name}-broken-torch"
    (broken / "torch").mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__import__("torch").__file__).with_name("version.py"), broken / "torch")
    (broken / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')\n")
    environment = {**os.environ, "LORA_KERNELS_BUILD": "", "PYTHONPATH": str(broken), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=600, env=environment
    )


def built(folder: Path, what: str, **variables: str) -> Path:
    done = python(folder, "-c", BUILD_META.format(what=what), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = copy_of_the_checkout(tmp_path_factory.mktemp("wheel"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", "out")
    done = python(folder, "-m", "pip", "wheel", *options, ".")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def checkout_with_stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose native library compiles in a second."""
    needs_a_compiler()
    folder = copy_of_the_checkout(tmp_path_factory.mktemp("checkout"))
    shutil.rmtree(folder / "csrc")
    write_sources(folder / "csrc")
    return folder


@pytest.fixture(scope="module")
def platform_wheel(checkout_with_stand_in: Path) -> Path:
    """Compiled ahead of time, linked against this environment's torch."""
    return built(checkout_with_stand_in, "wheel", LORA_KERNELS_BUILD="cpu", PYTHONPATH="")


def test_the_wheel_is_pure_and_named_by_the_package_version(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None
    assert Path(wheel.filename).name == f"lora_kernels-{lora_kernels.__version__}-py3-none-any.whl"


def test_the_wheel_holds_every_module_and_the_marker_of_types(wheel: zipfile.ZipFile) -> None:
    expected = {str(path.relative_to(ROOT)) for path in SOURCES} | {"lora_kernels/py.typed"}
    tuned = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("tuned/*.json")}
    assert expected | tuned <= set(wheel.namelist())


def test_the_wheel_holds_the_sources_of_the_native_library(wheel: zipfile.ZipFile) -> None:
    expected = {f"lora_kernels/{path.relative_to(ROOT).as_posix()}" for path in CSRC}
    assert expected == {name for name in wheel.namelist() if name.startswith("lora_kernels/csrc/")}
    assert "lora_kernels/csrc/common.h" in expected


def test_the_sdist_holds_them_too(tmp_path: Path) -> None:
    path = built(copy_of_the_checkout(tmp_path), "sdist")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in CSRC} <= names
    assert {"setup.py", "pyproject.toml", "MANIFEST.in"} <= names


def test_a_platform_wheel_serves_every_python_3(platform_wheel: Path) -> None:
    assert re.fullmatch(rf"lora_kernels-{lora_kernels.__version__}-py3-none-(?!any)\w+\.whl", platform_wheel.name)
    names = zipfile.ZipFile(platform_wheel).namelist()
    native = {Path(name).suffix for name in names if name.startswith("lora_kernels/lib/cpu/")}
    assert native in ({".so", ".json"}, {".dylib", ".json"})
    assert not [name for name in names if ".data/" in name]


def test_an_installed_platform_wheel_loads_what_it_brought(platform_wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--no-deps", "--no-index", "--no-compile", "--target", str(site))
    installed = python(tmp_path, "-m", "pip", "install", *options, str(platform_wheel))
    assert installed.returncode == 0, installed.stderr
    code = "import json; from lora_kernels.backends.native.load import load, status; "
    code += "load('cpu'); print(json.dumps(status('cpu')))"
    variables = {"PYTHONPATH": str(site), "LORA_KERNELS_BUILD": "off", "LORA_KERNELS_CACHE": str(tmp_path)}
    done = python(tmp_path, "-c", code, **variables)
    status = json.loads(done.stdout)
    assert (status["state"], status["origin"], done.stderr) == ("loaded", "installed", "")
    assert Path(status["path"]).parent == site / "lora_kernels" / "lib" / "cpu"
    assert status["build"]["torch"] == __import__("torch").__version__


def test_what_an_earlier_build_has_left_is_in_no_wheel(platform_wheel: Path, checkout_with_stand_in: Path) -> None:
    built(checkout_with_stand_in, "wheel")
    for folder in checkout_with_stand_in.glob("build/lib*/lora_kernels"):
        for name in ("lib/cpu/left.so", "csrc/left.h"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    path = built(checkout_with_stand_in, "wheel")
    assert path.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if "/lib/" in name or "left" in name]


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("wheel", "gpu", "LORA_KERNELS_BUILD=gpu was given: it must be cpu, cuda, launch, all or off"),
        ("editable", "cpu", "with an editable install, whose sources change: unset it, and run `lora-kernels build`"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(checkout_with_stand_in: Path, what: str, value: str, words: str) -> None:
    done = python(checkout_with_stand_in, "-c", BUILD_META.format(what=what), LORA_KERNELS_BUILD=value)
    assert done.returncode != 0
    assert words in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lora-kernels: ")


def test_without_a_compiler_a_build_ahead_of_time_is_a_sentence(checkout_with_stand_in: Path) -> None:
    variables = {"LORA_KERNELS_BUILD": "cpu", "CXX": "no-such-compiler"}
    done = python(checkout_with_stand_in, "-c", BUILD_META.format(what="wheel"), **variables)
    assert done.returncode != 0
    assert "lora-kernels: CXX=no-such-compiler was given" in done.stderr


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert folders == {"lora_kernels", f"lora_kernels-{lora_kernels.__version__}.dist-info"}


def test_the_rebuilt_rival_is_in_no_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    assert not [name for name in wheel.namelist() if "lorafusion" in name]
    wheel.extractall(tmp_path)
    command = [sys.executable, "-m", "lora_kernels", "bench", "--peers", "lorafusion"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "bench/lorafusion of a source checkout" in " ".join(done.stderr.split())


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


def test_the_interpreter_of_shell_scripts_is_found() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, f"{script} is not executable"
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_setup_py_stays_small() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80
