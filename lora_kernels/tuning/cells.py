"""What to tune, as data: presets for the published shapes, lists of values, and the layers of a transformers config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..backends.triton.choose.blocks import next_power_of_2
from ..backends.triton.choose.hopper_group_blocks import MEMBERS
from ..backends.triton.choose.plans import DIRECTIONS, DTYPES, Cell
from ..console import count_of
from ..errors import InvalidArgumentError
from ..json_text import parsed

__all__ = ["PRESETS", "Preset", "cells_of", "directions", "numbers", "preset", "shapes", "shapes_of_model"]

_SQUARE, _LARGE, _KEYS = (4096, 4096), (8192, 8192), (4096, 1024)
_SHAPES = (_SQUARE, (4096, 14336), (14336, 4096), _LARGE, _KEYS)
_FEW = (1, 16, 2, 4, 8)
_GROUPS = ((4096, 4096, 1024, 1024), (4096, 14336, 14336))  # q, k and v, gate and up of Llama-3-8B
_TOKENS = (8192, 1, 16, 2048, 4096, 16384, 1024, 512, 256, 128, 64, 32, 8, 4, 2)
_RANKS = (16, 8, 64, 128)


@dataclass(frozen=True)
class Grid:
    """Every combination of the values, the ones named first in each list first.

    A shape is in_features and out_features; of layers that read one x the out_features of each.
    """

    shapes: Sequence[tuple[int, ...]]
    tokens: Sequence[int]
    ranks: Sequence[int] = (16,)
    dtypes: Sequence[str] = ("bfloat16",)
    dropouts: Sequence[bool] = (False,)
    directions: Sequence[str] = ("forward",)

    def cells(self) -> list[Cell]:
        """By the sum of the values' places in their lists: what every list names first, then one step from it, ..."""
        lists: tuple[Sequence[Any], ...] = (
            self.directions, self.dtypes, self.ranks, self.dropouts, self.tokens, self.shapes
        )  # fmt: skip
        cells = []
        for places in sorted(product(*(range(len(values)) for values in lists)), key=sum):
            direction, dtype, r, dropout, tokens, (k, n, *more) = (v[i] for v, i in zip(lists, places, strict=True))
            others = tuple((width, r) for width in more)
            cells.append(Cell(direction, next_power_of_2(tokens), k, n, r, dtype, dropout, others))
        return cells


@dataclass(frozen=True)
class Preset:
    """Grids, the most valuable first."""

    name: str
    describe: str
    grids: tuple[Grid, ...]

    def cells(self, directions: Sequence[str] = DIRECTIONS) -> list[Cell]:
        every = dict.fromkeys(cell for grid in self.grids for cell in grid.cells())
        return [cell for cell in every if cell.direction in directions]


_PUBLISHED = (
    Grid(_SHAPES, (8192,), dropouts=(False, True), directions=DIRECTIONS),
    Grid((_SQUARE,), _FEW),
)

