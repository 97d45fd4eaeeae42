"""The two files of an adapter, read and written as one.

No file system renames two files at once, so the pair is held together by a digest: the weights' metadata has the
SHA-256 of the configuration that belongs to them. Saving writes both under other names, then renames the weights, then
the configuration. A reader that comes between the two (a process was killed there) finds weights that the configuration
does not belong to, and the one that does still under its other name: it takes that. So it always reads the former
adapter or the latter, whole. Where nothing of the kind is found, the configuration was changed by hand, and counts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError, LoRAStateError, MissingExtraError
from ..json_text import parsed

__all__ = ["CONFIG", "WEIGHTS", "PathLike", "read_config", "read_pair", "write_pair"]

PathLike = str | os.PathLike[str]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_DIGEST = "adapter_config_sha256"  # in the weights' metadata, beside PEFT's "format"
_LORA = "LORA"  # the type of an adapter in PEFT's configuration
_SAVING, _FORMER = ".saving", ".former"  # how the names end that files have while they are being replaced
_NOT_HELD = (KeyError, NotImplementedError, RuntimeError, ValueError)  # what safetensors raises of an odd tensor
_PATIENCE = 120.0  # seconds to wait for another process that saves into, or reads, the folder
_PAUSE = 0.02  # seconds between two looks


def read_pair(folder: PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of the configuration and the tensors, on the CPU and in memory of their own.

    Raises:
        InvalidArgumentError: a file is missing, may not be read, or cannot be read as what it should be.
        InvalidTypeError: ``folder`` is no path.
        LoRAStateError: another process has been saving into the folder all the time.
        MissingExtraError: safetensors is not installed.
    """
    try:
        path = _folder(folder)
        with _locked(path, exclusive=False):
            tensors, digest = _read_weights(path) if (path / WEIGHTS).is_file() else (None, None)
            fields = read_config(path, digest)
        pickled = (path / _PICKLED).is_file()
    except OSError as error:
        raise InvalidArgumentError(
            f"the adapter in {str(folder)!r} cannot be read: {error}. Give this user leave to read the folder and its "
            "files, or copy them."
        ) from error
    if tensors is not None:
        return fields, tensors
    if pickled:
        raise InvalidArgumentError(
            f"the weights in {path} are {_PICKLED}, a pickle, which is not read here. Convert it once: from "
            "safetensors.torch import save_file; save_file(torch.load("
            f"'{_PICKLED}', weights_only=True), '{WEIGHTS}', metadata={{'format': 'pt'}})."
        )
    raise InvalidArgumentError(f"{path} has no {WEIGHTS}: it is no whole adapter. Save it again, or copy the file too.")


def _path(folder: PathLike) -> Path:
    try:
        path = Path(folder)
    except TypeError as error:
        raise InvalidTypeError(f"{folder!r} was given as a folder: it must be a string or a pathlib.Path.") from error
    if "\0" in str(path):
        raise InvalidArgumentError(f"{str(path)!r} was given as a folder: no name of a file has a null character.")
    return path


def _folder(folder: PathLike) -> Path:
    path = _path(folder)
    if not path.is_dir():
        raise InvalidArgumentError(
            f"{str(folder)!r} is no folder: give the one that holds {CONFIG} and {WEIGHTS}. An adapter of a model hub "
            "is downloaded first, for example with huggingface_hub.snapshot_download."
        )
    return path


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path / WEIGHTS, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{path / WEIGHTS} cannot be read: {error}. It is truncated, or no safetensors file; save or copy it again."
        ) from error
    return tensors, metadata.get(_DIGEST)


