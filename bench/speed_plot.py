"""Writes docs/h200.svg, README's picture: the forward passes that were measured on the H200, without predictions.

python bench/speed_plot.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.tables import newest  # noqa: E402  (after the path)
from lora_kernels.benchmark.plot import plot  # noqa: E402
from lora_kernels.benchmark.results import Cell, Result  # noqa: E402

SHAPES = ("4096→4096", "4096→14336", "4096→1024")  # the square layers, an MLP's and the keys' of a Llama
TARGET = ROOT / "docs" / "h200.svg"


def measured(result: Result) -> Result:
    """The forward passes without dropout of ``SHAPES``, without what the model of the machine predicted."""
    cells = [c for c in result.cells if c.workload.direction == "forward" and c.workload.p == 0.0]
    return replace(result, cells=[_without_predictions(c) for c in cells if c.workload.shape in SHAPES])


def _without_predictions(cell: Cell) -> Cell:
    return replace(cell, providers={name: replace(entry, predicted={}) for name, entry in cell.providers.items()})


if __name__ == "__main__":
    plot(measured(newest(ROOT / "bench" / "results", "nvidia-h200", "gpu-quick")), TARGET)
