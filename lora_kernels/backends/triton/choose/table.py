"""A tuned table: one JSON file for each device, with what ``lora-kernels tune`` measured there, one row a line.

======= ==================================================================================================
format  the number of this layout
device  name, capability (90 is 9.0), multiprocessors: a table serves no other device
rows    cell, plan, us and floor_us (the frozen linear's), ratio (of the same rounds, to the floor), kinds
        (each kind's best ratio), predicted_us, versions (torch, triton, lora_kernels; kernels, the digest of the
        device code that plans of this kind run, see ``kernel_files``), date; timed, where there is something to
        choose by how a plan is launched: plan, ratio, host_us by ``launching``, kernels
======= ==================================================================================================

A file is replaced whole, and merged under a lock, so that processes that tune at once keep each other's rows. Rows that
this version does not know, as another version of this package may write them, stay in the file as they are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from .... import __version__, env
from ....errors import InvalidArgumentError, LoRAKernelsError
from ....json_text import parsed
from .kernel_files import digests
from .launching import WAYS_TO_LAUNCH
from .plans import DIRECTIONS, DTYPES, Cell, Plan, is_of, plan_from_json, plan_to_json

__all__ = [
    "DeviceName",
    "Row",
    "Table",
    "TableError",
    "Timed",
    "merge_into",
    "minor",
    "read",
    "running_versions",
    "slug",
    "user_folder",
    "versions_of",
]

FORMAT = 2  # 1 had one digest of all kernels
_DIGITS = 5  # significant, more than any timer gives


class TableError(LoRAKernelsError, ValueError):
    """A file that is no tuned table, or one that cannot be written."""


@dataclass(frozen=True, slots=True)
class DeviceName:
    """Which device a table is of."""

    name: str
    capability: int
    multiprocessors: int

    def __str__(self) -> str:
        capability = f"{self.capability // 10}.{self.capability % 10}"
        return f"{self.name} (capability {capability}, {self.multiprocessors} multiprocessors)"


@dataclass(frozen=True, slots=True)
class Timed:
    """A plan that costs least in some way to launch it.

    Attributes:
        ratio: as a row's, and at least that of the row's plan: what was faster by luck is not.
        host_us: microseconds of the host, a call of the backend alone, by the name of a ``launching.Launching``.
        kernels: the digest of its kernels, which may be others than the row's plan runs.
    """

    plan: Plan
    ratio: float
    host_us: dict[str, float] = field(default_factory=dict)
    kernels: str = ""

    def to_json(self) -> dict[str, Any]:
        host = {name: _rounded(us) for name, us in self.host_us.items()}
        return {
            "plan": plan_to_json(self.plan), "ratio": _rounded(self.ratio), "host_us": host, "kernels": self.kernels
        }  # fmt: skip

    @staticmethod
    def from_json(document: Any) -> Timed:
        """Raises InvalidArgumentError where ``document`` is none of this version."""
        names = [f.name for f in fields(Timed)]
        if not isinstance(document, Mapping) or set(document) != set(names):
            raise InvalidArgumentError(f"a timed plan has the fields {', '.join(names)}; got {document!r}.")
        host = {str(name): _positive(name, us) for name, us in _object("host_us", document).items()}
        if unknown := set(host) - set(WAYS_TO_LAUNCH):
            raise InvalidArgumentError(
                f"host_us of a timed plan names {min(unknown)!r}: it must be some of {', '.join(WAYS_TO_LAUNCH)}."
            )
        ratio = _positive("ratio", document["ratio"])
        return Timed(plan_from_json(document["plan"]), ratio, host, str(document["kernels"]))


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one cell, and the plan that is taken there.

    Attributes:
        us, floor_us: microseconds of the plan, and of the frozen ``nn.Linear`` of the same rounds; medians.
        ratio: the plan's time over the floor's of the same round, median.
        kinds: for each kind of plan, the best ratio that one of it reached.
        predicted_us: what the model held of the plan.
        versions: of torch, triton and lora_kernels, as they ran, and the digest of the plan's kernels.
        date: UTC, ISO 8601.
        timed: the plans that cost least by each way to launch; empty in rows of before 0.2, and where it is one.
    """

    cell: Cell
    plan: Plan
    us: float
    floor_us: float
    ratio: float
    kinds: dict[str, float]
    predicted_us: float
    versions: dict[str, str]
    date: str
    timed: tuple[Timed, ...] = ()

    @property
    def key(self) -> tuple[Cell, str]:
        """What a table has one row for: the cell, under a minor version of Triton."""
        return self.cell, minor(self.versions["triton"])

    def of(self, plan: Plan) -> Row:
        """With the figures of ``plan``, one of ``timed``; as it is where it has none."""
        found = next((one for one in self.timed if one.plan == plan and plan != self.plan), None)
        ratio = self.ratio if found is None else found.ratio
        us = self.us if found is None else ratio * self.floor_us
        return replace(self, plan=plan, us=us, ratio=ratio)

    def to_json(self) -> dict[str, Any]:
        numbers = {name: _rounded(getattr(self, name)) for name in ("us", "floor_us", "ratio", "predicted_us")}
        kinds = {name: _rounded(ratio) for name, ratio in self.kinds.items()}
        told = {"kinds": kinds, "versions": self.versions, "date": self.date}
        cell = {name: value for name, value in asdict(self.cell).items() if name != "others" or value}
        timed = {"timed": [one.to_json() for one in self.timed]} if self.timed else {}
        return {"cell": cell, "plan": plan_to_json(self.plan), **numbers, **told, **timed}

    @staticmethod
    def from_json(document: Any) -> Row:
        """Raises InvalidArgumentError where ``document`` is no row of this version."""
        names = [f.name for f in fields(Row) if f.name != "timed"]
        if not isinstance(document, Mapping) or set(document) - {"timed"} != set(names):
            raise InvalidArgumentError(f"a row has the fields {', '.join(names)}; got {document!r}.")
        values = {name: document[name] for name in names}
        for name in ("us", "floor_us", "ratio", "predicted_us"):
            values[name] = _positive(name, values[name])
        values["kinds"] = {str(kind): _positive(kind, ratio) for kind, ratio in _object("kinds", values).items()}
        values["versions"] = {str(name): str(text) for name, text in _object("versions", values).items()}
        if missing := {"torch", "triton", "lora_kernels", "kernels"} - set(values["versions"]):
            raise InvalidArgumentError(f"versions of a row lack {', '.join(sorted(missing))}.")
        values |= {"cell": _cell(document["cell"]), "plan": plan_from_json(document["plan"])}
        timed = document.get("timed", [])
        if not isinstance(timed, list):
            raise InvalidArgumentError(f"timed of a row is {timed!r} and must be a list.")
        values["timed"] = tuple(map(Timed.from_json, timed))
        for plan in (values["plan"], *(one.plan for one in values["timed"])):
            if not is_of(plan, values["cell"].direction):
                raise InvalidArgumentError(f"a row of direction {values['cell'].direction} has the plan {plan}.")
        return Row(**values | {"date": str(document["date"])})


