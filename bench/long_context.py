"""What a training step holds between forward and backward, by each way to hold less, beside PEFT.

``python bench/long_context.py`` measures and writes ``bench/results/long-context.json``; ``python bench/tables.py
--write`` then writes the table in ``docs/training.md``. Bytes do not depend on how busy the machine is.

*Held* is what torch has allocated when forward is over, beyond what was there before it: on a CPU the running sum of
its allocations and frees. *Peak* is the most during forward and backward. For the way that keeps activations on the
host, *held* is what does not pass autograd's hooks, and so stays on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.llamas import Sizes, adapted, llama  # noqa: E402  (after the path)
from lora_kernels.benchmark.memory import peak_of  # noqa: E402
from lora_kernels.benchmark.report import Table  # noqa: E402
from lora_kernels.benchmark.results import environment  # noqa: E402

RESULT = ROOT / "bench" / "results" / "long-context.json"
MEASURED = ("peft", "ours")
RANK, P = 16, 0.05
_NOTHING = 10_000  # bytes of which no ratio is told
_LENGTHS = (1 / 8, 3 / 16, 1 / 4, 7 / 16)  # of four sequences, in parts of a row
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
Policy = Callable[..., CheckpointPolicy]


def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps what linear layers give, ours and PyTorch's; norms, attention and activations run again."""
    kept = op in _PRODUCTS or (op.namespace == "lora_kernels" and "gated" not in op.__name__)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps the output of attention; the linear layers run again."""
    kept = "scaled_dot_product" in op.__name__
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(model: Any, policy: Policy | None) -> Any:
    """``model`` with a checkpoint around each block, and what ``policy`` keeps; None: nothing."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if policy is not None:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable(settings)
    return model


def held(forward: Callable[[], object]) -> int:
    """Bytes that are allocated when ``forward`` is over and were not before, its result included; on a CPU."""
    forward()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces itself on stderr
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        result = forward()
    events = profile.kineto_results.events()
    del result
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def _plain(model: Any, tokens: torch.Tensor, **others: torch.Tensor) -> dict[str, int]:
    def forward() -> Any:
        return model(input_ids=tokens, labels=tokens, **others).loss

    def step() -> None:
        forward().backward()
        model.zero_grad(set_to_none=True)

    return {"held": held(forward), "peak": peak_of(step, "cpu")}


def _on_the_host(model: Any, tokens: torch.Tensor) -> dict[str, int]:
    """The hooks drop what they are given. Backward has it come back piece by piece, so a peak here says nothing."""

    def forward() -> Any:
        with saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            return model(input_ids=tokens, labels=tokens).loss

    return {"held": held(forward)}


def _packed(model: Any, tokens: torch.Tensor) -> dict[str, int]:
    """Four sequences in one row, told apart by their positions."""
    positions = torch.cat([torch.arange(length) for length in _lengths(tokens)])[None]
    return _plain(model, tokens, position_ids=positions)


def _padded(model: Any, tokens: torch.Tensor) -> dict[str, int]:
    """The same four, each in a row of the longest one's length."""
    lengths = _lengths(tokens)
    rows = torch.nn.utils.rnn.pad_sequence(list(tokens[0].split(lengths)), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)
    return _plain(model, rows, attention_mask=mask)


def _lengths(tokens: torch.Tensor) -> list[int]:
    return [round(part * tokens.numel()) for part in _LENGTHS]


WAYS: dict[str, Callable[[Any, torch.Tensor], dict[str, int]]] = {
    "nothing": _plain,
    "a checkpoint around each block": lambda model, tokens: _plain(selective(model, None), tokens),
    "the same, attention kept": lambda model, tokens: _plain(selective(model, keep_attention), tokens),
    "the same, products kept": lambda model, tokens: _plain(selective(model, keep_products), tokens),
    "activations on the host": _on_the_host,
    "four sequences, padded": _padded,
    "the same four, packed": _packed,
}


def run(sizes: Sizes, length: int) -> dict[str, Any]:
    """Every way with both; progress on stderr."""
    base = llama(sizes, torch.bfloat16)
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    cells = []
    for way, measure in WAYS.items():
        print(f"long-context: {way}", file=sys.stderr, flush=True)
        cells.append({"way": way, "bytes": {name: measure(adapted(base, name, RANK, P), tokens) for name in MEASURED}})
    return {"sizes": asdict(sizes), "length": length, "environment": environment("cpu"), "cells": cells}


def table(result: dict[str, Any]) -> Table:
    """Megabytes and ratios, a row for each way."""
    header = ["what saves memory"]
    header += [f"{what}, {name}" for what in ("held", "peak") for name in ("PEFT, MB", "ours, MB", "ratio")]
    rows = []
    for cell in result["cells"]:
        row = [cell["way"]]
        for what in ("held", "peak"):
            theirs, ours = (cell["bytes"][name].get(what) for name in MEASURED)
            if ours is None:
                row += ["–"] * 3
                continue
            ratio = f"{ours / theirs:.2f}" if theirs > _NOTHING else "–"
            row += [f"{theirs / 1e6:.1f}", f"{ours / 1e6:.1f}", ratio]
        rows.append(row)
    versions = result["environment"]["versions"]
    caption = (
        f"A training step of a Llama ({Sizes(**result['sizes'])}; {result['length']} tokens in one row, bfloat16, fp32 "
        f"adapters of rank {RANK} on every linear layer, dropout {P:g}) on a CPU; torch {versions['torch']}, PEFT "
        f"{versions['peft']}."
    )
    return Table(caption, header, rows, frozenset(), frozenset(), [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help="default: the committed result")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    args = parser.parse_args(arguments)
    result = run(Sizes(64, 96, 2), 32) if args.small else run(Sizes(512, 1376, 4, positions=2048), 2048)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
