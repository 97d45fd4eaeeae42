"""A step of three layers of one x on a CPU: in one pass, beside the layers one by one.

    python bench/shared_inputs.py [--seconds S] [--json FILE]

The layers are K -> K, K / 4 and K / 4, as q, k and v are, in fp32 with rank 16; one thread. Ratio: time of the one pass
over that of the layers one by one in the same round, median. ``shared_input.FROM_ON_CPUS`` was chosen by it.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.codes import timed  # noqa: E402  (after the path)
from lora_kernels import FusedLoRALinear, shared_input  # noqa: E402
from lora_kernels.benchmark.results import environment  # noqa: E402

WIDTHS, TOKENS = (64, 256, 512, 1024, 2048), (32, 64, 128, 256, 512, 1024)
MOST = 2e9  # multiplications by the first W: beyond, a cell takes too long


def layers(k: int) -> nn.ModuleList:
    return nn.ModuleList([FusedLoRALinear(k, n, r=16, bias=False) for n in (k, k // 4, k // 4)])


def step(model: nn.ModuleList, x: Tensor, dys: list[Tensor]) -> None:
    due = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    torch.autograd.grad([layer(x) for layer in model], due, dys)


def cell(k: int, tokens: int, seconds: float) -> dict[str, float]:
    apart, together = layers(k), layers(k)
    shared_input.SharedInput(list(together))  # the members hold it
    x, dys = torch.randn(tokens, k, requires_grad=True), [torch.randn(tokens, n) for n in (k, k // 4, k // 4)]
    found = timed({name: partial(step, of, x, dys) for name, of in (("apart", apart), ("together", together))}, seconds)
    apart_us, together_us = (round(found[name].median * 1e6, 1) for name in ("apart", "together"))
    one = {"k": k, "tokens": tokens, "numbers_of_x": tokens * k, "apart_us": apart_us, "together_us": together_us}
    return one | {"ratio": round(found["together"].ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each cell (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shared_input.FROM_ON_CPUS = 0
    cells = []
    for k in WIDTHS:
        for tokens in (of for of in TOKENS if of * k * k <= MOST):
            cells.append(cell(k, tokens, options.seconds))
            print(cells[-1], flush=True)
    if options.json is not None:
        whole = {"what": __doc__, "date": date.today().isoformat(), "environment": environment("cpu"), "cells": cells}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
