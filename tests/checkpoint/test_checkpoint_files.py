"""The pair of files: a failed or killed save leaves the former adapter or the latter, whole, and nothing else."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, load_adapter, replace_linear, save_adapter
from lora_kernels.checkpoint import files
from lora_kernels.checkpoint.files import CONFIG, WEIGHTS, read_pair
from lora_kernels.errors import InvalidArgumentError, LoRAStateError
from made_models import Net, refused

safetensors = pytest.importorskip("safetensors.torch")

FORMER = {"r": 2, "lora_alpha": 4}
LATTER = {"r": 3, "lora_alpha": 9, "use_rslora": True}


def adapted(**arguments: Any) -> nn.Module:
    model = Net()
    replace_linear(model, LoRAConfig(target_modules=["up"], init_lora_weights=False, **arguments))
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


class Steps:
    """Counts the calls that change a folder, and acts at one of them."""

    CALLS = ("replace", "fsync", "link", "unlink")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], Any]) -> None:
        self.count, self.at, self.action = 0, at, action
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.action()
            return call(*args, **kwargs)

        return counted


def steps_of(function: Callable[[], Any]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch, 0, lambda: None)
        function()
        return steps.count


def killed_at(step: int, function: Callable[[], Any]) -> None:
    """Runs ``function`` in a process that is gone, without any clean-up, at its ``step``."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is no child that was killed at its step
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, step, lambda: os._exit(9))
            function()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def state_of(folder: Path) -> tuple[Any, ...]:
    fields, tensors = read_pair(folder)
    return fields["r"], fields["lora_alpha"], fields["use_rslora"], {tuple(tensor.shape) for tensor in tensors.values()}


STATES = {
    "former": (2, 4, False, {(2, 8), (12, 2)}),
    "latter": (3, 9, True, {(3, 8), (12, 3)}),
}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("by_peft", [True, False])
def test_a_killed_save_leaves_one_whole_adapter_and_the_next_save_tidies_up(by_peft: bool, tmp_path: Path) -> None:
    former, latter = adapted(**FORMER), adapted(**LATTER)
    (tmp_path / "README.md").write_text("mine")
    save_adapter(former, tmp_path)
    seen = []
    for step in range(1, steps_of(lambda: save_adapter(latter, tmp_path)) + 1):
        save_adapter(former, tmp_path)
        assert set(contents(tmp_path)) == {CONFIG, WEIGHTS, "README.md"}
        if by_peft:  # whose weights do not say what configuration is theirs
            safetensors.save_file(read_pair(tmp_path)[1], tmp_path / WEIGHTS, metadata={"format": "pt"})
        killed_at(step, lambda: save_adapter(latter, tmp_path))
        found = state_of(tmp_path)
        assert found in STATES.values()
        seen.append(found == STATES["latter"])
        assert len(load_adapter(Net(), tmp_path)) == 2
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


def sentence_of(model: nn.Module, folder: Path) -> str | None:
    try:
        save_adapter(model, folder)
    except LoRAStateError as error:
        return str(error)
    return None


@pytest.mark.parametrize("first", [True, False])
def test_a_save_that_fails_at_any_step_leaves_the_folder_as_it_was(first: bool, tmp_path: Path) -> None:
    latter, failed = adapted(**LATTER), []
    for step in range(1, steps_of(lambda: save_adapter(latter, tmp_path / "other")) + 4):
        folder = tmp_path / str(step)
        if not first:
            save_adapter(adapted(**FORMER), folder)
        before = contents(folder)
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, step, full_disk)
            sentence = sentence_of(latter, folder)
        if sentence is None:  # it went another way, or only tidying up was to come
            assert state_of(folder) == STATES["latter"]
        else:
            assert "No space left" in sentence
            assert contents(folder) == before
            failed.append(step)
    assert len(failed) == 7  # three files and folders are synced, two renamed, and the folder synced after each


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def test_a_file_system_that_syncs_no_folders_takes_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    save_adapter(adapted(**LATTER), tmp_path)
    assert state_of(tmp_path) == STATES["latter"]


def test_a_configuration_changed_by_hand_counts(tmp_path: Path) -> None:
    save_adapter(adapted(**FORMER), tmp_path)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace('"lora_alpha": 4', '"lora_alpha": 6'))
    model = Net()
    load_adapter(model, tmp_path)
    assert model.blocks[0]["up"].scaling == 3.0


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(adapted(), lambda model: save_adapter(model, tmp_path / "file"), LoRAStateError, "File exists", "as it was")


def test_safetensors_that_is_missing_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    refused(
        adapted(), lambda model: save_adapter(model, tmp_path), ImportError, 'pip install "lora-kernels[safetensors]"'
    )
    assert not list(tmp_path.iterdir())


