"""What a run should know of the machine it ran on: the GPU's clock and load, the package's source, its memory."""

from __future__ import annotations

import gc
import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from ..errors import LoRAKernelsError

__all__ = ["DeviceLostError", "first_line", "gpu_state", "must_live", "release_memory", "source_id"]

_HELD = 2**30
_QUERY = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu"}


class DeviceLostError(LoRAKernelsError, RuntimeError):
    """A provider has broken the GPU's context, in which nothing runs any more."""


def must_live(device: str, where: str, error: Exception) -> None:
    """Raises unless the device still answers after ``error``, which ``where`` has raised.

    Raises:
        DeviceLostError: it does not, and nothing else can be run in this process.
    """
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise DeviceLostError(
            f"{where}: the GPU's context is broken ({first_line(lost)}; first seen as {first_line(error)}), and "
            "nothing runs in this process any more. What was measured is kept: go on with --resume, and report it."
        ) from lost


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def gpu_state() -> dict[str, float]:
    """The current GPU's clock in MHz, power in W, temperature in °C, over the driver's last sample; {} if none tells.

    Through NVML where its package is installed, which takes milliseconds, else through ``nvidia-smi``.
    """
    try:
        clock, milliwatts, celsius = torch.cuda.clock_rate(), torch.cuda.power_draw(), torch.cuda.temperature()
        return {"sm_mhz": clock, "watts": milliwatts / 1e3, "celsius": celsius}
    except Exception:  # noqa: BLE001 (NVML's package may be missing, and its errors are classes of its own)
        return _by_command()


def _by_command() -> dict[str, float]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        values = answer.strip().splitlines()[0].split(",")
        return {name: float(value) for name, value in zip(_QUERY, values, strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def release_memory(device: str) -> None:
    """On a GPU: gives back what the last cell's graphs and layers held; a cycle that holds much is collected first."""
    if device != "cuda":
        return
    if torch.cuda.memory_allocated() > _HELD:
        gc.collect()
    torch.cuda.empty_cache()


@cache
def source_id() -> str:
    """A hash of the package's and the rebuilt rival's sources: it tells states of a checkout apart."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    places = ((package, "*.py"), (package.parent / "csrc", "*.*"), (package.parent / "bench" / "lorafusion", "*.py"))
    for folder, pattern in places:
        for path in sorted(folder.rglob(pattern)):
            digest.update(str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
