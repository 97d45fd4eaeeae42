"""Finding and loading the native library: the one installed with the package, else the cache's, else a fresh compile.

A library is loaded only if its ``build_info.json`` fits this platform and these sources and its SHA-256 is the one
written there. Nothing here compiles but ``load`` and ``compile_into_cache``.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...env import BUILD_VARIABLE, unknown_choice
from ...errors import BackendUnavailableError
from ...json_text import parsed
from . import cache
from .build import (
    INFO_NAME,
    KINDS,
    Recipe,
    file_digest,
    recipe,
    requested_kinds,
    source_digest,
    sources_folder,
)
from .progress import say
from .toolchain import BuildError, platform_tag

__all__ = ["Library", "compile_into_cache", "give_up", "instruction_set", "load", "loaded", "lost", "status", "why_not"]

_INSTALLED = Path(__file__).resolve().parents[2] / "lib"


@dataclass(frozen=True)
class Library:
    """A compiled library that was checked: where it lies, where it comes from, and its ``build_info.json``.

    ``origin`` is "installed", "cache" or "compiled just now".
    """

    path: Path
    origin: str
    info: dict[str, Any]


_loaded: dict[str, Library] = {}
_failed: dict[str, str] = {}
_lock = threading.RLock()


def _renew_lock() -> None:
    """A fork while another thread compiles must not leave the child waiting for a thread that it does not have."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def loaded(kind: str) -> Library | None:
    """The library of this kind that this process has loaded."""
    return _loaded.get(kind)


def load(kind: str) -> Library:
    """Loads the library ``kind`` ("cpu", "cuda" or "launch") once, compiling it first where there is none.

    Raises:
        BackendUnavailableError: there is none and none can be compiled here, or it cannot be loaded. The reason is
            remembered: the same process does not try again.
    """
    found = _loaded.get(kind)
    if found is not None:
        return found
    with _lock:
        if kind in _failed:
            raise BackendUnavailableError(_failed[kind])
        if kind not in _loaded:
            try:
                _loaded[kind] = _load(kind)
            except BackendUnavailableError as error:
                _failed[kind] = str(error)
                raise
        return _loaded[kind]


def give_up(kind: str, reason: str) -> None:
    """Has this process do without the library ``kind``, which was loaded and does not work; ``reason``: a sentence."""
    with _lock:
        _loaded.pop(kind, None)
        _failed[kind] = reason


def why_not(kind: str) -> list[str]:
    """Why ``load(kind)`` would fail, as far as can be told without compiling; empty: it would succeed."""
    if kind in _loaded:
        return []
    if kind in _failed:
        return [_failed[kind]]
    if (blocked := _blocked(kind)) is not None:
        return [blocked]
    search = _search(kind)
    return [] if search.library else search.obstacles


def lost(kind: str) -> list[str]:
    """Why there is no library, for what a user may not know of: none of it is his choice, nor was he told of it."""
    if kind in _loaded or kind in _failed:
        return []
    if kind == "cpu" and (unknown := unknown_choice()) is not None:
        return [unknown]
    search = _search(kind)
    return [] if search.library or search.forbidden else search.obstacles


def status(kind: str) -> dict[str, Any]:
    """What ``info`` tells of one library: its state, path and build; or what would be done, or why nothing can be."""
    search = _search(kind)
    library = _loaded.get(kind) or search.library
    state = "loaded" if kind in _loaded else "found" if library else "would be compiled at first use"
    reasons = why_not(kind)
    if reasons and kind not in _loaded:
        state = f"{state}, but cannot be used here" if library else "none"
    return {
        "state": state,
        "path": str(library.path) if library else None,
        "origin": library.origin if library else None,
        "build": library.info if library else None,
        "compiler": search.recipe.compiler.name if search.recipe else None,
        "reasons": reasons,
        "passed_over": search.passed_over,
    }


def instruction_set(path: str) -> dict[str, str] | None:
    """What runs of the CPU library at ``path``, which is loaded for the question; None where it does not tell.

    Returns:
        ``capability``, as LORA_KERNELS_CPU_CAPABILITY names it, and ``amx_obstacle``: why AMX cannot run here, or "".
    """
    try:
        library = ctypes.CDLL(path)
        asked = {
            "capability": library.lora_kernels_cpu_capability,
            "amx_obstacle": library.lora_kernels_cpu_amx_obstacle,
        }
    except (OSError, AttributeError):
        return None
    for function in asked.values():
        function.restype = ctypes.c_char_p
    return {name: function().decode() for name, function in asked.items()}


def compile_into_cache(kind: str, force: bool = False, hint: str = "") -> Library:
    """Compiles ``kind`` into the user's cache, unless it is there; an earlier failure is no obstacle.

    What takes longer than a second is shown on stderr, with the sentence ``hint``.

    Raises:
        BackendUnavailableError: it cannot be compiled; the sentence says why, and where the log is.
    """
    try:
        plan = recipe(kind)
    except BuildError as error:
        raise BackendUnavailableError(str(error)) from error
    folder, fresh = cache.build(plan, lambda path: _is_sound(path, plan), force, hint)
    try:
        library = _checked(folder, kind, "compiled just now" if fresh else "cache")
    except _Unsound as unsound:
        raise BackendUnavailableError(
            f"what was compiled into {folder} cannot be used: {unsound}. Were sources changed meanwhile? Build again."
        ) from unsound
    _failed.pop(kind, None)
    return library


@dataclass(frozen=True)
class _Search:
    """What was found without compiling; ``obstacles``: why nothing may be compiled."""

    library: Library | None
    recipe: Recipe | None
    passed_over: list[str]
    obstacles: list[str]
    forbidden: bool = False  # by LORA_KERNELS_BUILD


