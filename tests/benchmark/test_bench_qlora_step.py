"""The benchmark of a step over NF4 codes runs in small, compares before it times, and makes a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'lora-kernels[quant]'")
pytest.importorskip("peft", reason="PEFT is not installed: pip install 'lora-kernels[peft]'")
from bench import qlora_step


def test_small_sizes_run_and_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "qlora-step.json"
    assert qlora_step.main(["--small", "--seconds", "0.02", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [(row["dtype"], row["tokens"]) for row in result["rows"]] == [("float32", 16), ("bfloat16", 16)]
    assert all(row[name] > 0 for row in result["rows"] for name in ("ours", "values", "over_values", "peft"))
    assert len(capsys.readouterr().out.splitlines()) == 2
    ratio = 1 / (result["rows"][0]["values"] + result["rows"][0]["over_values"])
    assert qlora_step.table(result).rows[0][5] == f"{ratio:.2f}"


def test_what_takes_too_long_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlora_step, "LONG", 0.0)
    row = qlora_step.of_size(qlora_step.SMALL, 16, torch.float32, 0.01)
    assert row["peft"] is None
    made = qlora_step.table({"side": 64, "rows": [row], "environment": qlora_step.environment("cpu")})
    assert "takes above" in made.rows[0][-1]


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = qlora_step._step
    monkeypatch.setattr(
        qlora_step, "_step", lambda layer, x, dy: right(layer, x, dy) * (2.0 if "peft" in type(layer).__module__ else 1)
    )
    with pytest.raises(SystemExit, match="the gradient of PEFT is another"):
        qlora_step.of_size(qlora_step.SMALL, 16, torch.float32, 0.01)
