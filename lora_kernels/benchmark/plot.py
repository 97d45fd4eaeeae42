"""The ratio to the floor over the number of tokens, one panel per layer and direction, one line per provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..console import optional
from ..errors import InvalidArgumentError
from .results import Cell, Result
from .workloads import Preset

__all__ = ["check_plottable", "plot"]

PLOTTED = ("forward", "backward", "dx", "step")
_PANEL_INCHES = (4.2, 3.2)
_COLUMNS = 4


def check_plottable(preset: Preset) -> None:
    """Raises, before any work is done, unless there will be something to plot and matplotlib to plot it.

    Raises:
        InvalidArgumentError: no cell of the preset has a ratio over tokens.
        MissingExtraError: matplotlib is not installed.
    """
    optional("matplotlib")
    if not any(w.direction in PLOTTED for w in preset.workloads):
        raise InvalidArgumentError(
            f"preset {preset.name!r} has no ratio over tokens to plot: choose another preset, or leave --plot out."
        )


def plot(result: Result, path: str | Path) -> None:
    """Writes the figure; its format follows the file's name."""
    optional("matplotlib").use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Cell]] = {}
    for cell in result.cells:
        w = cell.workload
        if w.direction in PLOTTED:
            title = f"{w.direction}, {w.shape}, r={w.r}, {w.dtype}" + (f", p={w.p}" if w.p else "")
            panels.setdefault(title, []).append(cell)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, height = _PANEL_INCHES
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis, (title, cells) in zip(axes.flat, panels.items(), strict=False):
        _draw(axis, title, sorted(cells, key=lambda c: c.workload.tokens), result)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=len(handles), bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(
        f"time over that of the frozen {result.titles[result.floor]}, on {result.environment['device']}", y=1.04
    )
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _draw(axis: Any, title: str, cells: list[Cell], result: Result) -> None:
    for i, (name, label) in enumerate(result.titles.items()):
        points = [
            (c.workload.tokens, e.numbers) for c in cells if (e := c.providers.get(name)) and "ratio" in e.numbers
        ]
        if name == result.floor or not points:
            continue
        tokens, ratios = [m for m, _ in points], [n["ratio"] for _, n in points]
        low, high = ([n[f"ratio_{q}"] for _, n in points] for q in ("p20", "p80"))
        axis.plot(tokens, ratios, marker="o", markersize=3, color=f"C{i}", label=label)
        axis.fill_between(tokens, low, high, color=f"C{i}", alpha=0.15)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens M")
    axis.set_title(title, fontsize=9)
