"""What the commands share: rich where it is installed, a sentence where it is not, progress, and strict JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import InvalidArgumentError, MissingExtraError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "MissingExtraError",
    "Progress",
    "check_plot",
    "check_writable",
    "count_of",
    "json_text",
    "names",
    "one_thread",
    "optional",
    "progress_bars",
    "progress_lines",
    "seed_of",
    "write_file",
]

Progress = Callable[[str, int, int], None]
"""Called with what is running, how many of its steps are done, and how many there are."""


_LIMIT = 2**31  # a layer's sizes that an option names are below
_EXTRAS = {"matplotlib": "plot", "peft": "bench"}


def optional(name: str) -> ModuleType:
    """The module ``name`` of a package that only the command line needs.

    Raises:
        MissingExtraError: it cannot be imported; the sentence says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        extra = _EXTRAS.get(package, "cli")
        raise MissingExtraError(
            f"{package} is needed for this output and cannot be imported ({error}). "
            f'Run: pip install "lora-kernels[{extra}]".'
        ) from error


def stdout_console() -> Console:
    """A rich console on stdout; where stdout is no terminal, wide enough that tables do not fold."""
    rich = optional("rich.console")
    console: Console = rich.Console(width=None if sys.stdout.isatty() else 120)
    return console


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Rich progress bars on stderr, one for each label; they vanish when the block ends."""
    rich, console = optional("rich.progress"), optional("rich.console").Console(stderr=True)
    counts = (rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    with rich.Progress("{task.description}", rich.BarColumn(), *counts, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield advance


def progress_lines(command: str) -> Progress:
    """Progress as plain lines ``command: label done/total`` on stderr, for ``--json`` and for a parent process."""

    def advance(label: str, done: int, total: int) -> None:
        print(f"{command}: {label} {done}/{total}", file=sys.stderr, flush=True)

    return advance


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block PyTorch's CPU operators use one thread: on small tensors more only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def json_text(value: Any) -> str:
    """Strict JSON: NaN and infinities, which JSON lacks, become the strings "nan", "inf" and "-inf"."""
    return json.dumps(_finite(value), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def check_writable(option: str, path: Path) -> None:
    """Raises, before any work is done, unless ``path`` can be written.

    Raises:
        InvalidArgumentError: its folder is missing or closed, or it is a folder itself.
    """
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise InvalidArgumentError(
            f"{option} {path} cannot be written: name a file in a folder that exists and that you may write to."
        )


def write_file(path: Path, text: str) -> None:
    """Puts ``text`` into a file as a whole: where that fails, what was there stays.

    A device or a pipe, such as ``/dev/stdout``, is written to; it is never replaced.

    Raises:
        InvalidArgumentError: it cannot be written, as where the disk is full.
    """
    place = path.resolve()  # a link stays a link
    beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
            return
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(place)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InvalidArgumentError(
            f"{path} cannot be written: {error}. Make room, or name a file in another folder."
        ) from error


def check_plot(option: str, path: Path) -> None:
    """Raises, before any work is done, unless a figure can be written to ``path``.

    Raises:
        InvalidArgumentError: as :func:`check_writable`, or matplotlib knows no format of that name.
        MissingExtraError: matplotlib is not installed.
    """
    check_writable(option, path)
    formats = optional("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise InvalidArgumentError(
            f"{option} {path}: matplotlib writes no {path.suffix} files. Let its name end with .png, .svg, .pdf or "
            f"another of {', '.join(formats)}."
        )


def count_of(text: str) -> int:
    """The positive integer below 2^31 that ``text`` is; 0 where it is none."""
    digits = text.strip()
    if not digits.isdecimal() or len(digits) > len(str(_LIMIT)):  # Python reads no number of thousands of digits
        return 0
    number = int(digits)
    return number if number < _LIMIT else 0


def seed_of(word: str) -> int:
    """The type of ``--seed``: what PyTorch's generators take."""
    number = int(word)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{word} was given: a seed is an integer from 0 to 2^63 - 1.")
    return number


def names(given: Sequence[str] | None) -> list[str] | None:
    """The names that an option of several was given, with spaces or commas between them; None if it was not."""
    return None if given is None else [name for item in given for name in item.split(",") if name]
