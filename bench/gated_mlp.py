"""A gated MLP in one pass, beside its three layers one by one and beside PEFT's: time and memory of a step on a CPU.

``python bench/gated_mlp.py --json bench/results/MACHINE/gated-mlp.json`` measures forward and backward of Llama's kind
of MLP with adapters on its three layers; ``--small`` is for tests. Gradients are compared before anything is timed. A
call of PEFT's that takes above five seconds is left out. *Kept* is what forward hands to autograd beyond x and the
parameters, and *peak* the most that a step holds at once beyond what was there before it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.codes import timed  # noqa: E402  (after the path)
from lora_kernels import LoRAConfig, mark_only_lora_as_trainable, replace_linear, unshare_inputs  # noqa: E402
from lora_kernels.benchmark.memory import peak_of, storages_kept  # noqa: E402
from lora_kernels.benchmark.report import Table  # noqa: E402
from lora_kernels.benchmark.results import environment  # noqa: E402

__all__ = ["main", "table"]

HIDDEN, INNER, TOKENS, RANK = 1024, 2816, 512, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DROPOUTS = (0.0, 0.1)
FLOOR, PEFT = "three layers", "PEFT"
WAYS = (FLOOR, "one pass", "one pass, recomputed", PEFT)
LONG = 5.0  # seconds of a call


class MLP(nn.Module):
    """Llama's."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False, dtype=dtype) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(inner, hidden, bias=False, dtype=dtype), nn.SiLU()

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def modules(hidden: int, inner: int, dtype: torch.dtype, p: float) -> dict[str, Any]:
    """By each of ``WAYS``, with the same weights and adapters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = MLP(hidden, inner, dtype).requires_grad_(False)
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": p, "init_lora_weights": False}
    names = ["gate_proj", "up_proj", "down_proj"]
    one = copy.deepcopy(base)
    replace_linear(one, LoRAConfig(target_modules=names, **settings))
    mark_only_lora_as_trainable(one)
    apart, again = copy.deepcopy(one), copy.deepcopy(one)
    unshare_inputs(apart)
    again.recompute = True  # type: ignore[assignment]
    peft: Any = get_peft_model(base, LoraConfig(target_modules=names, **settings)).base_model.model
    with torch.no_grad():
        for name in names:
            theirs, ours = getattr(peft, name), getattr(one, name)
            theirs.lora_A.default.weight.copy_(ours.lora_A)
            theirs.lora_B.default.weight.copy_(ours.lora_B)
    return {name: module.train() for name, module in zip(WAYS, (apart, one, again, peft), strict=True)}


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> Any:
    """The gradient of x; those of the adapters are added to what they hold, as in training."""
    x.grad = None
    module(x).backward(dy)
    found: Any = x.grad
    return found


def _kept(module: nn.Module, x: Tensor) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    kept = storages_kept(lambda: module(x))
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def of_setting(sizes: tuple[int, int, int], dtype: torch.dtype, p: float, seconds: float) -> dict[str, Any]:
    """A row: for each way seconds (None: a call takes too long), bytes kept, and the peak."""
    hidden, inner, tokens = sizes
    made = modules(hidden, inner, dtype, p)
    x, dy = torch.randn(1, tokens, hidden).to(dtype).requires_grad_(), torch.randn(1, tokens, hidden).to(dtype)
    gradients, slow = {}, set()
    for name, module in made.items():
        torch.manual_seed(1)
        started = time.perf_counter()
        gradients[name] = _step(module, x, dy).float()
        if name == PEFT and time.perf_counter() - started > LONG:
            slow.add(name)
    for name, found in gradients.items():
        alike = p == 0.0 or name != PEFT  # PEFT draws other masks
        if alike and not (found - gradients[FLOOR]).abs().max() <= 2.0**-6 * gradients[FLOOR].abs().max():
            raise SystemExit(f"the step in {dtype} is not timed: the gradient by {name} is another.")
    runs: dict[str, Callable[[], Any]] = {
        name: partial(_step, module, x, dy) for name, module in made.items() if name not in slow
    }
    timings = timed(runs, seconds)
    found_of = {
        name: {
            "seconds": timings[name].median if name in timings else None,
            "ratio": timings[name].ratio if name in timings else None,
            "kept": _kept(module, x),
            "peak": peak_of(partial(_step, module, x, dy), "cpu"),
        }
        for name, module in made.items()
    }
    return {"dtype": str(dtype).removeprefix("torch."), "p": p, "ways": found_of}


def table(result: dict[str, Any]) -> Table:
    """A row for each dtype, dropout and way."""
    machine = result["environment"]
    hidden, inner, tokens = result["sizes"]
    caption = (
        f"A training step of a gated MLP {hidden} → 2 x {inner} → {hidden}, SwiGLU, {tokens} tokens, fp32 adapters of "
        f"rank {RANK} on its three layers, on a CPU. Ratio: time over that of our three layers one by one, of the same "
        f"round, median. {machine['device']}, {machine['threads']} threads; torch {machine['versions']['torch']}, PEFT "
        f"{machine['versions']['peft']}; lora_kernels at commit {machine['git']}."
    )
    rows = []
    for row in result["rows"]:
        for name, found in row["ways"].items():
            times = [f"one call takes above {LONG:.0f} s", "–"]
            if found["seconds"] is not None:
                times = [f"{found['seconds'] * 1e3:.3g}", f"{found['ratio']:.2f}"]
            rows.append([row["dtype"], f"{row['p']:g}", name, *times, *(f"{found[w] / 1e6:.1f}" for w in _MEMORY)])
    header = ["dtype", "dropout", "who", "ms", "ratio", "kept, MB", "peak, MB"]
    return Table(caption, header, rows, frozenset(), frozenset(), [])


_MEMORY = ("kept", "peak")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each setting, print its row, and write the file anew after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each setting (default: 20)")
    parser.add_argument("--json", type=Path, required=True, help="where to write")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    sizes = (64, 96, 16) if given.small else (HIDDEN, INNER, TOKENS)
    result = {"sizes": sizes, "rows": rows, "environment": environment("cpu")}
    for dtype in DTYPES.values():
        for p in DROPOUTS:
            rows.append(of_setting(sizes, dtype, p, given.seconds))
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(rows[-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
