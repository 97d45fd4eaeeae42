"""Triton's kernels on a CPU: ``verify`` in a process of its own, with Triton's interpreter switched on.

``TRITON_INTERPRET`` is read when Triton and the kernels are imported, so this process cannot switch it on for itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO

import torch

from .. import env
from ..console import Progress
from ..errors import BackendUnavailableError
from .report import Failure, NotRun, Report

__all__ = ["InterpretedTriton"]

UNAVAILABLE = 2  # the exit status of ``lora-kernels`` for an error that is a sentence
_PROGRESS = re.compile(r"verify: (.+) (\d+)/(\d+)$")


class InterpretedTriton:
    """Within the ``with`` block the other process runs beside this one, if it is needed; ``add_to`` waits for it.

    It is needed where Triton is to be verified on the CPU, is installed, and ``TRITON_INTERPRET`` is not set here.
    ``backend`` is then ``"triton"``, else None.
    """

    def __init__(
        self, names: Sequence[str], shorts: Sequence[str], device: torch.device, seed: int, progress: Progress | None
    ) -> None:
        wanted = "triton" in names and device.type == "cpu" and not env.triton_interpreter_requested()
        self.backend = "triton" if wanted and find_spec("triton") is not None else None
        self._shorts, self._seed, self._progress = tuple(shorts), seed, progress
        self._said: list[str] = []
        self._output = ""

    def __enter__(self) -> InterpretedTriton:
        if self.backend is not None:
            command = [sys.executable, "-m", "lora_kernels", "verify", "--json", "--backend", "triton"]
            command += ["--device", "cpu", "--seed", str(self._seed), "--dtype", *self._shorts]
            self._process = subprocess.Popen(
                command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            assert self._process.stdout is not None
            assert self._process.stderr is not None
            self._readers = [
                Thread(target=self._read_output, args=(self._process.stdout,)),
                Thread(target=self._read_progress, args=(self._process.stderr,)),
            ]
            for reader in self._readers:
                reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.backend is not None:
            if error is not None:
                self._process.terminate()
            self._wait()

    def add_to(self, report: Report, explicit: bool) -> Report:
        """``report`` with what the other process found, or why it could not begin; what stopped it later is a failure.

        Raises:
            BackendUnavailableError: it could not begin, and Triton was named (``explicit``).
        """
        if self.backend is None:
            return report
        self._wait()
        try:
            found = Report.from_dict(json.loads(self._output))
        except json.JSONDecodeError:
            last = " ".join(self._said[-3:])
            if self._process.returncode == UNAVAILABLE:
                last = last.removeprefix("lora-kernels: ")
                if explicit:
                    raise BackendUnavailableError(last) from None
                return replace(report, not_run=(*report.not_run, NotRun("triton", self._shorts, last)))
            sentence = f"Triton's interpreter stopped with status {self._process.returncode}: {last}"
            failure = Failure("triton", ", ".join(self._shorts), "all", sentence)
            return replace(report, failures=(*report.failures, failure))
        known = {item.composition for item in report.rounding}
        return replace(
            report,
            rows=(*report.rows, *found.rows),
            failures=(*report.failures, *found.failures),
            checks=(*report.checks, *found.checks),
            rounding=(*report.rounding, *(item for item in found.rounding if item.composition not in known)),
            not_run=(*report.not_run, *found.not_run),
        )

    def _wait(self) -> None:
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def _read_output(self, stream: IO[str]) -> None:
        with stream:
            self._output = stream.read()

    def _read_progress(self, stream: IO[str]) -> None:
        with stream:
            for line in map(str.strip, stream):
                match = _PROGRESS.match(line)
                if match is None:
                    self._said.append(line)
                elif self._progress is not None:
                    self._progress(f"{match[1]}, interpreted", int(match[2]), int(match[3]))


def _environment() -> dict[str, str]:
    """This process's environment with the interpreter on; the package is found where this process found it.

    One thread: the interpreter gains nothing by more, and they would get into the way of this process's.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
