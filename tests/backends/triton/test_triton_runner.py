"""A ready-made launch hands the device what Triton's own would: real kernels, compiled for a GPU that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("recorded launches")


def program(name: str, *arguments: str) -> Any:
    """What the program ``tests/<name>.py`` prints, as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), str(FOLDER.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = program("recorded_launches")
    return found


def test_what_is_kept_is_what_would_be_made_anew() -> None:
    """5000 random calls: what Triton specialises on, and what a launch holds, follows from its key."""
    found = program("bound_launches", "5000")
    assert found["wrong"] == []
    assert found["again"] > 1000


def test_ready_made_launches_are_triton_s(results: list[dict[str, Any]]) -> None:
    """Grid, stream, function, and each argument in its place."""
    kinds = {"few_tokens", "fused", "lora_first", "dx_fused", "dx_lora_first"}
    assert {result["plan"].split()[0] for result in results} == kinds | {
        "product", "input_grad", "gain_grad", "row_norms", "gated", "gated_grad", "combine", "combine_grad",
        "four_bits", "few_codes",
    }  # fmt: skip
    for result in results:
        assert result["first"] == result["third"], result["plan"]
        assert all(call["stream"] == 77 for call in result["third"])


def test_only_a_second_kernel_starts_early(results: list[dict[str, Any]]) -> None:
    """The first kernel of a call waits for all before it, for nothing in it waits for anything but its predecessor."""
    for result in results:
        drawn = [call for call in result["third"] if call["kernel"] == "draw_kernel"]
        first, *others = [call for call in result["third"] if call not in drawn]
        assert not any(call["pdl"] for call in (first, *drawn))
        assert all(call["pdl"] == ("pdl" in result["plan"]) for call in others)


def test_descriptors_get_their_memory(results: list[dict[str, Any]]) -> None:
    by_tma = [call for result in results for call in result["third"] if "persistent" in call["kernel"]]
    assert {call["kernel"] for call in by_tma} == {"persistent_kernel", "dx_persistent_kernel"}
    assert all(call["scratch"] > 0 for call in by_tma)
