"""Triton takes the Gluon kernels' launches as they are made ready: real kernels, compiled for an absent GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("recorded launches")


@pytest.fixture(scope="module")
def calls() -> dict[str, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "recorded_hopper.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def test_ready_made_launches_are_triton_s(calls: dict[str, list[dict[str, Any]]]) -> None:
    """Grid, stream, function, and each argument in its place, descriptors too; of every kernel but two alternatives."""
    assert calls["first"] == calls["third"]
    names = [call["kernel"].removeprefix("hopper_").removesuffix("_kernel") for call in calls["first"]]
    assert names == [
        *("pack", "shrink", "product", "product_h", "dh_db", "reduce_dh", "product", "outer", "reduce_grads")
    ]  # fmt: skip


def test_a_group_s_launches_are_triton_s(calls: dict[str, list[dict[str, Any]]]) -> None:
    """One launch for all members of each; members that are not there, ranks of their own and no bias among them."""
    assert calls["group first"] == calls["group third"]
    names = [call["kernel"].removeprefix("hopper_group_").removesuffix("_kernel") for call in calls["group first"]]
    assert names == ["pack", "shrink", "product", "dh_db", "reduce_dh", "dx", "dx", "da", "reduce_grads"]
    assert not any(call["scratch"] for call in calls["group first"])


def test_only_what_waits_for_others_is_launched_together(calls: dict[str, list[dict[str, Any]]]) -> None:
    """Its programs must all be resident; and no launch asks for memory of its own."""
    assert {call["kernel"] for call in calls["first"] if call.get("cooperative")} == {"hopper_product_h_kernel"}
    assert not any(call["scratch"] for call in calls["first"])
