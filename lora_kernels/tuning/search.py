"""One cell: which plans are tried, how they are told apart, and which one is stored.

The model of the machine picks whom to try; a clock decides. All are timed in few rounds, the better half in more, and
what is left in many (successive halving); the best plain composition is in every stage. Whoever is the quickest of
many is so partly by luck, so a fused winner is then timed once more, beside the best composition alone: it is stored
only if there it is quicker by more than the clock's noise, else the composition is. So a choice never loses to the
composition, whatever the model held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..backends.triton.choose.blocks import Machine
from ..backends.triton.choose.candidates import candidates, predicted_seconds
from ..backends.triton.choose.group_plans import Apart
from ..backends.triton.choose.plans import Cell, Plan
from ..benchmark.timing import Timing
from ..errors import LoRAKernelsError

__all__ = [
    "CANDIDATES",
    "CONFIRMATION",
    "STAGES",
    "Found",
    "NothingToStoreError",
    "Refusal",
    "Trial",
    "beats",
    "search",
    "shortlist",
]

STAGES, CONFIRMATION = (3, 9, 25), 25  # rounds
CANDIDATES = 16
_FACTOR = 1.5  # of the best prediction: beyond it only the best of each flavour is tried
_CLOSE = 1.02  # of the best ratio so far: what is within it stays for the next stage, whatever its place
_LEAST_GAIN = 0.003
_SIGMAS = 2.0
# Of a normal distribution: the distance of its 20th and 80th percentiles, and the error of a median, in deviations.
_FIFTHS, _MEDIAN = 1.683, 1.2533


class NothingToStoreError(LoRAKernelsError, RuntimeError):
    """No plain composition ran for a cell, so there is nothing that a choice could be measured against."""


@dataclass(frozen=True)
class Refusal:
    """Why a plan was not timed. ``why``: "does not run", "is wrong" or "is not deterministic"; then a sentence."""

    why: str
    sentence: str

    @property
    def is_fault(self) -> bool:
        """Whether it points at a mistake in a kernel, rather than at a device that has no room for it."""
        return self.why != "does not run"


class Trial(Protocol):
    """A cell, set up on a device."""

    def admit(self, plans: Sequence[Plan]) -> Mapping[Plan, Refusal]:
        """Compiles, runs and checks them; returns those that are out."""

    def time(self, plans: Sequence[Plan], rounds: int) -> Mapping[Plan | None, Timing]:
        """Times them and the frozen linear layer, which is None, in turn; what failed meanwhile is left out."""

    def host(self, plans: Sequence[Plan]) -> Mapping[Plan, dict[str, float]]:
        """Seconds of the host for a call by each, by the name of each way to launch that there is here."""


@dataclass(frozen=True)
class Found:
    """The outcome for one cell.

    Attributes:
        plan: what is to be stored.
        composition: the best plain one, measured beside it; None where a composition is what is stored.
        floor: the frozen layer's timing, of the last rounds.
        timings: each plan's, of the last rounds that it took part in, best first.
        predicted: seconds that the model held each tried plan to take.
        refused: the plans that were out before the clock.
        runner_up: the best of the others that reached the last stage.
        host: seconds of the host for a call by each timed plan, by the name of the way to launch.
    """

    cell: Cell
    plan: Plan
    floor: Timing
    timings: dict[Plan, Timing]
    predicted: dict[Plan, float]
    refused: dict[Plan, Refusal]
    composition: Plan | None
    runner_up: Plan | None
    host: Mapping[Plan, dict[str, float]] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, float]:
        """The best ratio of each kind of plan."""
        best: dict[str, float] = {}
        for plan, timing in self.timings.items():
            best[plan.kind] = min(timing.ratio, best.get(plan.kind, math.inf))
        return best

    @property
    def front(self) -> list[Plan]:
        """The stored plan, and those that take the host less than whatever takes the device less; best first."""
        found: list[Plan] = []
        for plan in self.timings:
            if plan == self.plan or not any(self._spares(other, plan) for other in found):
                found.append(plan)
        return found

    def _spares(self, other: Plan, plan: Plan) -> bool:
        """Whether ``other`` takes the host no more than ``plan``, by every way to launch; but for the clock's noise."""
        left, right = self.host.get(other, {}), self.host.get(plan, {})
        return all(left.get(name, math.inf) <= _CLOSE * seconds for name, seconds in right.items())


