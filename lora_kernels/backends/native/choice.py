"""Who multiplies by W on a CPU, the kernels or PyTorch's own product: the library's choice, and what decides it.

``LORA_KERNELS_CPU_PRODUCT`` decides; else the rows that ``lora-kernels tune --device cpu`` measured on this machine;
else a model of what the machine has (``csrc/cpu/choice.cpp``). The table is handed over once, when the backend is
registered: the bits of a result depend on the choice, so within a process it stays as it is.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...processor import processor_name
from . import choice_table, load
from .build import file_digest
from .choice_table import CHOICES, DIRECTIONS, DTYPES, ChoiceTableError, Machine, ProductCell, Row

__all__ = [
    "Decision",
    "chosen",
    "decide",
    "forced",
    "install",
    "install_rows",
    "machine",
    "model",
    "nearest",
    "status",
]

PRODUCT_VARIABLE = "LORA_KERNELS_CPU_PRODUCT"
_HALVES = ("bfloat16", "float16")
# The classes and reaches of choice.cpp.
_TOKENS, _SMALLEST, _SIZES, _FEW, _FULL, _REACH = 15, 5, 11, 4, 9, 2
_installed: tuple[Row, ...] | None = None  # what the library was given
_FIELDS = 6  # of a row as the library takes it: dtype, direction, tokens, n, k, choice


@dataclass(frozen=True)
class Found:
    """What the table's file gave: all rows, those that count here, and sentences on what does not."""

    path: Path | None = None
    total: int = 0
    rows: tuple[Row, ...] = ()
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Who multiplies by W in one pass, and what decided it.

    Attributes:
        choice: one of ``CHOICES``.
        by: "environment", "layout" (W's rows do not lie in one piece), "table" or "model".
        row: the table's row.
        features: what the model knows of this machine.
        capability: the instruction set of the kernels.
        passed_over: sentences on rows that do not count here.
    """

    choice: str
    by: str
    row: Row | None
    features: str
    capability: str
    passed_over: tuple[str, ...] = ()


def decide(cell: ProductCell, in_place: bool = True) -> Decision | None:
    """What the library does for ``cell``, and why; None where there is none, for nothing is compiled here.

    ``in_place``: whether each row of W lies in one piece.
    """
    library = load.loaded("cpu")
    path = library.path if library else load.status("cpu")["path"]
    functions = None if path is None else _opened(Path(path))
    if functions is None:
        return None
    here = _machine_of(functions, Path(path))
    found, features = _find(here), here.features
    capability = features.partition("own=")[2].partition(" ")[0]
    rows = found.rows if _installed is None else _installed
    named = os.environ.get(PRODUCT_VARIABLE)
    row = nearest(rows, cell)
    if named in CHOICES:
        choice, by, row = named, "environment", None
    elif row is not None:
        choice, by = row.choice, "table"
    else:
        choice, by = _model(functions, features, cell), "model"
    slow = cell.dtype in _HALVES and _model(functions, features, replace(cell, tokens=4096, k=4096, n=4096)) == "own"
    if choice == "own" and not in_place and cell.k > 1 and not slow:
        choice, by, row = "library", "layout", None
    return Decision(choice, by, row, features, capability, found.passed_over)


def nearest(rows: Sequence[Row], cell: ProductCell) -> Row | None:
    """The row that decides for ``cell`` by the rule of ``csrc/cpu/choice.cpp``, whose twin this is."""
    best, least = None, None
    for row in rows:
        if (row.cell.dtype, row.cell.direction) == (cell.dtype, cell.direction):
            away = _steps(row.cell, cell)
            if away is not None and (least is None or away < least):
                best, least = row, away
    return best


def _steps(measured: ProductCell, asked: ProductCell) -> int | None:
    """Between the classes of two cells; None where the first says nothing of the second."""
    row_m, m = _token_class(measured.tokens), _token_class(asked.tokens)
    sizes = [abs(_size_class(a) - _size_class(b)) for a, b in ((measured.n, asked.n), (measured.k, asked.k))]
    if max(sizes) > 1 or (row_m <= _FEW) != (m <= _FEW):
        return None
    apart = abs(row_m - m)
    if apart > _REACH and not (m > row_m >= _FULL):
        return None
    return apart + sum(sizes)


def _token_class(tokens: int) -> int:
    return min(max(tokens - 1, 0).bit_length(), _TOKENS - 1)


def _size_class(size: int) -> int:
    power = size.bit_length() - 1
    return min(max(power + (size * size > 2 << 2 * power) - _SMALLEST, 0), _SIZES - 1)


def install() -> None:
    """Hands the rows that count on this machine to the library, which is loaded; a broken file is told in a warning."""
    functions = _opened(load.load("cpu").path)
    if functions is None:
        return  # a library that makes no choice
    found = _find(_machine_of(functions))
    for sentence in found.passed_over if found.path is not None and not found.total else ():
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    install_rows(found.rows)


def install_rows(rows: Sequence[Row]) -> None:
    """Lets just these rows decide, and the model where none reaches. While no operator runs."""
    global _installed
    _installed = tuple(rows)
    numbers = [number for row in rows for number in _numbers(row)]
    _functions().lora_kernels_cpu_install_choices((ctypes.c_int64 * len(numbers))(*numbers), len(rows))


def chosen(cell: ProductCell) -> str:
    """What the library does in this process: "own" or "library"."""
    c = cell
    own = _functions().lora_kernels_cpu_own_product(_dtype(c), _direction(c), c.tokens, c.n, c.k)
    return CHOICES[0] if own else CHOICES[1]


def model(features: str, cell: ProductCell) -> str:
    """What the model holds of a machine with these features, such as "own=avx2 intel": "own" or "library"."""
    return _model(_functions(), features, cell)


def _model(functions: Any, features: str, cell: ProductCell) -> str:
    own = functions.lora_kernels_cpu_model(features.encode(), _dtype(cell), cell.tokens, cell.n, cell.k)
    return CHOICES[0] if own else CHOICES[1]


@contextmanager
def forced(choice: str) -> Iterator[None]:
    """All products of this process made so, while no other thread runs one: for the tuner."""
    functions = _functions()
    before = functions.lora_kernels_cpu_force_product(1 + CHOICES.index(choice))
    try:
        yield
    finally:
        functions.lora_kernels_cpu_force_product(before)


def machine() -> Machine:
    """This one, with the loaded library."""
    return _machine_of(_functions())


def status() -> dict[str, Any]:
    """For ``lora-kernels info``; the library is opened where there is one, and never compiled.

    ``decided_by`` is "environment", "table" or "model", or None where there is no library; ``machine`` what the rows
    must have been measured on; ``path``, ``rows``, ``used`` and ``passed_over`` tell of the table.
    """
    library = load.loaded("cpu")
    path = library.path if library else load.status("cpu")["path"]
    functions = None if path is None else _opened(Path(path))
    if functions is None:
        return {"decided_by": None, "machine": None, "path": None, "rows": 0, "used": 0, "passed_over": []}
    here = _machine_of(functions, None if library else Path(path))
    found = _find(here)
    by = "environment" if os.environ.get(PRODUCT_VARIABLE) else "table" if found.rows else "model"
    told = {"path": None if found.path is None else str(found.path), "rows": found.total, "used": len(found.rows)}
    return {"decided_by": by, "machine": asdict(here), **told, "passed_over": list(found.passed_over)}


def _find(here: Machine) -> Found:
    path = choice_table.find()
    if path is None:
        return Found()
    try:
        rows = choice_table.read(path)
    except ChoiceTableError as error:
        return Found(path, passed_over=(f"A table of choices is passed over: {error}",))
    others: dict[str, int] = {}
    for row in rows:
        if difference := row.machine.differs(here):
            others[difference] = others.get(difference, 0) + 1
    told = [
        f"{count} row{' is' if count == 1 else 's are'} passed over: {difference}. `lora-kernels tune --device cpu` "
        "measures this machine."
        for difference, count in others.items()
    ]
    return Found(path, len(rows), tuple(row for row in rows if row.machine == here), tuple(told))


def _machine_of(functions: Any, path: Path | None = None) -> Machine:
    if path is None:
        path = load.load("cpu").path
    file = path.stat()
    digest = _digest(path, file.st_mtime_ns, file.st_size)
    features = functions.lora_kernels_cpu_processor().decode()
    return Machine(processor_name(), features, torch.get_num_threads(), str(torch.__version__), digest)


@lru_cache(maxsize=8)
def _digest(path: Path, changed: int, size: int) -> str:
    """Of the file as it is now: a megabyte, and one is asked for each decision that is explained."""
    return file_digest(path)[:12]


def _numbers(row: Row) -> list[int]:
    c = row.cell
    values = [_dtype(c), _direction(c), c.tokens, c.n, c.k, 1 + CHOICES.index(row.choice)]
    assert len(values) == _FIELDS
    return values


def _dtype(cell: ProductCell) -> int:
    return DTYPES.index(cell.dtype)


def _direction(cell: ProductCell) -> int:
    return DIRECTIONS.index(cell.direction)


def _functions() -> Any:
    """The C functions of the loaded library."""
    functions = _opened(load.load("cpu").path)
    assert functions is not None, "the loaded library has no choice functions"
    return functions


@lru_cache(maxsize=8)
def _opened(path: Path) -> Any | None:
    """The C functions of the library in that file; None where it has none."""
    functions = ctypes.CDLL(str(path))
    size = ctypes.c_int64
    try:
        functions.lora_kernels_cpu_processor.restype = ctypes.c_char_p
        functions.lora_kernels_cpu_own_product.argtypes = [ctypes.c_int, ctypes.c_int, size, size, size]
        functions.lora_kernels_cpu_model.argtypes = [ctypes.c_char_p, ctypes.c_int, size, size, size]
        functions.lora_kernels_cpu_install_choices.argtypes = [ctypes.POINTER(size), size]
    except AttributeError:
        return None
    return functions
