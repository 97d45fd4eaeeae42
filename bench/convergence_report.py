"""What ``convergence.py``'s runs say: how far providers lie apart beside the seeds, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.llamas import AGAIN, PROVIDERS, Sizes
from lora_kernels.benchmark.report import Table
from lora_kernels.console import optional

__all__ = ["Row", "draw", "summary", "table"]

REFERENCE = "peft"
_STYLES = {"peft": ("#D55E00", "-"), AGAIN: ("#CC79A7", "-."), "ours": ("#000000", "--"), "compiled": ("#0072B2", ":")}


@dataclass(frozen=True)
class Row:
    """One provider at one dropout; held-out losses in nats a byte.

    Attributes:
        first, last: the mean over the seeds before the first and after the last step.
        apart: the mean, over seeds and steps, of the distance to PEFT's loss on the same seed.
        furthest: the largest such distance after the last step.
        spread: the mean, over steps, of the distance between PEFT's highest and lowest seed.
    """

    provider: str
    dropout: float
    first: float
    last: float
    apart: float
    furthest: float
    spread: float

    @property
    def within(self) -> bool:
        """Whether the provider lies closer to PEFT than one seed does to another."""
        return self.apart <= self.spread

    def __str__(self) -> str:
        verdict = "within" if self.within else "NOT within"
        return (
            f"{PROVIDERS[self.provider]}, dropout {self.dropout:g}: {self.first:.3f} to {self.last:.3f}, "
            f"{self.apart:.2e} from PEFT, {verdict} the {self.spread:.2e} between seeds"
        )


def summary(result: dict[str, Any]) -> list[Row]:
    """A row for each dropout and provider of which every seed has run."""
    rows = []
    for p in result["settings"]["dropouts"]:
        reference = _curves(result, REFERENCE, p)
        steps = [column[1:] for column in reference.values()]  # before the first step there is nothing to tell apart
        spread = fmean(max(losses) - min(losses) for losses in zip(*steps, strict=True))
        for provider in PROVIDERS:
            curves = _curves(result, provider, p)
            if curves.keys() != reference.keys():
                continue
            distances = [
                [abs(own - theirs) for own, theirs in zip(curves[seed][1:], reference[seed][1:], strict=True)]
                for seed in reference
            ]
            rows.append(
                Row(
                    provider=provider,
                    dropout=p,
                    first=fmean(curve[0] for curve in curves.values()),
                    last=fmean(curve[-1] for curve in curves.values()),
                    apart=fmean(distance for of_seed in distances for distance in of_seed),
                    furthest=max(of_seed[-1] for of_seed in distances),
                    spread=spread,
                )
            )
    return rows


def table(result: dict[str, Any]) -> Table:
    """For docs/training.md."""
    settings, versions = result["settings"], result["environment"]["versions"]
    header = ["dropout", "trained by", "before", "after", "from PEFT, mean", "from PEFT, last step", "between seeds"]
    rows = []
    for row in summary(result):
        apart = ["–", "–"] if row.provider == REFERENCE else [f"{row.apart:.1e}", f"{row.furthest:.1e}"]
        losses = [f"{row.first:.3f}", f"{row.last:.3f}"]
        rows.append([f"{row.dropout:g}", PROVIDERS[row.provider], *losses, *apart, f"{row.spread:.1e}"])
    caption = (
        f"Held-out loss of a byte-level Llama ({Sizes(**settings['sizes'])}), {settings['steps']} steps of "
        f"{settings['batch']} × {settings['length']} bytes, r={settings['r']} on every linear layer, "
        f"{len(settings['seeds'])} seeds; torch {versions['torch']}, PEFT {versions['peft']}."
    )
    return Table(caption, header, rows, frozenset(), frozenset(), [])


def draw(result: dict[str, Any], path: Path) -> None:
    """A column for each dropout: held-out losses above, PEFT's seeds shaded; the distance to PEFT below."""
    optional("matplotlib").use("Agg")
    from matplotlib import pyplot

    settings = result["settings"]
    dropouts, every, count = settings["dropouts"], settings["every"], settings["steps"]
    steps = [*range(0, count, every), count]
    size = (4.4 * len(dropouts), 5.2)
    pyplot.rcParams["svg.hashsalt"] = "lora_kernels"  # the same picture from the same numbers
    figure, axes = pyplot.subplots(
        2, len(dropouts), figsize=size, squeeze=False, sharex=True, sharey="row", height_ratios=(2, 1)
    )
    for column, p in enumerate(dropouts):
        above, below = axes[0][column], axes[1][column]
        reference = _curves(result, REFERENCE, p)
        low, high = _envelope(reference.values())
        above.fill_between(steps, low, high, color="#D55E00", alpha=0.2, linewidth=0, label="PEFT, all seeds")
        half = [(h - e) / 2 for h, e in zip(high, low, strict=True)]
        below.fill_between(steps, [-v for v in half], half, color="#D55E00", alpha=0.2, linewidth=0)
        for provider, title in PROVIDERS.items():
            curves, (color, line) = _curves(result, provider, p), _STYLES[provider]
            if not curves:
                continue
            above.plot(steps, _mean(curves.values()), line, color=color, label=title)
            shared = [seed for seed in curves if seed in reference]
            gaps = [[own - theirs for own, theirs in zip(curves[s], reference[s], strict=True)] for s in shared]
            for gap in gaps if provider != REFERENCE else ():
                below.plot(steps, gap, line, color=color, linewidth=1)
        above.set_title(f"dropout {p:g}", fontsize=10)
        below.set_xlabel("steps")
        for axis in (above, below):
            axis.grid(visible=True, color="#dddddd", linewidth=0.6)
            axis.tick_params(labelsize=8)
    axes[0][0].set_ylabel("held-out loss, nats a byte")
    axes[1][0].set_ylabel("minus PEFT's,\nsame seed")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)


def _curves(result: dict[str, Any], provider: str, p: float) -> dict[int, list[float]]:
    """The held-out losses of each seed."""
    return {
        run["seed"]: run["held_out"] for run in result["runs"] if (run["provider"], run["dropout"]) == (provider, p)
    }


def _mean(curves: Iterable[list[float]]) -> list[float]:
    return [fmean(column) for column in zip(*curves, strict=True)]


def _envelope(curves: Iterable[list[float]]) -> tuple[list[float], list[float]]:
    columns = list(zip(*curves, strict=True))
    return [min(column) for column in columns], [max(column) for column in columns]