def shortlist(machine: Machine, cell: Cell, limit: int = CANDIDATES) -> list[Plan]:
    """The plans worth measuring, best predicted first.

    The best of each flavour (kind, variant, early launch, a second stream) is always among them, so the compositions
    are. Then, up to ``limit`` in all, those within a factor of the best: first one for each further tile of the
    product, for what the ways to compute h differ by is little, then the rest.
    """
    every = candidates(machine, cell)
    predicted = {plan: predicted_seconds(machine, cell, plan) for plan in every}
    order = sorted(every, key=lambda plan: predicted[plan])
    best_of: dict[tuple[object, ...], Plan] = {}
    for plan in order:
        flavour = (getattr(plan, name, None) for name in ("kind", "variant", "pdl", "beside"))
        best_of.setdefault(tuple(flavour), plan)
    chosen = set(best_of.values())
    near = [plan for plan in order if predicted[plan] <= _FACTOR * predicted[order[0]]]
    tiles = {_tile(plan) for plan in chosen}
    for plan in near:
        if len(chosen) < limit and _tile(plan) not in tiles:
            chosen.add(plan)
            tiles.add(_tile(plan))
    for plan in near:
        if len(chosen) < limit:
            chosen.add(plan)
    return [plan for plan in order if plan in chosen]


def _tile(plan: Plan) -> tuple[object, ...]:
    """What makes the large product of ``plan``, apart from how h is computed and when it starts."""
    return plan.kind, *(getattr(plan, name, None) for name in ("variant", "gemm", "config", "product", "dx"))


def search(machine: Machine, cell: Cell, trial: Trial, limit: int = CANDIDATES) -> Found:
    """Measures the cell.

    Raises:
        NothingToStoreError: no plain composition runs there.
    """
    tried = shortlist(machine, cell, limit)
    refused = dict(trial.admit(tried))
    alive = [plan for plan in tried if plan not in refused]
    _need_composition(cell, alive, refused)
    timings: dict[Plan, Timing] = {}
    for rounds in STAGES:
        floor, latest = _time(trial, alive, rounds)
        refused |= {
            plan: Refusal("does not run", "It failed while it was timed.") for plan in alive if plan not in latest
        }
        _need_composition(cell, list(latest), refused)
        timings |= latest
        alive = _survivors(latest)
    order = sorted(latest, key=lambda plan: latest[plan].ratio)
    stored, composition = order[0], _best_composition(latest)
    if not _is_plain(stored):
        floor, latest = _time(trial, [stored, composition], CONFIRMATION)
        timings |= latest
        if stored not in latest or not beats(latest[stored], timings[composition]):
            stored = composition
    others = [plan for plan in order if plan != stored]
    return Found(
        cell=cell,
        plan=stored,
        floor=floor,
        timings=dict(sorted(timings.items(), key=lambda item: item[1].ratio)),
        predicted={plan: predicted_seconds(machine, cell, plan) for plan in tried},
        refused=refused,
        composition=None if _is_plain(stored) else composition,
        runner_up=others[0] if others else None,
        host=trial.host(list(timings)),
    )


def beats(left: Timing, right: Timing) -> bool:
    """Whether ``left`` is the quicker one, by more than the noise of both medians and by 0.3 % at the least."""
    noise = _SIGMAS * math.hypot(_error_of_median(left), _error_of_median(right))
    return right.ratio - left.ratio > max(noise, _LEAST_GAIN * right.ratio)


def _error_of_median(timing: Timing) -> float:
    return _MEDIAN * (timing.ratio_p80 - timing.ratio_p20) / _FIFTHS / math.sqrt(timing.rounds)


def _survivors(latest: Mapping[Plan, Timing]) -> list[Plan]:
    """The better half, what is as good as the best, and the best composition; best first."""
    order = sorted(latest, key=lambda plan: latest[plan].ratio)
    close = _CLOSE * latest[order[0]].ratio
    kept = {plan for i, plan in enumerate(order) if 2 * i < len(order) or latest[plan].ratio <= close}
    kept.add(_best_composition(latest))
    return [plan for plan in order if plan in kept]


def _best_composition(latest: Mapping[Plan, Timing]) -> Plan:
    return min(filter(_is_plain, latest), key=lambda plan: latest[plan].ratio)


def _is_plain(plan: Plan) -> bool:
    """What runs wherever anything does: a composition; of a group each layer by itself."""
    return plan.is_composition or isinstance(plan, Apart)


def _time(trial: Trial, plans: Sequence[Plan], rounds: int) -> tuple[Timing, dict[Plan, Timing]]:
    """The floor's timing, and the plans' in the same rounds."""
    measured = trial.time(plans, rounds)
    return measured[None], {plan: timing for plan, timing in measured.items() if plan is not None}


def _need_composition(cell: Cell, alive: Sequence[Plan], refused: Mapping[Plan, Refusal]) -> None:
    if not any(map(_is_plain, alive)):
        said = " ".join(f"{plan}: {refusal.sentence}" for plan, refusal in refused.items() if _is_plain(plan))
        raise NothingToStoreError(
            f"{cell} is not tuned, for no plain composition runs there. {said} Free the device's memory, or leave the "
            "cell out."
        )