def test_the_weights_are_those_of_the_model(tmp_path: Path) -> None:
    model = adapted(**FORMER)
    save_adapter(model, tmp_path)
    _, tensors = read_pair(tmp_path)
    layer = model.blocks[1]["up"]
    assert torch.equal(tensors["base_model.model.blocks.1.up.lora_A.weight"], layer.lora_A)
    assert torch.equal(tensors["base_model.model.blocks.1.up.lora_B.weight"], layer.lora_B)


@contextmanager
def held(folder: Path, kind: int) -> Iterator[int]:
    """The folder's lock, as another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, kind)
    try:
        yield handle
    finally:
        os.close(handle)


def test_a_reader_waits_for_a_writer_and_a_writer_for_a_reader(tmp_path: Path) -> None:
    save_adapter(adapted(**FORMER), tmp_path)
    for kind, act in ((fcntl.LOCK_EX, lambda: state_of(tmp_path)), (fcntl.LOCK_SH, lambda: save_latter(tmp_path))):
        with held(tmp_path, kind) as handle:
            threading.Timer(0.1, lambda handle=handle: fcntl.flock(handle, fcntl.LOCK_UN)).start()
            act()
    assert state_of(tmp_path) == STATES["latter"]


def save_latter(folder: Path) -> None:
    save_adapter(adapted(**LATTER), folder)


def test_a_lock_that_is_not_let_go_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    save_adapter(adapted(**FORMER), tmp_path)
    before = contents(tmp_path)
    load, save = (lambda model: load_adapter(model, tmp_path)), (lambda model: save_adapter(model, tmp_path))
    with held(tmp_path, fcntl.LOCK_EX):
        refused(Net(), load, LoRAStateError, "has been saving", "0.05 s", "try again")
    with held(tmp_path, fcntl.LOCK_SH):
        assert state_of(tmp_path) == STATES["former"]
        refused(adapted(**LATTER), save, LoRAStateError, "has been reading or saving", "0.05 s")
    assert contents(tmp_path) == before


@contextmanager
def without_rights(folder: Path, rights: int) -> Iterator[None]:
    """``folder`` has these ``rights`` for all, and root, who may do anything, is nobody."""
    mode, root = stat.S_IMODE(folder.stat().st_mode), os.geteuid() == 0
    folder.chmod(rights)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(mode)


@pytest.mark.parametrize("rights", [0o555, 0o000], ids=oct)
def test_a_folder_that_may_not_be_written_is_a_sentence_and_keeps_its_adapter(rights: int) -> None:
    latter, save_to = adapted(**LATTER), lambda folder: lambda model: save_adapter(model, folder)
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o755)
        folder = Path(outer) / "adapter"
        save_adapter(adapted(**FORMER), folder)
        before = contents(folder)
        with without_rights(folder, rights):
            refused(latter, save_to(folder), LoRAStateError, "Permission denied", "as it was")
            refused(latter, save_to(folder / "inner"), LoRAStateError, "Permission denied", "as it was")
            if rights == 0:
                refused(Net(), lambda m: load_adapter(m, folder), InvalidArgumentError, "Permission denied", "leave")
        assert contents(folder) == before


def test_what_a_killed_save_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    save_adapter(adapted(**FORMER), tmp_path)
    whole = contents(tmp_path)
    for name in (CONFIG, WEIGHTS):
        (tmp_path / f".{name}.0a1b2c3d.saving").write_bytes(b"{")
        (tmp_path / f".{name}.0a1b2c3d.former").write_bytes(b"{")
    assert state_of(tmp_path) == STATES["former"]
    save_adapter(adapted(**LATTER), tmp_path)
    assert state_of(tmp_path) == STATES["latter"]
    assert set(contents(tmp_path)) == set(whole)


def save_for_ever(folder: Path, ready: int) -> None:
    """One adapter after the other, until it is killed; a byte goes to ``ready`` once the first is saved."""
    former, latter = adapted(**FORMER), adapted(**LATTER)
    while True:
        for model in (latter, former):
            save_adapter(model, folder)
            os.write(ready, b".")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_hundred_saves_killed_at_any_moment_leave_a_whole_adapter(tmp_path: Path) -> None:
    save_adapter(adapted(**FORMER), tmp_path)
    moments, cut_short, found = random.Random(0), 0, []
    for _ in range(100):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a parent that is gone kills nobody
            save_for_ever(tmp_path, writing)
        os.close(writing)
        assert os.read(reading, 1), "the child has ended by itself"
        time.sleep(moments.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        cut_short += len(contents(tmp_path)) > 2
        found.append(state_of(tmp_path))
        assert found[-1] in STATES.values()
    assert cut_short  # some were in the middle of it
    assert all(state in found for state in STATES.values())
    save_adapter(adapted(**LATTER), tmp_path)
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS}
