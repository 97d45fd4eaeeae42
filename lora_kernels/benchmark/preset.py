"""A preset: a named grid of workloads, and how it is run. Nothing here runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InvalidArgumentError
from .workloads import FIELDS, Workload

__all__ = ["MODEL_PEERS", "QLORA_PEERS", "Preset", "grid"]

MODEL_PEERS = ("peft-lora", "peft-dora", "fused-lora", "fused-dora", "ours-lora", "ours-dora", "group")
QLORA_PEERS = ("nf4", "peft-nf4", "ours-nf4")


@dataclass(frozen=True)
class Preset:
    """A grid and how to run it.

    Attributes:
        device: "cpu", "cuda", or None for CUDA where there is a GPU.
        peers: providers that run unless ``--peers`` names others; "ours" is the automatic choice and every backend.
        budget: seconds for the whole preset unless ``--budget`` says otherwise; compiling and checking count.
        min_rounds: rounds of each cell even where they outlast the budget.
        max_call: seconds that one call of the floor may take; a cell where it takes longer is left out, and says so.
    """

    name: str
    describe: str
    workloads: tuple[Workload, ...]
    peers: tuple[str, ...]
    device: str | None = None
    budget: float = 60.0
    min_rounds: int = 7
    max_call: float = math.inf

    def only(self, conditions: dict[str, tuple[str, ...]]) -> Preset:
        """The preset with the cells whose fields have one of the given values: ``{"r": ("16",)}``.

        Raises:
            InvalidArgumentError: an unknown field, a value that no cell has, or no cell is left.
        """
        for name, values in conditions.items():
            known = dict.fromkeys(str(getattr(w, name, None)) for w in self.workloads)
            if name not in FIELDS or not set(values) <= set(known):
                raise InvalidArgumentError(
                    f"{name}={','.join(values)} was given: the fields are {', '.join(FIELDS)}"
                    + (f", and in preset {self.name!r} {name} is {', '.join(known)}." if name in FIELDS else ".")
                )
        left = tuple(w for w in self.workloads if all(w.has(name, values) for name, values in conditions.items()))
        if not left:
            raise InvalidArgumentError(f"preset {self.name!r} has no cell that meets all conditions: name fewer.")
        return replace(self, workloads=left)


def grid(
    directions: tuple[str, ...],
    tokens: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    ranks: tuple[int, ...],
    dtypes: tuple[str, ...] = ("float32",),
    dropouts: tuple[float, ...] = (0.0,),
    **more: Any,
) -> Iterator[Workload]:
    for dtype in dtypes:
        for direction in directions:
            for in_features, out_features in shapes:
                for p in dropouts:
                    for r in ranks:
                        for m in tokens:
                            yield Workload(direction, m, in_features, out_features, r, dtype, p=p, **more)
