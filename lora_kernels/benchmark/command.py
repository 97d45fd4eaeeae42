"""``lora-kernels bench``: arguments, progress while it runs, tables at the end."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import (
    Progress,
    check_plot,
    check_writable,
    names,
    progress_bars,
    progress_lines,
    seed_of,
    stdout_console,
    write_file,
)
from ..errors import InvalidArgumentError
from . import rebuilt
from .presets import PRESETS, WHOLE, preset
from .workloads import DIRECTIONS, DTYPES, FIELDS, LAYERS

if TYPE_CHECKING:
    from .preset import Preset
    from .providers import Provider
    from .results import Cell, Result

__all__ = ["add_arguments", "run"]

MACHINES_KNOWN = ("h100", "h200")
# What the presets of whole models do not take.
_OF_CELLS = ("peers", "dtype", "only", "plot", "resume", "limit", "predict", "show", "profile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench`` to ``parser``."""
    listed = "; ".join(f"{p.name}: {p.describe}" for p in PRESETS.values())
    block = (
        "gpu-block: a decoder block of Llama-3-8B's sizes, trained for a step, beside PEFT's; on any device; "
        "gpu-llama: all of Llama-3-8B, or another --model, likewise, on a GPU of 80 GB; llama-small: a tiny one, "
        "on any device"
    )
    rival = f"{rebuilt.NAME}, " if rebuilt.why_absent() is None else ""
    parser.add_argument(
        "--preset", default="quick", metavar="NAME", help=f"what to measure (default: quick). {listed}; {block}"
    )
    parser.add_argument("--model", metavar="NAME", help="of gpu-llama and llama-small: or Qwen2.5-7B (Llama-3-8B)")
    parser.add_argument(
        "--block", metavar="SIZES", help="of gpu-block: hidden=64,inner=96,heads=4,key_heads=2,tokens=16/32, or some"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help=f"peft, peft16, compile, addmm, lora_first, {rival}auto, a backend's name, or 'ours' for auto "
        "and all backends; of the presets with DoRA and several layers, "
        "peft-lora, peft-dora, fused-lora, fused-dora, ours-lora, ours-dora, group (default: the preset's). The floor, "
        "the frozen nn.Linear, always runs",
    )
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"of {', '.join(DTYPES)} (default: all)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="FIELD=VALUES",
        help=f"cells with these values, such as r=8,16; {', '.join(FIELDS)}",
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for the whole run (default: the preset's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's, or cuda where there is a GPU")
    parser.add_argument("--seed", type=seed_of, default=0, help="of the random data (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there, cell by cell")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot of the ratio over M there")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cells that --json's file holds of the same run, and go on"
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no cell after that; --resume goes on")
    parser.add_argument(
        "--predict",
        metavar="MACHINE",
        choices=tuple(MACHINES_KNOWN),
        help="run nothing: write and print what the model predicts on that machine (h100, h200)",
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="run nothing: tables and plot of what FILE holds")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="run nothing else: where a call of the layer spends its host time, over the preset's overhead cells",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables; returns 1 if a provider of this package failed its gate, else 0.

    Raises:
        InvalidArgumentError: an unknown preset, peer or dtype, a file that cannot be written or resumed, no GPU.
        MissingExtraError: --plot without matplotlib.
    """
    from .runner import providers_of, run_preset

    _check_options(args)
    if args.preset == "gpu-block":
        return _block(args)
    if args.preset in ("gpu-llama", "llama-small"):
        return _llama(args)
    shown = None if args.show is None else _load(args.show)
    chosen = _narrowed(preset(args.preset if shown is None else shown.preset), args)
    peers = names(args.peers) or None
    providers = providers_of(chosen, peers)
    if args.plot:
        from .plot import check_plottable

        check_plottable(chosen)
        check_plot("--plot", args.plot)
    for option, path in (("--json", args.json), ("--profile", args.profile)):
        if path is not None:
            check_writable(option, path)
    if shown is not None:
        wanted = set(chosen.workloads)
        result = replace(shown, cells=[cell for cell in shown.cells if cell.workload in wanted])
        _print(result)
        _plot(args.plot, result)
        return 0
    if args.resume and args.json is None:
        raise InvalidArgumentError("--resume goes on where --json's file ends: name the file with --json.")
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    if args.predict:
        return _predict(args, chosen, providers, date, rebuilt.left_out(() if peers else chosen.peers))
    device = _device(args.device, chosen)
    if args.profile:
        return _profile(args, chosen, providers, device, date)

    def keep(result: Result) -> None:
        if args.json:
            result.save(args.json)

    earlier = _earlier(args, chosen.name, device, [p.name for p in providers])
    limit = math.inf if args.limit is None else args.limit
    with _progress() as progress:
        result = run_preset(chosen, date, device, peers, args.budget, args.seed, progress, keep, earlier, limit)
    _print(result)
    if len(result.cells) < len(chosen.workloads):
        print(f"{len(result.cells)} of {len(chosen.workloads)} cells are done; the same call with --resume goes on.")
    _plot(args.plot, result)
    ours = (cell.providers[name] for cell in result.cells for name in result.ours if name in cell.providers)
    return 1 if any(entry.status == "failed" for entry in ours) else 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises for what the preset would pass over, and for times that are none."""
    own = WHOLE.get(args.preset)
    foreign = (*(_OF_CELLS if own else ()), *(name for name in ("block", "model") if name != own))
    unset = (None, False)
    if given := [name for name in foreign if all(getattr(args, name) is not value for value in unset)]:
        raise InvalidArgumentError(
            f"--{given[0]} was given, and preset {args.preset!r} does not take it: leave it out, or choose another "
            "preset."
        )
    for name in ("budget", "limit"):
        seconds = getattr(args, name)
        if seconds is not None and not seconds >= 0:
            raise InvalidArgumentError(f"--{name} {seconds:g} was given: it must be seconds, 0 or more.")


def _block(args: argparse.Namespace) -> int:
    """The decoder block: one JSON document of its own; 1 if ours computes something else."""
    from ..console import json_text
    from .block import run_block, sizes_of, told

    sizes = sizes_of(args.block)
    device, date = _device_and_date(args)
    with _progress() as progress:
        document = run_block(sizes, device, date, 40.0 if args.budget is None else args.budget, args.seed, progress)
    if args.json is not None:
        write_file(args.json, json_text(document) + "\n")
    for line in told(document):
        print(line)
    return 1 if any(cell["failed"] for cell in document["cells"]) else 0


def _llama(args: argparse.Namespace) -> int:
    """The whole model, likewise; what was measured is on disk after each cell."""
    from ..console import json_text
    from .llama import BUDGET, run_llama
    from .llama_report import told

    device, date = _device_and_date(args)

    def keep(document: dict[str, Any]) -> None:
        if args.json is not None:
            write_file(args.json, json_text(document) + "\n")

    budget = BUDGET if args.budget is None else args.budget
    model = "Llama-3-8B" if args.model is None else args.model
    with _progress() as progress:
        document = run_llama(args.preset, device, date, budget, args.seed, progress, keep, model)
    keep(document)
    for line in told(document):
        print(line)
    return 1 if any(cell["status"] == "failed" for cell in document["cells"]) else 0


def _device_and_date(args: argparse.Namespace) -> tuple[str, str]:
    """Of a run that writes a document of its own, whose file can be written."""
    import torch

    if args.json is not None:
        check_writable("--json", args.json)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("--device cuda was given, and no CUDA device is visible: pass --device cpu.")
    return device, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _narrowed(chosen: Preset, args: argparse.Namespace) -> Preset:
    """With the cells that --dtype and --only leave."""
    if dtypes := names(args.dtype):
        chosen = chosen.only({"dtype": tuple(dtypes)})
    return chosen.only(dict(_condition(text) for text in args.only)) if args.only else chosen


def _load(path: Path) -> Result:
    from .results import load

    if not path.is_file():
        raise InvalidArgumentError(f"--show {path}: there is no such file; give one that bench --json wrote.")
    return load(path)


def _device(named: str | None, chosen: Preset) -> str:
    import torch

    device: str = named or chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            f"preset {chosen.name!r} was to run on cuda, and no CUDA device is visible. Choose another preset, such as "
            "quick or cpu-grid, or pass --device cpu; --predict tells what the model holds of it."
        )
    return device


