"""The bytes that a step moves: counted without a GPU, and read from what Nsight Compute prints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import dram_bytes as dram

PRINTED = """==PROF== Connected to process 7
y of the program
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","shrink_kernel","dram__bytes_read.sum","Mbyte","1,067.5"
"0","7","shrink_kernel","dram__bytes_write.sum","Kbyte","524.0"
"1","7","gemm","dram__bytes_read.sum","Gbyte","0.5"
"1","7","gemm","dram__bytes_write.sum","byte","16"
"""


def test_ours_moves_the_least_that_is_counted() -> None:
    """Beside the frozen layer; and every count is below what was published, in which products read more than once."""
    for size in dram.SIZES:
        found = {provider: dram.counted(provider, size) for provider in dram.PROVIDERS}
        gib = {provider: moved for provider, (_, moved) in found.items()}
        assert gib["linear"] < gib["auto"] < gib["lorafusion"] < gib["addmm"] < gib["peft16"]
        assert found["auto"][0] < min(
            launches for name, (launches, _) in found.items() if name not in ("linear", "auto")
        )
        assert all(gib[name] < published for name, published in dram.PUBLISHED[size].items())


def test_what_ncu_prints_is_summed() -> None:
    assert dram.total(PRINTED) == (1067.5e6 + 524e3 + 0.5e9 + 16, 2)
    with pytest.raises(ValueError, match="no memory traffic"):
        dram.total("==ERROR== no permission")


def test_a_failure_of_ncu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    denied = SimpleNamespace(stdout="", stderr="==ERROR== ERR_NVGPUCTRPERM\n")
    monkeypatch.setattr(dram.subprocess, "run", lambda *arguments, **options: denied)
    assert "ERR_NVGPUCTRPERM" in dram.measured("auto", 4096, "ncu")["why_not"]


@pytest.mark.parametrize("there", [False, True])
def test_the_report(there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: dict[str, Any] = {"gib": 1.25, "kernels": 6}
    monkeypatch.setattr(dram, "why_not_measured", lambda: None if there else "no CUDA device is visible")
    monkeypatch.setattr(dram, "measured", lambda provider, size, ncu: said)
    path = tmp_path / "dram.json"
    assert dram.main(["--json", str(path)]) == 0
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == len(dram.SIZES) * len(dram.PROVIDERS)
    assert all(cell["measured"] == (said if there else None) for cell in cells)
    assert (cells[2]["provider"], cells[2]["published_gib"]) == ("lorafusion", 1.258)
