"""``lora-kernels demo``: options, tables, the plot of the loss curves, exit status."""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import (
    Progress,
    check_plot,
    check_writable,
    json_text,
    optional,
    progress_bars,
    progress_lines,
    stdout_console,
    write_file,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .experiment import Report

__all__ = ["add_arguments", "run_command"]

PLOT = "lora_demo.png"
ROWS = {
    "sphere": ("pre-trained", "its own data: the sphere"),
    "gaussian": ("pre-trained", "Gaussian, deviation 1/16"),
    "lora": ("second layer by LoRA", "Gaussian, deviation 1/16"),
    "adapter": ("by an adapter: ReLU between A and B", "Gaussian, deviation 1/16"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lora-kernels demo``."""
    parser.add_argument("--seeds", type=int, default=5, help="how many times it is run (5)")
    parser.add_argument("--epochs", type=int, default=400, help="of each phase (400, as published)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default the GPU where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON there; - is stdout, alone")
    curves = parser.add_mutually_exclusive_group()
    curves.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"write the loss curves there ({PLOT} in a new temporary folder)"
    )
    curves.add_argument("--no-plot", action="store_true", help="write no plot")


def run_command(args: argparse.Namespace) -> int:
    """Prints the report; 1 if the fused layer did not train as the reference one did.

    Raises:
        InvalidArgumentError: a count below 1, an unknown device, a file or format that cannot be written.
        MissingExtraError: rich or matplotlib is not installed, and is needed.
    """
    only_json = args.json is not None and str(args.json) == "-"
    by_default = args.plot is None and not args.no_plot and not only_json
    drawable = by_default and find_spec("matplotlib") is not None
    plot = None if args.no_plot else args.plot
    if drawable:
        plot = Path(tempfile.mkdtemp(prefix="lora_kernels-demo-")) / PLOT
    if plot is not None:
        check_plot("--plot", plot)
    if args.json is not None and not only_json:
        check_writable("--json", args.json)
    if only_json:
        report = _run(args, progress_lines("demo"))
        print(json_text(report.to_dict()))
    else:
        console = stdout_console()
        with progress_bars() as progress:
            report = _run(args, progress)
        for part in _tables(report):
            console.print(part)
        if args.json is not None:
            write_file(args.json, json_text(report.to_dict()) + "\n")
            console.print(f"Everything as JSON: {args.json.resolve()}", soft_wrap=True)
    if by_default and not drawable:
        console.print('No loss curves, as matplotlib is missing: pip install "lora-kernels[plot]".', markup=False)
    if plot is not None:
        draw(report, plot)
        if not only_json:
            console.print(f"Loss curves, fused over reference: {plot.resolve()}", soft_wrap=True)
    return 0 if report.passed else 1


def _run(args: argparse.Namespace, progress: Progress) -> Report:
    import torch

    from .experiment import run

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return run(args.seeds, args.epochs, device, progress)


def _tables(report: Report) -> list[RenderableType]:
    return [_accuracy_table(report), _agreement(report), _timing_table(report), f"({report.seconds} s)"]


def _accuracy_table(report: Report) -> RenderableType:
    seeds = len(report.results)
    table = optional("rich.table").Table(
        title=f"16→32→32→1 ReLU network, {report.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}: percent right",
        caption=f"LoRA (r = 2) trains {report.trainable} parameters in place of the layer's {report.replaced} "
        "(published: 160, 1056).\nLabel: sign of the mean of the coordinates; 2000 samples to train on, 10000 fresh to "
        "test on.",
    )
    table.add_column("model")
    table.add_column("tested on")
    for name in ("published", "mean", "deviation", "range", "published is in it"):
        table.add_column(name, justify="right")
    for name, summary in report.summaries.items():
        published = "–" if summary.published is None else f"{summary.published:.1f}"
        within = "–" if summary.published is None else "yes" if summary.published_is_within else "no"
        spread = f"{summary.lowest:.1f} to {summary.highest:.1f}"
        table.add_row(*ROWS[name], published, f"{summary.mean:.1f}", f"{summary.deviation:.1f}", spread, within)
    found: RenderableType = table
    return found


def _agreement(report: Report) -> str:
    difference = max(result.difference for result in report.results)
    gap = max(result.gap for result in report.results)
    verdict = "[green]agree[/]" if report.passed else "[red]DO NOT AGREE[/]"
    return (
        f"Loss curves of FusedLoRALinear (backend {report.backend}, {report.device}) and of the plain PyTorch "
        f"reference {verdict}: largest relative difference {difference:.1e}, at most {gap:.2g} of what is allowed "
        "(one fp32 rounding a step)."
    )


def _timing_table(report: Report) -> RenderableType:
    table = optional("rich.table").Table(
        title=f"One training step of the LoRA phase, batch 256, {report.device}",
        caption="speed: the reference's time over this layer's, median (p20 to p80) of rounds in turn.\nLayers of 32 "
        "features are all overhead; for the speed at real sizes: lora-kernels bench",
    )
    table.add_column("second layer")
    table.add_column("µs a step", justify="right")
    table.add_column("speed", justify="right")
    for timing in report.timings:
        ratio = f"{timing.ratio:.2f} ({timing.p20:.2f} to {timing.p80:.2f})"
        table.add_row(timing.layer, f"{timing.microseconds:.0f}", ratio)
    found: RenderableType = table
    return found


def draw(report: Report, path: Path) -> None:
    """Writes every seed's loss curves of the LoRA phase to ``path``, the reference's dashed over the fused layer's."""
    optional("matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for result in report.results:
        (line,) = axes.plot(result.losses, linewidth=3, alpha=0.5, label=f"seed {result.seed}")
        axes.plot(result.losses_reference, linewidth=1, linestyle="--", color=line.get_color())
    axes.plot([], [], linewidth=3, alpha=0.5, color="grey", label=f"FusedLoRALinear ({report.backend})")
    axes.plot([], [], linewidth=1, linestyle="--", color="grey", label="reference, plain PyTorch")
    axes.set(xlabel="epoch", ylabel="logistic loss", yscale="log", title="LoRA phase: fused and reference training")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
