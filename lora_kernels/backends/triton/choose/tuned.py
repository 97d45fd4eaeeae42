"""Which plan was measured quickest on this device: the tables that ship with the package, merged with the user's own.

For a device ``slug(name).json`` is read from the folder ``tuned`` next to this file, then from the user's cache, whose
rows win. Rows measured under another minor version of Triton, or whose plan ran other kernels than now, do not count:
they are passed over, and ``lora-kernels info`` tells how many and why. Nothing is read before the first
``lookup`` of a device, and a device's tables are read once in a process.

A cell takes its own row. Without one it takes that of the nearest token bucket of the same direction, shape, rank,
dtype and dropout, if

* both are few tokens (one launch for all) or both are not: nothing is carried over that border,
* the buckets lie within a factor of 4, or of 2 where fewer tokens are asked for than were measured, and not few: blocks
  that fill the machine with 8192 tokens leave most of it idle with 2048, where on an H100 such rows lost to ``addmm_``
  in three of five shapes; or more are asked for, and at least 4096 were measured: there the machine is full, and more
  tokens only add waves of the same tiles.

Of two equally near buckets that of fewer tokens counts. What is not measured by this rule is left to the model, and so
is a plan that the machine has no room for: ``candidates.in_order`` sees to that.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .blocks import FEW_TOKENS
from .plans import DIRECTIONS, Cell
from .table import DeviceName, Row, TableError, minor, read, running_versions, slug, user_folder, versions_of

__all__ = ["Loaded", "Source", "forget", "identify", "load", "lookup", "of", "shipped_for", "status"]

SHIPPED = Path(__file__).with_name("tuned")
_REACH, _REACH_DOWN = 4, 2
_FULL = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """What one file gave: its rows, how many of them count, and sentences on what does not."""

    path: Path
    origin: str
    rows: int
    used: int
    measured_with: tuple[str, ...]
    passed_over: tuple[str, ...]


@dataclass(slots=True)
class Loaded:
    """A device's rows; ``answers`` remembers what each cell was told. Without a ``device`` there are none."""

    rows: dict[Cell, Row] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    device: DeviceName | None = None
    answers: dict[Cell, Row | None] = field(default_factory=dict)

    def row(self, cell: Cell) -> Row | None:
        """The cell's own row, else its nearest neighbour's, else None."""
        try:
            return self.answers[cell]
        except KeyError:
            row = self.answers[cell] = self.rows.get(cell) or self._nearest(cell)
            return row

    def _nearest(self, cell: Cell) -> Row | None:
        family = [row for own, row in self.rows.items() if _reaches(own, cell)]
        return min(family, key=lambda row: (_apart(row.cell, cell), row.cell.tokens), default=None)


_loaded: dict[torch.device, Loaded] = {}
_lock = threading.Lock()


def lookup(device: torch.device, cell: Cell) -> Row | None:
    """What was measured on ``device`` for ``cell`` or, by this module's rule, near it; None: ask the model.

    A file that cannot be used is passed over with one warning; nothing is raised for it.
    """
    return of(device).row(cell)


def of(device: torch.device) -> Loaded:
    """The tables of ``device``, read at the first call; empty for a CPU."""
    found = _loaded.get(device)
    return found if found is not None else _first(device)


def forget() -> None:
    """Lets the next lookup read the files anew."""
    with _lock:
        _loaded.clear()


def identify(device: torch.device) -> DeviceName | None:
    """What tables call ``device``; None where none are kept: on a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return DeviceName(properties.name, capability, properties.multi_processor_count)


def load(device: DeviceName) -> Loaded:
    """Reads the shipped table and the user's; ``sources`` tells what became of each file that is there."""
    running = running_versions()
    loaded = Loaded(device=device)
    found = []
    for origin, folder in (("shipped", SHIPPED), ("user", user_folder())):
        path = None if folder is None else folder / f"{slug(device.name)}.json"
        if path is not None and os.path.isfile(path):
            source, rows = _read(path, origin, device, running)
            found.append(source)
            loaded.rows |= {row.cell: row for row in rows}
    loaded.sources = tuple(found)
    return loaded


def shipped_for(name: str, capability: int, multiprocessors: int) -> DeviceName | None:
    """The device of the shipped table that is of a machine known as ``name`` ("h100") with these numbers."""
    for path in sorted(SHIPPED.glob("*.json")):
        if name in path.stem.split("-"):
            device = read(path).device
            if (device.capability, device.multiprocessors) == (capability, multiprocessors):
                return device
    return None


