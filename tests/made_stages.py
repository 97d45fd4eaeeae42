"""Stages of a run on a GPU machine whose commands are a few lines of Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scripts.gpu_stages import Stage, judge_json

__all__ = ["stage", "summary"]


def stage(name: str, code: str, limit_s: float = 30, **changes: object) -> Stage:
    fields = {"result": f"{name}.json", "result_is_stdout": True, "judge": judge_json} | changes
    return Stage(name, (sys.executable, "-c", code), limit_s, **fields)  # type: ignore[arg-type]


def summary(out: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads((out / "summary.json").read_text())["stages"]}
