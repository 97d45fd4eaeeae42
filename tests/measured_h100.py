"""What an H100 measured: every plan's ratio to the frozen layer, from the committed files of ``bench/results``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from lora_kernels.backends.triton.choose import hopper_blocks as blocks
from lora_kernels.backends.triton.choose.plans import (
    Cell,
    DxHopper,
    DxInside,
    Hopper,
    HopperInside,
    Plan,
    plan_from_json,
)
from lora_kernels.errors import InvalidArgumentError

FOLDER = Path(__file__).resolve().parents[1] / "bench" / "results" / "nvidia-h100"
_GONE = ("flattened", "dx_base_first")  # plans that are no more, for they won nowhere
Measured = list[tuple[Cell, Plan, float]]


def _read(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@cache
def plain() -> Measured:
    """tune.json's candidates without dropout: with it every tile drew the mask, which no kernel does any more."""
    found = []
    for measured in _read("tune.json")["cells"]:
        cell = Cell(**measured["cell"])
        for entry in measured["measured"]:
            try:
                plan = plan_from_json(entry["plan"])
            except InvalidArgumentError:
                assert any(word in entry["name"] for word in _GONE), entry["name"]
                continue
            if not cell.dropout:
                found.append((cell, plan, entry["ratio"]))
    return found


@cache
def gluon() -> Measured:
    """hopper_step.json's forward and backward, by the configurations that it chose. Its backward finds A's and B's
    operands packed, and its h inside meets rounded."""
    document = _read("hopper_step.json")
    choice, found = document["choice"], []
    for shape in document["shapes"]:
        m, k, n = shape["shape"]
        for name, row in shape["rows"].items():
            direction, p, *way = name.split()
            if direction in ("forward", "backward") and (plan := _plan(direction, p != "p=0", way, choice)):
                found.append((Cell(direction, m, k, n, 16, "bfloat16", p != "p=0"), plan, row["ratio"]))
    return found


def _plan(direction: str, dropout: bool, way: list[str], choice: dict[str, str]) -> Plan | None:
    """None for orders that no plan has."""
    inside = blocks.product_h_configs(16)[0]
    if way == ["fused"]:
        return HopperInside(inside)
    if direction == "forward":
        shrinks = blocks.plain_shrink_configs(16) if way[0] == "plain" else blocks.shrink_configs(16)
        name = choice["plain" if way[0] == "plain" else "shrink-drop" if dropout else "shrink"]
        return Hopper(_named(shrinks, name), _named(blocks.forward_configs(), way[1]))
    da = _named(blocks.outer_configs(16, dropout), choice["outer-mask" if dropout else "outer"])
    if way[0] in ("fdx", "fdx-side"):
        db = _named(blocks.outer_configs(16, False), choice["outer"])
        return DxInside(inside, db, da, way[0] == "fdx-side")
    if way[0] not in ("serial", "side"):
        return None
    dx = _named(blocks.dx_configs(dropout), way[1])
    return DxHopper(_named(blocks.dh_db_configs(16), choice["dh_db"]), dx, da, way[0] == "side")


def _named(configs: Any, name: str) -> Any:
    return next(config for config in configs if config.name == name)


@cache
def rivals() -> dict[Cell, float]:
    """bench.json: the best ratio of addmm_, PEFT and LoRAFusion's split, of each forward cell."""
    found = {}
    for measured in _read("bench.json")["cells"]:
        w = measured["workload"]
        if w["direction"] == "forward" and w["adapter_dtype"] is None:
            sizes = (w["tokens"], w["in_features"], w["out_features"], w["r"], w["dtype"], w["p"] > 0)
            ratios = (
                measured["providers"][name]["numbers"]["ratio"] for name in ("addmm", "peft", "peft16", "lorafusion")
            )
            found[Cell("forward", *sizes)] = min(ratios)
    return found