@dataclass(frozen=True, slots=True)
class Table:
    """A file's content. ``unknown``: rows that this version cannot read, as they were; ``reasons``: a sentence each."""

    device: DeviceName
    rows: tuple[Row, ...]
    unknown: tuple[Any, ...] = ()
    reasons: tuple[str, ...] = field(default=(), compare=False)

    def merged(self, rows: Iterable[Row]) -> Table:
        """With ``rows`` in the place of what there was for the same cells."""
        kept = {row.key: row for row in self.rows}
        kept |= {row.key: row for row in rows}
        return Table(self.device, tuple(sorted(kept.values(), key=_order)), self.unknown, self.reasons)

    def text(self) -> str:
        """The file's content: JSON, one row a line."""
        lines = ",\n".join("  " + json.dumps(row) for row in [*(row.to_json() for row in self.rows), *self.unknown])
        rows = f"[\n{lines}\n ]" if lines else "[]"
        return f'{{\n "format": {FORMAT},\n "device": {json.dumps(asdict(self.device))},\n "rows": {rows}\n}}\n'


def slug(name: str) -> str:
    """A device's name as a file's: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def minor(version: str) -> str:
    """The first two numbers of a version: "3.6.0+git" is 3.6."""
    return ".".join(re.findall(r"\d+", version.partition("+")[0])[:2])


def running_versions() -> dict[str, str]:
    """Of torch, triton and this package, without importing them."""
    found = {"lora_kernels": __version__}
    for package in ("torch", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a build of one's own, on sys.path
            found[package] = str(getattr(__import__(package), "__version__", "unknown"))
    return found


def versions_of(plan: Plan, running: Mapping[str, str]) -> dict[str, str]:
    """``running``, and the digest of the kernels that ``plan`` runs: the versions of its row."""
    return {**running, "kernels": digests()[plan.kind]}


def user_folder() -> Path | None:
    """Where the user's own tables are kept; None where there is no home folder."""
    cache = env.cache_folder()
    return None if cache is None else cache / "tuned"


