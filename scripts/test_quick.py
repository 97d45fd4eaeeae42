"""The tests that a change to one place needs, in under a minute: ``make test-quick FOLDER=lora_kernels/peft``.

``python scripts/test_quick.py [PATH …]``: a folder or a file, from the root of the checkout or from ``lora_kernels/``.
Without a path it takes what git sees as changed, or not yet added. ``TESTS`` says what a place needs; of several rows
that fit, the longest one counts. Tests marked ``slow`` are left out: ``make test`` runs them, and all the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lora_kernels/"
ALWAYS = "tests/house/test_arrows.py"  # of every change in the package: who imports whom

_LAYERS = ("tests/layers",)
_CORE = (
    "tests/core/test_functional.py",
    "tests/core/test_autograd.py",
    "tests/core/test_branches.py",
    "tests/core/test_dispatch.py",
    "tests/core/test_ops.py",
    "tests/core/test_reference.py",
    "tests/core/test_told.py",
)
_COMMANDS = ("tests/house/test_cli.py", "tests/house/test_info.py", "tests/house/test_import.py")
_TRITON = "tests/backends/triton/test_triton"
_GROUPS = "tests/backends/triton/test_hopper_group"
_NATIVE = "tests/backends/native/test_native"

# A row: a folder with "/" at its end, or files, and what a change there needs.
TESTS: dict[str, tuple[str, ...]] = {
    "lora_kernels/": (*_CORE, "tests/core/test_config.py", "tests/layers/test_nn.py", "tests/house/test_import.py"),
    "lora_kernels/branches_autograd.py": ("tests/core/test_branches.py", "tests/core/test_parts.py"),
    "lora_kernels/accuracy.py": ("tests/core/test_accuracy.py", "tests/core/test_range.py"),
    "lora_kernels/rounding.py": ("tests/core/test_accuracy.py", "tests/core/test_range.py"),
    "lora_kernels/nn.py": _LAYERS,
    "lora_kernels/layer.py": _LAYERS,
    "lora_kernels/merging.py": _LAYERS,
    "lora_kernels/assigning.py": _LAYERS,
    "lora_kernels/storage.py": _LAYERS,
    "lora_kernels/pissa.py": _LAYERS,
    "lora_kernels/initialisation.py": _LAYERS,
    "lora_kernels/dora.py": ("tests/layers/test_dora.py", "tests/layers/test_nn.py", "tests/peft/test_peft_dora.py"),
    "lora_kernels/shared_input.py": (
        "tests/layers/test_shared_inputs.py",
        "tests/layers/test_shared_checkpoints.py",
        "tests/models/test_grouping.py",
        "tests/peft/test_peft_shared_inputs.py",
    ),
    "lora_kernels/foreseen.py": ("tests/layers/test_shared_inputs.py", "tests/layers/test_shared_checkpoints.py"),
    "lora_kernels/sharded.py": ("tests/distributed", "tests/layers/test_nn.py"),
    "lora_kernels/fsdp.py": ("tests/distributed", "tests/layers/test_nn_merging.py"),
    "lora_kernels/optim.py": ("tests/models/test_optim.py",),
    "lora_kernels/replaceable.py": ("tests/models/test_matching.py", "tests/models/test_model_refusals.py"),
    "lora_kernels/cli.py": _COMMANDS,
    "lora_kernels/console.py": _COMMANDS,
    "lora_kernels/info.py": _COMMANDS,
    "lora_kernels/__init__.py": (*_COMMANDS, "tests/house/test_doctests.py"),
    "lora_kernels/models/": ("tests/models",),
    "lora_kernels/experts/": ("tests/experts",),
    "lora_kernels/weights/": ("tests/weights",),
    "lora_kernels/models/experts.py": ("tests/experts/test_models.py",),
    "lora_kernels/peft/": ("tests/peft",),
    "lora_kernels/checkpoint/": ("tests/checkpoint",),
    "lora_kernels/backends/": ("tests/core/test_dispatch.py", "tests/core/test_parts.py", "tests/core/test_ops.py"),
    "lora_kernels/backends/native/": (f"{_NATIVE}_build.py", f"{_NATIVE}_load.py", f"{_NATIVE}_choice.py"),
    "lora_kernels/backends/native/cuda_report.py": ("tests/backends/native/test_cuda_report.py",),
    "lora_kernels/backends/triton/": (
        f"{_TRITON}_kernels.py",
        f"{_TRITON}_parts.py",
        f"{_TRITON}_plans.py",
        f"{_TRITON}_choice.py",
    ),
    "lora_kernels/backends/triton/choose/": (
        f"{_TRITON}_choice.py",
        f"{_TRITON}_plans.py",
        "tests/backends/triton/test_tuned.py",
        "tests/backends/triton/test_shipped_table.py",
        "tests/tuning/test_tuning.py",
    ),
    "lora_kernels/backends/triton/run/": (
        f"{_TRITON}_prepared.py",
        f"{_TRITON}_runner.py",
        f"{_TRITON}_plans.py",
        f"{_TRITON}_backward.py",
        f"{_TRITON}_beside.py",
    ),
    "lora_kernels/backends/triton/kernels/": (
        f"{_TRITON}_kernels.py",
        f"{_TRITON}_backward.py",
        f"{_TRITON}_parts.py",
        f"{_TRITON}_compile.py",
    ),
    "lora_kernels/backends/triton/kernels/hopper/": (
        "tests/backends/triton/test_hopper.py",
        "tests/backends/triton/test_hopper_groups.py",
        "tests/backends/triton/test_packed_draw.py",
    ),
    "lora_kernels/backends/triton/run/hopper.py": ("tests/backends/triton/test_hopper.py",),
    "lora_kernels/backends/triton/run/hopper_groups.py": ("tests/backends/triton/test_hopper_groups.py",),
    **{
        f"lora_kernels/backends/triton/{name}.py": (f"{_GROUPS}_plans.py", f"{_GROUPS}_layers.py")
        for name in ("group_operators", "run/group_call", "run/hopper_group_passes")
    },
    **{
        f"lora_kernels/backends/triton/choose/{name}.py": (f"{_GROUPS}_choice.py", f"{_TRITON}_choice.py")
        for name in ("group_candidates", "group_plans", "hopper_group_blocks", "hopper_group_cost")
    },
    "lora_kernels/packed_mask.py": ("tests/core/test_packed_mask.py", "tests/backends/triton/test_packed_draw.py"),
    "lora_kernels/backends/triton/offline/": (f"{_TRITON}_compile.py",),
    "lora_kernels/benchmark/": ("tests/benchmark",),
    "lora_kernels/tuning/": ("tests/tuning",),
    "lora_kernels/verify/": ("tests/verify",),
    "lora_kernels/demo/": ("tests/house/test_demo.py",),
    "lora_kernels/explaining/": (
        "tests/core/test_dispatch.py",
        "tests/core/test_composed_plan.py",
        "tests/house/test_cli.py",
        "tests/backends/triton/test_why.py",
    ),
    "csrc/": (f"{_NATIVE}_cpu.py", "tests/backends/native/test_cuda_kernels.py"),
    "csrc/cpu/": (f"{_NATIVE}_cpu.py", f"{_NATIVE}_parts.py", f"{_NATIVE}_amx.py"),
    "csrc/launch/": ("tests/backends/triton/test_launcher.py", "tests/backends/native/test_launch_library.py"),
    "csrc/cuda/": ("tests/backends/native/test_cuda_kernels.py", "tests/backends/native/test_cuda_report.py"),
    "bench/": (
        "tests/benchmark/test_benchmark_rebuilt.py",
        "tests/benchmark/test_benchmark_targets.py",
        "tests/benchmark/test_bench_whole_models.py",
        "tests/house/test_readme.py",
    ),
    "scripts/": (
        "tests/house/test_gpu_check.py",
        "tests/house/test_gpu_stages.py",
        "tests/house/test_torch_build.py",
        "tests/house/test_quick_tests.py",
    ),
    "scripts/test_quick.py": ("tests/house/test_quick_tests.py",),
    "docs/": ("tests/house/test_docs.py",),
    "examples/": ("tests/house/test_examples.py",),
    "tests/": ("tests/core/test_accuracy.py", "tests/house/test_gpu_selection.py"),
    "README.md": ("tests/house/test_readme.py", "tests/house/test_docs.py"),
    "CONTRIBUTING.md": ("tests/house/test_readme.py",),
    "DESIGN.md": (ALWAYS,),
    "Makefile": ("tests/house/test_readme.py", "tests/house/test_quick_tests.py"),
    "pyproject.toml": ("tests/house/test_packaging.py",),
    "setup.py": ("tests/house/test_packaging.py",),
    "MANIFEST.in": ("tests/house/test_packaging.py",),
    "CHANGELOG.md": ("tests/house/test_packaging.py",),
}


def row_of(path: str) -> str | None:
    """The row that a path of the checkout falls under; None where there is none."""
    fitting = [row for row in TESTS if path == row or (row.endswith("/") and f"{path}/".startswith(row))]
    return max(fitting, key=len, default=None)


def tests_of(path: str) -> tuple[str, tuple[str, ...]]:
    """Why, and the tests that a change of ``path`` needs; a test, or a folder of tests, needs itself."""
    name = path.rstrip("/").rpartition("/")[2]
    if path.startswith("tests/") and (name.startswith("test_") or (ROOT / path).is_dir()):
        return "itself", (path,) if (ROOT / path).exists() else ()
    row = row_of(path.rstrip("/"))
    if row is None:
        return "no row of scripts/test_quick.py", ()
    always = (ALWAYS,) if path.startswith(PACKAGE) else ()
    return f"row {row}", (*TESTS[row], *always)


def named(text: str) -> str:
    """A path of the checkout: as it stands, or within the package."""
    path = os.path.relpath(ROOT / text, ROOT)
    for candidate in (path, PACKAGE + path):
        if (ROOT / candidate).exists() and not candidate.startswith(".."):
            return candidate
    raise SystemExit(
        f"test-quick: {text} is neither in the checkout nor in {PACKAGE}. Name a folder or a file, such as peft, "
        "csrc or lora_kernels/nn.py."
    )


def changed() -> list[str]:
    """What git sees as changed since the last commit, and what is not yet added."""
    found: list[str] = []
    for command in ("diff --name-only HEAD", "ls-files --others --exclude-standard"):
        done = subprocess.run(["git", *command.split()], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit("test-quick: git does not tell what was changed here. Name a folder: FOLDER=peft.")
        found += done.stdout.splitlines()
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the tests; pytest's exit status, or 0 where nothing was changed."""
    paths = [named(text) for text in arguments] or changed()
    tests: dict[str, None] = {}
    for path in paths:
        why, needed = tests_of(path)
        tests.update(dict.fromkeys(needed))
        print(f"{path} ({why}): {' '.join(needed) or 'no tests'}")
    if not tests:
        print("Nothing to test: name a folder, such as FOLDER=peft, or run all tests with make test.")
        return 0
    began = time.monotonic()
    options = ("-q", "-m", "not slow", "-n", "auto", "--dist", "loadfile", "--benchmark-disable")
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    status = subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, env=environment).returncode
    print(f"{time.monotonic() - began:.0f} s. Tests marked slow, and those of other folders, are in make test.")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
