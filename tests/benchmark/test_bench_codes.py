"""The benchmark of quantised forms runs in small, compares before it times, and makes a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'lora-kernels[quant]'")
import quantised
from bench import codes
from lora_kernels.backends.native import load

KINDS = ["nf4", "int8", *(kind for kind in ("ao-mxfp8",) if kind in quantised.KINDS)]


def test_small_sizes_run_and_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "codes.json"
    assert codes.main(["--small", "--seconds", "0.01", "--kinds", *KINDS, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["kind"] for row in result["rows"]] == KINDS
    assert all(row["values"]["ours"] > 0 and row["forward"]["1"]["ours"] > 0 for row in result["rows"])
    assert len(capsys.readouterr().out.splitlines()) == len(KINDS)
    made = codes.table(result)
    assert [row[0] for row in made.rows] == [codes.NAMES[kind] for kind in KINDS]
    told = {row["kind"]: row["forward"]["1"]["package"] for row in result["rows"]}
    assert told["nf4"] is not None
    assert told.get("ao-mxfp8") is None  # torchao's runs on no CPU


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    if reasons := load.why_not("cpu"):
        pytest.skip(" ".join(reasons))
    monkeypatch.setattr(quantised, "values", lambda layer: torch.ones(codes.SMALL, codes.SMALL))
    with pytest.raises(SystemExit, match="nf4 is not timed"):
        codes.of_kind("nf4", codes.SMALL, 0.01)
