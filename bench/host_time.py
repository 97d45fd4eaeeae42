"""Host time of a layer's calls: on this CPU, and of a GPU's path where the driver does nothing.

    python bench/host_time.py [--package FOLDER] [--json FILE]

On the CPU ``native`` runs a layer 64 -> 64 in fp32, one token, one thread, beside a frozen ``nn.Linear`` and PEFT's
layer, and PEFT's layer fused. Of the GPU's path all runs but the GPU: checks, the choice, the launcher's call into C++
and its allocations (in the host's memory), with ``tests/driver_stand_in.py`` in the driver's place. So a launch takes
no time, and only two commits' figures, or two ways' here, are to be compared. ``--package`` names another checkout,
whose package is timed instead.

Each figure is microseconds of the thread's time a call, the least of ``ROUNDS`` turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, CALLS = 40, 100
_IN_CHILD = "LORA_KERNELS_HOST_TIME"


def least(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """All in turn."""
    found = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        for _ in range(CALLS):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                call()
            found[name] = min(found[name], (time.thread_time_ns() - start) / CALLS / 1e3)
    return {name: round(value, 2) for name, value in found.items()}


def calls_of(name: str, run: Callable[[Any], Any], x: Any) -> dict[str, Callable[[], Any]]:
    """A forward without a graph, one that records it, and a step, for x (M, K) and for x (1, M, K)."""
    import torch

    calls: dict[str, Callable[[], Any]] = {}
    for dims, given in ((2, x), (3, x[None])):
        own = given.clone().requires_grad_()
        ys = run(own)
        ys = ys if isinstance(ys, list) else [ys]
        dys = [torch.ones_like(y) for y in ys]

        def forward(given: Any = given) -> None:
            with torch.no_grad():
                run(given)

        def record(own: Any = own) -> None:
            run(own)

        def step(own: Any = own, dys: Any = dys) -> None:
            found = run(own)
            torch.autograd.backward(found if isinstance(found, list) else [found], dys)

        of = f"{name}, {dims} dimensions"
        calls |= {f"{of}: forward": forward, f"{of}: forward with a graph": record, f"{of}: step": step}
    return calls


def on_the_cpu() -> dict[str, float]:
    import torch
    from torch import nn

    from lora_kernels import FusedLoRALinear, fuse_peft, use_backend

    torch.set_num_threads(1)
    layer, plain = FusedLoRALinear(64, 64, r=16, bias=False), nn.Linear(64, 64, bias=False).requires_grad_(False)
    calls: dict[str, Any] = {}
    x = torch.randn(1, 64)
    peft, fused = of_peft(64), of_peft(64)
    fuse_peft(fused)
    for name, run in (
        *(("nn.Linear", plain), ("FusedLoRALinear", layer)),
        *(("PEFT's layer", peft.base_model.model.q), ("PEFT's layer, fused", fused.base_model.model.q)),
    ):
        calls |= calls_of(name, run, x)
    with use_backend("native"):
        return least(calls)


def of_peft(size: int) -> Any:
    import peft
    from torch import nn

    model = nn.ModuleDict({"q": nn.Linear(size, size, bias=False)})
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=["q"]))


def on_a_gpu_s_path(launcher_library: str, folder: str) -> dict[str, float]:
    import torch

    from lora_kernels import FusedLoRALinear, dispatch, gate
    from lora_kernels.branches import Branch
    from lora_kernels.shared_input import SharedInput

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(dispatch.__file__).parents[1] / "tests"))  # of the checkout that is timed
    parts: Any = import_module("prepared_passes")
    stand_in = parts.open_stand_in(launcher_library, folder)
    parts.take_the_cpu_s_tensors()
    dispatch.backend("triton").register("meta")
    gate.select = lambda *facts: "triton"  # type: ignore[attr-defined]
    gate._kept_group_fault = lambda *facts: None
    stand_in.quiet()
    bf16, k = torch.bfloat16, 512
    layer = FusedLoRALinear(k, k, r=16, bias=False, dtype=bf16)

    def branch(n: int) -> Branch:
        a, b = torch.ones(16, k, requires_grad=True), torch.ones(n, 16, requires_grad=True)
        return Branch(torch.ones(n, k, dtype=bf16), a, b, scaling=0.5)

    branches = [branch(n) for n in (k, k // 2, k // 2)]
    members = [FusedLoRALinear(k, n, r=16, bias=False, dtype=bf16) for n in (k, k // 2, k // 2)]
    SharedInput(members)  # the members hold it
    calls, x = calls_of("FusedLoRALinear", layer, torch.ones(8, k, dtype=bf16)), torch.ones(512, k).to(bf16)
    calls |= calls_of("three layers of one x", lambda x: gate.run_branches(x, branches, 0.0), x)
    calls |= calls_of("three layers of a model", lambda x: [member(x) for member in members], x)
    return least(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, default=ROOT)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if asked := os.environ.get(_IN_CHILD):
        print(json.dumps(on_the_cpu() if asked == "cpu" else on_a_gpu_s_path(*asked.split("|"))))
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.path[:0] = [str(options.package), str(ROOT / "tests")]
        driver: Any = import_module("driver_stand_in")
        driver.compile_driver(Path(folder))
        (Path(folder) / "libcuda.so").symlink_to(driver.NAME)
        load = import_module("lora_kernels.backends.native.load")
        library = load.compile_into_cache("launch").path
        without = ("TRITON_INTERPRET", "LD_PRELOAD")
        environment = {name: value for name, value in os.environ.items() if name not in without}
        environment |= {"PYTHONPATH": str(options.package), "TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
        found: dict[str, Any] = {}
        for name, asked in (("cpu", "cpu"), ("gpu path", f"{library}|{folder}")):
            command, own = [sys.executable, __file__], environment | {_IN_CHILD: asked}
            done = subprocess.run(command, env=own, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
