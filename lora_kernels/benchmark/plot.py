"""The ratio to the floor over the number of tokens: a column for each shape, a row for each rank, dropout and dtype.

One line a provider, its band from the 20th to the 80th percentile, what the model predicted dashed. Colours are those
that Okabe and Ito chose for colour-blind readers, and each provider has a marker of its own besides.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..console import optional
from ..errors import InvalidArgumentError
from .preset import Preset
from .results import Cell, Result
from .workloads import Workload

__all__ = ["check_plottable", "plot"]

PLOTTED = ("forward", "backward", "dx", "step")
_PANEL_INCHES = (3.4, 2.7)
_STYLES = {  # colour, marker
    "auto": ("#000000", "o"),
    "triton": ("#0072B2", "^"),
    "native": ("#0072B2", "v"),
    "eager": ("#56B4E9", "<"),
    "peft": ("#D55E00", "s"),
    "peft16": ("#E69F00", "D"),
    "compile": ("#CC79A7", "P"),
    "addmm": ("#009E73", "X"),
    "lora_first": ("#56B4E9", ">"),
    "lorafusion": ("#B8A800", "*"),
}
_TICKS = (
    1,
    2,
    1.5,
    0.5,
    1.2,
    4,
    0.2,
    3,
    1.1,
    0.1,
    1.35,
    0.7,
    0.02,
    8,
    1.05,
    0.85,
    0.35,
    1.75,
    0.05,
    2.5,
    6,
    0.01,
    12,
    20,
)
_TICKS_APART = 0.075  # of the axis


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

    pyplot.rcParams["svg.hashsalt"] = "lora_kernels"  # the same picture from the same numbers
    cells = [cell for cell in result.cells if cell.workload.direction in PLOTTED and not cell.left_out]
    rows = list(dict.fromkeys(_row(cell.workload) for cell in cells))
    columns = list(dict.fromkeys(cell.workload.shape for cell in cells))
    width, height = _PANEL_INCHES
    size = (max(width * len(columns), 2 * width), height * len(rows) + 0.9)
    figure, axes = pyplot.subplots(len(rows), len(columns), figsize=size, squeeze=False, sharex=True, sharey="row")
    for i, row in enumerate(rows):
        for j, shape in enumerate(columns):
            chosen = [c for c in cells if (_row(c.workload), c.workload.shape) == (row, shape)]
            axes[i][j].set_visible(bool(chosen))
            if chosen:
                _draw(axes[i][j], f"{shape}   {row}", sorted(chosen, key=lambda c: c.workload.tokens), result)
                _scale(axes[i][j], [cell.workload.tokens for cell in cells])  # the panels share one axis of tokens
        axes[i][0].set_ylabel(f"time / {result.titles[result.floor]}")
    for axis in axes[-1]:
        axis.set_xlabel("tokens M")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    where = f"frozen {result.titles[result.floor]} = 1, on {result.environment['device']}"
    dashed = any("ratio" in entry.predicted for cell in cells for entry in cell.providers.values())
    told = f"PREDICTED, nothing was run: {where}" if result.predicted else where + "; dashes: predicted" * dashed
    figure.suptitle(told, fontsize=11, y=1 - 0.12 / size[1], va="top")
    columns_of_legend = min(len(handles), 2 + 2 * len(columns)) or 1
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=columns_of_legend, frameon=False)
    below = 0.3 * -(-len(handles) // columns_of_legend)
    figure.tight_layout(rect=(0, below / size[1], 1, 1 - 0.3 / size[1]))
    figure.savefig(path, dpi=110, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    pyplot.close(figure)


def _row(w: Workload) -> str:
    """What the panels of a row have in common."""
    dropout = f", p={w.p:g}" if w.p else ""
    return f"{w.direction}, r={w.r}, {w.dtype}{dropout}{', bias trains' if w.train_bias else ''}"


def _draw(axis: Any, title: str, cells: list[Cell], result: Result) -> None:
    for name, label in result.titles.items():
        if name == result.floor:
            continue
        color, marker = _STYLES.get(name, ("#777777", "."))
        wide = 2.0 if name == "auto" else 1.2
        entries = [(c.workload.tokens, e) for c in cells if (e := c.providers.get(name)) is not None]
        timed = [(m, e.numbers) for m, e in entries if "ratio" in e.numbers]
        if timed:
            tokens, ratios = [m for m, _ in timed], [n["ratio"] for _, n in timed]
            low, high = ([n.get(f"ratio_{q}", n["ratio"]) for _, n in timed] for q in ("p20", "p80"))
            axis.plot(tokens, ratios, marker=marker, markersize=4, linewidth=wide, color=color, label=label)
            axis.fill_between(tokens, low, high, color=color, alpha=0.18, linewidth=0)
        foreseen = [(m, e.predicted["ratio"]) for m, e in entries if "ratio" in e.predicted]
        if foreseen:
            label = f"{label}, predicted" if result.predicted else "_predicted"
            tokens, ratios = [m for m, _ in foreseen], [ratio for _, ratio in foreseen]
            axis.plot(
                tokens,
                ratios,
                linestyle="--",
                linewidth=wide if result.predicted else 0.9,
                marker=marker if result.predicted else "_" if len(tokens) == 1 else "",
                color=color,
                label=label,
            )
    axis.axhline(1.0, color="#555555", linewidth=0.8)
    axis.set_title(title, fontsize=8.5)


def _scale(axis: Any, tokens: list[int]) -> None:
    """Both axes logarithmic, with ticks that are numbers to read."""
    from matplotlib import ticker

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    plain = ticker.FuncFormatter(lambda value, position: f"{value:g}")
    every = max(1, -(-len(set(tokens)) // 7))
    axis.xaxis.set_major_locator(ticker.FixedLocator(sorted(set(tokens), reverse=True)[::every]))
    low, high = axis.get_ylim()
    chosen: list[float] = []
    for tick in _TICKS:  # the rounder the number, the earlier it stands
        apart = min((abs(math.log(tick / other)) for other in chosen), default=math.inf)
        if low <= tick <= high and apart >= _TICKS_APART * math.log(high / low):
            chosen.append(tick)
    axis.yaxis.set_major_locator(ticker.FixedLocator(chosen or [1]))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(ticker.NullLocator())
        one.set_major_formatter(plain)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, color="#dddddd", linewidth=0.6)
