"""The tuned table that ships for a device, from what ``lora-kernels tune`` measured there: ``--write``, ``--check``.

``bench/results/nvidia-h100/tune.json`` holds every candidate's time. The tuner timed them in CUDA graphs, where a
launch costs nothing; outside of a graph a second stream costs the host about 80 µs a call by Python, and at few tokens
that is many times what it saves. The file has no host's time of each candidate, by which a choice could weigh it. So of
each cell the quickest plan on **one** stream ships, chosen as the tuner chooses: one that is no plain composition only
if it beats the best of those by more than the clock's noise. Whoever runs graphs alone may do better with a table of
their own (``lora-kernels tune``), whose rows count before these.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora_kernels.backends.triton.choose import tuned  # noqa: E402  (after the path)
from lora_kernels.backends.triton.choose.plans import Cell, Plan, plan_from_json  # noqa: E402
from lora_kernels.backends.triton.choose.table import DeviceName, Row, Table, slug  # noqa: E402
from lora_kernels.benchmark.timing import Timing  # noqa: E402
from lora_kernels.errors import InvalidArgumentError  # noqa: E402
from lora_kernels.tuning.search import beats  # noqa: E402

MEASURED = ROOT / "bench" / "results" / "nvidia-h100" / "tune.json"
# At commit ed63ecf the tuner's digest was of the whole backend's sources; that of its kernels was dd932ed0fde2, by git.
# Since then kernels/ changed once, in 1eff6ec, and over fp16 alone: for bf16, fp32 and tf32 all 455 calls of
# compile_jobs.py lower to the same TTIR under Triton 3.6.0. Every row is bf16's, so it counts for those kernels too:
# their digests, by ``choose.kernel_files``, are these. A kind whose files have changed since is passed over.
_KERNELS_OF = {
    "few_tokens": "d0ca35726eaf",
    "fused": "50bab0b62ed5",
    "lora_first": "e1dfa9de38ea",
    "base_first": "e1dfa9de38ea",
    "dx_fused": "4281472518e5",
    "dx_lora_first": "4281472518e5",
}


def table_of(document: dict[str, Any]) -> Table:
    """The table that ships, of what ``tune --json`` wrote."""
    named = document["device"]
    device = DeviceName(named["name"], named["capability"], named["sms"])
    versions = document["versions"]
    rows = [_row(cell, versions) for cell in document["cells"] if cell["row"] is not None]
    return Table(device, ()).merged(rows)


def _row(measured: dict[str, Any], versions: dict[str, str]) -> Row:
    every = {plan: entry for entry in measured["measured"] if (plan := _plan(entry["plan"])) is not None}
    entries = {plan: entry for plan, entry in every.items() if not getattr(plan, "beside", False)}
    chosen = _chosen({plan: _timing(entry) for plan, entry in entries.items()})
    kinds = {plan.kind: min(e["ratio"] for p, e in entries.items() if p.kind == plan.kind) for plan in entries}
    return Row(
        cell=Cell(**measured["cell"]),
        plan=chosen,
        us=entries[chosen]["us"],
        floor_us=measured["floor"]["us"],
        ratio=entries[chosen]["ratio"],
        kinds=kinds,
        predicted_us=entries[chosen]["predicted_us"],
        versions={**versions, "kernels": _KERNELS_OF.get(chosen.kind, versions["kernels"])},
        date=measured["row"]["date"],
    )


def _plan(document: dict[str, Any]) -> Plan | None:
    """None for a plan that is no more: it won nowhere."""
    try:
        return plan_from_json(document)
    except InvalidArgumentError:
        return None


def _chosen(timings: dict[Plan, Timing]) -> Plan:
    quickest = min(timings, key=lambda plan: timings[plan].ratio)
    composition = min((plan for plan in timings if plan.is_composition), key=lambda plan: timings[plan].ratio)
    return quickest if beats(timings[quickest], timings[composition]) else composition


def _timing(entry: dict[str, Any]) -> Timing:
    seconds = {"median": "us", "p20": "us_p20", "p80": "us_p80", "difference": "over_floor_us"}
    told = {old: entry[new] * 1e-6 for old, new in seconds.items()}
    rest = [field.name for field in fields(Timing) if field.name not in told]
    return Timing(**told, **{name: entry[name] for name in rest})


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks or writes; returns the exit status."""
    parser = argparse.ArgumentParser(description="the tuned table that ships, from what was measured")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="exit with 1 where the table is stale")
    mode.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--tune", type=Path, default=MEASURED, metavar="FILE", help="what tune --json wrote")
    parser.add_argument("--folder", type=Path, default=tuned.SHIPPED, help="of the tables that ship")
    args = parser.parse_args(arguments)
    table = table_of(json.loads(args.tune.read_text(encoding="utf-8")))
    path = args.folder / f"{slug(table.device.name)}.json"
    if args.write:
        path.write_text(table.text(), encoding="utf-8")
        return 0
    fresh = path.is_file() and path.read_text(encoding="utf-8") == table.text()
    if not fresh:
        print(f"shipped_table: {path} is stale: run python bench/shipped_table.py --write.", file=sys.stderr)
    return 0 if fresh else 1


if __name__ == "__main__":
    raise SystemExit(main())
