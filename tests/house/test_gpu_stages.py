"""The stages of a run on a GPU machine: their times and commands, how their results are judged, verify in parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels import cli, env
from lora_kernels.backends import triton
from lora_kernels.benchmark.block import BLOCK
from lora_kernels.benchmark.llama_report import LARGE
from lora_kernels.benchmark.presets import PRESETS
from lora_kernels.tuning.cells import PRESETS as tuning_presets
from lora_kernels.verify import checks as verify_checks
from lora_kernels.weights import samples
from scripts import gpu_check, gpu_stages, gpu_verify, gpu_warm_up
from scripts.gpu_stages import Stage, judge_tests

ROOT = Path(__file__).resolve().parents[2]


# The plans


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


def test_every_stage_of_the_check_has_its_time_in_seven_minutes() -> None:
    planned = gpu_stages.stages()
    assert [s.name for s in planned] == ["build", "warm-up", "info", "tests", "verify", "tune"]
    assert gpu_stages.TOTALS["check"] == 430
    assert max(latest_ends(planned).values()) <= gpu_stages.TOTALS["check"] - gpu_check.PATIENCE_SECONDS


def test_the_goals_and_their_verdict_have_their_time_in_six_minutes() -> None:
    planned = gpu_stages.bench_stages()
    names = [s.name for s in planned]
    assert names == ["info", "tune", "goals", "goals-group", "block", "verdict", "overhead", "moe", "quick"]
    assert gpu_stages.TOTALS["bench"] == 360
    ends = latest_ends(planned)
    assert ends["overhead"] <= gpu_stages.TOTALS["bench"] - gpu_check.PATIENCE_SECONDS
    assert {s.result for s in planned} >= {"goals.json", "goals-group.json", "block.json"}
    (verdict,) = (s for s in planned if s.name == "verdict")
    judged = {Path(part).name for part in verdict.command if part.startswith("{out}")}
    assert judged == {"goals.json", "goals-group.json", "block.json"}


def test_the_whole_model_has_its_time_in_four_minutes() -> None:
    planned = gpu_stages.llama_stages()
    assert [s.name for s in planned] == ["info", "llama"]
    assert gpu_stages.TOTALS["llama"] == 240
    assert max(latest_ends(planned).values()) <= gpu_stages.TOTALS["llama"] - gpu_check.PATIENCE_SECONDS
    assert "{limit}" in planned[-1].command  # its budget: no cell is begun that the stage would cut off


def test_quantised_weights_are_timed_with_both_kernels_in_six_minutes() -> None:
    planned = gpu_stages.qlora_stages()
    assert [s.name for s in planned] == ["info", "verify-weights", "qlora-package", "qlora-own"]
    assert max(latest_ends(planned).values()) <= gpu_stages.TOTALS["qlora"] - gpu_check.PATIENCE_SECONDS
    assert [s.variables for s in planned[2:]] == [((env.GPU_QUANTIZED_VARIABLE, word),) for word in triton._QUANTIZED]


def test_a_stage_runs_with_its_variables(tmp_path: Path) -> None:
    code = "import json, os; print(json.dumps(os.environ['LORA_KERNELS_GPU_QUANTIZED']))"
    word = ("LORA_KERNELS_GPU_QUANTIZED", "own")
    stage = Stage("a", (sys.executable, "-c", code), 60, "a.json", True, gpu_stages.judge_json, variables=(word,))
    assert gpu_check.run_stage(stage, tmp_path, 60).status == "passed"
    assert json.loads((tmp_path / "a.json").read_text()) == "own"


UNTIMED = ("build", "warm-up", "info", "tests", "verify", "verify-weights", "verdict")


def test_nothing_runs_beside_a_clock() -> None:
    for planned in (plan() for plan in gpu_stages.PLANS.values()):
        beside = {s.name: s.limit_s for s in planned if s.beside}
        ends = latest_ends(planned)
        for timed in (s for s in planned if s.name not in UNTIMED):
            begins = ends[timed.name] - timed.limit_s
            assert all(begins >= limit for limit in beside.values())
        clocks = [s for s in planned if s.name.startswith("tune") and beside]
        assert all("warm-up" in s.after for s in clocks)


def test_what_compiles_does_so_in_sixteen_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(gpu_stages, "find_spec", lambda name: object())
    assert gpu_stages.workers()[:2] == ("-n", "16")
    assert (gpu_verify.PROCESSES, len(gpu_verify.PARTS) >= 16) == (16, True)


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
            known = tuning_presets if planned.name.startswith("tune") else {*PRESETS, BLOCK, LARGE}
            assert "preset" not in args or args.preset in known
        else:
            helped = subprocess.run(
                [*filled[:3], "tests", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            options = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
            assert all(option in helped.stdout.replace("--junitxml", "--junit-xml") for option in options)


# Judging what a stage left


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


def made_llama(path: Path, *cells: tuple[str, str | None], left_out: str | None = None) -> Path:
    rows = [{"provider": "peft", "status": status, "reason": reason} for status, reason in cells]
    path.write_text(json.dumps({"cells": rows, "left_out": left_out}))
    return path


def test_a_whole_model_without_room_or_time_is_no_failure_and_another_result_is(tmp_path: Path) -> None:
    path = tmp_path / "llama.json"
    cells = [("timed", None), ("out of memory", "CUDA out of memory."), ("left out", "No time.")]
    assert gpu_stages.judge_llama(made_llama(path, *cells)) == "1 timed, 1 out of memory, 1 left out"
    assert gpu_stages.judge_llama(made_llama(path, left_out="no transformers")) == "no transformers"
    with pytest.raises(ValueError, match=r"^peft: something else$"):
        gpu_stages.judge_llama(made_llama(path, *cells, ("failed", "something else")))
    with pytest.raises(ValueError, match=r"^1 left out$"):
        gpu_stages.judge_llama(made_llama(path, cells[-1]))


# Verifying and warming up


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


def test_a_form_is_verified_with_the_kernels_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here the backend's reasons come first. One whose package is missing is left out, and told."""
    monkeypatch.setenv(env.GPU_QUANTIZED_VARIABLE, "package")
    assert not gpu_verify.verify_part("bf16 triton nf4 own")["passed"]
    assert os.environ[env.GPU_QUANTIZED_VARIABLE] == "own"
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    report = gpu_verify.verify_part("bf16 triton nf4 own")
    assert report["passed"]
    assert "pip install" in report["left_out"]
    assert all(part.split()[2] in samples.KINDS for part in gpu_verify.QUANTIZED)


