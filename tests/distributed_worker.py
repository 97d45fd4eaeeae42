"""Several processes that run the same checks: ``launch`` starts them, ``main`` is what each of them does.

They meet over a file, so no port is taken. One start serves all checks of a world size, for it takes seconds. A check
that fails in one process may leave the others waiting for it: they give up after ``PATIENCE``, and the parent after
its own limit, so a hang is a failure with a name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds that a collective waits for the other processes
LIMIT = 420  # seconds for all checks of one world size, on a machine that does other things too


def launch(world: int, device: str, folder: Path) -> dict[str, str]:
    """What came of each check: nothing where it passed, or why not, of the first process that knows."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LORA_KERNELS_BACKEND")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(rank), str(world), device, str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=folder,
        )
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + LIMIT
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            break
    for process, log in zip(processes, logs, strict=True):
        process.kill()
        process.wait()
        log.close()
    found: dict[str, str] = {}
    for rank in range(world):
        path = folder / f"{rank}.jsonl"
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for name, outcome in entries:
            if outcome and not found.get(name):
                outcome = f"process {rank} of {world}:\n{outcome}"
            found[name] = found.get(name) or outcome
        finished = {name for name, _ in entries}
        tail = "".join((folder / f"{rank}.log").read_text().splitlines(keepends=True)[-20:])
        found |= {
            name: f"process {rank} of {world} did not come to its end:\n{tail}"
            for name in names()
            if name not in finished and not found.get(name)
        }
    return found


def checks() -> dict[str, object]:
    """The checks by name, in the order in which they run."""
    import distributed_layers
    import distributed_training

    return {
        name: function
        for module in (distributed_layers, distributed_training)
        for name, function in vars(module).items()
        if name.startswith("check_") and getattr(function, "__module__", "") == module.__name__
    }


def names() -> list[str]:
    """Their names, of the sources alone: collecting tests should not import all that the checks do."""
    found = []
    for file in ("distributed_layers.py", "distributed_training.py"):
        lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
        found += [line[4 : line.index("(")] for line in lines if line.startswith("def check_")]
    return found


def main(rank: int, world: int, device: str, folder: Path, only: list[str]) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    with (folder / f"{rank}.jsonl").open("w") as report:
        for name, check in checks().items():
            if only and name not in only:
                continue
            torch.manual_seed(0)
            start = time.monotonic()
            try:
                check(device, folder)  # type: ignore[operator]
                outcome = ""
            except BaseException:  # noqa: BLE001 - whatever it is, it is this check's outcome
                outcome = traceback.format_exc()
            print(f"{name}: {time.monotonic() - start:.1f} s {outcome}", flush=True)
            report.write(json.dumps([name, outcome]) + "\n")
            report.flush()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
