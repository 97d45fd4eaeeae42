"""``lora-kernels tune --device cpu``: which cells, progress, the table at the end."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from ..backends.native import choice
from ..backends.native.choice_table import CHOICES, ProductCell, table_path
from ..benchmark.report import SHORT, Table
from ..console import json_text, write_file
from ..errors import InvalidArgumentError
from .cells import directions, numbers, shapes, shapes_of_model
from .cpu import COMPOSITION, Outcome, cells_of, preset, run

__all__ = ["cells", "dry_run", "outcomes_table", "table_path", "tune"]

_DEFAULT_PRESET, _DEFAULT_TOKENS, _DEFAULT_DTYPES = "cpu", "16,512,1,64,4,8", "bfloat16,float32"
_PLACE = ["pass", "K→N", "M", "dtype"]
_OF_GPUS = {"ranks": None, "dropout": None, "machine": None, "table": None, "candidates": 16}


def cells(args: argparse.Namespace) -> list[ProductCell]:
    """What the options name.

    Raises:
        InvalidArgumentError: an option that is for GPUs, or one that is not what it must be.
    """
    for name, default in _OF_GPUS.items():
        if getattr(args, name) != default:
            raise InvalidArgumentError(
                f"--{name} was given with --device cpu: there the ways are two, timed at r = 16 without dropout. "
                "Leave it out."
            )
    chosen = directions(args.directions or "forward,backward")
    if args.shapes and args.from_config:
        raise InvalidArgumentError("--shapes and --from-config were given: name the shapes in one way.")
    if not args.shapes and not args.from_config:
        if args.tokens or args.dtypes:
            raise InvalidArgumentError(
                "--tokens and --dtypes go with --shapes or --from-config; a preset has its own. Add "
                "--shapes 4096x4096, for example."
            )
        return preset(args.preset or _DEFAULT_PRESET).cells(chosen)
    if args.preset:
        raise InvalidArgumentError(f"--preset {args.preset} has its own shapes: leave it out, or name no others.")
    given = shapes(args.shapes) if args.shapes else shapes_of_model(args.from_config)
    return cells_of(
        list(dict.fromkeys((k, n) for k, *ns in given for n in ns)),  # here each product is one by itself
        numbers("--tokens", args.tokens or _DEFAULT_TOKENS),
        [part.strip() for part in (args.dtypes or _DEFAULT_DTYPES).split(",")],
        chosen,
    )


def dry_run(args: argparse.Namespace, found: Sequence[ProductCell]) -> Table:
    """Every cell with what the library does there now; nothing is measured."""
    _load()
    machine = choice.machine()
    rows = [[*_place(cell), choice.chosen(cell), choice.model(machine.features, cell)] for cell in found]
    if args.json:
        document = {"machine": asdict(machine), "cells": [asdict(cell) for cell in found]}
        write_file(args.json, json_text(document) + "\n")
    notes = [f"{len(found)} cells would be measured for {table_path()}. Nothing was run."]
    caption = f"a dry run on {machine.processor} ({machine.features}), {machine.threads} threads"
    return Table(caption, [*_PLACE, "now", "the model"], rows, frozenset(), frozenset(), notes)


def tune(args: argparse.Namespace, found: Sequence[ProductCell], progress: Any) -> list[Outcome]:
    """Measures, and stores each cell as soon as it is done; ``--json``'s file likewise."""
    _load()
    path, machine = table_path(), choice.machine()
    head = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": asdict(machine),
        "budget": args.budget,
        "table": str(path),
    }

    def keep(outcomes: list[Outcome]) -> None:
        if args.json:
            document = {**head, "cells": [_outcome_json(outcome) for outcome in outcomes]}
            write_file(args.json, json_text(document) + "\n")

    budget = float("inf") if args.budget is None else args.budget
    return run(found, path, budget, args.again, progress, keep)


def outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    """One row a measured cell: each way's time over the frozen layer's, and the choice."""
    names = [*CHOICES, COMPOSITION]
    rows = [
        [*_place(o.cell), f"{o.row.floor_us:.0f}", *(f"{o.row.ratios[n]:.3f}" for n in names), o.row.choice]
        for o in outcomes
        if o.row is not None
    ]
    counts = Counter(outcome.status for outcome in outcomes)
    notes = [", ".join(f"{count} cells {status}" for status, count in counts.items()) + "."]
    lost = [str(outcome.cell) for outcome in outcomes if outcome.composition_wins]
    if lost:
        notes.append(f"The plain composition is faster than either in {len(lost)} cells: {', '.join(lost)}.")
    caption = "time over the frozen nn.Linear's of the same pass and round, median"
    return Table(caption, [*_PLACE, "floor, µs", *names, "chosen"], rows, frozenset(), frozenset(), notes)


def _load() -> None:
    """Loads the library, and the table that there is, as any first use does."""
    import torch

    from .. import dispatch

    dispatch.select("cpu", torch.float32, "native")


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "cell": asdict(outcome.cell),
        "status": outcome.status,
        "sentence": outcome.sentence,
        "row": None if outcome.row is None else asdict(outcome.row),
        "timings": {name: asdict(timing) for name, timing in outcome.timings.items()},
    }


def _place(cell: ProductCell) -> list[str]:
    return [cell.direction, f"{cell.k}→{cell.n}", str(cell.tokens), SHORT.get(cell.dtype, cell.dtype)]
