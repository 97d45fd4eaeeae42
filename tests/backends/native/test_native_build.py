"""The recipe of the native library: what is compiled how, and what makes it another library."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_kernels import env
from lora_kernels.backends.native import build, toolchain
from lora_kernels.backends.native.toolchain import BuildError, Compiler, Torch
from stand_in import write_sources

NATIVE = Path(build.__file__).parent
GCC = Compiler("/usr/bin/c++", "c++ (Debian) 12.2.0\nCopyright")
NVCC = Compiler("/opt/cuda/bin/nvcc", "nvcc: NVIDIA\nCuda compilation tools, release 13.0, V13.0.88")
TORCH = Torch(Path("/site/torch"), "2.13.0+cpu", None)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = write_sources(tmp_path / "csrc")
    (folder / "cpu" / "kernels_fp32.cpp").write_text("int LORA_CAPABILITY;\n")
    (folder / "cpu" / "kernels.h").write_text("\n")
    return folder


@pytest.fixture
def cpu(sources: Path, monkeypatch: pytest.MonkeyPatch) -> build.Recipe:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Compiler, "accepts", lambda self, flags, code="": "-mavx512bf16" not in flags)
    return build.Recipe("cpu", sources, GCC, TORCH)


@pytest.fixture
def cuda(sources: Path, monkeypatch: pytest.MonkeyPatch) -> build.Recipe:
    monkeypatch.setattr(build, "cuda_architectures", lambda nvcc: ("80", "90"))
    monkeypatch.delenv("CXX", raising=False)
    return build.Recipe("cuda", sources, NVCC, TORCH)


def test_kernels_are_compiled_for_each_capability_the_compiler_knows_the_least_first(cpu: build.Recipe) -> None:
    kernels = [f"kernels_fp32.cpp.{name}" for name in ("portable", "avx2", "avx512")]
    assert [unit.name for unit in cpu.units] == ["operators.cpp", *kernels]


def test_each_unit_gets_its_own_flags_only(cpu: build.Recipe) -> None:
    machine = {unit.name: [flag for flag in unit.flags if flag.startswith("-m")] for unit in cpu.units}
    assert machine["operators.cpp"] == machine["kernels_fp32.cpp.portable"] == []
    assert machine["kernels_fp32.cpp.avx2"] == ["-mavx2", "-mfma", "-mf16c"]
    assert "-mavx512vl" in machine["kernels_fp32.cpp.avx512"]
    assert all({"-DLORA_HAVE_AVX2", "-DLORA_HAVE_AVX512"} <= set(unit.flags) for unit in cpu.units)
    assert not any("-DLORA_HAVE_AVX512_BF16" in unit.flags for unit in cpu.units)


@pytest.mark.parametrize("known", [True, False])
def test_amx_is_compiled_where_the_assembler_knows_it(
    cpu: build.Recipe, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    monkeypatch.setattr(Compiler, "accepts", lambda self, flags, code="": known or "tdpbf16ps" not in code)
    assert ("amx" in cpu.capabilities) == known
    assert cpu.capabilities[-1] == ("amx" if known else "avx512_bf16")


def test_elsewhere_only_the_portable_kernels_are_compiled(cpu: build.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert [unit.flags for unit in cpu.units] == [(), ("-DLORA_CAPABILITY=portable",)]


def test_the_compile_command(cpu: build.Recipe) -> None:
    command = cpu.compile_command(cpu.units[0], Path("o.o"))
    assert command[0] == GCC.path
    assert {"-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"} <= set(command)
    assert f"-DTORCH_TARGET_VERSION={build.TORCH_TARGET_VERSION}" in command
    assert command[-6:-4] == ["-isystem", "/site/torch/include"]
    assert command[-4:] == ["-c", str(cpu.sources / "cpu" / "operators.cpp"), "-o", "o.o"]


def test_the_link_command_names_torch_and_leaves_nothing_undefined(
    cpu: build.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.sys, "platform", "linux")
    assert cpu.link_command([Path("a.o")], Path("l.so"))[-3:] == ["a.o", "-L/site/torch/lib", "-ltorch_cpu"]
    assert "-Wl,-z,defs" in cpu.link_command([], Path("l.so"))
    sanitized = replace(cpu, extra=("-fsanitize=address",))
    assert "-Wl,-z,defs" not in sanitized.link_command([], Path("l.so"))
    assert "-fsanitize=address" in sanitized.link_command([], Path("l.so"))


def test_cuda_is_compiled_for_each_architecture_and_ptx_of_the_last(cuda: build.Recipe) -> None:
    command = cuda.compile_command(cuda.units[0], Path("o.o"))
    assert [flag.rpartition("code=")[2] for flag in command if flag.startswith("-gencode")] == [
        "sm_80",
        "sm_90",
        "compute_90",
    ]
    assert "-DUSE_CUDA" in command
    one = cuda.compile_command(cuda.units[0], Path("o.o"), architectures=["90"], more=["-Xptxas", "-v"])
    assert "-gencode=arch=compute_80,code=sm_80" not in one
    assert "-Xptxas" in one


def test_cuda_links_both_torch_libraries_and_the_runtime_statically(cuda: build.Recipe) -> None:
    command = cuda.link_command([Path("a.o")], Path("l.so"), stub=Path("/stub"))
    assert command[-4:] == ["-L/site/torch/lib", "-L/stub", "-ltorch_cpu", "-ltorch_cuda"]
    assert command[command.index("-cudart") + 1] == "static"
    assert not any("z,defs" in flag for flag in command)
    assert "-Xlinker=-z,defs" in cuda.link_command([], Path("l.so")) or sys.platform != "linux"


CHANGES = {
    "a source": lambda r: (r.sources / "cpu" / "operators.cpp").write_text("int x;"),
    "a header of the kind": lambda r: (r.sources / "cpu" / "kernels.h").write_text("int x;"),
    "a common header": lambda r: (r.sources / "common.h").write_text("int x;"),
    "a name": lambda r: (r.sources / "cpu" / "kernels.h").rename(r.sources / "cpu" / "other.h"),
    "one more file": lambda r: (r.sources / "cpu" / "more.cpp").write_text(""),
    "the compiler's path": lambda r: replace(r, compiler=replace(GCC, path="/usr/local/bin/c++")),
    "the compiler's version": lambda r: replace(r, compiler=replace(GCC, version="13.1")),
    "more flags": lambda r: replace(r, extra=("-g",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_ingredient_makes_another_library(cpu: build.Recipe, change: str) -> None:
    before = cpu.key
    changed = CHANGES[change](cpu)
    after = changed if isinstance(changed, build.Recipe) else replace(cpu)
    assert after.key != before


@pytest.mark.parametrize("fact", ["platform_tag", "c_library"])
def test_another_machine_makes_another_library(cpu: build.Recipe, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpu.key
    monkeypatch.setattr(build, fact, lambda: "another")
    assert replace(cpu).key != before


def test_what_does_not_matter_makes_the_same_library(cpu: build.Recipe, tmp_path: Path) -> None:
    before = cpu.key
    (cpu.sources / "cuda" / "operators.cu").write_text("changed")
    (cpu.sources / "cpu" / "notes.txt").write_text("changed")
    moved = cpu.sources.rename(tmp_path / "elsewhere")
    assert replace(cpu, sources=moved, torch=Torch(Path("/other/torch"), "2.99.0", None)).key == before


def test_the_two_libraries_differ(cpu: build.Recipe, cuda: build.Recipe) -> None:
    assert cpu.key != cuda.key
    assert cpu.library_name != cuda.library_name


def test_recipe_imports_no_torch_and_finds_it() -> None:
    code = (
        "import importlib.util as u, sys\n"
        f"s = u.spec_from_file_location('r', {str(NATIVE / 'build.py')!r}, "
        f"submodule_search_locations=[{str(NATIVE)!r}])\n"
        "m = sys.modules['r'] = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "print(m.find_torch().version, 'torch' in sys.modules, 'lora_kernels' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [__import__("torch").__version__, "False", "False"]


def test_the_torch_that_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not to be imported')\n")
    version = tmp_path / "torch" / "version.py"
    monkeypatch.setattr(
        toolchain, "find_spec", lambda name: importlib.util.spec_from_file_location(
            name, tmp_path / "torch" / "__init__.py", submodule_search_locations=[str(tmp_path / "torch")]
        )
    )  # fmt: skip
    version.write_text("__version__ = '2.11.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\n")
    assert toolchain.find_torch() == Torch(tmp_path / "torch", "2.11.0+cu130", "13.0")
    version.write_text("__version__ = '2.9.1'\ncuda: Optional[str] = None\n")
    with pytest.raises(BuildError, match=r"torch 2\.9\.1 is installed: .* 2\.11"):
        toolchain.find_torch()
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"torch is not installed.*--no-build-isolation"):
        toolchain.find_torch()


@pytest.mark.parametrize(
    ("kind", "variables", "words"),
    [
        ("cpu", {"PATH": "/nowhere"}, r"no C\+\+ compiler was found.*apt install g\+\+"),
        ("cpu", {"CXX": "ccache g++"}, r"CXX=ccache g\+\+ was given.*one compiler, without arguments"),
        ("cpu", {"CXX": "false"}, r"false.*--version.*fails"),
        ("cuda", {"CUDACXX": "/nowhere/nvcc"}, r"CUDACXX=/nowhere/nvcc was given.*no such program"),
        ("cuda", {"PATH": "/nowhere"}, r"no nvcc was found.*CUDACXX"),
    ],
)
def test_no_compiler_is_a_sentence(
    kind: str, variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "USUAL_NVCC", ())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=words):
        build.recipe(kind)


def test_a_compiler_without_vector_extensions_is_a_sentence(
    cpu: build.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "accepts", lambda self, flags, code="": "vector_size" not in code)
    with pytest.raises(BuildError, match="GCC's vector extensions"):
        build.compile_library(cpu, tmp_path / "out")


def test_a_program_that_writes_no_library_is_a_sentence(
    cpu: build.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which("true")
    assert program is not None
    pretended = replace(cpu, compiler=replace(cpu.compiler, path=program))
    with pytest.raises(BuildError, match="tells of no failure and wrote no library: name a C"):
        build.compile_library(pretended, tmp_path / "out")


def test_sources_that_are_not_whole_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    with pytest.raises(BuildError, match=r"the sources of the native cpu library are not in .*cpu: install"):
        build.recipe("cpu", tmp_path)


@pytest.mark.parametrize(
    ("value", "kinds"), [("cpu", ("cpu",)), ("ALL", build.KINDS), ("off", ()), ("0", ()), ("", ("cuda",))]
)
def test_the_variable_names_the_libraries(value: str, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_BUILD", value)
    assert build.requested_kinds("cuda") == kinds


def test_a_wrong_value_of_the_variable_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_BUILD", "gpu")
    with pytest.raises(BuildError, match="LORA_KERNELS_BUILD=gpu was given: it must be cpu, cuda, launch, all or off"):
        build.requested_kinds("off")
    assert build.BUILD_VARIABLE == env.BUILD_VARIABLE


def test_build_info_tells_how_and_for_what(cpu: build.Recipe, tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"1234")
    info = json.loads(json.dumps(cpu.info(library)))
    assert (info["kind"], info["library"], info["size"], info["hash"]) == ("cpu", "lib.so", 4, cpu.key)
    assert (info["compiler"], info["compiler_version"]) == (GCC.path, "c++ (Debian) 12.2.0")
    assert info["capabilities"] == ["portable", "avx2", "avx512"]
    assert (info["torch"], info["torch_target_version"]) == (TORCH.version, build.TORCH_TARGET_VERSION)
    assert info["lora_kernels"] == __import__("lora_kernels").__version__


def test_the_packages_own_sources_are_found() -> None:
    assert (build.sources_folder() / "common.h").is_file()
    names = [path.name for path in build.source_files("cpu", build.sources_folder())]
    assert {"common.h", "operators.cpp"} <= set(names)
