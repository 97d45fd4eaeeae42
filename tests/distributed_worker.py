"""Several processes that run the same checks: ``launch`` starts them, ``main`` is what each of them does.

They meet over a file, so no port is taken. On the CPU all of them are forked from one process that has done the
imports, which take longer than most checks. A check that fails in one process may leave the others waiting for it: they
give up after ``PATIENCE``, and their parent after ``LIMIT``, so a hang is a failure with a name.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    *("distributed_layers", "distributed_crossings", "distributed_training"),
    *("distributed_fsdp1", "distributed_experts"),
)
QUANTISED = "distributed_quantised"  # on CPUs, where the packages are
PATIENCE = 120  # seconds that a collective waits for the other processes
LIMIT = 600  # seconds for all checks of one world size, on a machine that does other things too
START = 120  # seconds for the imports

# What more processes than two would not change; it runs with the first number of processes alone.
ONCE = (
    *("check_policies_of_fsdp", "check_live_peft_models", "check_losses_under_ddp", "check_losses_under_fsdp"),
    *("check_losses_under_tensor_parallelism", "check_merging_whole_models"),  # of layers: with four too
    *("check_checkpoints_become_adapters", "check_what_cannot_be_is_a_sentence"),
    *("check_compiled_layers_in_parts", "check_every_backend_in_parts", "check_two_adapters_of_peft_in_parts"),
    *("check_the_former_fsdp_saves_within_its_context", "check_fsdp1_merges_in_its_context"),
    *("check_fsdp1_is_refused_outside_its_context", "check_fsdp1_gives_and_takes_adapters_in_its_context"),
    *("check_fsdp1_trains_like_one_process", "check_fsdp1_has_the_groups_of_the_plain_model"),
    *("check_fsdp1_gathers_layers_of_one_input_apart", "check_fsdp1_has_trainers_callback_save_once"),
    "check_experts_that_are_sharded_by_hand_are_refused",
    *("check_nf4_in_fp32_under_fsdp2", "check_nf4_in_bf16_under_fsdp2", "check_nf4_in_bytes_under_fsdp2"),
    *("check_int8_under_fsdp2", "check_fp8_under_fsdp2", "check_peft_over_quantised_weights_under_fsdp2"),
    "check_quantised_layers_of_one_x_run_together_under_fsdp2",
    *("check_quantised_weights_are_not_merged_under_fsdp2", "check_mixed_precision_of_quantised_weights_is_refused"),
    "check_torchaos_tensors_are_whole_under_fsdp2",
)

Outcomes = dict[tuple[int, str], str]


def launch(worlds: list[int], device: str, folder: Path, only: tuple[str, ...] = ()) -> Outcomes:
    """What came of each check with so many processes: nothing where it passed, or why not, of the first that knows."""
    clear = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LORA_KERNELS_BACKEND")
    env = {key: value for key, value in os.environ.items() if key not in clear}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), device, str(folder), ",".join(map(str, worlds)), *only]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True
        )
        try:
            process.wait((LIMIT + START) * len(worlds))
        except subprocess.TimeoutExpired:
            pass  # what it has not told is missing below
        finally:
            with suppress(ProcessLookupError):  # there is nobody left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {
        key: outcome
        for world in worlds
        for key, outcome in _outcomes(world, folder, only or tuple(names(world == worlds[0], device))).items()
    }


def _outcomes(world: int, folder: Path, expected: tuple[str, ...]) -> Outcomes:
    found: Outcomes = {}
    for rank in range(world):
        path = folder / str(world) / f"{rank}.jsonl"
        told = dict(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else {}
        for name in expected:
            outcome = told.get(name, "it did not come to its end:\n" + (folder / "log").read_text()[-4000:])
            if outcome and not found.get((world, name)):
                outcome = f"process {rank} of {world}: {outcome}"
            found[world, name] = found.get((world, name)) or outcome
    return found


def files(device: str) -> tuple[str, ...]:
    """Which hold checks for the device."""
    there = device == "cpu" and all(map(find_spec, ("bitsandbytes", "safetensors", "peft")))
    return (*FILES, *([QUANTISED] if there else []))


def names(once: bool = True, device: str = "cpu") -> list[str]:
    """The checks' names, from the sources: collecting tests should not import all that the checks do."""
    sources = [(ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8") for file in files(device)]
    lines = [line for text in sources for line in text.splitlines() if line.startswith("def check_")]
    found = [line[4 : line.index("(")] for line in lines]
    return [name for name in found if once or name not in ONCE]


def main(device: str, folder: Path, worlds: list[int], only: list[str]) -> None:
    """Imports, then forks as many processes as each world has, and ends them after ``LIMIT``."""
    import torch._dynamo  # noqa: F401 - DTensor's first operation imports it

    if find_spec("peft"):
        import peft  # noqa: F401

    checks = {
        name: getattr(__import__(file), name)
        for file in files(device)
        for name in names(device=device)
        if _is_in(file, name)
    }
    gc.collect()
    gc.freeze()  # what lasts, no process looks through again: FSDP1's open contexts are found among all other objects
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")  # CUDA does not survive a fork
    for world in worlds:
        chosen = {name: checks[name] for name in only or names(world == worlds[0], device)}
        (folder / str(world)).mkdir()
        arguments = (world, device, folder / str(world), chosen)
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(world)]
        end = time.monotonic() + LIMIT
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(end - time.monotonic(), 0.1))
        for process in processes:
            process.kill()
            process.join()


def _is_in(file: str, name: str) -> bool:
    return getattr(getattr(__import__(file), name, None), "__module__", None) == file


def work(rank: int, world: int, device: str, folder: Path, checks: dict[str, Callable[[str, Path], Any]]) -> None:
    """One process: each check in turn, and a line for each."""
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
        for name, check in checks.items():
            torch.manual_seed(0)
            start = time.monotonic()
            try:
                check(device, folder)
                outcome = ""
            except BaseException:  # noqa: BLE001 - whatever it is, it is this check's outcome
                outcome = traceback.format_exc()
            print(f"{rank} of {world}: {name}: {time.monotonic() - start:.1f} s {outcome}", flush=True)
            report.write(json.dumps([name, outcome]) + "\n")
            report.flush()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(world) for world in sys.argv[3].split(",")], sys.argv[4:])
