"""The stages of ``gpu_check.py``, as data: commands, time limits, results, and how a result is judged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "PLANS",
    "TOTALS",
    "TUNED",
    "Stage",
    "Unfinished",
    "bench_stages",
    "grid_stages",
    "judge_bench",
    "judge_json",
    "judge_llama",
    "judge_moe",
    "judge_tests",
    "judge_verify",
    "llama_stages",
    "qlora_stages",
    "stages",
]

TUNED = "tuned.json"
LEDGER = "tests.passed"
NO_GPU = re.compile(r"\b(no|needs?|requires?|wants?|without)\b.*\b(cuda|gpu)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """One command, its time limit, and where its result is.

    Attributes:
        name: what the summary calls it.
        command: arguments; ``{result}`` stands for the result's path, ``{out}`` for the output folder, ``{limit}`` for
            the seconds after which it should begin nothing more.
        limit_s: seconds after which it is stopped.
        result: file name in the output folder.
        result_is_stdout: whether the command prints its result, rather than writing the file itself.
        judge: reads the result; returns a short account, raises ``Unfinished`` if there is more to do, and
            ``ValueError`` if the result is not a pass.
        in_summary: the result is JSON, small, and moves into the summary.
        goes_on: the command takes up the result of an earlier run.
        every_time: run it even if it passed before: what it makes may be gone with the machine.
        beside: begun when the plan begins, and run beside the others.
        after: the stages beside which it must not run: their end is waited for.
        keeps: further files that it goes on from.
        threads: of OpenMP in each of its processes, where it has many; 0: as it is.
        variables: environment variables that it runs with.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    result: str
    result_is_stdout: bool
    judge: Callable[[Path], str]
    in_summary: bool = False
    goes_on: bool = False
    every_time: bool = False
    beside: bool = False
    after: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    threads: int = 0
    variables: tuple[tuple[str, str], ...] = ()


class Unfinished(ValueError):
    """The result is sound as far as it goes: run the stage again."""


def judge_json(path: Path) -> str:
    """Passes any JSON document; the command's exit status has judged its content."""
    json.loads(path.read_text())
    return path.name


def judge_info(path: Path) -> str:
    """Names the GPU; fails where none is visible, for then nothing below would run on one."""
    seen = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.strip()
    judge_json(path)
    if not seen:
        raise ValueError("no CUDA device is visible to torch: run this on a machine that has one")
    return seen


