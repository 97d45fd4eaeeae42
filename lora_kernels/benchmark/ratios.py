"""What DoRA, several adapters, a group and a whole block cost beside PEFT: a row for each cell of ``models``."""

from __future__ import annotations

import statistics

from .report import SHORT, Table, caption
from .results import Cell, Result
from .verdict import SLACK
from .workloads import LAYERS, SUBJECTS

__all__ = ["ratios"]

_DORA, _LORA = "-dora", "-lora"
_PEFT = "peft"


def ratios(result: Result, direction: str, conditions: dict[str, tuple[str, ...]] | None = None) -> Table:
    """Ratios to the frozen module, each provider with LoRA and "/ DoRA"; then the DoRA step over the LoRA step.

    The last columns are PEFT's time over that of each way to use this package, with LoRA, and "/" with DoRA: a user
    takes one of them, so the best of them is nobody's. The notes sum up each, with the cells where PEFT is ahead.
    """
    wanted = {"direction": (direction,), **(conditions or {})}
    chosen = [c for c in result.cells if c.workload.subject not in LAYERS and not c.left_out]
    cells = [c for c in chosen if all(c.workload.has(name, values) for name, values in wanted.items())]
    kinds = [n.removesuffix(_LORA) for n in result.titles if n.endswith(_LORA) or n == "group"]
    kinds = [k for k in kinds if any(_ratio(c, k + _LORA) or _ratio(c, k) for c in cells)]
    titles = {k: result.titles[k + _LORA if k != "group" else k].removesuffix(" LoRA") for k in kinds}
    pairs = [k for k in kinds if k != "group" and any(_ratio(c, k + _DORA) for c in cells)]
    varying = [f for f in ("dtype", "p") if len({getattr(c.workload, f) for c in cells}) > 1]
    header = ["what", "K→N", "M", *varying, f"{result.titles[result.floor]} ms", *titles.values()]
    ways = [k for k in kinds if k != _PEFT]
    header += [f"DoRA / LoRA, {titles[k]}" for k in pairs] + [f"PEFT / {titles[k]}" for k in ways]
    rows: list[list[str]] = []
    losses: set[tuple[int, int]] = set()
    quotients: dict[tuple[str, str], list[float]] = {(kind, k): [] for kind in ("LoRA", "DoRA") for k in ways}
    for cell in cells:
        w = cell.workload
        row = [w.subject, w.shape, str(w.tokens), *(SHORT.get(v, v) for v in (str(getattr(w, f)) for f in varying))]
        row.append(f"{cell.providers[result.floor].numbers['us'] / 1e3:.3g}")
        row += [_both(_ratio(cell, k if k == "group" else k + _LORA), _ratio(cell, k + _DORA)) for k in kinds]
        row += [_text(_over(_ratio(cell, k + _DORA), _ratio(cell, k + _LORA))) for k in pairs]
        for column, way in enumerate(ways, start=len(row)):
            gains = _gains(cell, way)
            for kind, gain in zip(("LoRA", "DoRA"), gains, strict=True):
                quotients[kind, way] += [gain] if gain is not None else []
            if any(gain is not None and _lost(gain) for gain in gains):
                losses.add((len(rows), column))
            row.append(_both(*gains))
        rows.append(row)
    notes = [
        f"{kind}: PEFT takes {statistics.geometric_mean(found):.2f} times as long as {titles[way]} (geometric mean of "
        f"{len(found)} cells; least {min(found):.2f}), and is ahead by more than {100 * SLACK:.0f} % in "
        f"{sum(map(_lost, found))}."
        for (kind, way), found in quotients.items()
        if found
    ]
    if (spread := _spread(cells)) is not None:
        notes.append(f"The rounds spread by ±{spread:.1f} % (20th to 80th percentile; median of what was timed).")
    notes += [f"{s}: {SUBJECTS[s]}." for s in dict.fromkeys(c.workload.subject for c in cells)]
    return Table(caption(result, direction, None), header, rows, frozenset(), frozenset(losses), notes)


def _gains(cell: Cell, way: str) -> tuple[float | None, float | None]:
    """PEFT's time over that of one way to use this package, with LoRA and with DoRA."""
    lora = _ratio(cell, way if way == "group" else way + _LORA)
    return _over(_ratio(cell, _PEFT + _LORA), lora), _over(_ratio(cell, _PEFT + _DORA), _ratio(cell, way + _DORA))


def _lost(gain: float) -> bool:
    return gain < 1.0 / (1.0 + SLACK)


def _spread(cells: list[Cell]) -> float | None:
    """Half the range of the rounds' ratios in percent, the median of all entries that have one."""
    timed = [e.numbers for c in cells for e in c.providers.values() if "ratio_p80" in e.numbers]
    found = [50 * (n["ratio_p80"] - n["ratio_p20"]) / n["ratio"] for n in timed if n["ratio_p80"] > n["ratio_p20"]]
    return statistics.median(found) if found else None


def _ratio(cell: Cell, name: str) -> float | None:
    entry = cell.providers.get(name)
    return None if entry is None else entry.ratio


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _both(lora: float | None, dora: float | None) -> str:
    return _text(lora) if dora is None else f"{_text(lora)} / {_text(dora)}"


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