def read(path: Path) -> Table:
    """The table in ``path``.

    Raises:
        TableError: it cannot be read, or is no table of this format. The sentence names the file and the remedy.
    """
    try:
        document = parsed(path.read_text(encoding="utf-8"))
        if document["format"] == 1:
            raise TableError(
                f"{path} has format 1, whose rows name one digest of all kernels, and not of those that each plan "
                "runs: remove the file; `lora-kernels tune` measures again."
            )
        if document["format"] != FORMAT:
            raise TableError(
                f"{path} has format {document['format']!r}, and this version of lora_kernels reads {FORMAT}: remove "
                "the file, or install the version that wrote it."
            )
        name, capability, multiprocessors = (document["device"][f.name] for f in fields(DeviceName))
        device = DeviceName(str(name), int(capability), int(multiprocessors))
        listed = list(document["rows"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(
            f"{path} is no tuned table ({type(error).__name__}: {error}): remove the file; `lora-kernels tune` "
            "measures again."
        ) from error
    rows, unknown, reasons = [], [], []
    for item in listed:
        try:
            rows.append(Row.from_json(item))
        except InvalidArgumentError as error:
            unknown.append(item)
            reasons.append(str(error))
    return Table(device, tuple(rows), tuple(unknown), tuple(reasons))


def merge_into(path: Path, device: DeviceName, rows: Iterable[Row]) -> Table:
    """Puts ``rows`` into the file, which others may write at the same time; returns what it holds then.

    A file that is no table is set aside as ``<name>.unreadable`` and begun anew.

    Raises:
        TableError: the table is of another device, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            found = _begun(path, device)
            if found.device != device:
                raise TableError(
                    f"{path} is the table of {found.device}, and this is {device}: name another file for this device."
                )
            merged = found.merged(rows)
            partial = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                partial.write_text(merged.text(), encoding="utf-8")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise TableError(
            f"the tuned table {path} cannot be written ({error}): make room there, or name another folder by "
            f"{env.CACHE_VARIABLE}, or another file."
        ) from error
    return merged


def _begun(path: Path, device: DeviceName) -> Table:
    if not path.exists():
        return Table(device, ())
    try:
        return read(path)
    except TableError:
        path.replace(path.with_name(f"{path.name}.unreadable"))
        return Table(device, ())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time, wherever it writes; the system lets go of it when the process ends.

    The lock is a file of the user's cache: in the folder of a table that is to be shipped, none is left.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where Triton runs on no GPU of ours
        yield
        return
    folder = user_folder() or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        with suppress(OSError):  # a file system without locks: the rename still keeps the file whole
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _order(row: Row) -> tuple[Any, ...]:
    c = row.cell
    return (c.direction, DTYPES.index(c.dtype), c.dropout, c.r, c.k, c.n, c.others, c.tokens, row.key[1])


def _cell(document: Any) -> Cell:
    names = {f.name: str(f.type) for f in fields(Cell) if f.name != "others"}
    others = document.get("others", []) if isinstance(document, Mapping) else []
    if not isinstance(document, Mapping) or set(document) - {"others"} != set(names):
        raise InvalidArgumentError(f"a cell has the fields {', '.join(names)}; got {document!r}.")
    kinds = {"int": int, "str": str, "bool": bool}
    for name, annotation in names.items():
        value = document[name]
        wrong = type(value) is not kinds[annotation]
        if wrong or (annotation == "int" and value < 1):
            raise InvalidArgumentError(f"{name} of a cell is {value!r} and must be a sensible {annotation}.")
    cell = Cell(**{name: document[name] for name in names}, others=_others(others))
    if cell.dtype not in DTYPES or cell.direction not in DIRECTIONS or cell.tokens & (cell.tokens - 1):
        raise InvalidArgumentError(
            f"a cell has a direction of {', '.join(DIRECTIONS)}, a dtype of {', '.join(DTYPES)} and 2^i tokens; got "
            f"{document!r}."
        )
    return cell


def _others(document: Any) -> tuple[tuple[int, int], ...]:
    """out_features and rank of each further layer of one x."""
    pairs = document if isinstance(document, (list, tuple)) else [document]
    if any(
        not isinstance(pair, (list, tuple)) or len(pair) != 2 or any(type(v) is not int or v < 1 for v in pair)
        for pair in pairs
    ):
        raise InvalidArgumentError(f"others of a cell is {document!r} and must be a list of [out_features, rank].")
    return tuple((n, r) for n, r in pairs)


def _object(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(values[name], Mapping):
        raise InvalidArgumentError(f"{name} of a row is {values[name]!r} and must be an object.")
    found: Mapping[str, Any] = values[name]
    return found


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        raise InvalidArgumentError(f"{name} of a row is {value!r} and must be a positive number.")
    return float(value)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
