"""Tuned tables: read, merged, passed over where they must be, and looked up by a rule that is told."""

from __future__ import annotations

import ast
import json
import multiprocessing
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels import nvrtc
from lora_kernels.backends.triton.choose import candidates, kernel_files, ranking, table, tuned
from lora_kernels.backends.triton.choose.blocks import INTERPRETER
from lora_kernels.backends.triton.choose.plans import KINDS, Cell, plan_to_json
from lora_kernels.backends.triton.choose.table import DeviceName, Row, TableError, Timed, merge_into, read, versions_of
from lora_kernels.errors import InvalidArgumentError
from made_tables import CELL, DEVICE, FEW, H200, VERSIONS, looked_up, plan, row, write

GPU = torch.device("cuda", 0)


class Folders:
    """An H200 under Triton 3.6, the folder of shipped tables and the user's."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shipped, self.user = tmp_path / "shipped", tmp_path / "cache" / "tuned"
        monkeypatch.setattr(tuned, "SHIPPED", self.shipped)
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(tuned, "identify", lambda device: DEVICE if device.type == "cuda" else None)
        monkeypatch.setattr(tuned, "running_versions", lambda: VERSIONS)
        tuned.forget()
        ranking.forget()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    yield Folders(tmp_path, monkeypatch)
    tuned.forget()
    ranking.forget()


# The file


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [row(), row(FEW, "few_tokens"), row(replace(CELL, dropout=True), "lora_first")]
    path = write(tmp_path, *rows)
    assert (read(path).device, set(map(str, read(path).rows))) == (DEVICE, set(map(str, rows)))
    assert len([line for line in path.read_text().splitlines() if '"cell"' in line]) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "nvidia-h100-80gb-hbm3-mig-1g-10gb"),
        ("Quadro RTX 6000/8000", "quadro-rtx-6000-8000"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "device"),
    ],
)
def test_a_device_s_name_is_a_file_s(name: str, expected: str) -> None:
    assert table.slug(name) == expected


NO_TABLES = {
    "empty": "",
    "cut off": '{"format": 1, "device": {"name"',
    "a list": "[]",
    "another format": '{"format": 99, "device": {}, "rows": []}',
    "no device": '{"format": 1, "rows": []}',
    "no rows": '{"format": 1, "device": {"name": "NVIDIA H200", "capability": 90, "multiprocessors": 132}, "rows": 3}',
    "a size that is not finite": '{"format": 2, "device": {"name": "x", "capability": Infinity, "multiprocessors": 1}}',
    "not text": "\udcff\udcfe",
}


@pytest.mark.parametrize("content", NO_TABLES.values(), ids=NO_TABLES.keys())
def test_what_is_no_table_is_passed_over_with_one_warning(content: str, folders: Folders) -> None:
    write(folders.shipped, row(kind="lora_first"))
    path = write(folders.user, row())
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning, match=f"passed over: {path} .*: remove the file") as caught:
        assert looked_up(GPU, CELL) == plan("lora_first")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert looked_up(GPU, FEW) is None


@pytest.mark.parametrize("other", [DeviceName("NVIDIA H20", 90, 132), replace(DEVICE, multiprocessors=114)], ids=str)
def test_another_device_s_table_is_passed_over(other: DeviceName, folders: Folders) -> None:
    write(folders.user, row(), device=other)
    with pytest.warns(RuntimeWarning, match="is the table of NVIDIA H20"):
        assert looked_up(GPU, CELL) is None


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = json.loads(json.dumps(row(FEW, "few_tokens").to_json()))
    change(document)
    return document


BROKEN_ROWS = {
    "a field too few": broken(lambda r: r.pop("us")),
    "a field too many": broken(lambda r: r.update(price=3)),
    "a plan of a later version": broken(lambda r: r["plan"].update(kind="teleport")),
    "a plan whose kind is a list": broken(lambda r: r["plan"].update(kind=["fused"])),
    "a plan with an odd tile": broken(lambda r: r["plan"]["config"].update(block_n=48)),
    "tokens that are no bucket": broken(lambda r: r["cell"].update(tokens=3)),
    "no tokens": broken(lambda r: r["cell"].update(tokens=0)),
    "tokens as text": broken(lambda r: r["cell"].update(tokens="16")),
    "dropout as a number": broken(lambda r: r["cell"].update(dropout=0.1)),
    "an unknown dtype": broken(lambda r: r["cell"].update(dtype="int8")),
    "a time below zero": broken(lambda r: r.update(us=-1.0)),
    "a time that is none": broken(lambda r: r.update(us=None)),
    "a time that is not finite": broken(lambda r: r.update(floor_us=float("nan"))),
    "no version of Triton": broken(lambda r: r["versions"].pop("triton")),
    "kinds as a list": broken(lambda r: r.update(kinds=[])),
    "no object": 7,
}


@pytest.mark.parametrize("document", BROKEN_ROWS.values(), ids=BROKEN_ROWS.keys())
def test_a_row_that_is_not_known_costs_that_row_and_stays_in_the_file(document: Any, folders: Folders) -> None:
    path = write(folders.user, row())
    path.write_text(path.read_text().replace('"rows": [', f'"rows": [{json.dumps(document)},'))
    assert looked_up(GPU, CELL) == plan("fused")
    assert looked_up(GPU, FEW) is None
    merge_into(path, DEVICE, [row(replace(CELL, r=8))])
    assert json.dumps(document) in path.read_text()
    assert len(read(path).rows) == 2


def test_a_later_row_takes_the_place_of_the_cell_s(tmp_path: Path) -> None:
    write(tmp_path, row(), row(FEW, "few_tokens"))
    path = write(tmp_path, row(kind="lora_first"))
    assert {r.cell: r.plan.kind for r in read(path).rows} == {CELL: "lora_first", FEW: "few_tokens"}


def test_rows_of_another_triton_stay_beside_it(folders: Folders) -> None:
    write(folders.user, row(kind="lora_first", triton="3.7.1"), row(kind="fused", triton="3.6.0"))
    assert looked_up(GPU, CELL) == plan("fused")


def test_a_table_is_not_mixed_with_another_device_s(tmp_path: Path) -> None:
    path = write(tmp_path, row())
    with pytest.raises(TableError, match=r"is the table of NVIDIA H200 .*name another file"):
        merge_into(path, DeviceName("NVIDIA H100", 90, 132), [])


def test_what_is_no_table_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "nvidia-h200.json").write_text("mine, do not touch")
    path = write(tmp_path, row())
    assert [r.cell for r in read(path).rows] == [CELL]
    assert path.with_name(f"{path.name}.unreadable").read_text() == "mine, do not touch"


def _tune_some(path: Path, first: int, count: int) -> None:
    for r in range(first, first + count):
        merge_into(path, DEVICE, [row(replace(CELL, r=r))])


def test_processes_that_tune_at_once_keep_each_other_s_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    forked = multiprocessing.get_context("fork")
    path, ranks = tmp_path / "table.json", range(1, 41, 10)
    writers = [forked.Process(target=_tune_some, args=(path, first, 10)) for first in ranks]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * len(ranks)
    assert {r.cell.r for r in read(path).rows} == set(range(1, 41))
    assert {found.name for found in tmp_path.iterdir()} <= {"table.json", "tuned"}


def test_a_write_that_fails_leaves_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, row())

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(TableError, match=r"cannot be written \(no space left on device\): make room"):
        merge_into(path, DEVICE, [row(FEW, "few_tokens")])
    assert [r.cell for r in read(path).rows] == [CELL]
    assert [found.name for found in tmp_path.glob("*table*")] == []
    assert [found.name for found in tmp_path.glob(".*part")] == []


def test_rows_of_other_kernels_are_passed_over_and_told(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folders.user, row(), row(FEW, "few_tokens", versions=VERSIONS | {"kernels": "ba9876543210"}))
    assert looked_up(GPU, CELL) == plan("fused")
    assert looked_up(GPU, FEW) is None
    (source,) = tuned.load(DEVICE).sources
    assert (source.rows, source.used) == (2, 1)
    sentence = "1 row is passed over, for the kernels that their plans run have changed since: `lora-kernels tune`"
    assert source.passed_over[0].startswith(sentence)


def test_a_changed_kernel_file_passes_over_the_rows_that_use_it_and_no_others(tmp_path: Path) -> None:
    """Shared helpers count for all that import them; sentences in ``__init__.py`` for none."""
    folder = tmp_path / "kernels"
    shutil.copytree(kernel_files.KERNELS, folder)
    before = {kind: kernel_files.digest_of(kind, folder) for kind in KINDS}
    assert before == kernel_files.digests()
    used = {kind: set(kernel_files.files_of(kind, folder)) for kind in KINDS}
    for path in sorted(folder.rglob("*.py")):
        kept = path.read_bytes()
        path.write_bytes(kept + b"# another\n")
        changed = {kind for kind in KINDS if kernel_files.digest_of(kind, folder) != before[kind]}
        path.write_bytes(kept)
        assert changed == {kind for kind in KINDS if path in used[kind]}, path
        assert path.name != "__init__.py" or not changed
    assert all(
        folder / "common.py" in used[kind]
        for kind in KINDS
        if used[kind] and "hopper" not in kind and "inside" not in kind
    )
    assert [kind for kind in KINDS if not used[kind]] == ["ring", "ring_grads"]  # CUDA C++: see the next test
    assert folder / "hopper" / "packed_draw.py" in used["hopper"]
    assert folder / "hopper" / "product.py" not in used["lora_first"]
    heads = [ast.parse(path.read_text()).body for path in folder.rglob("__init__.py")]
    assert all(isinstance(line, ast.Expr) for head in heads for line in head), "an __init__.py has code"


@pytest.mark.parametrize(("kind", "file"), [("ring", "few_tokens.cuh"), ("ring_grads", "few_tokens_grads.cuh")])
def test_a_changed_cuda_file_passes_over_the_rows_that_use_it(
    kind: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, source = {name: kernel_files.digest_of(name) for name in ("ring", "ring_grads")}, nvrtc.source
    monkeypatch.setattr(nvrtc, "source", lambda name: source(name) + ("// another" if name == file else ""))
    assert [name for name in before if kernel_files.digest_of(name) != before[name]] == [kind]
    assert kernel_files.digest_of("fused") == kernel_files.digests()["fused"]


def test_a_row_is_passed_over_where_its_own_kernels_changed(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folders.user, row(), row(FEW, "few_tokens"))
    monkeypatch.setattr(table, "digests", lambda: kernel_files.digests() | {"few_tokens": "ba9876543210"})
    assert looked_up(GPU, CELL) == plan("fused")
    assert looked_up(GPU, FEW) is None


def test_a_table_of_one_digest_for_all_kernels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, row())
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(TableError, match="format 1, whose rows name one digest of all kernels"):
        read(path)


def test_the_tables_that_ship_are_sound() -> None:
    assert list(tuned.SHIPPED.glob("*.json"))
    for path in tuned.SHIPPED.glob("*.json"):
        shipped = read(path)
        assert path.stem == table.slug(shipped.device.name), path
        assert not shipped.unknown, f"{path}: {shipped.reasons}"
        assert shipped.rows, f"{path} is empty"


# The choice of a row


def test_a_cell_takes_its_own_row(folders: Folders) -> None:
    write(folders.shipped, row(), row(replace(CELL, tokens=4096), "lora_first"))
    assert looked_up(GPU, CELL) == plan("fused")


def test_the_user_s_rows_win(folders: Folders) -> None:
    write(folders.shipped, row(kind="lora_first"), row(FEW, "few_tokens"))
    write(folders.user, row(kind="base_first"))
    assert looked_up(GPU, CELL) == plan("base_first")
    assert looked_up(GPU, FEW) == plan("few_tokens", FEW)


@pytest.mark.parametrize(
    ("measured", "asked", "expected"),
    [
        ((8192,), 4096, 8192),
        ((8192,), 2048, None),  # more than a factor of 2 down: its blocks leave the machine idle
        ((512,), 2048, 512),
        ((512,), 4096, None),  # more than a factor of 4
        ((16,), 4, 16),  # of few tokens one launch does all
        ((512, 8192), 1024, 512),
        ((1024, 4096), 2048, 1024),  # equally near: the fewer tokens
        ((512, 8192), 2048, 512),
        ((4096,), 1 << 20, 4096),  # a full machine only gets more waves
        ((2048,), 8192, 2048),
        ((2048,), 16384, None),  # not full
        ((16,), 32, None),  # over the border of few tokens
        ((32,), 16, None),
        ((1,), 4, 1),
        ((1, 16), 8, 16),
        ((2,), 16, None),
        ((), 8192, None),
    ],
)
def test_a_bucket_that_is_not_measured_takes_the_nearest_in_reach(
    measured: tuple[int, ...], asked: int, expected: int | None, folders: Folders
) -> None:
    by_tokens = {tokens: row(replace(CELL, tokens=tokens), place=i) for i, tokens in enumerate(measured)}
    write(folders.user, *by_tokens.values())
    found = looked_up(GPU, replace(CELL, tokens=asked))
    assert found == (by_tokens[expected].plan if expected else None)


@pytest.mark.parametrize(
    "change",
    [{"k": 4097}, {"n": 1024}, {"r": 8}, {"dtype": "float16"}, {"dropout": True}, {"direction": "dx"}],
    ids=str,
)
def test_nothing_but_tokens_is_carried_over(change: dict[str, Any], folders: Folders) -> None:
    write(folders.user, row())
    assert looked_up(GPU, replace(CELL, **change)) is None


@pytest.mark.parametrize(("triton", "used"), [("3.6.0", True), ("3.6.1+git", True), ("3.5.1", False), ("4.6.0", False)])
def test_only_the_running_minor_version_of_triton_counts(triton: str, used: bool, folders: Folders) -> None:
    write(folders.user, row(triton=triton))
    assert looked_up(GPU, CELL) == (plan("fused") if used else None)
    (source,) = tuned.load(DEVICE).sources
    assert (source.rows, source.used, len(source.passed_over)) == (1, int(used), int(not used))


def test_a_measured_plan_is_what_runs(folders: Folders) -> None:
    assert ranking.plan_for(GPU, H200, CELL) == candidates.candidates(H200, CELL)[0]
    ranking.forget()
    tuned.forget()
    write(folders.user, row(place=3))
    assert ranking.plan_for(GPU, H200, CELL) == plan("fused", place=3)


def test_a_plan_that_the_machine_has_no_room_for_is_left_to_the_model(folders: Folders) -> None:
    write(folders.user, row())
    small = replace(H200, shared_memory=49152)
    assert ranking.plan_for(GPU, small, CELL) == candidates.candidates(small, CELL)[0]


def test_a_row_with_few_tokens_plan_for_many_is_left_to_the_model(folders: Folders) -> None:
    write(folders.user, replace(row(), plan=plan("few_tokens", FEW)))
    assert ranking.plan_for(GPU, H200, CELL) == candidates.candidates(H200, CELL)[0]


# Reading


def test_a_cpu_has_no_table(folders: Folders) -> None:
    write(folders.user, row())
    assert looked_up(torch.device("cpu"), CELL) is None
    assert tuned.identify(torch.device("cpu")) is None
    assert ranking.plan_for(torch.device("cpu"), INTERPRETER, CELL) == candidates.candidates(INTERPRETER, CELL)[0]


def test_files_are_read_once_however_many_threads_ask(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folders.shipped, row())
    reads, together = [], threading.Barrier(8)
    monkeypatch.setattr(tuned, "read", lambda path: reads.append(path) or read(path))

    def ask() -> None:
        together.wait()
        found.append(looked_up(GPU, CELL))

    found: list[Any] = []
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(reads), found) == (1, [plan("fused")] * 8)
    tuned.forget()
    looked_up(GPU, CELL)
    assert len(reads) == 2


def test_without_a_home_the_shipped_table_serves(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folders.shipped, row())
    monkeypatch.setattr(tuned, "user_folder", lambda: None)
    assert looked_up(GPU, CELL) == plan("fused")


def test_a_row_tells_its_key() -> None:
    assert row(triton="3.7.0+git1").key == (CELL, "3.7")
    assert Row.from_json(row().to_json()) == row()
    assert isinstance(row().cell, Cell)


# By how a plan is launched


def test_figures_of_kernels_that_have_changed_are_left_out(folders: Folders) -> None:
    """Each plan of a row has its own kernels' digest; the row's own plan stays."""
    own, other = plan("fused"), plan("lora_first")
    kernels = {p: versions_of(p, VERSIONS)["kernels"] for p in (own, other)}
    timed = (Timed(own, 1.03, {"prepared": 20.0}, kernels[own]), Timed(other, 1.1, {"prepared": 9.0}, "changed"))
    write(folders.user, row(timed=timed))
    found = tuned.lookup(GPU, CELL)
    assert found is not None
    assert (found.plan, found.timed) == (own, timed[:1])


BAD_TIMED: dict[str, tuple[Any, str]] = {
    "no list": (5, "timed of a row is 5 and must be a list"),
    "fields": ([{"plan": {}}], "a timed plan has the fields plan, ratio, host_us, kernels"),
    "way": ([{"host_us": {"magic": 1.0}}], "names 'magic': it must be some of graph, prepared, python"),
    "host": ([{"host_us": {"python": -1.0}}], "python of a row is -1.0 and must be a positive number"),
    "ratio": ([{"ratio": "1"}], "ratio of a row is '1'"),
    "direction": ([{"plan": plan_to_json(plan("dx_lora_first", replace(CELL, direction="backward")))}], "has the plan"),
}


@pytest.mark.parametrize("name", BAD_TIMED)
def test_figures_that_are_none_are_refused(name: str) -> None:
    given, sentence = BAD_TIMED[name]
    good = Timed(plan("fused"), 1.03, {"python": 20.0}, "k").to_json()
    if name not in ("no list", "fields"):
        given = [{**good, **given[0]}]
    with pytest.raises(InvalidArgumentError, match=sentence):
        Row.from_json({**row().to_json(), "timed": given})


def test_a_row_of_before_has_no_figures() -> None:
    """The field is not written where it is empty, so such rows are byte for byte what they were."""
    document = row().to_json()
    assert "timed" not in document
    assert Row.from_json(document).timed == ()
