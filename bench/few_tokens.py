"""The table of ``bench/results/nvidia-h100/few-tokens.json``: one layer's forward for few tokens over ``F.linear``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_kernels.benchmark.report import Table

__all__ = ["table"]

RING, TRITON = "ring", "few_tokens"


def table(document: dict[str, Any]) -> Table:
    """A row for each shape and number of tokens: the quickest plan in CUDA C++ and in Triton, of those measured."""
    caption = (
        f"Forward of one layer in a CUDA graph, bf16, r = 16, on {document['device']} (torch {document['torch']}, "
        f"Triton {document['triton']}, {document['date']}): time over F.linear's, of the fastest plan of each kind."
    )
    header = ["K→N", "tokens", "F.linear µs", "CUDA C++", "Triton"]
    rows: list[list[str]] = []
    winners: set[tuple[int, int]] = set()
    for cell in document["cells"]:
        times = [_least(cell["plans"], kind) / cell["linear_us"] for kind in (RING, TRITON)]
        winners.add((len(rows), 3 + times.index(min(times))))
        shape = f"{cell['in_features']}→{cell['out_features']}"
        rows.append([shape, str(cell["tokens"]), f"{cell['linear_us']:.1f}", *(f"{time:.2f}" for time in times)])
    return Table(caption, header, rows, frozenset(winners), frozenset(), [])


def _least(plans: dict[str, float], kind: str) -> float:
    return min(time for name, time in plans.items() if name.split()[0] == kind)
