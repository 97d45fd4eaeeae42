"""The JSON of a run: where it ran, every cell with every provider, wins and losses; written, read, compared."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..console import write_file
from ..errors import InvalidArgumentError
from ..json_text import parsed
from ..processor import processor_name
from .device import gpu_state, source_id
from .presets import PRESETS
from .workloads import Workload

__all__ = [
    "SCHEMA",
    "Cell",
    "Entry",
    "Result",
    "compare",
    "continued",
    "device_name",
    "environment",
    "join",
    "load",
    "slug",
]

SCHEMA = 1
_ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Entry:
    """One provider in one cell.

    Attributes:
        status: "timed" (or "measured": memory), "unavailable", "same", "failed" (wrong, or it raised).
        reason: a sentence, for every status but the first.
        numbers: ``timing.Timing``'s or ``memory``'s fields; times in microseconds, memory in bytes.
        errors: relative Frobenius error of each output against float64, from the gate.
        predicted: bytes, flops, launches, microseconds and ratio by the roofline model; empty where there is none.
    """

    status: str
    reason: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Time over the floor's."""
        return self.numbers.get("ratio")


@dataclass(frozen=True)
class Cell:
    """A workload and what each provider gave.

    Attributes:
        left_out: a sentence that says why nothing was run, or None.
        state: seconds that the cell took; on a GPU its clock, power and temperature before and after the timing.
    """

    workload: Workload
    providers: dict[str, Entry]
    left_out: str | None = None
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A whole run, or what is there of it.

    Attributes:
        floor: the provider that ratios refer to.
        titles: every provider's name for people.
        ours: the providers that are this package.
        machine: the machine model that predictions rest on.
        predicted: nothing was run: the cells hold the model's predictions alone.
        planned: how many cells the run is to have in the end.
    """

    preset: str
    date: str
    seed: int
    floor: str
    titles: dict[str, str]
    ours: list[str]
    environment: dict[str, Any]
    machine: dict[str, Any]
    cells: list[Cell]
    schema: int = SCHEMA
    predicted: bool = False
    planned: int = 0

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = _rounded(asdict(self))
        text = _lines(document) if self.predicted else json.dumps(document, indent=1, ensure_ascii=False)
        write_file(path, text + "\n")


def load(path: str | Path) -> Result:
    """Reads what ``Result.save`` wrote.

    Raises:
        InvalidArgumentError: not such a file, or of another schema.
    """
    try:
        raw = parsed(Path(path).read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise InvalidArgumentError(
                f"{path} has schema {raw['schema']}, and this version reads {SCHEMA}: run the benchmark again."
            )
        cells = [
            Cell(
                Workload(**c["workload"]),
                {n: Entry(**e) for n, e in c["providers"].items()},
                c.get("left_out"),
                c.get("state", {}),
            )
            for c in raw["cells"]
        ]
        return Result(**{**raw, "cells": cells})
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(
            f"{path} is no benchmark result ({error!r}): give a file that bench --json wrote."
        ) from error


def join(results: Sequence[Result]) -> Result:
    """The latest result, and what runs of the same preset in the same place (device, threads, versions) add to it.

    A grid may be run in parts, one dtype at a time; of a cell that several runs have, the latest counts. The cells come
    in the preset's order, and the environment names every commit whose cells are there.
    """
    by_date = sorted(results, key=lambda result: result.date)
    last = by_date[-1]
    parts = [result for result in by_date if (result.preset, _place(result)) == (last.preset, _place(last))]
    cells = {cell.workload: cell for part in parts for cell in part.cells}
    latest = {cell.workload: part.environment.get("git") for part in parts for cell in part.cells}
    commits = ", ".join(dict.fromkeys(commit for commit in latest.values() if commit))
    planned = PRESETS[last.preset].workloads if last.preset in PRESETS else ()
    place = {workload: i for i, workload in enumerate(planned)}
    chosen = sorted(cells.values(), key=lambda cell: place.get(cell.workload, len(place)))
    return replace(last, cells=chosen, environment={**last.environment, "git": commits or None})


def continued(path: str | Path, preset: str, now: dict[str, Any], seed: int, titles: Sequence[str]) -> list[Cell]:
    """The cells that ``path`` holds of the same run: preset, seed, providers, device, threads, versions, source.

    None where there is no file yet. ``now`` is the environment of the run that goes on.

    Raises:
        InvalidArgumentError: the file is of another run, or no result.
    """
    if not Path(path).exists():
        return []
    found = load(path)
    names = ("device", "threads", "versions", "source")
    theirs = (found.preset, found.seed, list(found.titles), *(found.environment.get(name) for name in names))
    ours = (preset, seed, list(titles), *(now.get(name) for name in names))
    other = [n for n, a, b in zip(("preset", "seed", "peers", *names), theirs, ours, strict=True) if a != b]
    if other:
        raise InvalidArgumentError(
            f"{path} holds another run ({', '.join(other)} differ) and cannot be resumed: name another file, or leave "
            "--resume out to begin it anew."
        )
    return found.cells


def _place(result: Result) -> tuple[Any, ...]:
    return tuple(result.environment.get(name) for name in ("device", "threads", "versions"))


def compare(before: Result, after: Result) -> list[tuple[Workload, str, float, float]]:
    """(workload, provider, ratio before, ratio after) of every provider that both runs timed in the same cell."""
    earlier = {cell.workload: cell.providers for cell in before.cells}
    rows = []
    for cell in after.cells:
        for name, entry in cell.providers.items():
            former = earlier.get(cell.workload, {}).get(name)
            if former is not None and former.ratio is not None and entry.ratio is not None:
                rows.append((cell.workload, name, former.ratio, entry.ratio))
    return rows


def environment(device: str) -> dict[str, Any]:
    """Where the run happened: device, versions, git id of the checkout, threads, what governs the allocator."""
    return {
        "device": device_name(device),
        "device_type": device,
        "cpu": device_name("cpu"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "peft", "lora-kernels")},
        "cuda": torch.version.cuda,
        "git": _git(),
        "source": source_id(),
        "gpu": gpu_state() if device == "cuda" else {},
        "tuned": _tuned(device),
        "cpu_product": _cpu_product() if device == "cpu" else None,
        "allocator": {
            "libc": " ".join(platform.libc_ver()),
            "variables": {k: v for k, v in os.environ.items() if k.startswith(_ALLOCATOR_VARIABLES)},
        },
    }


def _cpu_product() -> dict[str, Any]:
    """What decides between the CPU library's own product and PyTorch's, and what the model knows of the CPU."""
    from ..backends.native import choice

    found = choice.status()
    return {"decided_by": found["decided_by"], "features": (found["machine"] or {}).get("features")}


def device_name(device: str) -> str:
    """The GPU's or CPU's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return processor_name()


