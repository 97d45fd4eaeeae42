"""Everything that wants a GPU, in one command that needs no network and installs nothing: ``make gpu-check``.

Runs its stages one after the other with the interpreter it was started with, the checkout on PYTHONPATH. Each stage
has its own time limit, so a hang costs one stage; each result is on disk before the next stage starts, so a run that is
cut off keeps what it had, and ``--resume`` skips the stages that passed. Files, eight at most:

    info.json  build.json  tests.xml  verify.json  bench.json  compile.json      one result for each stage
    log.txt                                                                      what the stages printed
    summary.json                                                                 what became of each stage

Exit status: 0 if every stage passed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 530.0
PATIENCE_SECONDS = 8.0  # between the request to stop and the kill: pytest writes its report in this time
NO_GPU = re.compile(r"\b(no|needs?|requires?|wants?|without)\b.*\b(cuda|gpu)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Stage:
    """One command, its time limit, and where its result is.

    Attributes:
        name: what the summary calls it.
        command: arguments; ``{result}`` stands for the result's path.
        limit_s: seconds after which it is stopped.
        result: file name in the output folder.
        result_is_stdout: whether the command prints its result, rather than writing the file itself.
        judge: reads the result; returns a short account, raises ``ValueError`` if the result is not a pass.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    result: str
    result_is_stdout: bool
    judge: Callable[[Path], str]


@dataclass(frozen=True)
class Outcome:
    """What became of a stage; ``status`` is passed, failed, timed out, or not run."""

    name: str
    status: str
    seconds: float
    note: str


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
    if not cases:
        raise ValueError("no test ran")
    if bad:
        raise ValueError(f"{account}; first: {bad[0].get('classname')}::{bad[0].get('name')}")
    if no_gpu:
        raise ValueError(f"{account}; {len(no_gpu)} for want of a GPU, first: {no_gpu[0]}")
    return account


def stages(pytest_args: Sequence[str] = ()) -> list[Stage]:
    """The six stages, in order; their limits add up to less than nine minutes."""
    package = (sys.executable, "-m", "lora_kernels")
    tests = (sys.executable, "-m", "pytest", "tests", "-q", "-rs", "--junit-xml={result}", *workers(), *pytest_args)
    bench = (*package, "bench", "--preset", "gpu-quick", "--json", "{result}")
    report = (sys.executable, "-m", "lora_kernels.backends.triton.compile_report", "--check", "--json", "{result}")
    return [
        Stage("info", (*package, "info", "--json"), 20, "info.json", True, judge_info),
        Stage("build", (*package, "build", "all", "--json"), 90, "build.json", True, judge_json),
        Stage("tests", tests, 170, "tests.xml", False, judge_tests),
        Stage("verify", (*package, "verify", "--json"), 120, "verify.json", True, judge_json),
        Stage("bench", bench, 85, "bench.json", False, judge_json),
        Stage("compile", report, 40, "compile.json", False, judge_json),
    ]


def workers() -> tuple[str, ...]:
    """Several test processes where pytest-xdist is there: most of the time compiles kernels, one core each."""
    count = min(len(os.sched_getaffinity(0)) - 1, 12)
    return ("-n", str(count)) if count > 1 and find_spec("xdist") else ()


def environment() -> dict[str, str]:
    """This environment with the checkout importable, Triton compiling rather than interpreting, and no downloads."""
    dropped = ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}


def stop(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Asks what is left of the stage's process group to stop as Ctrl-C would, then kills it."""
    for number, wait_s in ((signal.SIGINT, patience_s), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


def run_stage(stage: Stage, out: Path, limit_s: float, patience_s: float = PATIENCE_SECONDS) -> Outcome:
    """Runs one stage under its limit; what it left of its result is kept, and judged."""
    final, partial = out / stage.result, out / f"{stage.result}.part"
    final.unlink(missing_ok=True)
    command = [part.replace("{result}", str(partial)) for part in stage.command]
    began = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n===== {stage.name}: {shlex.join(command)}\n".encode())
        log.flush()
        stdout = partial.open("wb") if stage.result_is_stdout else log
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            status, note = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            status, note = "timed out", f"stopped after {limit_s:.0f} s"
        finally:
            stop(process, patience_s)
            if stage.result_is_stdout:
                stdout.close()
    try:
        if not partial.is_file() or partial.stat().st_size == 0:
            raise ValueError("it left no result")
        partial.replace(final)
        account = stage.judge(final)
    except (ValueError, OSError, ElementTree.ParseError, subprocess.TimeoutExpired) as problem:
        partial.unlink(missing_ok=True)
        status = "failed" if status == "passed" else status
        account = str(problem)
    return Outcome(stage.name, status, time.monotonic() - began, "; ".join(filter(None, [note, account])))


def render(outcomes: Sequence[Outcome]) -> str:
    """The table at the end."""
    lines = [f"{'stage':10} {'status':10} {'seconds':>8}  note"]
    lines += [f"{o.name:10} {o.status:10} {o.seconds:8.1f}  {o.note}" for o in outcomes]
    return "\n".join(lines) + "\n"


def source_id() -> str:
    """A hash of the package and its tests: results of other code are no reason to skip a stage."""
    digest = hashlib.sha256()
    folders, suffixes = ("lora_kernels", "tests", "csrc"), (".py", ".h", ".cpp", ".cu", ".cuh")
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_summary(outcomes: Sequence[Outcome], source: str, out: Path) -> None:
    """Writes the summary by replacing it whole."""
    document = {"source": source, "stages": [asdict(outcome) for outcome in outcomes]}
    partial = out / "summary.json.part"
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(out / "summary.json")


def passed_before(source: str, out: Path) -> dict[str, Outcome]:
    """The stages that an earlier run of the same code in this folder brought to a pass."""
    try:
        document = json.loads((out / "summary.json").read_text())
        rows = document["stages"] if document["source"] == source else []
        return {row["name"]: Outcome(**row) for row in rows if row["status"] == "passed"}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run(planned: Sequence[Stage], out: Path, resume: bool = False, total_s: float = TOTAL_SECONDS) -> int:
    """Runs the stages, all of them whatever fails, and returns the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    source = source_id()
    before = passed_before(source, out) if resume else {}
    if not before:
        (out / "log.txt").unlink(missing_ok=True)
    outcomes = [before.get(stage.name, Outcome(stage.name, "not run", 0.0, "")) for stage in planned]
    deadline = time.monotonic() + total_s
    for position, stage in enumerate(planned):
        if stage.name in before and (out / stage.result).is_file():
            print(f"{stage.name}: passed before, skipped", flush=True)
            continue
        limit_s = min(stage.limit_s, deadline - time.monotonic())
        if limit_s <= 0:
            outcomes[position] = replace(outcomes[position], status="not run", note="no time was left")
        else:
            print(f"{stage.name}: running, at most {limit_s:.0f} s", flush=True)
            outcomes[position] = run_stage(stage, out, limit_s)
        write_summary(outcomes, source, out)
    write_summary(outcomes, source, out)
    print(f"\n{render(outcomes)}\nresults: {out.resolve()}")
    return 0 if all(o.status == "passed" for o in outcomes) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    parser.add_argument("--resume", action="store_true", help="skip the stages that passed in this folder")
    parser.add_argument("--pytest-args", default="", help="further arguments for pytest, as one string")
    args = parser.parse_args(argv)
    return run(stages(shlex.split(args.pytest_args)), args.out, args.resume)


if __name__ == "__main__":
    sys.exit(main())
