"""What tests ask of passes in common: how many there were, and what still waits. With it a CPU has them for any x."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_kernels import shared_input as module

module.FROM_ON_CPUS = 0


@contextmanager
def passes() -> Iterator[list[int]]:
    """How many branches each common pass had."""
    counted: list[int] = []
    run = module.run_branches

    def counting(x: Tensor, branches: Any, p: float) -> list[Tensor]:
        counted.append(len(branches))
        return run(x, branches, p)

    module.run_branches = counting
    try:
        yield counted
    finally:
        module.run_branches = run


def waiting(model: nn.Module) -> list[Any]:
    """What still waits for its layer's call."""
    return [held for holder in model.modules() for shared in module.shared_inputs(holder) for held in shared._pending]
