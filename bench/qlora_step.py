"""A step over an NF4 weight on a CPU, beside what it is made of and beside PEFT's.

``python bench/qlora_step.py --json bench/results/MACHINE/qlora-step.json`` measures forward and backward of a layer
2048 -> 2048 with an adapter of r = 16, in fp32 and bf16; ``--small`` is for tests. *Parts*: W's values are made once,
and then our layer over those values does its step; the goal is 1.10 times their sum. *PEFT*: its layer over the same
bitsandbytes weight. Gradients are compared before anything is timed. A call that takes above five seconds is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.codes import timed  # noqa: E402  (after the path)
from lora_kernels import FusedLoRALinear  # noqa: E402  (after the path)
from lora_kernels.benchmark.report import Table  # noqa: E402
from lora_kernels.benchmark.results import environment  # noqa: E402
from lora_kernels.weights import known  # noqa: E402

__all__ = ["main", "table"]

TOKENS, SIDE, SMALL, RANK, ALPHA, KIND = (512, 2048), 2048, 64, 16, 32, "nf4"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LONG = 5.0  # seconds of a call
GOAL = 1.10


def _ours(base: Any) -> FusedLoRALinear:
    torch.manual_seed(1)
    return FusedLoRALinear.from_linear(base, r=RANK, lora_alpha=ALPHA, init_lora_weights=False)


def layers(side: int, dtype: torch.dtype) -> dict[str, Any]:
    """Ours over the codes and over their values, and PEFT's over the codes, with the same adapter."""
    from peft import LoraConfig, get_peft_model

    quantised: Any = importlib.import_module("quantised").quantised
    torch.manual_seed(0)
    weight = torch.randn(side, side) * 0.02
    base, rival = (quantised(KIND, side, side, dtype, bias=False, of=weight) for _ in range(2))
    ours = _ours(base)
    plain = nn.Linear(side, side, bias=False, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(known.read(ours, ours.weight).dequantize(dtype))
    over_values = _ours(plain)
    model = get_peft_model(nn.Sequential(rival), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]))
    peft = model.base_model.model[0]
    with torch.no_grad():
        for a, b in (
            (over_values.lora_A, over_values.lora_B),
            (peft.lora_A.default.weight, peft.lora_B.default.weight),
        ):
            a.copy_(ours.lora_A)
            b.copy_(ours.lora_B)
    return {"ours": ours, "over values": over_values, "PEFT": peft}


def _step(layer: Any, x: Tensor, dy: Tensor) -> Any:
    """The gradient of x; those of the adapters are added to what they hold, as in training."""
    x.grad = None
    layer(x).backward(dy)
    found: Any = x.grad
    return found


def of_size(side: int, tokens: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """A row: seconds of ours, and ratios to it of its parts and of PEFT's; None where a call takes too long."""
    made = layers(side, dtype)
    x, dy = torch.randn(tokens, side).to(dtype).requires_grad_(), torch.randn(tokens, side).to(dtype)
    packed = known.read(made["ours"], made["ours"].weight)
    gradients, slow = {}, []
    for name, layer in made.items():
        started = time.perf_counter()
        gradients[name] = _step(layer, x, dy).float()
        if name == "PEFT" and time.perf_counter() - started > LONG:
            slow.append(name)
    for name, found in gradients.items():
        if not (found - gradients["ours"]).abs().max() <= 2.0**-6 * gradients["ours"].abs().max():
            raise SystemExit(f"the step of {tokens} tokens is not timed: the gradient of {name} is another.")
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: _step(made["ours"], x, dy),
        "values": lambda: packed.dequantize(dtype),
        "over values": lambda: _step(made["over values"], x, dy),
    }
    if not slow:
        runs["PEFT"] = lambda: _step(made["PEFT"], x, dy)
    timings = timed(runs, seconds)
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "ours": timings["ours"].median,
        "values": timings["values"].ratio,
        "over_values": timings["over values"].ratio,
        "peft": None if slow else timings["PEFT"].ratio,
    }


def table(result: dict[str, Any]) -> Table:
    """A row for each dtype and number of tokens."""
    machine, side = result["environment"], result["side"]
    caption = (
        f"A step (forward and backward) of a layer {side} → {side} over NF4 codes, r = {RANK}, on a CPU, relative to "
        f"its parts and to PEFT's step over the same bitsandbytes weight; the goal is at most {GOAL:.2f} of its parts. "
        f"{machine['device']}, {machine['threads']} threads; torch {machine['versions']['torch']}; lora_kernels at "
        f"commit {machine['git']}."
    )
    header = ["dtype", "M", "lora_kernels ms", "W's values ms", "our step over them ms", "ratio to both", "to PEFT's"]
    rows = []
    for row in result["rows"]:
        ours = row["ours"] * 1e3
        parts = row["values"] + row["over_values"]
        rival = f"one call takes above {LONG:.0f} s" if row["peft"] is None else f"{1 / row['peft']:.2f}"
        times = [f"{ours * ratio:.3g}" for ratio in (1.0, row["values"], row["over_values"])]
        rows.append([row["dtype"], str(row["tokens"]), *times, f"{1 / parts:.2f}", rival])
    return Table(caption, header, rows, frozenset(), frozenset(), [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each cell, print its row, and write the file anew after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each cell (default: 6)")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="which (default: both)")
    parser.add_argument("--json", type=Path, required=True, help="where to write")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    side, tokens = (SMALL, (16,)) if given.small else (SIDE, TOKENS)
    result = {"side": side, "rows": rows, "environment": environment("cpu")}
    for dtype in given.dtypes:
        for count in tokens:
            rows.append(of_size(side, count, DTYPES[dtype], given.seconds))
            given.json.write_text(json.dumps(result, indent=1))
            print(json.dumps(rows[-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
