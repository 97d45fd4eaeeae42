"""Many layers in a few lines: those whose names differ only by numbers are one kind, told once with their count."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["MOST", "Kind", "arrow", "count", "in_a_line", "kind_lines", "some", "span", "times"]

MOST = 8  # lines, or items of a line, that tell of layers
_NAMES_SHOWN = 4  # of the layers that one line tells of by name

T = TypeVar("T")


class Kind(NamedTuple):
    """Layers of one kind: where there is one, by its name, else by the part of their names that tells kinds apart."""

    label: str
    indices: list[int]

    def __str__(self) -> str:
        return self.label if len(self.indices) == 1 else f"{len(self.indices)} {times()} {self.label}"


def kinds(names: Sequence[str], *facts: Sequence[Hashable], alone: int = MOST) -> list[Kind]:
    """``names``, each a kind of its own where they are at most ``alone``, else by what is equal up to numbers.

    ``facts`` has for each name what its kind has in common besides; the first that gives few kinds is taken, the
    later ones hold less.
    """
    if len(names) <= alone:
        return [Kind(name, [index]) for index, name in enumerate(names)]
    found: list[list[int]] = []
    for fact in facts or ([None] * len(names),):
        for number in (r"(?<![^.])\d+(?![^.])", r"\d+"):  # first the components that are numbers, as of blocks
            alike: dict[Hashable, list[int]] = {}
            for index, name in enumerate(names):
                alike.setdefault((re.sub(number, "*", name), fact[index]), []).append(index)
            found = list(alike.values())
            if len(found) <= MOST:
                return _labelled(names, found)
    return _labelled(names, found)


def _labelled(names: Sequence[str], found: list[list[int]]) -> list[Kind]:
    paths = [_path([names[index] for index in indices]) for indices in found]
    return [
        Kind(names[indices[0]], indices) if len(indices) == 1 else Kind(_label(path, paths, names, indices), indices)
        for path, indices in zip(paths, found, strict=True)
    ]


def _path(alike: Sequence[str]) -> list[str]:
    """The components of ``alike``, which differ in numbers: these as ``*``."""
    columns = zip(*(name.split(".") for name in alike), strict=True)
    return [column[0] if len(set(column)) == 1 else re.sub(r"\d+", "*", column[0]) for column in columns]


def _label(path: list[str], paths: list[list[str]], names: Sequence[str], indices: list[int]) -> str:
    """The shortest end of ``path`` that begins with a word and that no other kind's path has."""
    for length in range(1, len(path) + 1):
        end = path[-length:]
        is_word = not re.fullmatch(r"[*\d]*|weight|bias", end[0])
        if is_word and all(other == path or other[-length:] != end for other in paths):
            return ".".join(end)
    return some([names[index] for index in indices])


def kind_lines(
    items: Sequence[T], name: Callable[[T], str], facts: Sequence[Callable[[T], Hashable]], text: Callable[..., str]
) -> list[str]:
    """A line for each kind of ``items``: ``text(kind, its items)``, and how many kinds more there are."""
    told = [[fact(item) for item in items] for fact in facts]
    found = kinds([name(item) for item in items], *told)
    shown = found if len(found) <= MOST else found[: MOST - 1]
    lines = [f"  {text(kind, [items[index] for index in kind.indices])}" for kind in shown]
    if len(shown) < len(found):
        rest = sum(len(kind.indices) for kind in found[len(shown) :])
        lines.append(f"  and {count(rest, 'layer')} of {len(found) - len(shown)} more kinds; details() names them")
    return lines


def in_a_line(names: Sequence[str], most: int = MOST) -> str:
    """``names`` by kind, between commas."""
    found = kinds(names, alone=_NAMES_SHOWN)
    more = sum(len(kind.indices) for kind in found[most:])
    return ", ".join(map(str, found[:most])) + (f" and {more} more" if more else "")


def span(values: Iterable[float]) -> str:
    """The one value that all are, or the least and the greatest."""
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g}-{found[-1]:g}"


def some(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def count(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def times() -> str:
    return _sign("×", "x")


def arrow() -> str:
    return _sign("→", "->")


def _sign(sign: str, plain: str) -> str:
    """``sign``, or ``plain`` where printing it would raise."""
    try:
        sign.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return plain
    return sign
