"""The benchmark of a gated MLP: every way is timed, the pass keeps least, wrong gradients are not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from bench import gated_mlp, tables


def test_every_way_is_measured_and_stands_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "amd-epyc-avx2" / "gated-mlp.json"
    path.parent.mkdir()
    assert gated_mlp.main(["--small", "--seconds", "0.05", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["dtype"], row["p"]) for row in rows] == [(d, p) for d in gated_mlp.DTYPES for p in gated_mlp.DROPOUTS]
    for row in rows:
        layers, one, again, theirs = (row["ways"][name] for name in gated_mlp.WAYS)
        assert all(found["seconds"] > 0 for found in row["ways"].values())
        assert again["kept"] < one["kept"] < layers["kept"] <= theirs["kept"]
    page = tmp_path / "page.md"
    page.write_text("<!-- model:gated-mlp-avx2 -->\n<!-- /model -->\n")
    assert tables.main(["--write", "--file", str(page), "--results", str(tmp_path)]) == 0
    assert "| bfloat16 | 0.1 | one pass, recomputed |" in page.read_text()


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gated_mlp.modules

    def wrong(*given: Any) -> dict[str, Any]:
        found = made(*given)
        with torch.no_grad():
            found["one pass"].down_proj.lora_B.mul_(1.1)
        return found

    monkeypatch.setattr(gated_mlp, "modules", wrong)
    with pytest.raises(SystemExit, match="the gradient by one pass is another"):
        gated_mlp.of_setting((64, 96, 16), torch.float32, 0.1, 0.05)


def test_a_call_that_takes_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_mlp, "LONG", 0.0)
    row = gated_mlp.of_setting((64, 96, 16), torch.float32, 0.0, 0.05)
    assert row["ways"]["PEFT"]["seconds"] is None
    assert row["ways"]["PEFT"]["kept"] > 0
