"""The scripts of ``scripts/``: the GPU check on fake commands, and which build of torch the set-up asks for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_kernels import cli
from lora_kernels.benchmark.block import BLOCK
from lora_kernels.benchmark.presets import PRESETS
from lora_kernels.tuning.cells import PRESETS as tuning_presets

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
import torch_build  # noqa: E402

from lora_kernels.verify import checks as verify_checks  # noqa: E402
from scripts import gpu_stages, gpu_verify, gpu_warm_up  # noqa: E402
from scripts.gpu_stages import Stage, judge_json, judge_tests  # noqa: E402


def stage(name: str, code: str, limit_s: float = 30, **changes: object) -> Stage:
    fields = {"result": f"{name}.json", "result_is_stdout": True, "judge": judge_json} | changes
    return Stage(name, (sys.executable, "-c", code), limit_s, **fields)  # type: ignore[arg-type]


def summary(out: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads((out / "summary.json").read_text())["stages"]}


def test_all_stages_run_and_a_failure_is_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = [
        stage("good", "print('{}')"),
        stage("bad", "import sys; print('{}'); sys.exit('because')"),
        stage("empty", "pass"),
        stage("broken", "print('{')"),
        stage("writes", "import sys; open('{result}', 'w').write('[1]')", result_is_stdout=False),
    ]
    assert gpu_check.run(planned, tmp_path) == 1
    rows = summary(tmp_path)
    assert [rows[s.name]["status"] for s in planned] == ["passed", "failed", "failed", "failed", "passed"]
    assert "exit status 1" in rows["bad"]["note"]
    assert "no result" in rows["empty"]["note"]
    assert "because" in (tmp_path / "log.txt").read_text()
    assert "good       passed" in capsys.readouterr().out
    assert gpu_check.run(planned[:1], tmp_path) == 0


def test_a_hang_costs_one_stage_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PATIENCE_SECONDS", 1.0)
    pid_file = tmp_path / "pid"
    hang = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"child = subprocess.Popen(['sleep', '300']); open({str(pid_file)!r}, 'w').write(str(child.pid));"
        "time.sleep(300)"
    )
    began = time.monotonic()
    assert gpu_check.run([stage("hang", hang, limit_s=2), stage("next", "print('{}')")], tmp_path / "out") == 1
    assert time.monotonic() - began < 60
    rows = summary(tmp_path / "out")
    assert [rows[name]["status"] for name in ("hang", "next")] == ["timed out", "passed"]
    assert not _runs(int(pid_file.read_text()))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_resume_skips_what_passed_and_only_for_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = tmp_path / "runs"
    count = f"open({str(counter)!r}, 'a').write('x'); print('{{}}')"
    planned = [stage("counted", count), stage("bad", "raise SystemExit(3)")]
    for resume in (False, True):
        assert gpu_check.run(planned, tmp_path / "out", resume=resume) == 1
    assert counter.read_text() == "x"
    monkeypatch.setattr(gpu_check, "source_id", lambda: "other code")
    gpu_check.run(planned, tmp_path / "out", resume=True)
    assert counter.read_text() == "xx"


def test_no_time_left_is_said(tmp_path: Path) -> None:
    assert gpu_check.run([stage("late", "print('{}')")], tmp_path, total_s=0.0) == 1
    assert summary(tmp_path)["late"]["note"] == "no time was left"


@pytest.mark.parametrize(
    ("body", "account"),
    [
        ('<testcase name="a"/>', "1 passed, 0 failed, 0 skipped"),
        ('<testcase name="a"/><testcase name="b"><skipped message="needs an interpreter"/></testcase>', "1 skipped"),
        ('<testcase name="a"/><testcase name="b"><skipped message="there is a CUDA device"/></testcase>', "1 skipped"),
    ],
)
def test_tests_are_counted(tmp_path: Path, body: str, account: str) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    assert account in judge_tests(path)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "no test ran"),
        ('<testcase classname="t" name="a"><failure/></testcase>', "1 failed, 0 skipped; first: t::a"),
        ('<testcase name="a"><skipped message="no CUDA device"/></testcase>', "1 for want of a GPU, first: a"),
    ],
)
def test_tests_that_did_not_do_their_work_are_a_failure(tmp_path: Path, body: str, reason: str) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    with pytest.raises(ValueError, match=reason):
        judge_tests(path)


def test_cells_that_were_not_reached_do_not_count_as_tuned(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    path.write_text('{"cells": [{"row": {}}, {"row": null}]}')
    assert gpu_stages.judge_tune(path) == "1 of 2 cells"
    path.write_text('{"cells": [{"row": null}]}')
    with pytest.raises(ValueError, match="no cell was tuned"):
        gpu_stages.judge_tune(path)


VERIFIES = """
import json, sys
failures = [{'backend': 'b', 'dtype': sys.argv[1], 'case': 'square', 'sentence': 'y is off'}]
print(json.dumps({'passed': sys.argv[1] != 'bad', 'failures': failures * (sys.argv[1] == 'bad'), 'checks': []}))
sys.exit(sys.argv[1] == 'broken' and print('no report') or 0)
"""


@pytest.mark.parametrize(
    ("dtypes", "account"),
    [
        (["bf16", "fp32"], "bf16, fp32 passed"),
        (["bf16", "bad"], "bf16 passed; 1 failures, first: bad: b square y is off"),
        (["broken"], "no dtype passed; 1 failures, first: broken:   it ended with status 0 and no report"),
    ],
)
def test_verify_runs_each_dtype_in_a_process_of_its_own(tmp_path: Path, dtypes: list[str], account: str) -> None:
    path = tmp_path / "verify.json"
    sound = gpu_verify.run(path, dtypes, (sys.executable, "-c", VERIFIES)) == 0
    if sound:
        assert gpu_stages.judge_verify(path) == account
    else:
        with pytest.raises(ValueError, match=f"^{account}"):
            gpu_stages.judge_verify(path)
    assert sound == (dtypes[-1] not in ("bad", "broken"))


def test_a_dtype_that_there_was_no_time_for_is_told(tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    path.write_text(json.dumps({"passed": False, "planned": ["bf16", "fp64"], "reports": {"bf16": {"passed": True}}}))
    with pytest.raises(ValueError, match=r"^bf16 passed, fp64 not done$"):
        gpu_stages.judge_verify(path)


@pytest.mark.parametrize("plan", gpu_stages.PLANS)
def test_a_plan_has_ten_files_at_most(plan: str) -> None:
    planned = gpu_stages.PLANS[plan]()
    files = {s.result for s in planned if not s.in_summary} | {"log.txt", "summary.json", gpu_stages.TUNED}
    kept = {name for s in planned for name in s.keeps if not name.endswith(".new")}
    assert len(files | kept) <= 10
    assert len({s.name for s in planned}) == len(planned)
    assert {name for s in planned for name in s.after} <= {s.name for s in planned if s.beside}


def latest_ends(planned: list[Stage]) -> dict[str, float]:
    """When each stage has ended at the latest: those beside begin at once, the others wait for each other."""
    ends = {stage.name: stage.limit_s for stage in planned if stage.beside}
    now = 0.0
    for stage in planned:
        if not stage.beside:
            now = ends[stage.name] = max([now, *(ends[name] for name in stage.after)]) + stage.limit_s
    return ends


def test_every_stage_of_the_check_has_its_time_in_five_minutes() -> None:
    planned = gpu_stages.stages()
    assert [s.name for s in planned] == ["build", "warm-up", "info", "tests", "verify", "tune"]
    assert gpu_stages.TOTALS["check"] == 300
    assert max(latest_ends(planned).values()) <= gpu_stages.TOTALS["check"] - gpu_check.PATIENCE_SECONDS


def test_the_goals_and_their_verdict_have_their_time_in_six_minutes() -> None:
    planned = gpu_stages.bench_stages()
    names = [s.name for s in planned]
    assert names == ["info", "tune", "goals", "goals-group", "block", "verdict", "overhead", "quick"]
    assert gpu_stages.TOTALS["bench"] == 360
    ends = latest_ends(planned)
    assert ends["overhead"] <= gpu_stages.TOTALS["bench"] - gpu_check.PATIENCE_SECONDS
    assert {s.result for s in planned} >= {"goals.json", "goals-group.json", "block.json"}
    (verdict,) = (s for s in planned if s.name == "verdict")
    judged = {Path(part).name for part in verdict.command if part.startswith("{out}")}
    assert judged == {"goals.json", "goals-group.json", "block.json"}


def test_nothing_runs_beside_a_clock() -> None:
    for planned in (plan() for plan in gpu_stages.PLANS.values()):
        beside = {s.name: s.limit_s for s in planned if s.beside}
        ends = latest_ends(planned)
        for timed in (s for s in planned if s.name not in ("build", "warm-up", "info", "tests", "verify", "verdict")):
            begins = ends[timed.name] - timed.limit_s
            assert all(begins >= limit for limit in beside.values())
        clocks = [s for s in planned if s.name.startswith("tune") and beside]
        assert all("warm-up" in s.after for s in clocks)


def test_stages_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    env = gpu_check.environment()
    assert (env["TRITON_CACHE_DIR"], env["TORCHINDUCTOR_CACHE_DIR"]) == (
        str(tmp_path / "triton"),
        str(tmp_path / "torchinductor"),
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert gpu_check.environment()["TRITON_CACHE_DIR"] == "/elsewhere"


def test_what_compiles_does_so_in_sixteen_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(gpu_stages, "find_spec", lambda name: object())
    assert gpu_stages.workers()[:2] == ("-n", "16")
    assert (gpu_verify.PROCESSES, len(gpu_verify.PARTS) >= 16) == (16, True)


def test_the_parts_of_verify_are_all_cases_of_every_backend_and_dtype() -> None:
    of_triton = [part.split() for part in gpu_verify.PARTS if "triton" in part]
    assert {(dtype, share) for dtype, _, share in of_triton} == {
        (dtype, f"{i}/{gpu_verify.SHARES}") for dtype in ("bf16", "fp16", "fp32") for i in range(gpu_verify.SHARES)
    }
    others = {tuple(part.split()) for part in gpu_verify.PARTS if "triton" not in part}
    assert others == {(d, b) for d in ("bf16", "fp16", "fp32", "fp64") for b in ("native", "eager")}


def test_a_part_of_verify_is_verified_and_one_that_cannot_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_checks, "CASES", verify_checks.CASES)  # put back at the end
    report = gpu_verify.verify_part("fp32 eager 0/11")
    assert report["passed"]
    assert max(row["cases"] for row in report["rows"]) == 2
    assert not gpu_verify.verify_part("fp64 triton")["passed"]


def test_parts_that_passed_are_not_verified_again(tmp_path: Path) -> None:
    path, told = tmp_path / "verify.json", tmp_path / "told"
    code = VERIFIES.replace("failures =", f"open({str(told)!r}, 'a').write(sys.argv[1] + ' ')\nfailures =")
    for _ in range(2):
        assert gpu_verify.run(path, ["good", "bad"], (sys.executable, "-c", code)) == 1
    assert sorted(told.read_text().split()) == ["bad", "bad", "good"]


def test_stages_beside_begin_at_once_and_are_waited_for(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    slow = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w').write('x'); print('{{}}')"
    sees = f"import os; print([int(os.path.exists({str(mark)!r}))])"
    planned = [
        stage("slow", slow, beside=True),
        stage("first", sees),
        stage("second", sees, after=("slow",)),
    ]
    assert gpu_check.run(planned, tmp_path / "out") == 0
    assert [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("first", "second")] == [[0], [1]]
    assert list(summary(tmp_path / "out")) == ["slow", "first", "second"]


def test_a_stage_beside_that_fails_is_a_failure(tmp_path: Path) -> None:
    assert (
        gpu_check.run([stage("bad", "raise SystemExit(3)", beside=True), stage("good", "print('{}')")], tmp_path) == 1
    )
    assert [row["status"] for row in summary(tmp_path).values()] == ["failed", "passed"]


def test_an_interrupt_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    made = gpu_check.run_stage

    def run_stage(planned: Stage, *arguments: object) -> object:
        if planned.name == "first":
            while not pid_file.is_file() or not pid_file.read_text():
                time.sleep(0.05)
            raise KeyboardInterrupt
        return made(planned, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_check, "run_stage", run_stage)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run([stage("hang", code, beside=True), stage("first", "pass")], tmp_path / "out")
    assert not _runs(int(pid_file.read_text()))


def test_the_threads_of_a_stage_with_many_processes(tmp_path: Path) -> None:
    code = "import os; print([int(os.environ.get('OMP_NUM_THREADS', 0))])"
    gpu_check.run([stage("many", code, threads=1)], tmp_path)
    assert json.loads((tmp_path / "many.json").read_text()) == [1]


def test_what_is_slow_to_start_is_started_at_once(tmp_path: Path) -> None:
    starts = {"one": "import time; time.sleep(1)", "two": "import time; time.sleep(1)", "bad": "raise SystemExit(2)"}
    began = time.monotonic()
    assert gpu_warm_up.run(tmp_path / "a.json", starts) == 1
    found = json.loads((tmp_path / "a.json").read_text())
    assert [entry["status"] for entry in found.values()] == [0, 0, 2]
    assert sum(entry["seconds"] for entry in found.values()) > time.monotonic() - began
    for code in gpu_warm_up.STARTS.values():
        compile(code, "start", "exec")


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
    return SimpleNamespace(nodeid=name, fixturenames=fixtures, get_closest_marker=marked.get, **called)


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
    assert 900 < len(names) < 1600


@pytest.mark.parametrize("plan", gpu_stages.PLANS)
def test_the_stages_are_commands_that_exist(plan: str) -> None:
    for planned in gpu_stages.PLANS[plan]():
        filled = [part.replace("{limit}", "9") for part in planned.command]
        if filled[1] != "-m":
            assert (ROOT / filled[1]).is_file()
            continue
        module, *arguments = filled[2:]
        if module == "lora_kernels":
            args = cli._parser(arguments).parse_args(arguments)
            known = tuning_presets if planned.name.startswith("tune") else {*PRESETS, BLOCK}
            assert "preset" not in args or args.preset in known
        else:
            helped = subprocess.run(
                [*filled[:3], "tests", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            options = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
            assert all(option in helped.stdout.replace("--junitxml", "--junit-xml") for option in options)


GOES_ON = """
import json, pathlib, sys
file = pathlib.Path('{result}')
found = json.loads(file.read_text()) if file.exists() else {'cells': [], 'planned': 2}
found['cells'].append({'providers': {}})
file.write_text(json.dumps(found))
"""


def bench_stage() -> Stage:
    changes = {"result_is_stdout": False, "judge": gpu_stages.judge_bench, "goes_on": True}
    return stage("bench", GOES_ON.strip().replace("\n", ";"), **changes)


def test_what_is_not_done_goes_on_and_is_then_left_alone(tmp_path: Path) -> None:
    statuses = []
    for resume in (False, True, True):
        gpu_check.run([bench_stage()], tmp_path, resume=resume)
        statuses.append((summary(tmp_path)["bench"]["status"], summary(tmp_path)["bench"]["note"]))
    assert statuses[0] == ("unfinished", "1 of 2 cells, 0 entries failed")
    assert statuses[1:] == [("passed", "2 of 2 cells, 0 entries failed")] * 2


def test_an_earlier_run_s_folder_is_gone_on_from_and_stays_as_it_was(tmp_path: Path) -> None:
    gpu_check.run([bench_stage()], tmp_path / "first")
    (tmp_path / "first" / "bystander.json").write_text("{}")
    before = (tmp_path / "first" / "bench.json").read_text()
    assert gpu_check.run([bench_stage()], tmp_path / "second", resume=True, earlier=tmp_path / "first") == 0
    assert len(json.loads((tmp_path / "second" / "bench.json").read_text())["cells"]) == 2
    assert (tmp_path / "first" / "bench.json").read_text() == before
    assert not (tmp_path / "second" / "bystander.json").exists()


def test_what_a_killed_run_left_is_gone_on_from(tmp_path: Path) -> None:
    gpu_check.run([bench_stage(), stage("other", "pass", result_is_stdout=False)], tmp_path / "first")
    (tmp_path / "first" / "bench.json").rename(tmp_path / "first" / "bench.json.part")
    (tmp_path / "first" / "other.json.part").write_text("{}")
    planned = [bench_stage(), stage("other", "pass", result_is_stdout=False)]
    gpu_check.run(planned, tmp_path / "second", resume=True, earlier=tmp_path / "first")
    found = summary(tmp_path / "second")
    assert (found["bench"]["note"], found["other"]["status"]) == ("2 of 2 cells, 0 entries failed", "failed")


def test_what_was_measured_of_other_code_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_check.run([bench_stage()], tmp_path)
    monkeypatch.setattr(gpu_check, "source_id", lambda: "other code")
    gpu_check.run([bench_stage()], tmp_path, resume=True)
    assert len(json.loads((tmp_path / "bench.json").read_text())["cells"]) == 1
    assert (tmp_path / "before" / "bench.json").is_file()


def test_small_results_lie_in_the_summary(tmp_path: Path) -> None:
    planned = [stage("small", "print('[1, 2]')", in_summary=True)]
    assert gpu_check.run(planned, tmp_path) == 0
    assert summary(tmp_path)["small"]["result"] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.json"]
    assert gpu_check.run(planned, tmp_path, resume=True) == 0
    assert "small" in summary(tmp_path)


def test_what_the_machine_may_have_lost_is_made_again(tmp_path: Path) -> None:
    counter = tmp_path / "runs"
    code = f"open({str(counter)!r}, 'a').write('x'); print('{{}}')"
    for resume in (False, True):
        gpu_check.run([stage("made", code, every_time=True)], tmp_path / "out", resume=resume)
    assert counter.read_text() == "xx"


def test_a_command_is_told_when_to_stop(tmp_path: Path) -> None:
    gpu_check.run([stage("told", "print([{limit}])", limit_s=30)], tmp_path)
    assert json.loads((tmp_path / "told.json").read_text()) == [30 - int(gpu_check.MARGIN_SECONDS)]


def test_a_tuned_table_is_put_where_the_package_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    text = '{"format": 1, "device": {"name": "NVIDIA H200", "capability": 90, "multiprocessors": 132}, "rows": []}'
    (tmp_path / gpu_stages.TUNED).write_text(text)
    gpu_check.restore_table(tmp_path)
    (found,) = (tmp_path / "cache" / "tuned").glob("*.json")
    assert json.loads(found.read_text())["device"]["name"] == "NVIDIA H200"


def test_stages_see_the_checkout_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env = gpu_check.environment()
    assert "TRITON_INTERPRET" not in env
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


@pytest.mark.parametrize(
    ("gpu", "plain_is_cpu", "reached", "expected"),
    [
        (True, False, True, []),
        (False, True, True, []),
        (False, False, True, ["--extra-index-url", torch_build.CPU_INDEX]),
        (False, False, False, []),
    ],
)
def test_the_set_up_asks_for_a_cpu_build_only_where_one_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, plain_is_cpu: bool, reached: bool, expected: list[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch_build, "gpu_is_seen", lambda: gpu)
    monkeypatch.setattr(torch_build, "pip_takes_cpu_build", lambda requirement: plain_is_cpu)
    monkeypatch.setattr(torch_build, "index_is_reached", lambda: reached)
    assert torch_build.pip_options(["torch==2.13.0"]) == expected


@pytest.mark.parametrize(("listing", "seen"), [("GPU 0: NVIDIA H200", True), ("", False)])
def test_a_gpu_is_seen_by_what_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch, listing: str, seen: bool) -> None:
    monkeypatch.setattr(torch_build.shutil, "which", lambda name: f"/usr/bin/{name}")
    answer = subprocess.CompletedProcess([], 0, stdout=listing, stderr="")
    monkeypatch.setattr(torch_build.subprocess, "run", lambda *args, **kwargs: answer)
    assert torch_build.gpu_is_seen() is seen
