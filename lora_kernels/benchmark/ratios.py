"""What DoRA, several adapters, a group and a whole block cost beside PEFT: a row for each cell of ``models``."""

from __future__ import annotations

import statistics

from .report import SHORT, SLOWER, Table, caption
from .results import Cell, Result
from .workloads import LAYER, SUBJECTS

__all__ = ["ratios"]

_DORA, _LORA = "-dora", "-lora"


def ratios(result: Result, direction: str, conditions: dict[str, tuple[str, ...]] | None = None) -> Table:
    """Ratios to the frozen module, each provider with LoRA and "/ DoRA"; then the DoRA step over the LoRA step.

    The last column is PEFT's time over the best of ours, with LoRA, and "/" with DoRA. The notes sum that up.
    """
    wanted = {"direction": (direction,), **(conditions or {})}
    chosen = [c for c in result.cells if c.workload.subject != LAYER and not c.left_out]
    cells = [c for c in chosen if all(c.workload.has(name, values) for name, values in wanted.items())]
    kinds = [n.removesuffix(_LORA) for n in result.titles if n.endswith(_LORA) or n == "group"]
    kinds = [k for k in kinds if any(_ratio(c, k + _LORA) or _ratio(c, k) for c in cells)]
    titles = {k: result.titles[k + _LORA if k != "group" else k].removesuffix(" LoRA") for k in kinds}
    pairs = [k for k in kinds if k != "group" and any(_ratio(c, k + _DORA) for c in cells)]
    varying = [f for f in ("dtype", "p") if len({getattr(c.workload, f) for c in cells}) > 1]
    header = ["what", "K→N", "M", *varying, f"{result.titles[result.floor]} ms", *titles.values()]
    header += [f"DoRA / LoRA, {titles[k]}" for k in pairs] + ["PEFT / ours"]
    rows: list[list[str]] = []
    losses: set[tuple[int, int]] = set()
    quotients: dict[str, list[float]] = {"LoRA": [], "DoRA": []}
    for cell in cells:
        w = cell.workload
        row = [w.subject, w.shape, str(w.tokens), *(SHORT.get(v, v) for v in (str(getattr(w, f)) for f in varying))]
        row.append(f"{cell.providers[result.floor].numbers['us'] / 1e3:.3g}")
        row += [_both(_ratio(cell, k if k == "group" else k + _LORA), _ratio(cell, k + _DORA)) for k in kinds]
        row += [_text(_over(_ratio(cell, k + _DORA), _ratio(cell, k + _LORA))) for k in pairs]
        gains = [_gain(result, cell, suffix) for suffix in (_LORA, _DORA)]
        for kind, gain in zip(quotients, gains, strict=True):
            quotients[kind] += [gain] if gain is not None else []
        if any(gain is not None and gain < 1 / SLOWER for gain in gains):
            losses.add((len(rows), len(header) - 1))
        rows.append([*row, _both(*gains)])
    notes = [
        f"{kind}: PEFT takes {statistics.geometric_mean(found):.2f} times as long as the best of ours (geometric mean "
        f"of {len(found)} cells; least {min(found):.2f})."
        for kind, found in quotients.items()
        if found
    ]
    notes += [f"{s}: {SUBJECTS[s]}." for s in dict.fromkeys(c.workload.subject for c in cells)]
    return Table(caption(result, direction, None), header, rows, frozenset(), frozenset(losses), notes)


def _gain(result: Result, cell: Cell, suffix: str) -> float | None:
    """PEFT's time over the best of ours with LoRA or DoRA."""
    own = [n for n in result.ours if n.endswith(suffix) or (n == "group" and suffix == _LORA)]
    found = [ratio for n in own if (ratio := _ratio(cell, n)) is not None]
    return _over(_ratio(cell, f"peft{suffix}"), min(found, default=None))


def _ratio(cell: Cell, name: str) -> float | None:
    entry = cell.providers.get(name)
    return None if entry is None else entry.ratio


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _both(lora: float | None, dora: float | None) -> str:
    return _text(lora) if dora is None else f"{_text(lora)} / {_text(dora)}"


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