def slug(name: str) -> str:
    """``name`` as a folder: lower case, words joined by hyphens, "(R)" and clock rates gone."""
    name = re.sub(r"\((r|tm)\)|@.*$|\b(cpu|processor|\d+-core)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _version(name: str) -> str | None:
    if name == "lora-kernels":
        from .. import __version__

        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> str | None:
    """The commit of the checkout that this package lies in, "-dirty" where it is; None if it is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _tuned(device: str) -> list[dict[str, Any]]:
    """The tuned tables that the Triton backend reads on this machine's GPUs."""
    if device != "cuda":
        return []
    from ..backends.triton.choose import tuned

    devices: list[dict[str, Any]] = tuned.status()["devices"]
    return devices


def _lines(document: dict[str, Any]) -> str:
    """A prediction's JSON, a line for each cell, without what is empty because nothing was run."""
    cells = document.pop("cells")
    for cell in cells:
        cell["providers"] = {n: {k: v for k, v in e.items() if v} for n, e in cell["providers"].items()}
    lines = ",\n".join(json.dumps({k: v for k, v in cell.items() if v}, ensure_ascii=False) for cell in cells)
    head = json.dumps(document, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n "cells": [\n{lines}\n ]\n}}'


def _rounded(value: Any) -> Any:
    """Five significant digits are more than any timer gives, and files stay readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value
