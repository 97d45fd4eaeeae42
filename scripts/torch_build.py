"""Prints the pip options that make ``pip install <torch requirement>`` take a CPU build where no NVIDIA GPU is seen.

Only the development set-up (``make demo``, ``make test``) uses it; an installed package never guesses from the host.
It prints nothing where a plain ``pip install`` is right as it is: outside Linux, where a GPU is seen, where pip by its
own configuration finds a CPU build, and where PyTorch's index of CPU builds cannot be reached.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REACH_SECONDS = 5.0
NOT_REACHED = (
    f"note: no NVIDIA GPU is seen, but {CPU_INDEX} cannot be reached: pip takes PyTorch from its own index, on Linux a "
    'CUDA build of several GB. To choose another, stop and run: make TORCH="<what pip install should be given>" ...'
)


def gpu_is_seen() -> bool:
    """Whether ``nvidia-smi`` is there and lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def pip_takes_cpu_build(requirement: list[str]) -> bool:
    """Whether pip, as it is configured here, would take a build of torch whose version says ``+cpu``."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    asked = subprocess.run([*command, "--report", "-", *requirement], capture_output=True, text=True)
    if asked.returncode != 0:
        return False
    packages = [item["metadata"] for item in json.loads(asked.stdout)["install"]]
    return any(package["name"] == "torch" and "+cpu" in package["version"] for package in packages)


def index_is_reached() -> bool:
    """Whether PyTorch's index of CPU builds answers within a few seconds."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=REACH_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def pip_options(requirement: list[str]) -> list[str]:
    """The options for ``requirement``, what ``pip install`` is given for torch; see the module."""
    if not sys.platform.startswith("linux") or gpu_is_seen() or pip_takes_cpu_build(requirement):
        return []
    if not index_is_reached():
        print(NOT_REACHED, file=sys.stderr)
        return []
    return ["--extra-index-url", CPU_INDEX]


if __name__ == "__main__":
    print(" ".join(pip_options(sys.argv[1:])))
