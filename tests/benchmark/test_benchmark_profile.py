"""Where the host's time goes: the groups, and the command that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_kernels.benchmark import profile
from lora_kernels.benchmark.presets import preset
from lora_kernels.benchmark.providers import FLOOR
from lora_kernels.cli import main


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("lora_kernels/nn.py:forward", "layer"),
        ("peft/tuners/lora/layer.py:forward", "layer"),
        ("lora_kernels/gate.py:check", "validation"),
        ("lora_kernels/dispatch.py:select", "dispatch"),
        ("lora_kernels/autograd.py:forward_only", "autograd"),
        ("lora_kernels/backends/triton/operators.py:forward", "launch"),
        ("triton/runtime/jit.py:run", "launch"),
        ("<built-in method torch._C._nn.linear>", "operators"),
        ("contextlib.py:__enter__", "other"),
    ],
)
def test_functions_fall_into_their_group(name: str, group: str) -> None:
    assert profile._group(name) == group


def test_the_profile_is_written_and_its_shares_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "_CALLS", 100)
    file = tmp_path / "p.json"
    call = ["bench", "--preset", "smoke", "--device", "cpu", "--only", "direction=overhead,overhead-grad"]
    assert main([*call, "--peers", "addmm,auto", "--profile", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    cells = [w for w in preset("smoke").workloads if w.direction.startswith("overhead")]
    assert [row["provider"] for row in rows] == [FLOOR, "addmm", "auto"] * len(cells)
    assert all(abs(sum(row["shares"].values()) - 1) < 1e-6 for row in rows)
    assert all(row["over_floor_us"] == 0.0 for row in rows if row["provider"] == FLOOR)
    assert all((row["shares"]["validation"] > 0) == (row["provider"] == "auto") for row in rows)
    assert "validation" in capsys.readouterr().out
