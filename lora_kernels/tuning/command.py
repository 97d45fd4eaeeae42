"""``lora-kernels tune``: options, progress while it runs, the table at the end."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import Progress, check_writable, json_text, progress_bars, progress_lines, stdout_console, write_file
from ..errors import BackendUnavailableError, InvalidArgumentError

if TYPE_CHECKING:
    from ..backends.triton.choose.blocks import Machine
    from ..backends.triton.choose.plans import Cell
    from ..benchmark.report import Table
    from .session import Outcome

__all__ = ["add_arguments", "run_command"]

MACHINES = ("h200", "h100")
_DEFAULT_TOKENS, _DEFAULT_RANKS = "8192,1,16,512,2048", "16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lora-kernels tune``."""
    from .cells import PRESETS
    from .cpu import PRESETS as OF_CPUS

    listed = "; ".join(f"{p.name}: {p.describe}" for p in PRESETS.values())
    listed += "; with --device cpu, " + "; ".join(f"{p.name}: {p.describe}" for p in OF_CPUS.values())
    what = parser.add_argument_group("what to tune", "of each list, and of each preset, the first values come first")
    what.add_argument("--preset", metavar="NAME", help=f"default: published, on CPUs cpu. {listed}")
    what.add_argument(
        "--shapes",
        metavar="KxN,...",
        help="in_features x out_features, such as 4096x4096; of layers of one x 4096x4096+1024+1024",
    )
    what.add_argument("--from-config", type=Path, metavar="FILE", help="the shapes of a transformers config.json")
    what.add_argument("--tokens", metavar="M,...", help=f"default: {_DEFAULT_TOKENS}; each stands for its power of 2")
    what.add_argument("--ranks", metavar="R,...", help=f"default: {_DEFAULT_RANKS}")
    what.add_argument("--dtypes", metavar="NAMES", help="of bfloat16, float16, float32, tf32; default: bfloat16")
    what.add_argument("--dropout", metavar="P,...", help="0, or any other for dropout; default: 0")
    what.add_argument("--directions", metavar="NAMES", help="of forward, backward; default: both")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for the whole run; by default there is none")
    parser.add_argument("--candidates", type=int, default=16, metavar="N", help="tried in each cell, about (16)")
    parser.add_argument("--again", action="store_true", help="measure also what the table has from these versions")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N, or cpu: own product or PyTorch's (cuda)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="put the rows into this table too, to ship it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there, cell by cell")
    parser.add_argument(
        "--dry-run", action="store_true", help="list cells, candidates and predictions; measure nothing"
    )
    parser.add_argument("--machine", choices=MACHINES, help="whom a dry run is for; by default the GPU that is here")


def run_command(args: argparse.Namespace) -> int:
    """Tunes; 1 if a candidate computed something wrong, which a fault in a kernel is, or a cell failed.

    Raises:
        InvalidArgumentError: an option is not what it must be.
        BackendUnavailableError: there is no GPU that the Triton backend runs on.
        TableError: a table cannot be written, or is another device's.
    """
    on_cpu = args.device == "cpu"
    cells = [] if on_cpu else _cells(args)
    for option, path in (("--json", args.json), ("--table", args.table)):
        if path is not None:
            check_writable(option, path)
    if args.machine and not args.dry_run:
        raise InvalidArgumentError(
            f"--machine {args.machine} was given without --dry-run: tuning measures what is here."
        )
    if args.candidates < 1 or (args.budget is not None and not args.budget > 0):
        raise InvalidArgumentError("--candidates must be at least 1, and --budget more than 0 seconds.")
    if on_cpu:
        return _on_cpu(args)
    return _dry_run(args, cells) if args.dry_run else _tune(args, cells)


def _on_cpu(args: argparse.Namespace) -> int:
    """The CPU library's choice between its own product and PyTorch's."""
    from .cpu_command import cells, dry_run, outcomes_table, table_path, tune

    found = cells(args)
    if args.dry_run:
        _print(dry_run(args, found))
        return 0
    with _progress() as progress:
        outcomes = tune(args, found, progress)
    _print(outcomes_table(outcomes))
    for sentence in dict.fromkeys(outcome.sentence for outcome in outcomes if outcome.sentence):
        print(sentence)
    print(f"The table is {table_path()}. It decides in processes that start from now on.")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _cells(args: argparse.Namespace) -> list[Cell]:
    from .cells import cells_of, directions, numbers, preset, shapes, shapes_of_model

    chosen = directions(args.directions or "forward,backward")
    lists = [args.tokens, args.ranks, args.dtypes, args.dropout]
    if args.shapes and args.from_config:
        raise InvalidArgumentError("--shapes and --from-config were given: name the shapes in one way.")
    if not args.shapes and not args.from_config:
        if any(lists):
            raise InvalidArgumentError(
                "--tokens, --ranks, --dtypes and --dropout go with --shapes or --from-config; a preset has its own. "
                "Add --shapes 4096x4096, for example."
            )
        return preset(args.preset or "published").cells(chosen)
    if args.preset:
        raise InvalidArgumentError(f"--preset {args.preset} has its own shapes: leave it out, or name no others.")
    return cells_of(
        shapes(args.shapes) if args.shapes else shapes_of_model(args.from_config),
        numbers("--tokens", args.tokens or _DEFAULT_TOKENS),
        numbers("--ranks", args.ranks or _DEFAULT_RANKS),
        (args.dtypes or "bfloat16").split(","),
        [_probability(part) for part in (args.dropout or "0").split(",")],
        chosen,
    )