def _earlier(args: argparse.Namespace, name: str, device: str, peers: Sequence[str]) -> list[Cell]:
    if not args.resume:
        return []
    from .results import continued, environment

    return continued(args.json, name, environment(device), args.seed, peers)


def _predict(
    args: argparse.Namespace,
    chosen: Preset,
    providers: Sequence[Provider],
    date: str,
    left_out: dict[str, dict[str, str]],
) -> int:
    from .prediction import predict_preset
    from .roofline import MACHINES

    result = predict_preset(chosen, MACHINES[args.predict], providers, date)
    result.environment.update(left_out)
    if args.json:
        result.save(args.json)
    _print(result)
    _plot(args.plot, result)
    return 0


def _profile(args: argparse.Namespace, chosen: Preset, providers: Sequence[Provider], device: str, date: str) -> int:
    from .profile import profile_preset

    found = profile_preset(chosen, providers, device, args.seed, date)
    write_file(args.profile, found.to_json())
    print(found)
    return 0


def _plot(path: Path | None, result: Result) -> None:
    if path is not None:
        from .plot import plot

        plot(result, path)


def _condition(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, values = text.partition("=")
    return name, tuple(values.split(","))


@contextmanager
def _progress() -> Iterator[Progress]:
    """Bars where rich is installed; a GPU machine without network often has PyTorch and nothing else: lines there."""
    if _rich():
        with progress_bars() as bars:
            yield bars
    else:
        yield progress_lines("lora-kernels")


def _print(result: Result) -> None:
    from .predicted_table import beside
    from .ratios import ratios
    from .report import legend, markdown, reasons, rich_table, table

    of_models = any(cell.workload.subject not in LAYERS for cell in result.cells)
    maker = ratios if of_models else beside if result.predicted else table
    console = stdout_console() if _rich() else None
    for sentence in result.environment.get("left_out", {}).values():
        print(sentence, end="\n\n")
    for direction in DIRECTIONS:
        if any(cell.workload.direction == direction for cell in result.cells):
            content = maker(result, direction)
            if console is None:
                print(markdown(content), end="\n\n")
            else:
                console.print(rich_table(content))
    for sentence in (*legend(result), *reasons(result)):
        print(sentence)


def _rich() -> bool:
    return importlib.util.find_spec("rich") is not None
