"""Which tests a run on a GPU machine takes: what ``tests/conftest.py`` selects, and leaves out once it has passed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import gpu_stages
from scripts.gpu_stages import judge_tests

ROOT = Path(__file__).resolve().parents[2]


def suite() -> Any:
    """The suite's own conftest.py; other folders have one of that name too."""
    spec = importlib.util.spec_from_file_location("suite_conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def item(name: str, fixtures: tuple[str, ...] = (), marks: tuple[str, ...] = (), **parameters: object) -> Any:
    """A test, as far as the selection looks at it."""
    called = {"callspec": SimpleNamespace(params=parameters)} if parameters else {}
    marked = {mark: mark for mark in marks}
    path = Path(name.partition("::")[0])
    return SimpleNamespace(nodeid=name, path=path, fixturenames=fixtures, get_closest_marker=marked.get, **called)


def left(plugin: Any, items: list[Any], **options: object) -> list[str]:
    """The tests that are left, and all of those that were told to be deselected."""
    told: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    before = len(items)
    plugin.pytest_collection_modifyitems(SimpleNamespace(option=SimpleNamespace(**options), hook=hook), items)
    assert len(items) + len(told) == before
    return [one.nodeid for one in items]


def test_the_tests_that_a_gpu_changes_something_about() -> None:
    items = [
        item("cpu", device="cpu"),
        item("device", device="cuda", case=object()),
        item("fixture", fixtures=("triton_device", "tmp_path")),
        item("marked", marks=("gpu",)),
        item("compiled", compiler="inductor", device="cuda"),
        item("nccl", marks=("gpu", "xdist_group")),
        item("compiled on a CPU", compiler="inductor", device="cpu"),
        item("plain"),
    ]
    assert left(suite(), items.copy(), on_gpu=False) == [one.nodeid for one in items]
    assert left(suite(), items.copy(), on_gpu=True) == ["compiled", "nccl", "device", "fixture", "marked"]


def test_the_longest_files_go_first_in_their_order() -> None:
    first = suite().LONGEST
    assert all(len(list((ROOT / "tests").rglob(name))) == 1 for name in first)
    items = [item(f"{name}::{test}") for name in ("test_a.py", *reversed(first), "test_b.py") for test in "ab"]
    expected = [f"{name}::{test}" for name in (*first, "test_a.py", "test_b.py") for test in "ab"]
    assert left(suite(), items, on_gpu=False) == expected


def test_a_file_that_names_no_gpu_is_not_even_imported(tmp_path: Path) -> None:
    found = []
    for text in ("def test_a(triton_device): ...", '"cuda"', "BACKENDS", "pytest.mark.gpu", "def test_a(): ..."):
        (tmp_path / "test_a.py").write_text(text)
        config = SimpleNamespace(option=SimpleNamespace(on_gpu=True))
        found.append(suite().pytest_ignore_collect(tmp_path / "test_a.py", config))
    assert found == [None, None, None, None, True]


def test_nothing_runs_on_a_gpu_that_is_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_TESTS_PRETEND_GPU", "1")
    with pytest.raises(pytest.UsageError, match="for --collect-only"):
        suite().pytest_configure(SimpleNamespace(option=SimpleNamespace(passed=None, collectonly=False)))


def test_tests_that_passed_are_left_out_by_the_next_run(tmp_path: Path) -> None:
    path, names = tmp_path / gpu_stages.LEDGER, ["a", "b", "c"]
    for passes, expected in ((["a"], ["a", "b", "c"]), (["b"], ["b", "c"]), ([], ["c"])):
        controller, worker = suite().Ledger(path, True), suite().Ledger(path, False)
        assert left(controller, [item(name) for name in names]) == expected
        for name in expected:
            report = SimpleNamespace(nodeid=name, when="call", passed=name in passes)
            controller.pytest_runtest_logreport(report)
            worker.pytest_runtest_logreport(report)
        assert left(worker, [item(name) for name in names]) == expected  # also where it begins late
        assert left(suite().Ledger(path, False), [item(name) for name in names]) == expected
    (tmp_path / "tests.xml").write_text('<testsuites><testsuite><testcase name="b"/></testsuite></testsuites>')
    account = judge_tests(tmp_path / "tests.xml")
    assert account == "1 passed, 0 failed, 0 skipped; 2 have passed by now, with earlier calls"
    (tmp_path / "tests.xml").write_text("<testsuites/>")
    assert judge_tests(tmp_path / "tests.xml").startswith("0 passed, 0 failed, 0 skipped; 2 have passed")
    session = SimpleNamespace(exitstatus=5)
    suite().Ledger(path, True).pytest_sessionfinish(session, 5)
    assert session.exitstatus == 0


def test_the_gpu_s_tests_are_there_and_few_enough() -> None:
    """Of the suite itself: what would run on a GPU, by files, and none of what knows no GPU."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "LORA_KERNELS_TESTS_PRETEND_GPU": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "tests", "--on-gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    files = {name.partition("::")[0] for name in names}
    assert done.returncode == 0, done.stdout[-2000:]
    assert {
        "tests/backends/triton/test_triton_kernels.py",
        "tests/benchmark/test_benchmark_cuda.py",
        "tests/core/test_gradients.py",
    } <= files
    assert {
        "tests/distributed/test_distributed_device.py",
        "tests/tuning/test_tuning_device.py",
        "tests/backends/native/test_cuda_device.py",
    } <= files
    assert not files & {
        "tests/house/test_packaging.py",
        "tests/models/test_transformers.py",
        "tests/backends/native/test_native_cpu.py",
    }
    assert not [name for name in names if "-cpu" in name or "[cpu" in name]
    assert 900 < len(names) < 1630
