"""Launches and bytes of device memory of one forward and backward: counted, and measured by Nsight Compute.

``python bench/dram_bytes.py [--json FILE]``: M = 8192, r = 16, p = 0.1, bf16, layers of 4096² and 8192². *Counted* is
every tensor once for each kernel that touches it, and needs no GPU; ``bench/results/step-traffic.json``, of
which ``bench/tables.py`` makes a table. *Measured* is the sum of ``dram__bytes_read`` and
``dram__bytes_write`` over a step's kernels, caches cold before each kernel, as ``ncu`` leaves them by default. Beside
them stand LoRAFusion's published figures (arXiv 2510.00206) for its own kernels and for eager PEFT.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_kernels.benchmark import roofline
from lora_kernels.benchmark.report import Table
from lora_kernels.benchmark.workloads import Workload

SIZES = (4096, 8192)
TITLES = {
    "linear": "frozen nn.Linear",
    "auto": "lora_kernels",
    "lorafusion": "LoRAFusion",
    "peft16": "PEFT, 16-bit adapters",
    "addmm": "base, then addmm_",
}
PROVIDERS = tuple(TITLES)
PUBLISHED = {4096: {"lorafusion": 1.258, "peft16": 2.008}, 8192: {"lorafusion": 4.044, "peft16": 5.289}}
_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
_GIB = 2.0**30
_SECONDS = 60.0  # of one provider under ncu


def workload(size: int) -> Workload:
    return Workload("step", 8192, size, size, 16, "bfloat16", p=0.1)


def counted(provider: str, size: int) -> tuple[int, float]:
    """Launches, and GiB by the kernels' own tensors, of one step; ours with both products fused, where a composition
    takes more of both."""
    work = roofline.kernels("triton" if provider == "auto" else provider, workload(size)) or []
    return len(work), float(sum(kernel.bytes for kernel in work)) / _GIB


def measured(provider: str, size: int, ncu: str) -> dict[str, Any]:
    """GiB of one step and its kernels; or why there is no figure."""
    command = [ncu, "--metrics", ",".join(_METRICS), "--csv", "--profile-from-start", "off"]
    child = [sys.executable, str(Path(__file__).resolve()), "--child", provider, str(size)]
    try:
        done = subprocess.run([*command, *child], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"why_not": f"{type(error).__name__}: {error}"}
    try:
        moved, kernels = total(done.stdout)
    except (ValueError, KeyError) as error:  # KeyError: a unit that is not known
        said = next(filter(None, reversed((done.stderr + done.stdout).splitlines())), "")
        return {"why_not": f"{error} {said}"[:300]}
    return {"gib": moved / _GIB, "kernels": kernels}


def total(text: str) -> tuple[float, int]:
    """Bytes and kernels of what ``ncu --csv`` printed.

    Raises:
        ValueError: it holds no such metrics.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    rows = [] if start is None else list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    rows = [row for row in rows if row.get("Metric Name") in _METRICS]
    if not rows:
        raise ValueError("ncu reported no memory traffic.")
    moved = sum(float(row["Metric Value"].replace(",", "")) * _UNITS[row["Metric Unit"]] for row in rows)
    return moved, len({row["ID"] for row in rows})


def run_child(provider: str, size: int) -> None:
    """What ``ncu`` looks at: a step like those before it."""
    import torch

    from lora_kernels.benchmark.providers import PROVIDERS as KNOWN
    from lora_kernels.benchmark.providers import make_setups

    (setup,) = make_setups(workload(size), "cuda")
    layer = KNOWN[provider].build(setup)
    for turn in range(4):
        if turn == 3:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        with layer.context():
            torch.autograd.grad(layer.call(setup.x), [setup.x, *layer.trainable], setup.dy)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def why_not_measured() -> str | None:
    """A sentence where nothing can be measured here."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if shutil.which("ncu") is None:
        return "Nsight Compute (ncu) is not on the path"
    return None


def report() -> dict[str, Any]:
    reason, cells = why_not_measured(), []
    for size in SIZES:
        for provider in PROVIDERS:
            launches, gib = counted(provider, size)
            cell: dict[str, Any] = {"size": size, "provider": provider, "launches": launches, "counted_gib": gib}
            cell["published_gib"] = PUBLISHED[size].get(provider)
            cell["measured"] = None if reason else measured(provider, size, str(shutil.which("ncu")))
            cells.append(cell)
    return {"workload": str(workload(SIZES[0])), "sizes": SIZES, "not_measured": reason, "cells": cells}


def table(document: dict[str, Any]) -> Table:
    """A row for each layer and provider."""
    rows = []
    for cell in document["cells"]:
        found = (cell["measured"] or {}).get("gib"), cell["published_gib"]
        numbers = [f"{value:.3f}" if value is not None else "–" for value in (cell["counted_gib"], *found)]
        rows.append([f"{cell['size']}²", TITLES[cell["provider"]], str(cell["launches"]), *numbers])
    caption = (
        "One forward and backward of 8192 tokens, r = 16, p = 0.1, bf16: launches, and GiB of device memory, by the "
        "tensors that each kernel touches, by Nsight Compute, and as LoRAFusion published them of its own kernels and "
        "of eager PEFT (arXiv 2510.00206)."
    )
    if document["not_measured"]:
        caption += f" Nothing was measured: {document['not_measured']}."
    header = ["layer", "by", "launches", "GiB counted", "GiB measured", "GiB published"]
    return Table(caption, header, rows, frozenset(), frozenset(), [])


def lines(document: dict[str, Any]) -> list[str]:
    """The table as text, and why a provider has no measurement."""
    shown = table(document)
    text = [" ".join(f"{value:>14}" for value in row) for row in (shown.header, *shown.rows)]
    reasons = [(cell["provider"], (cell["measured"] or {}).get("why_not")) for cell in document["cells"]]
    return [shown.caption, *text, *(f"{name}: {reason}" for name, reason in reasons if reason)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="bytes of device memory that a step moves, counted and measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there")
    parser.add_argument("--child", nargs=2, metavar=("PROVIDER", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        run_child(options.child[0], int(options.child[1]))
        return 0
    document = report()
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(document)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
