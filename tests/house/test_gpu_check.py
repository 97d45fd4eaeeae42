"""``scripts/gpu_check.py`` on fake commands: what runs, what a failure or a hang costs, and going on later."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from made_stages import stage, summary
from scripts import gpu_check, gpu_stages
from scripts.gpu_stages import Stage

ROOT = Path(__file__).resolve().parents[2]


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
    assert gpu_check.run([stage("hang", hang, limit_s=5), stage("next", "print('{}')")], tmp_path / "out") == 1
    assert time.monotonic() - began < 200  # far from what it would hang for, on a machine that does other things too
    rows = summary(tmp_path / "out")
    assert [rows[name]["status"] for name in ("hang", "next")] == ["timed out", "passed"]
    assert not _runs(int(pid_file.read_text()))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_no_time_left_is_said(tmp_path: Path) -> None:
    assert gpu_check.run([stage("late", "print('{}')")], tmp_path, total_s=0.0) == 1
    assert summary(tmp_path)["late"]["note"] == "no time was left"


def test_stages_beside_begin_at_once_and_are_waited_for(tmp_path: Path) -> None:
    seen, mark = tmp_path / "seen", tmp_path / "mark"  # no clock: the slow one waits until the first has looked
    slow = f"import os, time; [time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(seen)!r}), True)];"
    slow += f"open({str(mark)!r}, 'w').write('x'); print('{{}}')"
    sees = f"import os; print([int(os.path.exists({str(mark)!r}))]); open({str(seen)!r}, 'w').write('x')"
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


def test_small_results_lie_in_the_summary(tmp_path: Path) -> None:
    planned = [stage("small", "print('[1, 2]')", in_summary=True)]
    assert gpu_check.run(planned, tmp_path) == 0
    assert summary(tmp_path)["small"]["result"] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.json"]
    assert gpu_check.run(planned, tmp_path, resume=True) == 0
    assert "small" in summary(tmp_path)


def test_a_command_is_told_when_to_stop(tmp_path: Path) -> None:
    gpu_check.run([stage("told", "print([{limit}])", limit_s=30)], tmp_path)
    assert json.loads((tmp_path / "told.json").read_text()) == [30 - int(gpu_check.MARGIN_SECONDS)]


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


def test_stages_see_the_checkout_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env = gpu_check.environment()
    assert "TRITON_INTERPRET" not in env
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_a_tuned_table_is_put_where_the_package_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    text = '{"format": 2, "device": {"name": "NVIDIA H200", "capability": 90, "multiprocessors": 132}, "rows": []}'
    (tmp_path / gpu_stages.TUNED).write_text(text)
    gpu_check.restore_table(tmp_path)
    (found,) = (tmp_path / "cache" / "tuned").glob("*.json")
    assert json.loads(found.read_text())["device"]["name"] == "NVIDIA H200"


# Going on from an earlier run


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


def test_what_the_machine_may_have_lost_is_made_again(tmp_path: Path) -> None:
    counter = tmp_path / "runs"
    code = f"open({str(counter)!r}, 'a').write('x'); print('{{}}')"
    for resume in (False, True):
        gpu_check.run([stage("made", code, every_time=True)], tmp_path / "out", resume=resume)
    assert counter.read_text() == "xx"
