"""Everything that wants a GPU, in commands that need no network and install nothing.

``make gpu-check`` is seven minutes: the tests that a GPU changes something about, verification, tuning.
``make gpu-bench`` is six: the project's goals and their verdict, then what README's tables show.
``make gpu-grid`` is nine minutes a call: the grids of both passes, then what compiled rivals make of them.
``make gpu-llama`` is four: a training step of all of Llama-3-8B, on 80 GB.
``make gpu-qlora`` is six: quantised weights by the packages' kernels and by those in Triton, verified and timed.

Runs its stages with the interpreter it was started with, the checkout on PYTHONPATH: those that are slow to begin all
at once in the background, the others one after the other. Each has its own time limit, so a hang costs one stage; each
result is on disk before the next stage starts, so a run that is cut off keeps what it had. ``--resume`` skips the
stages that passed and goes on with those that were not done, of the tests and of ``verify`` with what has not passed;
``--resume FOLDER`` first takes over the files of an earlier run, also of one on a machine that is gone: its tuned table
is put where the package looks for it. Files, ten at most (what is small is in the summary):

    gpu-check  tests.xml  tests.passed  verify.json  tune.json  tuned.json
    gpu-bench  tune.json  tuned.json  goals.json  goals-group.json  block.json  verdict.txt  moe.json  quick.json
    gpu-grid   tune-grid.json  tuned.json  forward.json  step.json  compiled.json  step-compiled.json
    gpu-llama  llama.json
    gpu-qlora  verify-weights.json  qlora-package.json  qlora-own.json
    all        summary.json (what became of each stage; info, build, overhead)  log.txt (what the stages printed)

Exit status: 0 if every stage passed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.gpu_stages import PLANS, TOTALS, TUNED, Stage, Unfinished  # noqa: E402  (after the path)

PATIENCE_SECONDS = 8.0  # between the request to stop and the kill: pytest writes its report in this time
MARGIN_SECONDS = 15.0  # a benchmark begins no cell in the last seconds of its stage

_running: set[subprocess.Popen[bytes]] = set()  # what runs in the background must not outlive this


@dataclass(frozen=True)
class Outcome:
    """What became of a stage; ``status`` is passed, failed, timed out, unfinished, or not run."""

    name: str
    status: str
    seconds: float
    note: str
    result: Any = None


def environment() -> dict[str, str]:
    """This environment with the checkout importable, Triton compiling rather than interpreting, and no downloads.

    Triton's and Inductor's caches are named, the same for all stages: what one has compiled no other compiles again.
    """
    dropped = ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    cache = Path(env.get("LORA_KERNELS_CACHE") or Path.home() / ".cache" / "lora_kernels")
    shared = {f"{name}_CACHE_DIR": str(cache / name.lower()) for name in ("TRITON", "TORCHINDUCTOR")}
    return {**shared, **env, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}


def stop(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Asks what is left of the stage's process group to stop as Ctrl-C would, then kills it."""
    for number, wait_s in ((signal.SIGINT, patience_s), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


def run_stage(stage: Stage, out: Path, limit_s: float) -> Outcome:
    """Runs one stage under its limit; what it left of its result is kept, and judged."""
    final, partial = out / stage.result, out / f"{stage.result}.part"
    if not stage.goes_on:
        partial.unlink(missing_ok=True)
    elif final.is_file():
        final.replace(partial)
    final.unlink(missing_ok=True)
    places = {"{result}": partial, "{out}": out, "{limit}": int(max(limit_s - MARGIN_SECONDS, 1))}
    command = list(stage.command)
    for name, value in places.items():
        command = [part.replace(name, str(value)) for part in command]
    began = time.monotonic()
    status, note = _run_command(stage, command, partial, out / "log.txt", limit_s)
    content = None
    try:
        if not partial.is_file() or partial.stat().st_size == 0:
            raise ValueError("it left no result")
        partial.replace(final)
        account = stage.judge(final)
    except Unfinished as unfinished:
        status, account = "unfinished" if status == "passed" else status, str(unfinished)
    except (ValueError, OSError, ElementTree.ParseError, subprocess.TimeoutExpired) as problem:
        partial.unlink(missing_ok=True)
        status = "failed" if status == "passed" else status
        account = str(problem)
    if stage.in_summary and final.is_file():
        with suppress(ValueError):
            content = json.loads(final.read_text())
        final.unlink()
    told = "; ".join(filter(None, [note, account]))
    return Outcome(stage.name, status, time.monotonic() - began, told, content)


def _run_command(stage: Stage, command: list[str], partial: Path, log_file: Path, limit_s: float) -> tuple[str, str]:
    """Runs it, and ends all that is left of it; the status and a note."""
    with log_file.open("ab") as log:
        log.write(f"\n===== {stage.name}: {shlex.join(command)}\n".encode())
        log.flush()
        stdout = partial.open("wb") if stage.result_is_stdout else log
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | dict(stage.variables) | _threads(stage),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log,
            start_new_session=True,
        )
        _running.add(process)
        try:
            code = process.wait(limit_s)
            return ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            return "timed out", f"stopped after {limit_s:.0f} s"
        finally:
            stop(process, PATIENCE_SECONDS)
            _running.discard(process)
            if stage.result_is_stdout:
                stdout.close()


