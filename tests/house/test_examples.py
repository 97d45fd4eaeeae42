"""The examples run, short, as a user would start them."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bench import qlora_curve
from numerics import alike_as_printed

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str, *arguments: str, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_here(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """In this process, where a second import of PEFT and transformers costs nothing."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_quickstart(tmp_path: Path) -> None:
    out = run_example("quickstart.py", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses == sorted(losses, reverse=True)
    assert "merged" in out


def test_finetune_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the fine-tune needs transformers and accelerate")
    pytest.importorskip("accelerate", reason="the fine-tune needs transformers and accelerate")
    monkeypatch.chdir(tmp_path)
    out = run_here("finetune_llama.py", "--steps", "5", "--out", "adapter", monkeypatch=monkeypatch, capsys=capsys)
    before, after, merged = map(float, re.search(r"([\d.]+) before, ([\d.]+) after, ([\d.]+) merged", out).groups())
    assert after < before
    assert abs(merged - after) < 1e-3 * after
    assert "replaced 14 layers" in out
    saved = {path.name for path in (tmp_path / "adapter").glob("adapter_*")}
    assert saved == {"adapter_config.json", "adapter_model.safetensors"}
    assert "loaded 14 layers onto the plain model: the same logits" in out


def test_qlora_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("peft", "transformers", "accelerate", "bitsandbytes"):
        pytest.importorskip(package, reason=f"QLoRA with the Trainer needs {package}")
    file = tmp_path / "found.json"
    out = run_here("qlora_llama.py", "--steps", "3", "--json", str(file), monkeypatch=monkeypatch, capsys=capsys)
    assert "fused 14 layers:" in out
    kept, peak = zip(*re.findall(r"([\d.]+) MiB kept for backward, a step holds at most ([\d.]+)", out), strict=True)
    assert float(kept[1]) <= float(kept[0])
    assert float(peak[1]) <= 1.05 * float(peak[0])  # the same tensors in another order
    losses = re.findall(r"loss ([\d.]+) by PEFT's layers, ([\d.]+) fused", out)
    assert len(losses) == 3
    assert all(abs(float(one) - float(other)) < 1e-3 * float(one) for one, other in losses)
    assert float(losses[-1][1]) < float(losses[0][1])
    made = qlora_curve.table(json.loads(file.read_text()))
    assert [len(row) for row in made.rows] == [len(made.header)] * 2
    assert [row[1:4] for row in made.rows] == [list(column) for column in zip(*losses, strict=True)]


def test_peft_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="the script trains a PEFT model")
    pytest.importorskip("transformers", reason="the script trains a transformers model")
    out = run_here("peft_one_line.py", "--steps", "3", monkeypatch=monkeypatch, capsys=capsys)
    assert "calls when counted: 42 fused, 0 by PEFT's own forward, 0 base alone" in out
    assert out.count("by PEFT  ") == 3


def test_moe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("peft", "transformers", "accelerate"):
        pytest.importorskip(name, reason="the script trains a transformers model with Trainer, by PEFT and by ours")
    out = run_here("moe.py", "--steps", "4", monkeypatch=monkeypatch, capsys=capsys)
    assert "layers.1.mlp.experts.down_proj (48→64) of 8 experts" in out
    theirs, ours = (re.search(rf"{who} +(.*)", out)[1].split() for who in ("by PEFT", "by ours"))
    assert len(theirs) == len(ours) == 4
    assert float(ours[-1]) < float(ours[0])
    assert "losses differ by at most" in out


def test_serve_merged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="several adapters are served by PEFT")
    pytest.importorskip("transformers", reason="the script serves a transformers model")
    out = run_here("serve_merged.py", monkeypatch=monkeypatch, capsys=capsys)
    assert "adapters merged: 6; adapters dropped: 0" in out
    assert "each row is what its adapter gives alone" in out


def test_trl_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("trl", "datasets", "peft"):
        pytest.importorskip(name, reason="the script trains with TRL's SFTTrainer, which is not a requirement")
    monkeypatch.chdir(tmp_path)
    out = run_here("trl_sft.py", "--steps", "3", monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"calls when counted: [1-9]\d* fused, 0 by PEFT's own forward, 0 base alone", out)
    theirs, ours = (re.search(rf"{who} +(.*)", out)[1].split() for who in ("by PEFT", "fused   "))
    assert len(theirs) == 3
    assert float(theirs[-1]) < float(theirs[0])
    assert alike_as_printed(ours, theirs)
    assert not list(tmp_path.iterdir())


def test_trl_dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("trl", "datasets", "peft"):
        pytest.importorskip(name, reason="the script trains with TRL's DPOTrainer, which is not a requirement")
    monkeypatch.chdir(tmp_path)
    out = run_here("trl_dpo.py", "--steps", "3", monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"calls when counted: [1-9]\d* fused, 0 by PEFT's own forward, [1-9]\d* base alone", out)
    ways = ("by PEFT ", "fused   ", "replaced")
    theirs, fused, replaced = (re.search(rf"^{way} (.*)", out, re.MULTILINE)[1].split() for way in ways)
    assert len(theirs) == 3
    assert theirs[0] == "0.6931"  # ln 2: at first the model is its own reference
    assert float(theirs[-1]) < float(theirs[0])
    assert alike_as_printed(fused, theirs)
    assert alike_as_printed(replaced, theirs)
    assert not list(tmp_path.iterdir())
