"""What people and programs get to see: the table at the end, what a dry run would try, and the JSON of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..backends.triton.choose.blocks import Machine
from ..backends.triton.choose.candidates import candidates, predicted_seconds
from ..backends.triton.choose.plans import Cell, Plan, plan_to_json
from ..benchmark import roofline
from ..benchmark.providers import FLOOR
from ..benchmark.report import SHORT, Table
from ..benchmark.timing import Timing
from ..benchmark.workloads import Workload
from .search import CANDIDATES, Found, shortlist
from .session import Outcome

__all__ = ["dry_run_json", "dry_run_table", "outcomes_json", "outcomes_table", "sentences"]

_MICRO = 1e6
_PLACE = ["pass", "K→N", "M", "r", "dtype", "dropout"]


def outcomes_table(outcomes: Sequence[Outcome], device: str, machine: Machine) -> Table:
    """One row a cell that has a choice: the winner, its ratio beside the predicted one, and who came next."""
    header = [*_PLACE, "floor, µs", "chosen", "ratio", "predicted", "next", "ratio of next"]
    rows = []
    for outcome in outcomes:
        if (row := outcome.row) is None:
            continue
        expected = predicted_ratio(machine, row.cell, row.predicted_us / _MICRO)
        found = outcome.found
        after = found.runner_up if found is not None else None
        told = ["was there", "–"] if found is None else ["–", "–"]
        if found is not None and after is not None:
            told = [str(after), _with_spread(found.timings[after])]
        reached = f"{row.ratio:.3f}" if found is None else _with_spread(found.timings[row.plan])
        numbers = [f"{row.floor_us:.1f}", str(row.plan), reached, _ratio_text(expected)]
        rows.append([*_place(row.cell), *numbers, *told])
    caption = f"tuned on {device}: time over the frozen nn.Linear's of the same pass and round, median, ± their spread"
    notes = [_counted(outcomes), *_graphs(outcomes)]
    return Table(caption, header, rows, frozenset(), frozenset(), notes)


def dry_run_table(cells: Sequence[Cell], machine: Machine, name: str, limit: int = CANDIDATES) -> Table:
    """Every cell with the plans that would be tried, and what the model holds them to take."""
    header = [*_PLACE, "candidate", "predicted, µs", "over the floor"]
    rows = []
    for cell in cells:
        for i, plan in enumerate(shortlist(machine, cell, limit)):
            seconds = predicted_seconds(machine, cell, plan)
            numbers = [f"{seconds * _MICRO:.1f}", _ratio_text(predicted_ratio(machine, cell, seconds))]
            rows.append([*(_place(cell) if i == 0 else [""] * len(_PLACE)), str(plan), *numbers])
    every = sum(len(candidates(machine, cell)) for cell in cells)
    notes = [f"{len(cells)} cells; of {every} plans {len(rows)} would be measured. Nothing was run."]
    return Table(f"a dry run for {name}: predictions only", header, rows, frozenset(), frozenset(), notes)


def sentences(outcomes: Sequence[Outcome]) -> list[str]:
    """What the table does not show: cells that failed, and what was refused, faults in full."""
    told = [f"{outcome.cell}: {outcome.sentence}" for outcome in outcomes if outcome.sentence]
    stepped: Counter[str] = Counter()
    for outcome in outcomes:
        for plan, refusal in (outcome.found.refused if outcome.found else {}).items():
            if refusal.is_fault:
                told.append(f"{outcome.cell}: {plan} {refusal.why}. {refusal.sentence}")
            else:
                stepped[refusal.sentence] += 1
    told += [f"{count} candidates were stepped over: {sentence}" for sentence, count in stepped.most_common()]
    return told


def outcomes_json(outcomes: Sequence[Outcome], machine: Machine) -> list[dict[str, Any]]:
    """Every cell with everything that was measured."""
    return [
        {
            "cell": asdict(outcome.cell),
            "status": outcome.status,
            "sentence": outcome.sentence,
            "seconds": outcome.seconds,
            "row": None if outcome.row is None else outcome.row.to_json(),
            **({} if outcome.found is None else _found_json(outcome.found, machine)),
        }
        for outcome in outcomes
    ]


def dry_run_json(cells: Sequence[Cell], machine: Machine, limit: int = CANDIDATES) -> list[dict[str, Any]]:
    """Every cell with the plans that would be tried."""

    def one(cell: Cell, plan: Plan) -> dict[str, Any]:
        seconds = predicted_seconds(machine, cell, plan)
        ratio = predicted_ratio(machine, cell, seconds)
        return {**_plan_json(plan), "predicted_us": seconds * _MICRO, "predicted_ratio": ratio}

    return [
        {"cell": asdict(cell), "candidates": [one(cell, plan) for plan in shortlist(machine, cell, limit)]}
        for cell in cells
    ]


def predicted_ratio(machine: Machine, cell: Cell, seconds: float) -> float | None:
    """``seconds`` over what the model holds the frozen layer to take; None where it knows nothing of that."""
    if cell.tf32 or machine.interpreter:
        return None
    direction = "dx" if cell.direction == "backward" else "forward"
    floors = []
    for member in cell.members:
        work = Workload(direction, cell.tokens, cell.k, member.n, member.r, cell.dtype)
        floors.append(roofline.cost(FLOOR, work, roofline.gpu_machine("this", machine)))
    return None if None in floors else seconds / sum(floor.seconds for floor in floors if floor is not None)


def _found_json(found: Found, machine: Machine) -> dict[str, Any]:
    def one(plan: Plan, timing: Timing) -> dict[str, Any]:
        seconds = found.predicted[plan]
        expected = {"predicted_us": seconds * _MICRO, "predicted_ratio": predicted_ratio(machine, found.cell, seconds)}
        host = {way: taken * _MICRO for way, taken in found.host.get(plan, {}).items()}
        return {**_plan_json(plan), **_timing_json(timing), **expected, "host_us": host}

    return {
        "floor": _timing_json(found.floor),
        "measured": [one(plan, timing) for plan, timing in found.timings.items()],
        "refused": [{**_plan_json(plan), **asdict(refusal)} for plan, refusal in found.refused.items()],
        "beaten_composition": None if found.composition is None else _plan_json(found.composition),
        "next": None if found.runner_up is None else _plan_json(found.runner_up),
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {"plan": plan_to_json(plan), "name": str(plan)}


def _timing_json(timing: Timing) -> dict[str, Any]:
    numbers = asdict(timing)
    for seconds, micro in (("median", "us"), ("p20", "us_p20"), ("p80", "us_p80"), ("difference", "over_floor_us")):
        numbers[micro] = numbers.pop(seconds) * _MICRO
    return numbers


def _place(cell: Cell) -> list[str]:
    dtype = SHORT.get(cell.dtype, cell.dtype)
    ns, dropout = "+".join(map(str, cell.ns)), "yes" if cell.dropout else "no"
    return [cell.direction, f"{cell.k}→{ns}", str(cell.tokens), str(cell.r), dtype, dropout]


def _ratio_text(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}"


def _with_spread(timing: Timing) -> str:
    """The ratio, and half the range of the rounds from the 20th to the 80th percentile."""
    return f"{timing.ratio:.3f} ±{(timing.ratio_p80 - timing.ratio_p20) / 2:.3f}"


def _graphs(outcomes: Sequence[Outcome]) -> list[str]:
    """What a time in a CUDA graph leaves out, where that was the clock."""
    timed = [(o.row.plan, o.found.timings[o.row.plan]) for o in outcomes if o.row is not None and o.found is not None]
    chosen = [plan for plan, timing in timed if timing.clock == "graph"]
    if not chosen:
        return []
    others = sum(len(o.row.timed) > 1 for o in outcomes if o.row is not None and o.found is not None)
    second = f" Outside of graphs {others} cells choose by the host's time too, which was measured." if others else ""
    return [f"{len(chosen)} choices were timed in CUDA graphs, where launching costs nothing.{second}"]


def _counted(outcomes: Sequence[Outcome]) -> str:
    counts = Counter(outcome.status for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    kinds = Counter(outcome.row.plan.kind for outcome in outcomes if outcome.row is not None)
    chosen = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return (
        f"{counts['tuned']} cells tuned in {seconds:.0f} s, {counts['kept']} kept, {counts['failed']} failed, "
        f"{counts['not reached']} not reached"
        + (f", {counts['one way']} without a choice." if counts["one way"] else ".")
        + (f" Chosen: {chosen}." if chosen else "")
    )
