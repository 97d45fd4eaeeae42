"""Who is ahead in a cell: the automatic choice, which a user gets, or the best rival; and how sure that is.

A backend that was named, or another plan, is no part of the verdict: whoever calls the layer gets the automatic choice.
A slack is stated wherever one is allowed, and the noise of the rounds stands beside the verdict.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .results import Cell, Entry, Result

__all__ = ["AUTOMATIC", "SLACK", "Verdict", "memory_summary", "summary", "verdict_of"]

AUTOMATIC = "auto"
SLACK = 0.02  # a lead within it is told as none: timers cannot be trusted for more


@dataclass(frozen=True)
class Verdict:
    """The automatic choice beside the best rival of one cell.

    Attributes:
        rival: the quickest provider that is not this package.
        gain: its ratio to the floor over ours; above 1 ours is the quicker one.
        noise: how far the rounds spread, 20th to 80th percentile, as half that share of the ratio: ours or the rival's,
            the wider one; NaN where that is not known: in a prediction.
        apart: whether those two ranges do not overlap.
    """

    rival: str
    gain: float
    noise: float
    apart: bool

    @property
    def sign(self) -> int:
        """1: ours is ahead by more than the slack; -1: the rival is; 0: level."""
        if self.gain > 1.0 + SLACK:
            return 1
        return -1 if self.gain < 1.0 / (1.0 + SLACK) else 0

    def __str__(self) -> str:
        """``+8 % ±1``, ``−3 % ±1``; ``= ±1`` within the slack."""
        lead = {1: f"+{100 * (self.gain - 1):.0f} %", -1: f"−{100 * (1 / self.gain - 1):.0f} %", 0: "="}[self.sign]
        return lead if math.isnan(self.noise) else f"{lead} ±{100 * self.noise:.1f}"


def verdict_of(result: Result, cell: Cell) -> Verdict | None:
    """Measured, or of a prediction predicted; None where the automatic choice or every rival is missing."""
    ratios = {name: ratio for name in result.titles if (ratio := _ratio(result, cell, name)) is not None}
    rivals = {name: ratio for name, ratio in ratios.items() if name != result.floor and name not in result.ours}
    if AUTOMATIC not in ratios or not rivals:
        return None
    rival = min(rivals, key=rivals.__getitem__)
    gain = rivals[rival] / ratios[AUTOMATIC]
    ours, theirs = (_range(cell.providers[name]) for name in (AUTOMATIC, rival))
    if result.predicted or ours is None or theirs is None:
        return Verdict(rival, gain, math.nan, True)
    noise = max(_half(ours) / ratios[AUTOMATIC], _half(theirs) / rivals[rival])
    return Verdict(rival, gain, noise, ours[1] < theirs[0] or theirs[1] < ours[0])


def summary(result: Result, cells: Sequence[Cell]) -> list[str]:
    """The verdicts of ``cells`` as sentences; a cell without one is told too."""
    found = [verdict for cell in cells if (verdict := verdict_of(result, cell)) is not None]
    if not found:
        return ["The automatic choice has no rival beside it here: nothing is said of who is ahead."]
    signs = [verdict.sign for verdict in found]
    of, slack = f"of {len(found)} cells", f"{100 * SLACK:.0f} %"
    level = signs.count(0)
    best = Counter(result.titles[verdict.rival] for verdict in found if verdict.sign < 0)
    who = f" ({', '.join(f'{title} {count}' for title, count in best.most_common())})" if best else ""
    behind = f"A rival is ahead of the automatic choice by more than {slack} in {signs.count(-1)} {of}{who}"
    ahead = f"the automatic choice of every rival in {signs.count(1)}"
    told = [f"{behind}, {ahead}; {level} {'is' if level == 1 else 'are'} level."]
    spread = [100 * verdict.noise for verdict in found if not math.isnan(verdict.noise)]
    if spread:
        told.append(
            f"The rounds spread by ±{statistics.median(spread):.1f} % (20th to 80th percentile; median of the cells, "
            f"at most ±{max(spread):.1f} %)."
        )
        if close := sum(verdict.sign != 0 and not verdict.apart for verdict in found):
            told.append(f"In {close} of the cells with a lead both ranges overlap.")
    if missing := len(cells) - len(found):
        told.append(f"{missing} more have no verdict: the automatic choice or every rival is missing there.")
    return told


def memory_summary(result: Result, cells: Sequence[Cell]) -> list[str]:
    """Likewise of bytes, which have no noise and so no slack: what is kept for backward, and the peak of a step.

    Nothing is said where the automatic choice has no rival.
    """
    told = []
    for field, what in (("rest", "keeps less"), ("peak", "has a lower peak")):
        found = [pair for cell in cells if (pair := _bytes(result, cell, field)) is not None]
        behind = sum(theirs < ours for ours, theirs in found)
        if found:
            told.append(f"A rival {what} than the automatic choice in {behind} of {len(found)} cells.")
    return told


def _bytes(result: Result, cell: Cell, field: str) -> tuple[float, float] | None:
    """The automatic choice's, and the least of the rivals'."""
    found = {n: float(e.numbers[field]) for n, e in cell.providers.items() if field in e.numbers and n != result.floor}
    rivals = [value for name, value in found.items() if name not in result.ours]
    return (found[AUTOMATIC], min(rivals)) if AUTOMATIC in found and rivals else None


def _ratio(result: Result, cell: Cell, name: str) -> float | None:
    entry = cell.providers.get(name)
    if entry is None:
        return None
    return entry.predicted.get("ratio") if result.predicted else entry.ratio


def _range(entry: Entry) -> tuple[float, float] | None:
    """The 20th and 80th percentile of the ratio over the rounds."""
    low, high = (entry.numbers.get(name) for name in ("ratio_p20", "ratio_p80"))
    return None if low is None or high is None else (float(low), float(high))


def _half(ends: tuple[float, float]) -> float:
    return (ends[1] - ends[0]) / 2
