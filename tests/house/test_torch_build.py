"""Which build of torch the set-up asks pip for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts import torch_build


@pytest.mark.parametrize(
    ("gpu", "plain_is_cpu", "reached", "expected"),
    [
        (True, False, True, []),
        (False, True, True, []),
        (False, False, True, ["--extra-index-url", torch_build.CPU_INDEX]),
        (False, False, False, []),
    ],
)
def test_the_set_up_asks_for_a_cpu_build_only_where_one_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, plain_is_cpu: bool, reached: bool, expected: list[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch_build, "gpu_is_seen", lambda: gpu)
    monkeypatch.setattr(torch_build, "pip_takes_cpu_build", lambda requirement: plain_is_cpu)
    monkeypatch.setattr(torch_build, "index_is_reached", lambda: reached)
    assert torch_build.pip_options(["torch==2.13.0"]) == expected


@pytest.mark.parametrize(("listing", "seen"), [("GPU 0: NVIDIA H200", True), ("", False)])
def test_a_gpu_is_seen_by_what_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch, listing: str, seen: bool) -> None:
    monkeypatch.setattr(torch_build.shutil, "which", lambda name: f"/usr/bin/{name}")
    answer = subprocess.CompletedProcess([], 0, stdout=listing, stderr="")
    monkeypatch.setattr(torch_build.subprocess, "run", lambda *args, **kwargs: answer)
    assert torch_build.gpu_is_seen() is seen