def _probability(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidArgumentError(f"--dropout {text} was given: it must be numbers from 0 to below 1.") from error


def _dry_run(args: argparse.Namespace, cells: list[Cell]) -> int:
    from .report import dry_run_json, dry_run_table

    if args.machine:
        machine, name = _named_machine(args.machine)
    else:
        from ..backends.triton.choose.blocks import machine_of

        device = _device(args.device, "name one by --machine h200, or run it where a GPU is")
        machine, name = machine_of(device), str(device)
    if args.json:
        document = {"machine": name, "cells": dry_run_json(cells, machine, args.candidates)}
        write_file(args.json, json_text(document) + "\n")
    _print(dry_run_table(cells, machine, name, args.candidates))
    return 0


def _named_machine(name: str) -> tuple[Machine, str]:
    from ..benchmark.roofline import MACHINES as KNOWN

    machine = KNOWN[name]
    assert machine.gpu is not None
    return machine.gpu, machine.name


def _tune(args: argparse.Namespace, cells: list[Cell]) -> int:
    device = _device(
        args.device, "run it where a GPU is; `lora-kernels tune --dry-run --machine h200` shows what it does"
    )
    from ..backends.triton import operators
    from ..backends.triton.choose import tuned
    from ..backends.triton.choose.table import TableError, slug, user_folder
    from .bench import DeviceBench
    from .report import outcomes_json, outcomes_table, sentences
    from .session import Options, run

    folder = user_folder()
    if folder is None:
        raise TableError("There is no home folder for the tuned table: name a folder by LORA_KERNELS_CACHE.")
    bench = DeviceBench(device)
    own = folder / f"{slug(bench.name.name)}.json"
    tables = (own, *([args.table] if args.table else []))
    options = Options(tables, float("inf") if args.budget is None else args.budget, args.again, args.candidates)
    head: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": {"name": bench.name.name, "capability": bench.name.capability, "sms": bench.name.multiprocessors},
        "versions": bench.versions,
        "budget": args.budget,
        "table": str(own),
    }

    def keep(outcomes: list[Outcome]) -> None:
        if args.json:
            text = json_text({**head, "cells": outcomes_json(outcomes, bench.machine)})
            write_file(args.json, text + "\n")

    with _progress() as progress:
        outcomes = run(cells, bench, options, progress, keep)
    tuned.forget()
    operators.forget()
    _print(outcomes_table(outcomes, bench.name.name, bench.machine))
    for sentence in sentences(outcomes):
        print(sentence)
    print(f"The table is {own}.")
    return 1 if _failed(outcomes) else 0


def _failed(outcomes: list[Outcome]) -> bool:
    faults = (refusal for outcome in outcomes if outcome.found for refusal in outcome.found.refused.values())
    return any(outcome.status == "failed" for outcome in outcomes) or any(refusal.is_fault for refusal in faults)


def _device(name: str, remedy: str) -> Any:
    """The CUDA device of that name.

    Raises:
        InvalidArgumentError: it is no name of a CUDA device.
        BackendUnavailableError: it is not here, or the Triton backend does not run on it.
    """
    import torch

    from .. import dispatch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type != "cuda":
        raise InvalidArgumentError(f"--device {name} was given: it must be cuda, cuda:N or cpu.")
    count = torch.cuda.device_count()
    index = (torch.cuda.current_device() if count else 0) if device.index is None else device.index
    reasons = dispatch.backend("triton").why_not(dispatch.Problem("cuda", torch.bfloat16)) if count else []
    if index >= count:
        build = "a CPU build of torch" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda}"
        reasons = [f"PyTorch sees {count} CUDA devices ({build}), and {name} was asked for."]
    if reasons:
        raise BackendUnavailableError(
            f"tune measures on an NVIDIA GPU of compute capability 8.0 or later, and there is none to be used: "
            f"{' '.join(reasons)} What to do: {remedy}."
        )
    return torch.device("cuda", index)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Bars where rich is installed, else lines: a GPU machine without network often has PyTorch and nothing else."""
    if _rich():
        with progress_bars() as bars:
            yield bars
    else:
        yield progress_lines("lora-kernels")


def _print(content: Table) -> None:
    from ..benchmark.report import markdown, rich_table

    if _rich():
        stdout_console().print(rich_table(content))
    else:
        print(markdown(content))


def _rich() -> bool:
    return importlib.util.find_spec("rich") is not None
