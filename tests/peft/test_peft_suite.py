"""What ``scripts/peft_suite.py`` makes of two runs of PEFT's suite; the runs themselves are no part of these tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import peft_suite
from peft_suite import peft_hub

STOCK = {"outcomes": {"a": "passed", "b": "passed", "c": "failed", "d": "skipped"}, "calls": {}, "seconds": 3}
FUSED = STOCK | {
    "outcomes": {"a": "passed", "b": "failed", "c": "passed"},
    "calls": {"fused": 6, "base": 5, "a reason": 2},
}


def test_tests_that_fusing_loses_are_named() -> None:
    result = peft_suite.compared(STOCK, FUSED)
    assert (result["lost"], result["gained"]) == (["b"], ["c"])
    assert result["stock"] == {"passed": 2, "failed": 1, "skipped": 1, "seconds": 3}


def test_the_total_counts_the_share_of_calls_on_which_an_adapter_acted() -> None:
    total = peft_suite.added([peft_suite.compared(STOCK, FUSED)] * 2)
    assert (total["lost"], total["gained"], total["share_fused"]) == (2, 2, 0.75)
    assert total["calls"] == {"fused": 12, "base": 10, "a reason": 4}


@pytest.mark.parametrize(
    ("phases", "outcome"),
    [
        ([("setup", "passed"), ("call", "passed"), ("teardown", "passed")], "passed"),
        ([("setup", "passed"), ("call", "passed"), ("teardown", "failed")], "failed"),
        ([("setup", "failed"), ("teardown", "passed")], "failed"),
        ([("setup", "skipped"), ("teardown", "passed")], "skipped"),
    ],
)
def test_a_test_has_the_worst_outcome_of_its_parts(phases: Any, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(peft_suite, "_outcomes", seen)
    for when, result in phases:
        peft_suite.pytest_runtest_logreport(SimpleNamespace(when=when, outcome=result, nodeid="t"))
    assert seen == {"t": outcome}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors"])
def test_the_hub_of_our_own_is_read_as_the_cache_of_the_real_one(file: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="it builds the models")
    cache = pytest.importorskip("huggingface_hub", reason="it reads the cache")
    name = "peft-internal-testing/tiny-random-OPTForCausalLM"
    peft_hub.fill(tmp_path, [name])
    found = cache.try_to_load_from_cache(name, file, cache_dir=tmp_path)
    assert Path(found).stat().st_size > 0


def test_the_hub_writes_what_it_lacks_and_each_time_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="it builds the models")
    name = "peft-internal-testing/tiny-random-OPTForCausalLM"
    peft_hub.fill(tmp_path / "a", [name])
    peft_hub.fill(tmp_path / "b", [name])
    (first,), (second,) = (list((tmp_path / folder).rglob("model.safetensors")) for folder in "ab")
    assert first.read_bytes() == second.read_bytes()
    first.unlink()
    peft_hub.fill(tmp_path / "a", [name])
    assert not first.exists()


def test_peft_takes_each_model_for_one_that_it_has_seen() -> None:
    seen = peft_hub.Visited()
    assert "any/model" in seen
    seen["any/model"] += 1
    assert seen.get("any/model") != 0  # PEFT forgets a model whose first use failed