class _Unsound(Exception):
    """A folder whose library is not to be loaded; the message goes on with "... (it is truncated)"."""


def _search(kind: str) -> _Search:
    passed_over: list[str] = []
    obstacles: list[str] = []
    plan: Recipe | None = None
    forbidden = False
    try:
        plan = recipe(kind)
    except BuildError as error:
        obstacles.append(str(error))
    try:
        forbidden = kind not in requested_kinds("all")
        if plan is not None and forbidden:
            obstacles.append(
                f"the native {kind} library is not compiled, and {BUILD_VARIABLE}={os.environ[BUILD_VARIABLE]} forbids "
                f"to do it at the first use: unset that, or run `lora-kernels build {kind}`."
            )
    except BuildError as error:
        obstacles.append(str(error))
    if plan is not None and (failure := cache.failure(plan)):
        obstacles.append(failure)
    for folder, origin in _candidates(kind, plan):
        try:
            return _Search(_checked(folder, kind, origin), plan, passed_over, obstacles)
        except _Unsound as unsound:
            passed_over.append(f"{folder} is passed over: {unsound}.")
    return _Search(None, plan, passed_over, obstacles, forbidden)


def _candidates(kind: str, plan: Recipe | None) -> Iterator[tuple[Path, str]]:
    """Folders that may hold the library, best first. Without a compiler, any of the cache that fits will do."""
    if (_INSTALLED / kind).is_dir():
        yield _INSTALLED / kind, "installed"
    for root in cache.folders():
        if plan is not None:
            keyed = [root / plan.key]
        else:
            keyed = [path.parent for path in sorted(root.glob(f"*/{INFO_NAME}")) if _fits(path.parent, kind)]
        yield from ((folder, "cache") for folder in keyed if folder.is_dir())


def _read_info(folder: Path) -> dict[str, Any]:
    try:
        info = parsed((folder / INFO_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _Unsound(f"its {INFO_NAME} cannot be read ({error})") from error
    if not isinstance(info, dict):
        raise _Unsound(f"its {INFO_NAME} is no description of a library")
    return info


def _fits(folder: Path, kind: str) -> bool:
    try:
        _check_fit(_read_info(folder), kind)
    except _Unsound:
        return False
    return True


def _check_fit(info: dict[str, Any], kind: str) -> None:
    expected = {"kind": kind, "platform": platform_tag(), "sources": source_digest(kind, sources_folder())}
    for name, value in expected.items():
        if info.get(name) != value:
            raise _Unsound(f"its {name} differ: {info.get(name)} in {INFO_NAME}, {value} here")


def _checked(folder: Path, kind: str, origin: str) -> Library:
    """The library in ``folder``, if it is whole and made for this machine from these sources."""
    info = _read_info(folder)
    _check_fit(info, kind)
    path = folder / Path(str(info.get("library"))).name
    try:
        if path.stat().st_size != info.get("size"):
            raise _Unsound(f"{path.name} is truncated or foreign: its size is not the one in {INFO_NAME}")
        if file_digest(path) != info.get("sha256"):
            raise _Unsound(f"{path.name} is corrupt or foreign: its SHA-256 is not the one in {INFO_NAME}")
    except OSError as error:
        raise _Unsound(f"{path.name} cannot be read ({error})") from error
    return Library(path, origin, info)


def _is_sound(folder: Path, plan: Recipe) -> bool:
    try:
        return _checked(folder, plan.kind, "cache").info.get("hash") == plan.key
    except _Unsound:
        return False


def _blocked(kind: str) -> str | None:
    """Why no library of this kind can be loaded into this process, whatever is compiled."""
    if kind not in KINDS:
        return f"there is no native library for device type {kind!r}: use tensors on the CPU or on a CUDA device."
    if kind == "cuda" and torch.version.cuda is None:
        return (
            "torch.version.cuda is None: this is a CPU build of torch, and the native CUDA library needs libtorch_cuda "
            "to load. Install a CUDA build of torch, or move the tensors to the CPU."
        )
    if kind == "launch" and torch.version.cuda is None:
        return "this build of torch is not for CUDA: there are no launches on an NVIDIA GPU to be made."
    return unknown_choice() if kind == "cpu" else None


def _load(kind: str) -> Library:
    if (blocked := _blocked(kind)) is not None:
        raise BackendUnavailableError(blocked)
    search = _search(kind)
    said = search.passed_over
    if search.library is not None:
        try:
            library = _dlopen(search.library)
        except OSError as error:
            if search.obstacles or search.library.origin != "cache":
                raise _unloadable(search.library, error) from error
            said = [*said, f"{search.library.path} cannot be loaded ({error.__cause__ or error})."]
        else:
            for sentence in said:
                say(sentence)
            return library
    elif search.obstacles:
        raise BackendUnavailableError(" ".join([*search.obstacles, *said]))
    if said:
        say(f"{' '.join(said)} The native {kind} library is compiled again.")
    hint = f"`lora-kernels build {kind}` does it beforehand; {BUILD_VARIABLE}=off forbids it."
    library = compile_into_cache(kind, search.library is not None, hint)
    try:
        return _dlopen(library)
    except OSError as error:
        raise _unloadable(library, error) from error


def _dlopen(library: Library) -> Library:
    torch.ops.load_library(str(library.path))
    return library


def _unloadable(library: Library, error: OSError) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{library.path} cannot be loaded ({error.__cause__ or error}): run `lora-kernels build --force` with a "
        "compiler that fits this machine."
    )