def _threads(stage: Stage) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(stage.threads)} if stage.threads else {}


def render(outcomes: Sequence[Outcome]) -> str:
    """The table at the end."""
    lines = [f"{'stage':10} {'status':10} {'seconds':>8}  note"]
    lines += [f"{o.name:10} {o.status:10} {o.seconds:8.1f}  {o.note}" for o in outcomes]
    return "\n".join(lines) + "\n"


def source_id() -> str:
    """A hash of the package and its tests: results of other code are no reason to skip a stage."""
    digest = hashlib.sha256()
    folders, suffixes = ("lora_kernels", "tests", "csrc", "bench/lorafusion"), (".py", ".h", ".cpp", ".cu", ".cuh")
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_summary(outcomes: Sequence[Outcome], source: str, out: Path) -> None:
    """Writes the summary by replacing it whole."""
    document = {"source": source, "stages": [asdict(outcome) for outcome in outcomes]}
    partial = out / "summary.json.part"
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(out / "summary.json")


def ran_before(source: str, out: Path) -> dict[str, Outcome]:
    """What became of the stages of an earlier run of the same code in this folder."""
    try:
        document = json.loads((out / "summary.json").read_text())
        return {row["name"]: Outcome(**row) for row in document["stages"]} if document["source"] == source else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def take_over(folder: Path, planned: Sequence[Stage], out: Path) -> None:
    """Copies what these stages can go on from out of an earlier run's folder; its files count, not those of ``out``.

    A run that was killed leaves the result of its stage unfinished, under its name with ``.part``.
    """
    for name in ("summary.json", TUNED, *results_of(planned)):
        if (folder / name).is_file() and (folder / name).resolve() != (out / name).resolve():
            (out / name).unlink(missing_ok=True)
            shutil.copyfile(folder / name, out / name)


def results_of(planned: Sequence[Stage]) -> list[str]:
    """The names of the stages' results, finished or not."""
    return [name for stage in planned for name in (stage.result, f"{stage.result}.part", *stage.keeps)]


def set_aside(out: Path, names: Sequence[str], keep: bool) -> None:
    """Clears the folder of what is not this code's; with ``keep`` into ``before``, for it was measured once."""
    there = [out / name for name in names if (out / name).is_file()]
    if keep and there:
        (out / "before").mkdir(exist_ok=True)
    for path in there:
        path.replace(out / "before" / path.name) if keep else path.unlink()


