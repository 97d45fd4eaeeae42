"""``lora-kernels bench``: arguments, progress while it runs, tables at the end."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import Progress, check_writable, progress_bars, progress_lines, stdout_console
from ..errors import InvalidArgumentError
from .workloads import DIRECTIONS, DTYPES, FIELDS, PRESETS, preset

if TYPE_CHECKING:
    from .results import Result

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``bench`` to ``parser``."""
    listed = "; ".join(f"{p.name}: {p.describe}" for p in PRESETS.values())
    parser.add_argument("--preset", default="quick", metavar="NAME", help=f"what to measure (default: quick). {listed}")
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        help="comma-separated: peft, peft16, compile, addmm, lora_first, auto, a backend's name, or 'ours' for auto "
        "and all backends (default: the preset's). The floor, the frozen nn.Linear, always runs",
    )
    parser.add_argument("--dtype", metavar="NAMES", help=f"comma-separated, of {', '.join(DTYPES)} (default: all)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="FIELD=VALUES",
        help=f"cells with these values, such as r=8,16; {', '.join(FIELDS)}",
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for the whole run (default: the preset's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's, or cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of the random data (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there, cell by cell")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot of the ratio over M there")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables; returns 1 if a provider of this package failed its gate, else 0.

    Raises:
        InvalidArgumentError: an unknown preset, peer or dtype, a file that cannot be written, no CUDA device.
        MissingExtraError: --plot without matplotlib.
    """
    import torch

    from .runner import expand_peers, run_preset

    chosen = preset(args.preset)
    if args.dtype:
        chosen = chosen.only({"dtype": tuple(args.dtype.split(","))})
    if args.only:
        chosen = chosen.only(dict(_condition(text) for text in args.only))
    peers = args.peers.split(",") if args.peers else None
    expand_peers(peers or ())
    if args.plot:
        from .plot import check_plottable

        check_plottable(chosen)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            check_writable(option, path)
    device = args.device or chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            f"preset {chosen.name!r} was to run on cuda, and no CUDA device is visible. Choose another preset, such as "
            "quick or cpu-grid, or pass --device cpu."
        )

    def keep(result: Result) -> None:
        if args.json:
            result.save(args.json)

    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    with _progress() as progress:
        result = run_preset(chosen, date, device, peers, args.budget, args.seed, progress, keep)
    _print(result)
    if args.plot:
        from .plot import plot

        plot(result, args.plot)
    ours = (cell.providers[name] for cell in result.cells for name in result.ours if cell.providers)
    return 1 if any(entry.status == "failed" for entry in ours) else 0


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
    from .report import legend, markdown, reasons, rich_table, table

    console = stdout_console() if _rich() else None
    for direction in DIRECTIONS:
        if any(cell.workload.direction == direction for cell in result.cells):
            content = table(result, direction)
            if console is None:
                print(markdown(content), end="\n\n")
            else:
                console.print(rich_table(content))
    for sentence in (*legend(result), *reasons(result)):
        print(sentence)


def _rich() -> bool:
    return importlib.util.find_spec("rich") is not None
