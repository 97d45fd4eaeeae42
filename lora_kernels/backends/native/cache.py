"""The user's cache of compiled libraries: one folder for each build hash, made whole or not at all.

``<cache>/native/<hash>/`` holds the library, ``build_info.json`` and ``build.log``; ``<hash>-failed.log`` beside it
remembers a compile that failed. A build happens in a folder of another name, under a lock, and is then renamed: what
an interrupted one leaves is never mistaken for a library, and the next build of that hash removes it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ... import env
from ...errors import BackendUnavailableError
from .build import LOG_NAME, Recipe, compile_library
from .progress import Progress, say, shown
from .toolchain import BuildError

__all__ = ["build", "failure", "folders", "locked", "writable_folder"]

_TOLD = 4  # lines of a failed compile that its sentence holds


def folders() -> list[Path]:
    """Where libraries may lie: the user's cache, and the private temporary folder that stands in for it."""
    return [path for path in (_user_folder(), _temporary_folder()) if path is not None]


def build(recipe: Recipe, usable: Callable[[Path], bool], force: bool = False, hint: str = "") -> tuple[Path, bool]:
    """Compiles ``recipe`` into the cache, unless another process has by the time that the lock is held.

    Args:
        recipe: what to compile.
        usable: whether the folder it is given holds a sound library of this recipe.
        force: compile even so.
        hint: a sentence that goes with what is said while it compiles.

    Returns:
        The folder of the library, and whether it was compiled just now.

    Raises:
        BackendUnavailableError: the compile failed; the log's path and last lines are in the sentence.
    """
    try:
        why: list[str] = []
        root = writable_folder(why.append)
        final = root / recipe.key
        what = f"the native {recipe.kind} library"
        with locked(root / f"{recipe.key}.lock", f"compiles {what} into {root}"):
            due = force or not usable(final)
            if due:
                with shown(what, str(root), " ".join([*why, hint])) as progress:
                    _build_at(root, final, recipe, progress)
    except OSError as error:
        raise BackendUnavailableError(
            f"the native {recipe.kind} library could not be compiled into the cache ({error}): make room there, or "
            f"name another folder by {env.CACHE_VARIABLE}."
        ) from error
    return final, due


def _build_at(root: Path, final: Path, recipe: Recipe, progress: Progress) -> None:
    for left_behind in root.glob(f"{recipe.key}.part-*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    part = root / f"{recipe.key}.part-{uuid.uuid4().hex}"
    part.mkdir()
    failed = _failed_log(root, recipe.key)
    try:
        try:
            compile_library(recipe, part, progress)
        except BuildError as error:
            _remember_failure(part / LOG_NAME, failed, error)
            raise BackendUnavailableError(_failure_sentence(recipe, failed)) from error
        if final.exists():
            final.rename(root / f"{part.name}-replaced")
        part.rename(final)
        failed.unlink(missing_ok=True)
    finally:
        for left_behind in root.glob(f"{part.name}*"):
            shutil.rmtree(left_behind, ignore_errors=True)


def failure(recipe: Recipe) -> str | None:
    """The sentence on an earlier compile of this very recipe that failed, in whichever process; None: there is none."""
    logs = (_failed_log(root, recipe.key) for root in folders())
    return next((_failure_sentence(recipe, log) for log in logs if log.is_file()), None)


def _failed_log(root: Path, key: str) -> Path:
    return root / f"{key}-failed.log"


def _remember_failure(log: Path, failed: Path, error: BuildError) -> None:
    said = log.read_text(encoding="utf-8") if log.is_file() else ""
    partial = failed.with_name(f"{log.parent.name}.log")
    partial.write_text(f"{said}\n{error}\n{error.output}\n", encoding="utf-8")
    partial.replace(failed)


def _failure_sentence(recipe: Recipe, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = dict.fromkeys(line for line in lines if "error:" in line or line.startswith("ld"))
    said = [line for line in lines if not line.startswith(f"{recipe.compiler.path} -")]  # without the commands
    told = list(errors)[:_TOLD] or said[-_TOLD:]  # what follows the first errors is often their echo
    return (
        f"the native {recipe.kind} library could not be compiled by {recipe.compiler.name}. The log {log} says: "
        f"{' | '.join(told).rstrip('.')}. Mend the cause and run `lora-kernels build {recipe.kind}`, which tries again."
    )


@contextmanager
def locked(path: Path, does: str) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when the process ends, however it does.

    Who waits says what the other process ``does``.
    """
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process {does}; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _user_folder() -> Path | None:
    named = env.cache_folder()
    return None if named is None else named / "native"


def _temporary_folder() -> Path | None:
    folder = Path(tempfile.gettempdir()) / f"lora_kernels-{_user()}"
    return folder / "native" if _is_private(folder) else None


def writable_folder(tell: Callable[[str], None] = say) -> Path:
    """The user's cache; where it cannot be written to, a private temporary folder, and ``tell`` is given the reason."""
    user = _user_folder()
    if user is not None and _can_write(user):
        return user
    missing = "There is no home folder" if user is None else f"The cache {user.parent} cannot be written to"
    tell(f"{missing}; {env.CACHE_VARIABLE} names another one.")
    return _stand_in()


@lru_cache(maxsize=1)
def _stand_in() -> Path:
    folder = Path(tempfile.gettempdir()) / f"lora_kernels-{_user()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _is_private(folder):
        folder = Path(tempfile.mkdtemp(prefix="lora_kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "native").mkdir(exist_ok=True)
    return folder / "native"


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


def _is_private(folder: Path) -> bool:
    """Whether it is a folder, no link, of this user, that no one else may enter: libraries are run from it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and str(found.st_uid) == _user() and not found.st_mode & 0o077
