"""A tiny native library, compiled in half a second: it stands in for the real one where its handling is tested."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lora_kernels.backends.native import build as recipes
from lora_kernels.backends.native import cache, load, progress, toolchain

PACKAGE = Path(recipes.__file__).resolve().parents[2]
FILES = {
    "common.h": "#pragma once\n#define LORA_STAND_IN 1\n",
    "cpu/operators.cpp": '#include "common.h"\n'
    'extern "C" __attribute__((visibility("default"))) int lora_stand_in() { return LORA_STAND_IN; }\n',
    "launch/operators.cpp": '#include "common.h"\n'
    'extern "C" __attribute__((visibility("default"))) int lora_stand_in() { return LORA_STAND_IN; }\n',
    "cuda/operators.cu": '#include "common.h"\n__global__ void stand_in(float* x) { *x = LORA_STAND_IN; }\n',
}
COMPILER = """#!/bin/sh
case "$*" in
*--version*) echo "stand-in compiler 1.0" ; exit 0 ;;
*" {devnull}"*) exec "{compiler}" "$@" ;;
*" -c "*) echo "$$" >>"{folder}/calls" ;;
esac
while [ -e "{folder}/wait" ]; do sleep 0.05; done
if [ -e "{folder}/fail" ]; then echo "no space left in this compiler"; exit 1; fi
exec "{compiler}" "$@"
"""


def needs_a_compiler() -> None:
    """Skips the test where no library can be compiled, with the recipe's own reason."""
    try:
        recipes.recipe("cpu")
    except toolchain.BuildError as error:
        pytest.skip(str(error))


def write_sources(folder: Path) -> Path:
    """The stand-in's ``csrc``."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


class CountingCompiler:
    """The machine's C++ compiler behind a script that counts, waits or fails as it is told to by files beside it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.path = folder, folder / "compiler"
        self.path.write_text(
            COMPILER.format(compiler=toolchain.find_compiler("cpu").path, devnull=os.devnull, folder=folder)
        )
        self.path.chmod(0o755)

    @property
    def calls(self) -> int:
        """How many object files it was asked for."""
        log = self.folder / "calls"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def tell(self, word: str, on: bool = True) -> None:
        """``wait``: hold every compile; ``fail``: fail every compile; until told otherwise."""
        (self.folder / word).touch() if on else (self.folder / word).unlink()


class StandIn:
    """The stand-in's sources, compiler and cache, in use by this process (``monkeypatch`` undoes it)."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.sources = write_sources(folder / "csrc")
        self.compiler = CountingCompiler(folder / "compiler")
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("CXX", str(self.compiler.path))
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(self.cache))
        monkeypatch.delenv("LORA_KERNELS_BUILD", raising=False)
        for module in (recipes, load):
            monkeypatch.setattr(module, "sources_folder", lambda: self.sources)
        monkeypatch.setattr(load, "_INSTALLED", folder / "installed")
        monkeypatch.setattr(progress, "DELAY", 3600)  # a busy machine is no slow compile
        self.forget()

    def forget(self) -> None:
        """As in a process that has loaded nothing, and has failed at nothing."""
        self.monkeypatch.setattr(load, "_loaded", {})
        self.monkeypatch.setattr(load, "_failed", {})
        cache._stand_in.cache_clear()

    @property
    def home(self) -> Path:
        """The folder in the cache where the library is, or will be."""
        return self.home_of("cpu")

    def home_of(self, kind: str) -> Path:
        return self.cache / "native" / recipes.recipe(kind).key


class OtherProcess:
    """A process of a copy of the package, beside the stand-in's sources, as a user's would run."""

    SCRIPT = "from lora_kernels.backends.native import load; print(load.load('cpu').path)"

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.logs: dict[int, Path] = {}
        shutil.copytree(PACKAGE, folder / "lora_kernels", ignore=shutil.ignore_patterns("__pycache__", "lib"))
        write_sources(folder / "csrc")

    def start(self, arguments: Sequence[str] = ("-c", SCRIPT)) -> subprocess.Popen[str]:
        """Runs; what it says on stderr goes into the file ``said(process)``."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        self.started += 1
        with self._log(self.started).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.logs[process.pid] = self._log(self.started)
        return process

    def said(self, process: subprocess.Popen[str]) -> str:
        return self.logs[process.pid].read_text()

    def finish(self, process: subprocess.Popen[str]) -> str:
        """What it printed; it must have succeeded."""
        out = process.communicate(timeout=600)[0]
        assert process.returncode == 0, self.said(process)
        return out.strip()

    def wait_for(self, condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
        """Until ``condition`` holds, as long as the process runs, and no longer than five minutes."""
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, self.said(process)
            assert time.monotonic() < deadline, self.said(process)
            time.sleep(0.05)

    def _log(self, number: int) -> Path:
        return self.folder / f"{number}.log"
