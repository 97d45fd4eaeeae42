"""The scripts of ``scripts/``: the GPU check on fake commands, and which build of torch the set-up asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_kernels import cli
from lora_kernels.benchmark.block import BLOCK
from lora_kernels.benchmark.presets import PRESETS
from lora_kernels.tuning.cells import PRESETS as tuning_presets

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
import torch_build  # noqa: E402

from scripts import gpu_stages, gpu_verify  # noqa: E402
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
def test_the_stages_fit_nine_minutes_and_eight_files(plan: str) -> None:
    planned = gpu_stages.PLANS[plan]()
    files = {s.result for s in planned if not s.in_summary} | {"log.txt", "summary.json", gpu_stages.TUNED}
    assert len(files) <= 8
    assert len({s.name for s in planned}) == len(planned)
    assert gpu_check.TOTAL_SECONDS <= 540


def test_every_stage_of_the_check_but_the_last_has_its_time() -> None:
    planned = gpu_stages.stages()
    assert [s.name for s in planned] == ["info", "build", "tests", "verify", "tune", "bench", "overhead", "compile"]
    assert sum(s.limit_s for s in planned[:-1]) <= gpu_check.TOTAL_SECONDS


def test_tests_that_are_left_out_exist() -> None:
    assert [name for name in gpu_stages.NOT_HERE if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []


def test_what_knows_of_a_gpu_is_tested_first() -> None:
    files = gpu_stages.files_of_tests()
    knows = [bool(gpu_stages.KNOWS_A_GPU.search((ROOT / file).read_text())) for file in files]
    assert knows == sorted(knows, reverse=True)
    assert {"tests/test_triton_kernels.py", "tests/test_benchmark_cuda.py", "tests/test_gradients.py"} <= set(files)
    assert "tests/test_packaging.py" not in files


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
            helped = subprocess.run([*filled[:3], "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
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
