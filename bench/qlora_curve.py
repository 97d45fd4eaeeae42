"""The losses and the memory that ``examples/qlora_llama.py --json FILE`` wrote, as a table."""

from __future__ import annotations

from typing import Any

from lora_kernels.benchmark.report import Table

__all__ = ["table"]

_STEPS = 5  # of which the loss is shown
_WAYS = {"PEFT": "PEFT, bitsandbytes", "fused": "the same after `fuse_peft`"}


def table(result: dict[str, Any]) -> Table:
    """A row for each way to train: losses of some steps, bytes kept for backward, the peak of a step."""
    losses, memory, machine = result["losses"], result["memory"], result["environment"]
    count = len(losses["PEFT"])
    shown = sorted({round(i * (count - 1) / (_STEPS - 1)) for i in range(_STEPS)})
    apart = max(abs(one - other) for one, other in zip(losses["PEFT"], losses["fused"], strict=True))
    caption = (
        f"A small Llama in NF4, {count} steps of Trainer from the same adapters on the same batches: losses, and MiB "
        f"beyond the model. Over all steps the losses differ by at most {apart:.1e}. "
        f"{machine['device']}, {machine['threads']} threads; torch {machine['versions']['torch']}; lora_kernels at "
        f"commit {machine['git']}."
    )
    header = ["layers", *(f"loss, step {step + 1}" for step in shown), "kept for backward", "peak of a step"]
    rows = [
        [name, *(f"{losses[way][step]:.4f}" for step in shown), *(f"{memory[way][of]:.1f}" for of in ("kept", "peak"))]
        for way, name in _WAYS.items()
    ]
    return Table(caption, header, rows, frozenset(), frozenset(), [])