def restore_table(out: Path) -> None:
    """Puts the tuned table of an earlier run, whose machine may be gone, where the package looks for it."""
    if not (out / TUNED).is_file():
        return
    code = (
        "import sys; from pathlib import Path; from lora_kernels.backends.triton.choose import table as t;"
        "table = t.read(Path(sys.argv[1])); folder = t.user_folder();"
        "t.merge_into(folder / (t.slug(table.device.name) + '.json'), table.device, table.rows)"
    )
    command = [sys.executable, "-c", code, str(out / TUNED)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    if done.returncode:
        print(f"{TUNED} was not restored: {done.stderr.strip()}", flush=True)


def run(
    planned: Sequence[Stage],
    out: Path,
    resume: bool = False,
    total_s: float = TOTALS["check"],
    earlier: Path | None = None,
) -> int:
    """Runs the stages, all of them whatever fails, and returns the exit status; ``total_s`` is for all together."""
    deadline = time.monotonic() + total_s
    out = out.resolve()  # the stages run in the checkout, wherever this was called
    out.mkdir(parents=True, exist_ok=True)
    if earlier is not None:
        take_over(earlier, planned, out)
    source = source_id()
    known = ran_before(source, out) if resume else {}
    if not known:
        set_aside(out, ["log.txt", "summary.json", *results_of(planned)], keep=resume and earlier is None)
    if resume:
        restore_table(out)
    else:
        (out / TUNED).unlink(missing_ok=True)
    before = {name: outcome for name, outcome in known.items() if outcome.status == "passed"}
    outcomes = {stage.name: known.get(stage.name, Outcome(stage.name, "not run", 0.0, "")) for stage in planned}
    others = [outcome for name, outcome in known.items() if name not in outcomes]

    def skipped(stage: Stage) -> bool:
        there = stage.in_summary or (out / stage.result).is_file()
        return stage.name in before and there and not stage.every_time

    def told(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        write_summary([*outcomes.values(), *others], source, out)

    def begin(stage: Stage) -> Outcome:
        limit_s = min(stage.limit_s, deadline - PATIENCE_SECONDS - time.monotonic())
        if limit_s <= 0:
            return replace(outcomes[stage.name], status="not run", note="no time was left")
        print(f"{stage.name}: running{' beside the others' * stage.beside}, at most {limit_s:.0f} s", flush=True)
        return run_stage(stage, out, limit_s)

    beside = [stage for stage in planned if stage.beside and not skipped(stage)]
    with ThreadPoolExecutor(max(len(beside), 1)) as pool:
        waiting = {stage.name: pool.submit(begin, stage) for stage in beside}
        try:
            for stage in planned:
                if skipped(stage):
                    print(f"{stage.name}: passed before, skipped", flush=True)
                elif not stage.beside:
                    for name in filter(waiting.__contains__, stage.after):
                        told(name, waiting.pop(name).result())
                    told(stage.name, begin(stage))
            for name, future in waiting.items():
                told(name, future.result())
        finally:
            for process in list(_running):  # only where this was interrupted
                stop(process, 1.0)
    write_summary([*outcomes.values(), *others], source, out)
    print(f"\n{render(list(outcomes.values()))}\nresults: {out}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes.values()) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    parser.add_argument("--plan", choices=tuple(PLANS), default="check", help="which stages (default: check)")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FOLDER",
        help="skip the stages that passed in --out, and go on with the others; with FOLDER: take its files over first",
    )
    parser.add_argument("--pytest-args", default="", help="further arguments for pytest, as one string")
    args = parser.parse_args(argv)
    earlier = args.resume if args.resume is not None and args.resume != Path() else None
    if earlier is not None and not earlier.is_dir():
        parser.error(f"--resume {earlier}: there is no such folder")
    planned = PLANS[args.plan](shlex.split(args.pytest_args))
    return run(planned, args.out, args.resume is not None, TOTALS[args.plan], earlier)


if __name__ == "__main__":
    sys.exit(main())
