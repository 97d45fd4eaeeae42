"""Every quantised form on a CPU beside its own package: W's values, and a forward of 1 and of 16 tokens.

``python bench/codes.py --json bench/results/MACHINE/codes.json`` measures a bf16 layer 2048 -> 2048 of each form whose
package is installed; ``--small`` is for tests. *Values*: the package's own function that gives W, and what this package
gives a product of many tokens. *Forward*: the package's layer without adapters, and ours with one of r = 16, both as
ratios to the frozen bf16 ``nn.Linear`` of the same round. *Host*: one token of a layer 64 -> 64, nearly all host time.
Both ways' values are compared before they are timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lora_kernels import FusedLoRALinear  # noqa: E402  (after the path)
from lora_kernels.benchmark.report import Table  # noqa: E402
from lora_kernels.benchmark.results import environment  # noqa: E402
from lora_kernels.benchmark.timing import Candidate, measure  # noqa: E402
from lora_kernels.weights import known  # noqa: E402

__all__ = ["NAMES", "main", "table", "timed"]

TOKENS = (1, 16)
SIDE, SMALL, RANK, DTYPE = 2048, 64, 16, torch.bfloat16
NAMES = {
    "nf4": "NF4, bitsandbytes",
    "nf4-nested": "NF4, nested, bitsandbytes",
    "fp4": "FP4, bitsandbytes",
    "int8": "int8, bitsandbytes",
    "ao-int8": "int8, torchao",
    "ao-int8-group": "int8 by groups, torchao",
    "ao-int4": "int4 by groups, torchao",
    "ao-float8": "float8, torchao",
    "ao-nvfp4": "NVFP4, torchao",
    "ao-mxfp4": "MXFP4, torchao",
    "ao-mxfp8": "MXFP8, torchao",
    "fp8": "FP8 by blocks, transformers",
}


def _makers() -> Any:
    """What the tests make such layers by."""
    return importlib.import_module("quantised")


def layers(kind: str, side: int) -> tuple[Any, Any]:
    """The package's layer, and ours over one of the same weight."""
    torch.manual_seed(0)
    weight = torch.randn(side, side).to(DTYPE) * 0.02
    own, base = (_makers().quantised(kind, side, side, DTYPE, bias=False, of=weight) for _ in range(2))
    return own.eval(), FusedLoRALinear.from_linear(base, r=RANK).eval()


def of_kind(kind: str, side: int, seconds: float) -> dict[str, Any]:
    """A form's row: milliseconds and ratios, or what the package says where its layer does not run here."""
    values, (own, ours) = _makers().values, layers(kind, side)
    x, plain = torch.randn(max(TOKENS), side).to(DTYPE), torch.randn(side, side).to(DTYPE)
    ours(x)  # loads the kernels
    packed = known.read(ours, ours.weight)
    expected, found = values(own).to(DTYPE).float(), packed.dequantize(DTYPE).float()
    if not (found - expected).abs().max() <= 2.0**-7 * expected.abs().max():
        raise SystemExit(f"{kind} is not timed, because its values are not the package's.")
    made = timed({"package": lambda: values(own).to(DTYPE), "ours": lambda: packed.dequantize(DTYPE)}, seconds)
    row: dict[str, Any] = {"kind": kind, "values": {name: timing.median for name, timing in made.items()}}
    row["forward"] = {}
    for tokens in TOKENS:
        row["forward"][str(tokens)] = _forward(own, ours, x[:tokens], plain, seconds)
    own, ours = layers(kind, SMALL)
    row["host"] = _forward(own, ours, torch.randn(1, SMALL).to(DTYPE), torch.randn(SMALL, SMALL).to(DTYPE), seconds)
    return row


def _forward(own: Any, ours: Any, x: Tensor, plain: Tensor, seconds: float) -> dict[str, Any]:
    runs: dict[str, Callable[[], Any]] = {"frozen": lambda: F.linear(x, plain), "ours": lambda: ours(x)}
    found: dict[str, Any] = {}
    try:
        own(x)
        runs["package"] = lambda: own(x)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:  # as packages say "not on a CPU"
        found["package"] = None
        found["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    timings = timed(runs, seconds)
    found |= {name: timing.ratio for name, timing in timings.items()}
    return found | {"frozen": timings["frozen"].median}


def timed(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Each of ``runs`` in turn in every round; the first is what ratios are to."""
    floor = next(iter(runs))
    return measure([Candidate(name, lambda _, run=run: run()) for name, run in runs.items()], floor, seconds)  # type: ignore[misc]


def table(result: dict[str, Any]) -> Table:
    """A row for each form."""
    machine, side = result["environment"], result["side"]
    caption = (
        f"A bf16 layer {side} → {side} of each form on a CPU. Values: milliseconds for all of W. M tokens: time over "
        f"the frozen bf16 nn.Linear's of the same round; ours has an adapter of r = {RANK}, the package's layer none. "
        f"Host: microseconds of one token of a layer {SMALL} → {SMALL}. "
        f"{machine['device']}, {machine['threads']} threads; torch {machine['versions']['torch']}; lora_kernels at "
        f"commit {machine['git']}."
    )
    header = ["form", "values: package's ms", "ours ms"]
    for tokens in TOKENS:
        header += [f"M = {tokens}: package's", "lora_kernels"]
    header += ["host: package's µs", "lora_kernels µs"]
    rows, best = [], set()
    for i, row in enumerate(result["rows"]):
        cells = [f"{row['values'][name] * 1e3:#.3g}" for name in ("package", "ours")]
        best.add((i, 1 if row["values"]["package"] < row["values"]["ours"] else 2))
        for place, tokens in enumerate(TOKENS):
            found = row["forward"][str(tokens)]
            cells += [
                "runs on no CPU" if found["package"] is None else f"{found['package']:.2f}",
                f"{found['ours']:.2f}",
            ]
            ahead = found["package"] is not None and found["package"] < found["ours"]
            best.add((i, 3 + 2 * place + (0 if ahead else 1)))
        host = row["host"]
        absent = host["package"] is None
        times = [0.0 if absent else host["package"] * host["frozen"], host["ours"] * host["frozen"]]
        cells += ["runs on no CPU" if absent else f"{times[0] * 1e6:.0f}", f"{times[1] * 1e6:.0f}"]
        best.add((i, len(header) - (1 if absent or times[1] <= times[0] else 2)))
        rows.append([NAMES[row["kind"]], *cells])
    return Table(caption, header, rows, frozenset(best), frozenset(), [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each form, print its row, and write the file anew after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each measurement (default: 1.5)")
    parser.add_argument(
        "--kinds", nargs="+", default=[kind for kind in NAMES if kind in _makers().KINDS], help="which forms"
    )
    parser.add_argument("--json", type=Path, required=True, help="where to write")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    side = SMALL if given.small else SIDE
    result = {"side": side, "rows": rows, "environment": environment("cpu")}
    for kind in given.kinds:
        with torch.no_grad():
            rows.append(of_kind(kind, side, given.seconds))
        given.json.write_text(json.dumps(result, indent=1))
        print(json.dumps(rows[-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
