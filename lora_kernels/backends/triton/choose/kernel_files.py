"""Which source files of ``kernels/`` a kind of plan runs, and their digest: what a tuned row was measured with.

The modules that a kind launches from are named here; what those import of ``kernels/`` counts with them. An
``__init__.py`` does not, for it has no code, and a sentence of it would orphan every row.
"""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

from .... import nvrtc
from . import ring
from .plans import KINDS

__all__ = ["KERNELS", "digest_of", "digests", "files_of"]

KERNELS = Path(__file__).parents[1] / "kernels"
_SMALL = ("backward", "forward")  # da, dh with db and the sums; dh is a shrink
_MODULES: dict[str, tuple[str, ...]] = {
    "ring": (),
    "ring_grads": (),
    "few_tokens": ("few_tokens",),
    "fused": ("forward", "persistent"),
    "lora_first": ("forward",),
    "base_first": ("forward",),
    "hopper": ("hopper/small", "hopper/shrink", "hopper/product"),
    "hopper_inside": ("hopper/small", "hopper/product_h"),
    "dx_fused": (*_SMALL, "input_grad"),
    "dx_lora_first": (*_SMALL, "input_grad"),
    "dx_hopper": ("hopper/small", "hopper/outer", "hopper/product", "hopper/shrink"),
    "dx_inside": ("hopper/small", "hopper/outer", "hopper/product_h"),
    "hopper_group": ("hopper/group_small", "hopper/group_shrink", "hopper/group_product"),
    "dx_hopper_group": ("hopper/group_small", "hopper/group_outer", "hopper/group_dx"),
}
_CUDA = {  # files of csrc/cuda
    "ring": ("few_tokens_forward_entry.cuh", *ring.HEADERS),
    "ring_grads": ("few_tokens_grads_entry.cuh", *ring.GRAD_HEADERS),
}
_MODULES["apart"] = tuple(sorted({module for modules in _MODULES.values() for module in modules}))  # whatever runs
assert set(_MODULES) == set(KINDS)


def files_of(kind: str, folder: Path = KERNELS) -> tuple[Path, ...]:
    """The files of ``folder`` that plans of ``kind`` run, shared helpers too, in order."""
    found: set[Path] = set()
    waiting = [folder / f"{module}.py" for module in _MODULES[kind]]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports(path)
    return tuple(sorted(found))


def digest_of(kind: str, folder: Path = KERNELS) -> str:
    """Of the device code of ``kind``: what was measured of other kernels says nothing of these."""
    digest = hashlib.sha256()
    for path in files_of(kind, folder):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    for name in _CUDA.get(kind, ()):
        digest.update(f"{name}\0{nvrtc.source(name)}".encode())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=1)
def digests() -> dict[str, str]:
    """Of every kind of plan."""
    return {kind: digest_of(kind) for kind in KINDS}


def _imports(path: Path) -> list[Path]:
    """The modules of this folder, or of one above it, that the file imports from."""
    named = (path.parents[level - 1] / f"{name}.py" for level, name in _relative_imports(path.read_bytes()))
    return [found for found in named if found.is_file()]


@lru_cache(maxsize=256)
def _relative_imports(source: bytes) -> tuple[tuple[int, str], ...]:
    """How many folders up, and a module's name there; most files are asked about by several kinds of plans."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return tuple(found)