def status() -> dict[str, Any]:
    """For ``lora-kernels info``: each GPU's tables, and where tables are kept.

    ``devices``: for each GPU its name, the number of cells that are measured, in all and by direction, and its files.
    ``shipped``: the tables in the package. ``user_folder``: where the user's are.
    """
    folder = user_folder()
    devices = []
    for index in range(torch.cuda.device_count()):
        name = identify(torch.device("cuda", index))
        if name is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sentences are in the report
            loaded = load(name)
        files = [{**_fields(source), "path": str(source.path)} for source in loaded.sources]
        passes = {d: sum(cell.direction == d for cell in loaded.rows) for d in DIRECTIONS}
        told = {"device": f"cuda:{index}", "name": name.name, "cells": len(loaded.rows), "directions": passes}
        devices.append({**told, "files": files})
    return {
        "devices": devices,
        "shipped": sorted(path.stem for path in SHIPPED.glob("*.json")),
        "user_folder": None if folder is None else str(folder),
    }


def _first(device: torch.device) -> Loaded:
    with _lock:
        found = _loaded.get(device)
        if found is None:
            name = identify(device)
            found = Loaded() if name is None else load(name)
            _loaded[device] = found
        return found


def _read(path: Path, origin: str, device: DeviceName, running: dict[str, str]) -> tuple[Source, list[Row]]:
    """The rows of one file that count here."""
    try:
        table = read(path)
        if table.device != device:
            raise TableError(
                f"{path} is the table of {table.device}, and this is {device}: remove the file; `lora-kernels tune` "
                "measures this one."
            )
    except TableError as error:
        sentence = f"A tuned table is passed over: {error}"
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
        return Source(path, origin, 0, 0, (), (sentence,)), []
    rows = [_current(row, running) for row in table.rows if _same(row, running)]
    with_ = tuple(sorted({_told(row.versions) for row in rows}))
    total = len(table.rows) + len(table.unknown)
    return Source(path, origin, total, len(rows), with_, tuple(_sentences(table.rows, table.reasons, running))), rows


def _same(row: Row, running: dict[str, str]) -> bool:
    """Whether ``row`` was measured with what runs here: a minor version of Triton, and its plan's kernels."""
    kernels = versions_of(row.plan, running)["kernels"]
    return minor(row.versions["triton"]) == minor(running["triton"]) and row.versions["kernels"] == kernels


def _current(row: Row, running: dict[str, str]) -> Row:
    """Without the figures of plans whose own kernels have changed since."""
    kept = [one for one in row.timed if one.kernels == versions_of(one.plan, running)["kernels"]]
    return row if len(kept) == len(row.timed) else replace(row, timed=tuple(kept))


def _sentences(rows: Iterable[Row], reasons: tuple[str, ...], running: dict[str, str]) -> list[str]:
    """What does not count, and what to do about it."""
    here = minor(running["triton"])
    others = Counter(minor(row.versions["triton"]) for row in rows if not _same(row, running))
    changed = others.pop(here, 0)
    told = [
        f"{_rows(count)} passed over, for Triton {version} ran when they were measured, and {here} runs here: "
        "`lora-kernels tune` measures anew."
        for version, count in sorted(others.items())
    ]
    if changed:
        told.append(
            f"{_rows(changed)} passed over, for the kernels that their plans run have changed since: `lora-kernels "
            "tune` measures anew."
        )
    if reasons:
        told.append(
            f"{_rows(len(reasons))} passed over, for this version of lora_kernels does not know them: {reasons[0]}"
        )
    return told


def _rows(count: int) -> str:
    return f"{count} row{' is' if count == 1 else 's are'}"


def _reaches(measured: Cell, asked: Cell) -> bool:
    """Whether the row of ``measured`` says something of ``asked``; see the module's rule."""
    if replace(measured, tokens=asked.tokens) != asked:
        return False
    if (measured.tokens <= FEW_TOKENS) != (asked.tokens <= FEW_TOKENS):
        return False
    down = FEW_TOKENS < asked.tokens < measured.tokens
    reach = _REACH_DOWN if down else _REACH
    return _apart(measured, asked) <= reach or asked.tokens > measured.tokens >= _FULL


def _apart(left: Cell, right: Cell) -> float:
    """The factor between two token buckets."""
    return max(left.tokens, right.tokens) / min(left.tokens, right.tokens)


def _told(versions: dict[str, str]) -> str:
    return f"torch {versions['torch']}, triton {versions['triton']}, lora_kernels {versions['lora_kernels']}"


def _fields(source: Source) -> dict[str, Any]:
    names = ("origin", "rows", "used", "measured_with", "passed_over")
    return {name: getattr(source, name) for name in names}
