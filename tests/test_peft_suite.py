"""What ``scripts/peft_suite.py`` makes of two runs of PEFT's suite; the runs themselves are no part of these tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import peft_suite

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