def judge_tests(path: Path) -> str:
    """Counts the tests; a test that was skipped for want of a GPU did not do what this run is for."""
    suites = ElementTree.parse(path).getroot()
    cases = list(suites.iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [(case.get("name", "?"), skip.get("message", "")) for case in cases for skip in case.iter("skipped")]
    no_gpu = [name for name, why in skips if NO_GPU.search(why)]
    account = f"{len(cases) - len(bad) - len(skips)} passed, {len(bad)} failed, {len(skips)} skipped"
    earlier = _passed_before(path.with_name(LEDGER))
    if not cases and not earlier:
        raise ValueError("no test ran")
    if earlier > len(cases) - len(bad) - len(skips):
        account += f"; {earlier} have passed by now, with earlier calls"
    if bad:
        raise ValueError(f"{account}; first: {bad[0].get('classname')}::{bad[0].get('name')}")
    if no_gpu:
        raise ValueError(f"{account}; {len(no_gpu)} for want of a GPU, first: {no_gpu[0]}")
    return account


def _passed_before(ledger: Path) -> int:
    """How many tests have passed, by the ledger that ``tests/conftest.py`` keeps."""
    files = [file for file in (ledger, ledger.with_name(f"{ledger.name}.new")) if file.is_file()]
    return len({line for file in files for line in file.read_text(encoding="utf-8").splitlines()})


def judge_text(path: Path) -> str:
    """The last line; the command's exit status has judged the rest."""
    return path.read_text(encoding="utf-8").splitlines()[-1]


def judge_bench(path: Path) -> str:
    """Counts the cells, and tells what failed its check against float64."""
    result = json.loads(path.read_text())
    cells, planned = result["cells"], result.get("planned", 0)
    failed = sum(entry["status"] == "failed" for cell in cells for entry in cell["providers"].values())
    account = f"{len(cells)} of {planned or len(cells)} cells, {failed} entries failed"
    if len(cells) < planned:
        raise Unfinished(account)
    return account


def judge_tune(path: Path) -> str:
    """Counts the cells that the table has; what there was no time for is left to the model."""
    cells = json.loads(path.read_text())["cells"]
    tuned = sum(cell["row"] is not None for cell in cells)
    if not tuned:
        raise ValueError("no cell was tuned")
    return f"{tuned} of {len(cells)} cells"


def judge_verify(path: Path) -> str:
    """Names the dtypes that passed; a failure, and a dtype that there was no time for, is told."""
    document = json.loads(path.read_text())
    reports = document["reports"]
    passed = [dtype for dtype in document["planned"] if dtype in reports and reports[dtype]["passed"]]
    account = f"{', '.join(passed) or 'no dtype'} passed"
    if missing := [dtype for dtype in document["planned"] if dtype not in reports]:
        account += f", {', '.join(missing)} not done"
    told = [
        f"{dtype}: {found.get('backend', '')} {found.get('case', found.get('name', ''))} "
        f"{found.get('sentence', found.get('detail', ''))}"
        for dtype, report in reports.items()
        for found in (*report.get("failures", ()), *(c for c in report.get("checks", ()) if not c["passed"]))
    ]
    left_out = [report["left_out"] for report in reports.values() if "left_out" in report]
    if left_out:
        account += f"; {len(left_out)} of these left out, first: {left_out[0]}"
    if told:
        account += f"; {len(told)} failures, first: {told[0][:300]}"
    if not document["passed"]:
        raise ValueError(account)
    return account


PACKAGE = (sys.executable, "-m", "lora_kernels")


# Seconds that a call of each plan may take in all, on 16 cores.
TOTALS = {"check": 430.0, "bench": 360.0, "grid": 530.0, "llama": 240.0, "qlora": 330.0}


def stages(pytest_args: Sequence[str] = ()) -> list[Stage]:
    """``gpu-check``: every stage has its time for certain.

    What is slow the first time begins at once, beside the others: nvcc, NCCL's and the compiler's first start. All
    stages share Triton's cache, so that what a test has compiled costs ``verify`` and ``tune`` nothing. Nothing runs
    beside the tuner, for it times.
    """
    pytest = (sys.executable, "-m", "pytest", "-q", "-rs", "tests", "--on-gpu", "--passed", f"{{out}}/{LEDGER}")
    tests = (*pytest, "--junit-xml={result}", *workers(), *pytest_args)
    verify = (sys.executable, "scripts/gpu_verify.py", "--json", "{result}")
    warm_up = (sys.executable, "scripts/gpu_warm_up.py", "--json", "{result}")
    build = (*PACKAGE, "build", "all", "--json")
    kept = (LEDGER, f"{LEDGER}.new")
    return [
        Stage("build", build, 70, "build.json", True, judge_json, True, every_time=True, beside=True),
        Stage("warm-up", warm_up, 185, "warm-up.json", False, judge_json, True, every_time=True, beside=True),
        _info(),
        Stage("tests", tests, 250, "tests.xml", False, judge_tests, after=("build",), keeps=kept, threads=1),
        Stage("verify", verify, 45, "verify.json", False, judge_verify, goes_on=True, threads=1),
        _tune("tune", "goals", 55, after=("warm-up",)),
    ]


def bench_stages(pytest_args: Sequence[str] = ()) -> list[Stage]:
    """``gpu-bench``: the project's goals first, all in one call, and the verdict; then what README's tables show."""
    files = [f"{{out}}/{name}.json" for name in ("goals", "goals-group", "block")]
    verdict = (sys.executable, "bench/gpu_targets.py", "--pass", "goals", *files)
    return [
        _info(),
        _tune("tune", "goals", 75),
        _bench("goals", "gpu-goals", 90),
        _bench("goals-group", "gpu-goals-group", 35),
        _block(),
        Stage("verdict", verdict, 20, "verdict.txt", True, judge_text, every_time=True),
        _overhead(),
        _moe(),
        _bench("quick", "gpu-quick", 110),
    ]


def grid_stages(pytest_args: Sequence[str] = ()) -> list[Stage]:
    """``gpu-grid``: the table first, then as much of the grids as there is time for; the next call goes on."""
    return [
        _info(),
        _tune("tune-grid", "grid", 170),
        _bench("forward", "gpu-forward", 520),
        _bench("step", "gpu-step", 520),
        _dram(),
        _bench("compiled", "gpu-compile", 520),
        _bench("step-compiled", "gpu-step-compile", 520),
    ]


def llama_stages(pytest_args: Sequence[str] = ()) -> list[Stage]:
    """``gpu-llama``: a step of all of Llama-3-8B; its cells go by importance, and each is on disk when it is done."""
    command = (*PACKAGE, "bench", "--preset", "gpu-llama", "--budget", "{limit}", "--json", "{result}")
    return [_info(), Stage("llama", command, 200, "llama.json", False, judge_llama)]


def qlora_stages(pytest_args: Sequence[str] = ()) -> list[Stage]:
    """``gpu-qlora``: quantised weights by the package's kernels and by those in Triton: right, then how fast."""
    verify = (sys.executable, "scripts/gpu_verify.py", "--quantized", "--json", "{result}")
    return [
        _info(),
        Stage("verify-weights", verify, 100, "verify-weights.json", False, judge_verify, goes_on=True, threads=1),
        *(_bench(f"qlora-{word}", "qlora", 90, (("LORA_KERNELS_GPU_QUANTIZED", word),)) for word in ("package", "own")),
    ]


PLANS = {
    "check": stages,
    "bench": bench_stages,
    "grid": grid_stages,
    "llama": llama_stages,
    "qlora": qlora_stages,
}


def _info() -> Stage:
    return Stage("info", (*PACKAGE, "info", "--json"), 30, "info.json", True, judge_info, True, every_time=True)


def _tune(name: str, preset: str, limit_s: float, after: tuple[str, ...] = ()) -> Stage:
    command = (*PACKAGE, "tune", "--preset", preset, "--budget", "{limit}", "--table", f"{{out}}/{TUNED}")
    return Stage(name, (*command, "--json", "{result}"), limit_s, f"{name}.json", False, judge_tune, after=after)


def _bench(name: str, preset: str, limit_s: float, variables: tuple[tuple[str, str], ...] = ()) -> Stage:
    command = (*PACKAGE, "bench", "--preset", preset, "--json", "{result}", "--resume", "--limit", "{limit}")
    return Stage(name, command, limit_s, f"{name}.json", False, judge_bench, goes_on=True, variables=variables)


def _overhead() -> Stage:
    """Of the square layer alone: the profile is written at its end."""
    cells = ("--preset", "gpu-overhead", "--only", "out_features=4096", "p=0.0")
    command = (*PACKAGE, "bench", *cells, "--profile", "{result}")
    return Stage("overhead", command, 20, "overhead.json", False, judge_json, True)


def judge_block(path: Path) -> str:
    """Counts the cells; passes too where transformers or PEFT is missing, and says so."""
    document = json.loads(path.read_text())
    if failed := [cell["failed"] for cell in document["cells"] if cell["failed"]]:
        raise ValueError(failed[0])
    return document["left_out"] or f"{len(document['cells'])} cells"


def judge_llama(path: Path) -> str:
    """Counts the cells by what became of them; having no room or no time is no failure, another result is."""
    document = json.loads(path.read_text())
    cells = document["cells"]
    if failed := [cell for cell in cells if cell["status"] == "failed"]:
        raise ValueError(f"{failed[0]['provider']}: {failed[0]['reason']}")
    count = {
        status: sum(cell["status"] == status for cell in cells) for status in ("timed", "out of memory", "left out")
    }
    account = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    if not document["left_out"] and not count["timed"]:
        raise ValueError(account or "no cell was timed")
    return document["left_out"] or account


def judge_moe(path: Path) -> str:
    """Tells our ratio to the frozen experts; passes too where transformers or PEFT is missing, and says so."""
    document = json.loads(path.read_text())
    if document["left_out"]:
        return str(document["left_out"])
    ratios = {row["provider"]: row["ratio"] for row in document["rows"]}
    if "ours" not in ratios:
        raise ValueError("no provider was timed")
    return f"{len(ratios)} providers, ours {ratios['ours']:.2f} of the frozen experts"


def judge_dram(path: Path) -> str:
    """Counts what was measured; passes too where Nsight Compute is missing, and says so."""
    document = json.loads(path.read_text())
    found = sum("gib" in (cell["measured"] or {}) for cell in document["cells"])
    return document["not_measured"] or f"{found} of {len(document['cells'])} measured"


def _block() -> Stage:
    command = (*PACKAGE, "bench", "--preset", "gpu-block", "--budget", "40", "--json", "{result}")
    return Stage("block", command, 70, "block.json", False, judge_block)


def _moe() -> Stage:
    """A layer's experts: after what is judged, for its goals have no part in the verdict yet."""
    command = (sys.executable, "bench/moe.py", "--layer", "qwen3-30b", "--device", "cuda", "--dtypes", "bfloat16")
    return Stage("moe", (*command, "--rounds", "15", "--json", "{result}"), 60, "moe.json", False, judge_moe)


def _dram() -> Stage:
    """Under Nsight Compute, which replays every kernel."""
    command = (sys.executable, "bench/dram_bytes.py", "--json", "{result}")
    return Stage("dram", command, 240, "dram.json", False, judge_dram, True)


def workers() -> tuple[str, ...]:
    """Several test processes where pytest-xdist is there: most of the time compiles kernels, one core each.

    Tests are handed out one by one, in order, so that no process is left with a whole file of slow ones.
    """
    count = min(len(os.sched_getaffinity(0)), 16)
    return ("-n", str(count), "--dist", "loadgroup") if count > 1 and find_spec("xdist") else ()