def test_parts_that_passed_are_not_verified_again(tmp_path: Path) -> None:
    path, told = tmp_path / "verify.json", tmp_path / "told"
    code = VERIFIES.replace("failures =", f"open({str(told)!r}, 'a').write(sys.argv[1] + ' ')\nfailures =")
    for _ in range(2):
        assert gpu_verify.run(path, ["good", "bad"], (sys.executable, "-c", code)) == 1
    assert sorted(told.read_text().split()) == ["bad", "bad", "good"]


def test_what_is_slow_to_start_is_started_at_once(tmp_path: Path) -> None:
    meets = "import os, time; open({own!r}, 'w').close(); end = time.monotonic() + 300\n"
    meets += "while not os.path.exists({other!r}): time.sleep(0.01) if time.monotonic() < end else os._exit(1)"
    left, right = (str(tmp_path / name) for name in ("left", "right"))
    starts = {"one": meets.format(own=left, other=right), "two": meets.format(own=right, other=left)}
    assert gpu_warm_up.run(tmp_path / "a.json", starts | {"bad": "raise SystemExit(2)"}) == 1
    found = json.loads((tmp_path / "a.json").read_text())
    assert [entry["status"] for entry in found.values()] == [0, 0, 2]
    assert all(entry["seconds"] >= 0.0 for entry in found.values())
    for code in gpu_warm_up.STARTS.values():
        compile(code, "start", "exec")