def read_config(path: Path, digest: str | None = None) -> dict[str, Any]:
    """The fields of the configuration: the one with ``digest`` if a save was cut off, else the one that is there."""
    text = (path / CONFIG).read_bytes() if (path / CONFIG).is_file() else None
    if digest is not None and (text is None or _digest(text) != digest):
        unfinished = (file.read_bytes() for file in path.glob(f".{CONFIG}.*"))
        text = next((found for found in unfinished if _digest(found) == digest), text)
    if text is None:
        inner = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
        hint = f" Adapters are in its folders {', '.join(map(repr, inner))}: give one of these." if inner else ""
        raise InvalidArgumentError(
            f"{path} has no {CONFIG}, so it holds no adapter that PEFT or save_adapter wrote.{hint}"
        )
    try:
        fields = parsed(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{path / CONFIG} is not JSON ({error}): save or copy it again.") from error
    if not isinstance(fields, dict):
        raise InvalidArgumentError(
            f"{path / CONFIG} holds {type(fields).__name__} where an object of fields is expected."
        )
    return fields


def write_pair(folder: PathLike, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files; where it raises, what was in the folder is as it was.

    Raises:
        InvalidArgumentError: ``folder`` has a null character.
        InvalidTypeError: ``folder`` is no path.
        LoRAStateError: a file cannot be written; the folder holds an adapter of another kind; or others have been
            reading or saving there all the time.
        MissingExtraError: safetensors is not installed.
    """
    path, created = _path(folder), False
    safetensors = _safetensors()
    text = json.dumps(fields, indent=2, sort_keys=True).encode()
    try:
        created = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path, exclusive=True):
            _check_former(path)
            _write(path, text, tensors)
    except BaseException as error:
        if created:
            with suppress(OSError):
                path.rmdir()
        if not isinstance(error, (OSError, safetensors.SafetensorError)):
            raise
        raise LoRAStateError(
            f"the adapter cannot be written to {path}: {error}. What was there is as it was; make room or give another "
            "folder."
        ) from error


def _write(path: Path, text: bytes, tensors: Mapping[str, Tensor]) -> None:
    # Not save_file: it writes to a file of a name of its own beside the given one, which stays where it is killed.
    serialised = _serialised(tensors, {"format": "pt", _DIGEST: _digest(text)})
    token = secrets.token_hex(4)
    order = (WEIGHTS, CONFIG)
    saving, former = ({name: path / f".{name}.{token}{end}" for name in order} for end in (_SAVING, _FORMER))
    leftover = [*saving.values(), *former.values()]
    try:
        saving[CONFIG].write_bytes(text)
        saving[WEIGHTS].write_bytes(serialised)
        for name in order:
            _keep(path / name, former[name])
            _sync(saving[name])
        _sync(path)
        try:
            for name in order:
                os.replace(saving[name], path / name)
                _sync(path)
        except BaseException:
            kept, leftover = leftover, []  # a reader needs them, should the next lines fail too
            for name in order:
                _put_back(path / name, saving[name], former[name])
            leftover = kept
            raise
        leftover += (file for name in order for file in path.glob(f".{name}.*"))  # of processes that were killed
    finally:
        for file in leftover:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _serialised(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    save = import_module("safetensors.torch").save
    try:
        found: bytes = save(dict(tensors), metadata=metadata)
    except _NOT_HELD as error:
        for name, tensor in tensors.items():
            try:
                save({name: tensor})
            except _NOT_HELD:
                raise LoRAStateError(
                    f"{name} is a tensor of {tensor.dtype} and {tensor.layout}, which a safetensors file cannot hold. "
                    "Convert it, or leave its module out of modules_to_save. Nothing was written."
                ) from error
        raise
    return found


def _check_former(path: Path) -> None:
    """Raises where the folder holds an adapter of another kind, such as a prompt: it would be lost."""
    try:
        former = parsed((path / CONFIG).read_bytes()) if (path / CONFIG).is_file() else {}
    except ValueError:
        return  # what is no JSON is no adapter
    kind = former.get("peft_type", _LORA) if isinstance(former, dict) else _LORA
    if kind != _LORA:
        raise LoRAStateError(
            f"the adapter cannot be written to {path}, which holds one of type {kind} in files of the same names: "
            "saving would replace it. Give a folder of its own, or remove that adapter first."
        )


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _keep(file: Path, former: Path) -> None:
    """Gives a file that is there a second name, or where the file system has no links, makes a copy."""
    if not file.exists():
        return
    try:
        os.link(file, former)
    except OSError:
        shutil.copyfile(file, former)


def _put_back(file: Path, saving: Path, former: Path) -> None:
    """Undoes the renaming of ``saving`` to ``file``, if it has come that far."""
    if former.exists():
        os.replace(former, file)
    elif not saving.exists():
        file.unlink()


def _sync(path: Path) -> None:
    """Waits until ``path``, a file or a folder's list of files, is on the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path, exclusive: bool) -> Iterator[None]:
    """Waits for others that save into the folder (or, if exclusive, read it); the lock ends with the process.

    Raises:
        LoRAStateError: they have not finished after ``_PATIENCE`` seconds.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _try_lock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise LoRAStateError(
                    f"another process has been {'reading or saving' if exclusive else 'saving'} the adapter in {path} "
                    f"for {_PATIENCE:g} s and has not finished. Nothing was changed; wait for it or end it, then try "
                    "again."
                )
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int, kind: int) -> bool:
    """Whether the lock was taken; also where the file system knows no locks, as some network ones."""
    import fcntl

    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _safetensors() -> Any:
    try:
        return import_module("safetensors")
    except ImportError as error:
        raise MissingExtraError(
            f"safetensors is needed for adapter files and cannot be imported ({error}). "
            'Run: pip install "lora-kernels[safetensors]".'
        ) from error
