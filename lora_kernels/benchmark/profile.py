"""Where a call of a layer spends its host time: what its Python calls, by group, and what that adds to F.linear.

The profiler (``cProfile``) charges each Python frame and each call into C; it makes Python slower than it is, so the
shares are what to read, and the times beside them are those of the same calls without it.
"""

from __future__ import annotations

import cProfile
import json
import math
import pstats
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .preset import Preset
from .results import environment
from .runner import admit, candidate
from .setups import FLOOR, Provider, make_setups
from .timing import Candidate
from .workloads import Workload

__all__ = ["GROUPS", "Profile", "Row", "profile_preset"]

_CALLS = 2000
_ROUNDS = 5
_TOP = 6

GROUPS: dict[str, tuple[str, ...]] = {
    "benchmark": ("lora_kernels/benchmark/", "autograd/grad_mode"),
    "layer": ("lora_kernels/nn.py", "lora_kernels/layer.py", "peft/", "nn/modules/"),
    "validation": ("lora_kernels/functional.py", "lora_kernels/gate.py"),
    "dispatch": ("lora_kernels/dispatch.py", "lora_kernels/ops.py", "lora_kernels/backends/__init__.py"),
    "autograd": ("lora_kernels/autograd.py", "autograd/", "FunctionMeta", "_C._functions"),
    "launch": ("lora_kernels/backends/", "triton/"),
    "operators": ("torch", "built-in", "method"),
}
"""Which functions belong together: the first group that has a part of the function's file or name."""


@dataclass(frozen=True)
class Row:
    """One provider in one cell.

    Attributes:
        us: host microseconds of a call, without the profiler: the best of several rounds.
        over_floor_us: what that is more than the floor's.
        shares: of the profiled time, by group; they add up to 1.
        top: the functions with the most time of their own: name, share, calls for each call of the layer.
    """

    workload: Workload
    provider: str
    us: float
    over_floor_us: float
    shares: dict[str, float]
    top: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Profile:
    preset: str
    date: str
    environment: dict[str, Any]
    rows: list[Row]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            groups = ", ".join(f"{name} {share:.0%}" for name, share in _largest(row.shares) if share >= 0.005)
            lines.append(f"{row.workload}, {row.provider}: {row.us:.1f} us, {row.over_floor_us:+.1f} over the floor")
            lines.append(f"    {groups}")
            lines += [f"    {share:4.0%}  {calls:4.1f} calls  {name}" for name, share, calls in row.top]
        return "\n".join(lines)


def profile_preset(preset: Preset, providers: Sequence[Provider], device: str, seed: int, date: str) -> Profile:
    """Profiles every overhead cell of the preset with every provider that can run it; see the module's text."""
    rows: list[Row] = []
    for workload in preset.workloads:
        if not workload.direction.startswith("overhead"):
            continue
        setups = make_setups(workload, device, 1, seed)
        calls = {}
        for provider in providers:
            _, layers = admit(provider, setups)
            if layers:
                calls[provider.name] = candidate(provider.name, layers, setups)
        us = {name: seconds * 1e6 for name, seconds in _seconds(calls, device).items()}
        for name, work in calls.items():
            with work.context():
                shares, top = _summed(_profiled(work.run, device))
            rows.append(Row(workload, name, us[name], us[name] - us[FLOOR], shares, top))
    return Profile(preset.name, date, environment(device), rows)


def _seconds(candidates: dict[str, Candidate], device: str) -> dict[str, float]:
    """Host seconds of a call, the least of several rounds, all in turn; on a GPU in too few calls to fill a queue."""
    calls = 50 if device == "cuda" else _CALLS // _ROUNDS
    least = dict.fromkeys(candidates, math.inf)
    for _ in range(_ROUNDS + 1):
        for name, work in candidates.items():
            with work.context():
                _wait(device)
                start = time.perf_counter()
                for _ in range(calls):
                    work.run(0)
                least[name] = min(least[name], (time.perf_counter() - start) / calls)
    _wait(device)
    return least


def _profiled(run: Callable[[int], Any], device: str) -> pstats.Stats:
    profile = cProfile.Profile()
    for done in range(_CALLS):
        if done % 50 == 0:
            _wait(device)
        profile.enable()
        run(0)
        profile.disable()
    _wait(device)
    return pstats.Stats(profile)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _summed(stats: pstats.Stats) -> tuple[dict[str, float], list[tuple[str, float, float]]]:
    """Each group's share of the time, and the functions that take the most themselves."""
    own: dict[str, tuple[float, int]] = {}
    entries: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = stats.stats  # type: ignore[attr-defined]
    for (file, _, function), (_, calls, seconds, *_rest) in entries.items():
        name = f"{_short(file)}:{function}" if file != "~" else function
        before = own.get(name, (0.0, 0))
        own[name] = before[0] + seconds, before[1] + calls
    total = sum(seconds for seconds, _ in own.values()) or 1.0
    shares = dict.fromkeys([*GROUPS, "other"], 0.0)
    for name, (seconds, _) in own.items():
        shares[_group(name)] += seconds / total
    ranked = sorted(own.items(), key=lambda item: -item[1][0])[:_TOP]
    return shares, [(name, seconds / total, calls / _CALLS) for name, (seconds, calls) in ranked]


def _group(name: str) -> str:
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other")


def _short(file: str) -> str:
    """The path from its package on."""
    return file.rpartition("site-packages/")[2] if "site-packages/" in file else file[file.rfind("lora_kernels/") :]


def _largest(shares: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(shares.items(), key=lambda item: -item[1])
