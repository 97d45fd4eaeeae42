"""Everything is declared in pyproject.toml; here the sources of the native library join the package.

The wheel is pure. ``LORA_KERNELS_BUILD=cpu|cuda|all pip install --no-build-isolation .`` compiles the libraries into it
ahead of time, by the recipe that the first use follows as well; the wheel is then tagged ``py3-none-<platform>``.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "lora_kernels" / "backends" / "native"


def load_recipe():
    """``build.py`` as a package of its own: the real one imports torch."""
    spec = importlib.util.spec_from_file_location(
        "lora_kernels_recipe", NATIVE / "build.py", submodule_search_locations=[str(NATIVE)]
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()
try:
    KINDS = recipe.requested_kinds("off")
except recipe.BuildError as error:
    raise SystemExit(f"lora-kernels: {error}") from None


class BuildPackage(build_py):
    """Copies ``csrc`` into the package, and compiles what was asked for into its folder ``lib``."""

    def run(self):
        super().run()
        if self.editable_mode:
            if KINDS:
                raise SystemExit(
                    f"lora-kernels: {recipe.BUILD_VARIABLE} was given with an editable install, whose sources change: "
                    "unset it, and run `lora-kernels build` afterwards."
                )
            return
        package = Path(self.build_lib) / "lora_kernels"
        for folder in ("csrc", "lib"):  # what an earlier build has left here is of other sources
            shutil.rmtree(package / folder, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", package / "csrc")
        for kind in KINDS:
            self.compile_native(kind, package / "lib" / kind)

    def compile_native(self, kind, folder):
        try:
            library = recipe.compile_library(recipe.recipe(kind, ROOT / "csrc"), folder)
        except recipe.BuildError as error:
            raise SystemExit(f"lora-kernels: {error}\n{error.output}") from None
        (folder / recipe.LOG_NAME).unlink()
        self.announce(f"compiled {library}", level=2)


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return bool(KINDS) or super().has_ext_modules()


class Wheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", super().get_tag()[2]) if KINDS else super().get_tag()


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel}, distclass=PlatformDistribution)
