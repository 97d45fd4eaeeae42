"""Memory of a training step beside PEFT, of a 4-layer Llama and of one decoder block of Llama-3-8B's sizes.

``python bench/model_memory.py`` measures and writes ``bench/results/model-memory.json``; ``python bench/tables.py
--write`` then writes the tables in ``docs/training.md``. Bytes do not depend on how busy the machine is. The block is
in bfloat16 with the adapters of ``lora-kernels bench --preset gpu-block``, and takes some minutes on two cores.

*Kept* is every storage that forward hands to autograd, counted once, without parameters. *Peak* is the most that
forward and backward hold at once beyond what was held before, gradients included: on a CPU the running sum of torch's
own allocations and frees. Parameters and the optimizer's state are the same for both and are in neither.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.llamas import PROVIDERS, Sizes, adapted, llama  # noqa: E402  (after the path)
from lora_kernels.benchmark import block  # noqa: E402
from lora_kernels.benchmark.memory import peak_of, storages_kept  # noqa: E402
from lora_kernels.benchmark.report import Table  # noqa: E402
from lora_kernels.benchmark.results import environment  # noqa: E402

RESULT = ROOT / "bench" / "results" / "model-memory.json"
MEASURED = ("peft", "ours")
RANK, BATCH, LENGTH = 16, 2, 512


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    dtype: str
    p: float
    checkpointing: bool


SETTINGS = [Setting(dtype, p, c) for dtype in ("float32", "bfloat16") for c in (False, True) for p in (0.0, 0.1)]


def measure(base: Any, setting: Setting, provider: str, batch: int, length: int) -> dict[str, int]:
    """Bytes kept and the peak of one step."""
    model = adapted(base, provider, RANK, setting.p)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    peak = peak_of(step, "cpu")
    kept = storages_kept(lambda: model(input_ids=tokens, labels=tokens).loss)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    return {"kept": held, "peak": peak}


def measure_block(sizes: block.BlockSizes) -> dict[str, Any]:
    """Bytes of one decoder block at every length, with and without dropout; progress on stderr."""
    cells = []
    for tokens in sizes.tokens:
        for p in block.DROPOUTS:
            print(f"model-memory: a block of {tokens} tokens, dropout {p:g}", file=sys.stderr, flush=True)
            cells.append({"tokens": tokens, "p": p, **block.block_bytes(sizes, tokens, p, "cpu", torch.bfloat16)})
    return {"sizes": asdict(sizes), "dtype": "bfloat16", "target": block.TARGETS[block.KEPT], "cells": cells}


def run(
    sizes: Sizes, settings: Sequence[Setting], batch: int, length: int, block_sizes: block.BlockSizes
) -> dict[str, Any]:
    """Every setting with every provider, and the block; progress on stderr."""
    cells: list[dict[str, Any]] = []
    for number, setting in enumerate(settings, 1):
        base = llama(sizes, getattr(torch, setting.dtype))
        print(f"model-memory: {setting} {number}/{len(settings)}", file=sys.stderr, flush=True)
        found = {provider: measure(base, setting, provider, batch, length) for provider in MEASURED}
        cells.append(asdict(setting) | {"bytes": found})
    shape = {"sizes": asdict(sizes), "r": RANK, "batch": batch, "length": length}
    return shape | {"environment": environment("cpu"), "cells": cells, "block": measure_block(block_sizes)}


def table(result: dict[str, Any]) -> Table:
    """Megabytes and ratios, a row for each setting."""
    header = ["base", "dropout", "checkpointing"]
    header += [f"{what}, {name}" for what in ("kept", "peak") for name in ("PEFT, MB", "ours, MB", "ratio")]
    rows = []
    for cell in result["cells"]:
        row = [cell["dtype"], f"{cell['p']:g}", "yes" if cell["checkpointing"] else "no"]
        for what in ("kept", "peak"):
            theirs, ours = (cell["bytes"][provider][what] for provider in MEASURED)
            row += [f"{theirs / 1e6:.1f}", f"{ours / 1e6:.1f}", f"{ours / theirs:.2f}"]
        rows.append(row)
    sizes, versions = Sizes(**result["sizes"]), result["environment"]["versions"]
    caption = (
        f"A training step of a Llama ({sizes}; {result['batch']} × {result['length']} tokens, r={result['r']} on every "
        f"linear layer, fp32 adapters) on a CPU; torch {versions['torch']}, PEFT {versions['peft']}."
    )
    return Table(caption, header, rows, frozenset(), frozenset(), [])


def block_table(result: dict[str, Any]) -> Table:
    """Megabytes and ratios of the block, a row for each length and dropout."""
    header = ["tokens", "dropout"]
    header += [f"{what}, {name}" for what in ("kept", "peak") for name in ("PEFT, MB", "ours, MB", "ratio")]
    rows = []
    for cell in result["block"]["cells"]:
        row = [str(cell["tokens"]), f"{cell['p']:g}"]
        for what in ("bytes_kept", "bytes_peak"):
            theirs, ours = cell["peft"][what], cell["auto"][what]
            row += [f"{theirs / 1e6:.0f}", f"{ours / 1e6:.0f}", f"{ours / theirs:.2f}"]
        rows.append(row)
    sizes, versions = block.BlockSizes(**result["block"]["sizes"]), result["environment"]["versions"]
    caption = (
        f"A training step of one decoder block (hidden {sizes.hidden}, inner {sizes.inner}, {sizes.heads} heads, "
        f"{sizes.key_heads} of keys; {result['block']['dtype']} base, fp32 adapters of rank 16 on its seven "
        f"projections) on a CPU; torch {versions['torch']}, PEFT {versions['peft']}. The aim is to keep at most "
        f"{result['block']['target']:g} of PEFT's."
    )
    return Table(caption, header, rows, frozenset(), frozenset(), [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help="default: the committed result")
    parser.add_argument("--small", action="store_true", help="a tiny model and two settings, to see that it runs")
    args = parser.parse_args(arguments)
    if args.small:
        result = run(Sizes(64, 96, 1), SETTINGS[:2], 1, 16, block.BlockSizes(64, 96, 4, 2, (24,)))
    else:
        result = run(Sizes(512, 1376, 4), SETTINGS, BATCH, LENGTH, block.BlockSizes())
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name in MEASURED:
        print(PROVIDERS[name], *(f"{cell['bytes'][name]['peak'] / 1e6:.1f}" for cell in result["cells"]), "MB at most")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