PRESETS = {
    p.name: p
    for p in (
        Preset(
            "published",
            "the shapes with a published target, r = 16, bf16: 15 cells and backward's 10",
            _PUBLISHED,
        ),
        Preset(
            "goals",
            "those, then 2048 and 512 tokens of the square layer: what make gpu-check and gpu-bench tune",
            (*_PUBLISHED, Grid((_SQUARE,), (2048, 512), dropouts=(False, True), directions=DIRECTIONS)),
        ),
        Preset(
            "quick",
            "the published ones, then r = 16 at 1, 16, 64, 512 and 2048 tokens",
            (*_PUBLISHED, Grid(_SHAPES, (1, 512, 16, 2048, 64)), Grid(_SHAPES, (2048, 512), directions=("backward",))),
        ),
        Preset(
            "groups",
            "layers of one x, where a GPU has kernels for them: q, k and v, gate and up of Llama-3-8B",
            (Grid(_GROUPS, (8192, 4096, 2048), dropouts=(False, True), directions=DIRECTIONS),),
        ),
        Preset(
            "grid",
            "the published ones, then M from 1 to 16384, r of 8, 16, 64 and 128, dropout on and off",
            (*_PUBLISHED, Grid(_SHAPES, _TOKENS, _RANKS, dropouts=(False, True), directions=DIRECTIONS)),
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InvalidArgumentError: there is none.
    """
    if name not in PRESETS:
        raise InvalidArgumentError(f"preset {name!r} is not known: name one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def cells_of(
    shapes: Sequence[tuple[int, ...]],
    tokens: Sequence[int],
    ranks: Sequence[int],
    dtypes: Sequence[str],
    dropouts: Sequence[float],
    directions: Sequence[str] = DIRECTIONS,
) -> list[Cell]:
    """Every combination; of each list the first values come first. Tokens enter as their bucket, the next power of 2.

    Raises:
        InvalidArgumentError: a dtype that is not known, or a dropout that is no probability below 1.
    """
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise InvalidArgumentError(f"dtype {unknown[0]!r} is not known: name some of {', '.join(DTYPES)}.")
    if wrong := [p for p in dropouts if not 0.0 <= p < 1.0]:
        raise InvalidArgumentError(f"dropout {wrong[0]:g} was given: it must be at least 0 and below 1.")
    dropped = list(dict.fromkeys(p > 0.0 for p in dropouts))
    return list(dict.fromkeys(Grid(shapes, tokens, ranks, dtypes, dropped, directions).cells()))


def directions(text: str) -> list[str]:
    """Of a list such as ``forward,backward``.

    Raises:
        InvalidArgumentError: another direction is named.
    """
    found = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in found if name not in DIRECTIONS]:
        raise InvalidArgumentError(f"--directions names {unknown[0]!r}: it must be some of {', '.join(DIRECTIONS)}.")
    return found


def numbers(option: str, text: str) -> list[int]:
    """The positive integers of a list such as ``1,16,8192``.

    Raises:
        InvalidArgumentError: it is no such list.
    """
    found = [count_of(part) for part in text.split(",")]
    if not all(found):
        raise InvalidArgumentError(
            f"{option} {text} was given: it must be positive integers below 2^31, such as 1,16,8192."
        )
    return list(dict.fromkeys(found))


def shapes(text: str) -> list[tuple[int, ...]]:
    """in_features x out_features of a list such as ``4096x4096,4096x14336+14336``, with + those of layers of one x.

    Raises:
        InvalidArgumentError: it is no such list.
    """
    found = []
    for part in text.split(","):
        k, _, ns = part.strip().partition("x")
        sides = tuple(count_of(side) for side in (k, *ns.split("+")))
        if len(sides) > 1 + MEMBERS[-1] or not all(sides):
            raise InvalidArgumentError(
                f"--shapes {text} was given: it must be in_features x out_features, such as 4096x4096, or "
                f"4096x4096+1024+1024 for 2 to {MEMBERS[-1]} layers that read one x, with commas between them. "
                "Sizes are below 2^31."
            )
        found.append(sides)
    return list(dict.fromkeys(found))


def shapes_of_model(path: Path) -> list[tuple[int, ...]]:
    """The linear layers of a decoder, from transformers' ``config.json``: attention's four and the MLP's three.

    Then those that read one x: q, k and v; gate and up.

    Raises:
        InvalidArgumentError: the file cannot be read, or lacks the sizes that such a config has.
    """
    try:
        config = parsed(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        hidden, inner, heads = (_size(config, n) for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
        key_heads = config.get("num_key_value_heads") or heads
        head = config.get("head_dim") or hidden // heads
        queries, keys = int(heads * head), int(key_heads * head)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, OverflowError) as error:
        raise InvalidArgumentError(
            f"--from-config {path} cannot be used ({type(error).__name__}: {error}): name the config.json of a "
            "transformers decoder, or give --shapes."
        ) from error
    layers: tuple[tuple[int, ...], ...]
    layers = ((hidden, queries), (hidden, inner), (inner, hidden), (hidden, keys), (queries, hidden))
    layers += ((hidden, queries, keys, keys), (hidden, inner, inner))
    return list(dict.fromkeys(layers))


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}")
    return value
