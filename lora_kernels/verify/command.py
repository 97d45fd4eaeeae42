"""``lora-kernels verify``: options, tables, exit status."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..console import json_text, names, optional, progress_bars, progress_lines, seed_of, stdout_console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .report import Report

__all__ = ["add_arguments", "run_command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``lora-kernels verify``."""
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="backends; by default every one that is available")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="of fp32, bf16, fp16, fp64; by default all")
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="FORM",
        help="quantised forms of W, in the place of a plain one: nf4, nf4-nested, fp4, int8 (bitsandbytes), "
        "torchao-int8, torchao-int4, torchao-float8, nvfp4, mxfp4, mxfp8 (torchao), fp8 (transformers)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default the GPU where there is one")
    parser.add_argument("--seed", type=seed_of, default=0, help="of the tensors and of dropout (0)")
    parser.add_argument("--json", action="store_true", help="print JSON, and progress as lines on stderr")


def run_command(args: argparse.Namespace) -> int:
    """Prints the report; 1 if anything failed."""
    from .checks import run

    chosen = {"backends": names(args.backend), "dtypes": names(args.dtype), "weights": names(args.weights)}
    options = {**chosen, "device": args.device, "seed": args.seed}
    if args.json:
        report = run(**options, progress=progress_lines("verify"))
        print(json_text(report.to_dict()))
    else:
        console = stdout_console()
        with progress_bars() as progress:
            report = run(**options, progress=progress)
        for part in _tables(report):
            console.print(part)
    return 0 if report.passed else 1


def _tables(report: Report) -> list[RenderableType]:
    parts = [_rows_table(report)]
    parts += [_checks_table(report)] if report.checks else []
    parts += [_rounding_table(report)] if report.rounding else []
    parts += [
        f"[yellow]{i.backend} in {', '.join(i.dtypes)} was not run:[/] {_plain(i.reasons)}" for i in report.not_run
    ]
    parts += [f"[red]{i.backend} {i.dtype}, {i.case}:[/] {_plain(i.sentence)}" for i in report.failures]
    failed = len(report.failures) + sum(not check.passed for check in report.checks)
    verdict = "[green]verify: all passed" if report.passed else f"[red]verify: {failed} FAILED"
    return [*parts, f"{verdict}[/] (seed {report.seed}, {report.seconds} s)"]


def _rows_table(report: Report) -> RenderableType:
    table = optional("rich.table").Table(
        title="Every result against float64",
        caption="ratio: the largest error over the cases, in units of plain PyTorch's own in the same dtype (–: that "
        "is float64 itself).\nerror and limit (relative, Frobenius): of the case that came closest to its limit.",
    )
    quantised = any(row.weights for row in report.rows)
    for name in ("backend", "device", *(["weights"] if quantised else []), "dtype", "output"):
        table.add_column(name)
    for name in ("ratio", "error", "limit", "cases"):
        table.add_column(name, justify="right")
    table.add_column("closest case")
    table.add_column("")
    former = None
    for row in report.rows:
        if former not in (None, (row.backend, row.weights, row.dtype)):
            table.add_section()
        former = (row.backend, row.weights, row.dtype)
        device = "interpreter" if row.backend == "triton" and row.device == "cpu" else row.device
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
        numbers = (ratio, f"{row.error:.1e}", f"{row.limit:.1e}", str(row.cases))
        verdict = "[green]pass" if row.passed else f"[red]{row.failed} FAILED"
        form = [row.weights] if quantised else []
        table.add_row(row.backend, device, *form, row.dtype, row.output, *numbers, row.worst_case, verdict)
    found: RenderableType = table
    return found


def _checks_table(report: Report) -> RenderableType:
    table = optional("rich.table").Table("backend", "dtype", "check", "found", "", title="Properties")
    for check in report.checks:
        verdict = "[green]pass" if check.passed else "[red]FAILED"
        table.add_row(check.backend, check.dtype, check.name, _plain(check.detail), verdict)
    found: RenderableType = table
    return found


def _rounding_table(report: Report) -> RenderableType:
    table = optional("rich.table").Table(title="How often y is rounded: its error against float64, bf16, bf16 adapters")
    table.add_column("composition")
    table.add_column("error", justify="right")
    table.add_column("over PEFT's", justify="right")
    for item in report.rounding:
        table.add_row(item.composition, f"{item.error:.2e}", f"{item.over_peft:.2f}")
    found: RenderableType = table
    return found


def _plain(text: str) -> str:
    escaped: str = optional("rich.markup").escape(text)
    return escaped
