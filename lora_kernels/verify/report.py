"""What ``verify`` found, as data: for the tables, for JSON, and for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Check", "Failure", "NotRun", "Report", "Rounding", "Row"]


@dataclass(frozen=True)
class Row:
    """One output of one backend in one dtype, over all cases.

    Attributes:
        ratio: the largest error, over the cases, in units of plain PyTorch's in the same dtype, made or expected;
            cases beyond fp16's range are left out, for theirs is in fp32. None in float64, where the yardstick is the
            exact result itself, and where no case ran.
        error, limit: relative Frobenius error against float64, and what was allowed, in the case that came closest to
            its limit (the worst row of the tensor counts too).
        worst_case: the name of that case.
        cases, failed: how many ran, and how many of them failed.
        weights: the form of W, such as "nf4"; empty: plain numbers.
    """

    backend: str
    device: str
    dtype: str
    output: str
    ratio: float | None
    error: float
    limit: float
    worst_case: str
    cases: int
    failed: int
    weights: str = ""

    @property
    def passed(self) -> bool:
        return self.failed == 0


@dataclass(frozen=True)
class Failure:
    """One case that failed, and the sentence that says how."""

    backend: str
    dtype: str
    case: str
    sentence: str


@dataclass(frozen=True)
class Check:
    """A property that holds or not: gradcheck, determinism, the share of elements that dropout keeps."""

    backend: str
    dtype: str
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Rounding:
    """The error of y against float64 in bf16 of one way to compose the layer, alone and over PEFT's composition's."""

    composition: str
    error: float
    over_peft: float


@dataclass(frozen=True)
class NotRun:
    """A backend that does not run in ``dtypes`` here, and why."""

    backend: str
    dtypes: tuple[str, ...]
    reasons: str


@dataclass(frozen=True)
class Report:
    """What :func:`lora_kernels.verify.run` returns."""

    versions: Mapping[str, str | None]
    device: str
    seed: int
    rows: tuple[Row, ...] = ()
    failures: tuple[Failure, ...] = ()
    checks: tuple[Check, ...] = ()
    rounding: tuple[Rounding, ...] = ()
    not_run: tuple[NotRun, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether something ran and nothing failed."""
        sound = all(row.passed for row in self.rows) and all(check.passed for check in self.checks)
        return bool(self.rows) and not self.failures and sound

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold, with ``passed``."""
        return {"passed": self.passed, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """What :meth:`to_dict` gave, as it comes back from JSON."""
        rows: list[dict[str, Any]] = [
            {
                name: float(value) if name in ("ratio", "error") and value is not None else value
                for name, value in row.items()
            }
            for row in data["rows"]
        ]
        return cls(
            versions=data["versions"],
            device=data["device"],
            seed=data["seed"],
            rows=tuple(Row(**row) for row in rows),
            failures=tuple(Failure(**item) for item in data["failures"]),
            checks=tuple(Check(**item) for item in data["checks"]),
            rounding=tuple(Rounding(**item) for item in data["rounding"]),
            not_run=tuple(NotRun(i["backend"], tuple(i["dtypes"]), i["reasons"]) for i in data["not_run"]),
            seconds=data["seconds"],
        )
