"""What the machine model predicts: of a provider in a cell, and of a whole preset on a machine that is not here."""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from ..backends.composed import MANY_TOKENS
from . import roofline
from .preset import Preset
from .providers import FLOOR, PROVIDERS, Provider
from .results import Cell, Entry, Result
from .workloads import LAYER, Workload

__all__ = ["PREDICTED", "predict", "predict_preset"]

PREDICTED = "predicted"
_MICRO = 1e6


def predict(
    provider: Provider, workload: Workload, machine: roofline.Machine | None, automatic: str
) -> dict[str, float]:
    """Bytes, flops, launches, microseconds and the ratio to the floor; empty where the model knows nothing of it.

    Args:
        automatic: the backend that the automatic choice takes on that machine.
    """
    if machine is None or workload.subject != LAYER:
        return {}
    name = (provider.backend or automatic) if provider.ours else provider.name
    if name == "eager":
        name = "addmm" if workload.tokens < MANY_TOKENS else "lora_first"
    floor, own = (roofline.cost(n, workload, machine) for n in (FLOOR, name))
    if floor is None or own is None:
        return {}
    return {
        "bytes": own.bytes,
        "flops": own.flops,
        "launches": own.launches,
        "us": own.seconds * _MICRO,
        "ratio": own.seconds / floor.seconds,
    }


def predict_preset(preset: Preset, machine: roofline.Machine, providers: Sequence[Provider], date: str) -> Result:
    """A result in which nothing was run: every cell that the model knows, every provider with its prediction alone."""
    cells = []
    for workload in preset.workloads:
        foreseen = {p.name: predict(p, workload, machine, "triton") for p in providers}
        known = {name: _short(values) for name, values in foreseen.items() if values}
        if known:
            cells.append(Cell(workload, known))
    return Result(
        preset=preset.name,
        date=date,
        seed=0,
        floor=FLOOR,
        titles={p.name: PROVIDERS[p.name].title for p in providers},
        ours=[p.name for p in providers if p.ours],
        environment={"device": machine.name, "device_type": "cuda", "versions": {"lora-kernels": __version__}},
        machine=machine.to_json(),
        cells=cells,
        predicted=True,
        planned=len(cells),
    )


def _short(values: dict[str, float]) -> Entry:
    """The times alone: bytes and flops are to be counted at any time."""
    return Entry(PREDICTED, predicted={name: values[name] for name in ("launches", "us", "ratio")})
