"""The table of ``lora-kernels tune --device cpu``: which product was quicker, the kernels' own or the library's.

======= ==========================================================================================================
format  the number of this layout
rows    dtype, direction, tokens, k, n; choice, "own" or "library"; ratios, each one's time and the plain
        composition's over the frozen layer's; floor_us, the frozen layer's; machine (see ``Machine``), date
======= ==========================================================================================================

It is one file in the cache, beside the libraries: ``product-choices.json``. A row counts only on the machine that it
was measured on; the others stay in the file. A file is replaced whole, and merged under a lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import InvalidArgumentError, LoRAKernelsError
from ...json_text import parsed
from . import cache

__all__ = [
    "CHOICES",
    "DIRECTIONS",
    "DTYPES",
    "ChoiceTableError",
    "Machine",
    "ProductCell",
    "Row",
    "find",
    "merge_into",
    "read",
    "table_path",
]

FORMAT = 1
NAME = "product-choices.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")  # in the order of csrc/cpu/kernels.h
DIRECTIONS = ("forward", "backward")  # in the order of csrc/cpu/choice.h
CHOICES = ("own", "library")
_LIMIT = 2**40  # of a size


class ChoiceTableError(LoRAKernelsError, ValueError):
    """A file that is no table of choices, or one that cannot be written."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a row is worth something on.

    Attributes:
        processor: the CPU's name.
        features: what the library's model knows of it, and the instruction set whose kernels run.
        threads: PyTorch's.
        torch: PyTorch's version.
        library: of the native library, the SHA-256's first 12 digits.
    """

    processor: str
    features: str
    threads: int
    torch: str
    library: str

    def differs(self, other: Machine) -> str:
        """What tells the two apart, in words: "4 threads there, 2 here"; empty where nothing does."""
        return "; ".join(
            f"{f.name} {getattr(self, f.name)} there, {getattr(other, f.name)} here"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        )


@dataclass(frozen=True, slots=True)
class ProductCell:
    """One product with W (n, k): ``x Wᵀ`` of forward, or ``dy W`` of backward, for so many tokens."""

    direction: str
    tokens: int
    k: int
    n: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.direction} M={self.tokens} {self.k}→{self.n} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one cell; see the module."""

    cell: ProductCell
    choice: str
    ratios: dict[str, float]
    floor_us: float
    machine: Machine
    date: str

    @property
    def key(self) -> tuple[ProductCell, Machine]:
        return self.cell, self.machine

    @staticmethod
    def from_json(document: Any) -> Row:
        """Raises InvalidArgumentError where ``document`` is no row of this version."""
        names = {f.name for f in fields(Row)}
        if not isinstance(document, Mapping) or set(document) != names:
            raise InvalidArgumentError(f"a row has the fields {', '.join(sorted(names))}; got {document!r}.")
        cell = _made(ProductCell, document["cell"])
        known = cell.dtype in DTYPES and cell.direction in DIRECTIONS and document["choice"] in CHOICES
        if not known or not all(0 < size < _LIMIT for size in (cell.tokens, cell.k, cell.n)):
            raise InvalidArgumentError(f"a row has a dtype, direction, choice or size that is not known: {document!r}.")
        ratios = document["ratios"]
        numbers = [document["floor_us"], *(ratios.values() if isinstance(ratios, Mapping) else [None])]
        if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < 1e12 for x in numbers):
            raise InvalidArgumentError(f"a row's ratios and floor_us must be positive numbers: {document!r}.")
        machine = _made(Machine, document["machine"])
        return Row(cell, document["choice"], dict(ratios), document["floor_us"], machine, str(document["date"]))


def _made(kind: Any, document: Any) -> Any:
    kinds = {f.name: {"int": int, "str": str}[str(f.type)] for f in fields(kind)}
    if not isinstance(document, Mapping) or {name: type(value) for name, value in document.items()} != kinds:
        raise InvalidArgumentError(f"a {kind.__name__} has the fields {', '.join(kinds)}; got {document!r}.")
    return kind(**document)


def table_path() -> Path:
    """Where ``tune`` puts the table: in the cache that libraries are compiled into."""
    return cache.writable_folder() / NAME


def find() -> Path | None:
    """The table that counts: the user's cache's, or that of the folder which stands in for it."""
    return next((path for folder in cache.folders() if (path := folder / NAME).is_file()), None)


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ChoiceTableError: it cannot be read, or is no such table.
    """
    try:
        document = parsed(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise InvalidArgumentError(f"its format is not {FORMAT}.")
        if not isinstance(document.get("rows"), list):
            raise InvalidArgumentError("its rows are no list.")
        return [Row.from_json(row) for row in document["rows"]]
    except (OSError, ValueError) as error:
        raise ChoiceTableError(
            f"{path} is no table of choices ({error}) Remove it; `lora-kernels tune --device cpu` writes another."
        ) from error


def merge_into(path: Path, rows: Iterable[Row]) -> None:
    """Puts ``rows`` into the place of what the file had for the same cells and machine.

    A file that is no table is put aside as ``product-choices.json.unreadable``.

    Raises:
        ChoiceTableError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with cache.locked(path.with_name(f"{path.name}.lock"), "writes the table of choices"):
            merged = {row.key: row for row in _begun(path)} | {row.key: row for row in rows}
            lines = ",\n".join("  " + json.dumps(asdict(row)) for row in merged.values())
            partial = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                partial.write_text(f'{{\n "format": {FORMAT},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise ChoiceTableError(
            f"the table of choices {path} cannot be written ({error}): make room there, or name another folder by "
            "LORA_KERNELS_CACHE."
        ) from error


def _begun(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        return read(path)
    except ChoiceTableError:
        path.replace(path.with_name(f"{path.name}.unreadable"))
        return []
