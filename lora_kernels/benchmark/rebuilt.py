"""The rival whose kernels are rebuilt in a checkout's ``bench/lorafusion``, and in no wheel: whether it is here.

Nothing of torch is imported before a layer is asked for: the command's help names the rival too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .setups import Layer, Setup

__all__ = ["FOLDER", "NAME", "absent", "build", "left_out", "why_absent", "why_not"]

NAME = "lorafusion"
FOLDER = Path(__file__).resolve().parents[2] / "bench" / NAME
_MODULE = "lora_kernels_bench_lorafusion"  # a name of its own: another project's folder bench/ may be importable


def why_absent() -> str | None:
    """A sentence that says why the rival is not here and what to do, or None where it is."""
    if (FOLDER / "__init__.py").is_file():
        return None
    return (
        "LoRAFusion is left out: its rebuilt kernels are in bench/lorafusion of a source checkout, and in no wheel. "
        "Run the package from the checkout (pip install --editable .), or name other peers."
    )


def absent() -> dict[str, str]:
    """The peers that cannot run because of what is not here, and why."""
    sentence = why_absent()
    return {} if sentence is None else {NAME: sentence}


def left_out(peers: Iterable[str]) -> dict[str, dict[str, str]]:
    """What a result's environment says of the peers that a preset names and that are not here; empty if all are."""
    found = {name: sentence for name, sentence in absent().items() if name in peers}
    return {"left_out": found} if found else {}


def why_not(setup: Setup) -> str | None:
    """A sentence that says why the rival cannot run this cell, or None."""
    if sentence := why_absent():
        return sentence
    reason: str | None = _loaded(FOLDER).why_not(setup)
    return reason


def build(setup: Setup) -> Layer:
    """The rival's layer."""
    layer: Layer = _loaded(FOLDER).build(setup)
    return layer


@cache
def _loaded(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        _MODULE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[_MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
