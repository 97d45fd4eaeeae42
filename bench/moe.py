"""A training step of one layer's experts, beside the frozen experts, PEFT and a loop over own linear layers.

``python bench/moe.py`` measures Qwen3-MoE's shape on a CPU, made small enough to run (E = 32, H = 1024, I = 768, top-8,
M = 2048 tokens, r = 16), and writes ``bench/results/moe-cpu.json``. ``--layer qwen3-30b`` is Qwen3-30B-A3B's (E = 128,
H = 2048, M = 8192), which ``make gpu-bench`` runs in bf16; ``--layer mixtral-8x7b`` is Mixtral's (E = 8, H = 4096,
I = 14336, top-2, M = 4096). ``--small`` is for tests. All providers are compared with float64 before they are timed.
They run in turn on the same data, and the ratio to the frozen experts is the result.

*frozen*: the experts module without adapters, by transformers' ``grouped_mm``. *peft*: ``ParamWrapper``. *loop*: a
``FusedLoRALinear`` for each expert and projection. *added*, measured once: the low-rank term added to ``grouped_mm``'s
product. *Peak* is what a step holds at most beyond what was held before.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora_kernels import FusedLoRALinear, LoRAConfig, replace_linear  # noqa: E402  (after the path)
from lora_kernels.accuracy import judge  # noqa: E402
from lora_kernels.benchmark.block import missing  # noqa: E402
from lora_kernels.benchmark.memory import peak_of  # noqa: E402
from lora_kernels.benchmark.report import Table  # noqa: E402
from lora_kernels.benchmark.results import environment  # noqa: E402
from lora_kernels.benchmark.timing import Candidate  # noqa: E402
from lora_kernels.benchmark.timing import measure as timed  # noqa: E402
from lora_kernels.experts.peft_form import to_peft  # noqa: E402

RESULT = ROOT / "bench" / "results" / "moe-cpu.json"
TARGETS = ["gate_up_proj", "down_proj"]
PROVIDERS = ("frozen", "ours", "loop", "peft")
# What runs in one clock, the floor first. On a GPU the loop comes last and by itself: it may take longer than there is.
GROUPS: dict[str, list[tuple[str, ...]]] = {
    "cpu": [PROVIDERS],
    "qwen3-30b": [("frozen", "ours", "peft"), ("frozen", "loop")],
    "mixtral-8x7b": [("frozen", "ours", "peft"), ("frozen", "loop")],
}
NAMES = {
    "frozen": "frozen experts",
    "ours": "lora_kernels",
    "added": "lora_kernels, added to grouped_mm",
    "loop": "loop over FusedLoRALinear",
    "peft": "PEFT",
}


@dataclass(frozen=True)
class Sizes:
    """E experts H -> 2 I and I -> H, k of them for each of M tokens, and the rank."""

    experts: int = 32
    hidden: int = 1024
    intermediate: int = 768
    k: int = 8
    tokens: int = 2048
    r: int = 16


SMALL = Sizes(4, 32, 24, 2, 40, 4)
LAYERS = {
    "cpu": Sizes(),
    "qwen3-30b": Sizes(128, 2048, 768, 8, 8192, 16),
    "mixtral-8x7b": Sizes(8, 4096, 14336, 2, 4096, 16),
}


class Holder(nn.Module):
    """A model of nothing but the experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: Tensor) -> Tensor:
        y: Tensor = self.experts(*inputs)
        return y


class Loop(nn.Module):
    """The experts one after the other, each projection a ``FusedLoRALinear``."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.act_fn, self.up, self.down = ours.act_fn, nn.ModuleList(), nn.ModuleList()
        for name, layers in zip(TARGETS, (self.up, self.down), strict=True):
            for e, weight in enumerate(getattr(ours, name)):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
                linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
                of = ours.options[name]
                layer = FusedLoRALinear.from_linear(linear, r=of.r, lora_alpha=of.lora_alpha)
                layer.lora_A.data.copy_(ours.lora_A[name][e])
                layer.lora_B.data.copy_(ours.lora_B[name][e])
                layers.append(layer)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, slot = torch.where(index == e)
            gate, value = up(x[token]).chunk(2, dim=-1)
            y = y.index_add(0, token, down(self.act_fn(gate) * value) * weights[token, slot, None])
        return y


def models(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> dict[str, nn.Module]:
    """Each provider's model, with the same weights and adapters."""
    transformers = __import__("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        num_experts=sizes.experts, hidden_size=sizes.hidden, moe_intermediate_size=sizes.intermediate
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        frozen = Holder(Qwen3MoeExperts(config)).to(dtype).requires_grad_(False)
    for parameter in frozen.parameters():
        nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5)
    ours = copy.deepcopy(frozen)
    replace_linear(ours, LoRAConfig(r=sizes.r, lora_alpha=sizes.r, target_parameters=TARGETS))
    layer: Any = ours.experts
    for name in TARGETS:
        nn.init.normal_(layer.lora_B[name], std=sizes.r**-0.5)
    peft = _by_peft(frozen, layer, sizes.r)
    return {"frozen": frozen, "ours": ours, "loop": Loop(layer), "peft": peft}


def _by_peft(frozen: nn.Module, layer: Any, r: int) -> nn.Module:
    peft = __import__("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=[], target_parameters=TARGETS)
        model: nn.Module = peft.get_peft_model(copy.deepcopy(frozen), config)
    for wrapper in (each for each in model.modules() if hasattr(each, "parameter_name")):
        a, b = to_peft(layer.lora_A[wrapper.parameter_name].detach(), layer.lora_B[wrapper.parameter_name].detach())
        held: Any = wrapper
        held.lora_A["default"].weight.data.copy_(a)
        held.lora_B["default"].weight.data.copy_(b)
    return model


def inputs(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, their experts at random, the experts' weights, and dy."""
    torch.manual_seed(1)
    x = torch.randn(sizes.tokens, sizes.hidden).to(device, dtype).requires_grad_()
    index = torch.rand(sizes.tokens, sizes.experts).topk(sizes.k).indices.to(device)
    weights, dy = torch.rand(sizes.tokens, sizes.k), torch.randn(sizes.tokens, sizes.hidden)
    return x, index, weights.to(device, dtype), dy.to(device, dtype)


def check(made: dict[str, nn.Module], given: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises unless ours and the loop give what float64 gives, PEFT's error being the yardstick."""
    x, index, weights, _ = (tensor.detach() for tensor in given)
    with torch.no_grad():
        exact = copy.deepcopy(made["loop"]).double()(x.double(), index, weights.double())
        yardstick = made["peft"](x, index, weights)
        for name in ("ours", "loop"):
            verdict = judge(name, made[name](x, index, weights), exact, yardstick, dtype, depth=2)
            if not verdict.passed:
                raise SystemExit(f"{name} is not timed, because it is wrong: {verdict}")


def measure(
    made: dict[str, nn.Module], given: Sequence[Tensor], names: Sequence[str], rounds: int, device: str
) -> list[dict[str, Any]]:
    """A row for each provider: seconds of a step, its ratio to the frozen experts of the same round, bytes."""
    x, index, weights, dy = given

    def step(name: str) -> Callable[[int], None]:
        model = made[name]

        def run(turn: int) -> None:
            x.grad = None
            model.zero_grad(set_to_none=True)
            model(x, index, weights).backward(dy)

        return run

    candidates = [Candidate(name, step(name)) for name in names]
    timings = timed(candidates, "frozen", 0.0, rounds, device)
    rows = []
    for each in candidates:
        found = timings[each.name]
        peak = peak_of(lambda run=each.run: run(0), device)  # type: ignore[misc]
        rows.append({"provider": each.name, "dtype": str(x.dtype).removeprefix("torch."), "seconds": found.median})
        rows[-1] |= {"ratio": found.ratio, "p20": found.ratio_p20, "p80": found.ratio_p80, "peak_bytes": peak}
    return rows


def table(result: dict[str, Any]) -> Table:
    """A row for each provider and dtype, and whether the goals were reached."""
    sizes, machine = Sizes(**result["sizes"]), result["environment"]
    versions = machine["versions"]
    where = machine["device"] + ("" if machine["device_type"] == "cuda" else f", {machine['threads']} threads")
    caption = (
        f"A training step of one layer of {sizes.experts} experts, {sizes.hidden} → 2 x {sizes.intermediate} → "
        f"{sizes.hidden}, {sizes.k} for each of {sizes.tokens} tokens, r = {sizes.r}. Ratio: time over the frozen "
        f"experts' of the same round, median (20th to 80th percentile). {where}; torch {versions['torch']}, peft "
        f"{versions['peft']}; lora_kernels at commit {machine['git']}. {result.get('context', '')}"
    ).strip()
    rows = [
        [
            row["dtype"],
            NAMES[row["provider"]],
            _milliseconds(row["seconds"]),
            f"{row['ratio']:.2f} ({row['p20']:.2f}-{row['p80']:.2f})",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in result["rows"]
    ]
    notes = [_verdict(dtype, result["rows"]) for dtype in dict.fromkeys(row["dtype"] for row in result["rows"])]
    return Table(caption, ["dtype", "who", "ms", "ratio", "peak, MiB"], rows, frozenset(), frozenset(), notes)


def _milliseconds(seconds: float) -> str:
    """Three digits, or all of the integer."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:#.3g}"


def _verdict(dtype: str, rows: Sequence[dict[str, Any]]) -> str:
    """What the goals were, and what came of each."""
    of = {row["provider"]: row for row in rows if row["dtype"] == dtype}
    ours, peft, loop = of["ours"], of["peft"], of.get("loop")
    goals = {
        f"{ours['ratio']:.2f} of the frozen experts' time (at most 1.12)": ours["ratio"] <= 1.12,
        f"PEFT takes {peft['ratio'] / ours['ratio']:.2f} times as long (at least 1.4)": peft["ratio"]
        >= 1.4 * ours["ratio"],
    }
    if loop is not None:
        goals[f"{ours['ratio'] / loop['ratio']:.2f} of the loop's time (at most 1)"] = ours["ratio"] <= loop["ratio"]
    share = ours["peak_bytes"] / peft["peak_bytes"]
    goals[f"{share:.2f} of PEFT's peak (at most 0.5)"] = share <= 0.5
    told = "; ".join(f"{words}: {'reached' if reached else '**missed**'}" for words, reached in goals.items())
    return f"{dtype}: {told}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write the file, anew after each group of providers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layer", choices=LAYERS, default="cpu", help="whose sizes (default: cpu)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--context", default="", help="a sentence about the run, for the table")
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write")
    given = parser.parse_args(arguments)
    sizes, absent = SMALL if given.small else LAYERS[given.layer], missing()
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"layer": given.layer, "sizes": asdict(sizes), "context": given.context}
    result |= {"left_out": absent, "rows": rows, "environment": environment(given.device)}
    given.json.write_text(json.dumps(result, indent=1))
    for dtype in [] if absent else [getattr(torch, name) for name in given.dtypes]:
        made, data = models(sizes, dtype, given.device), inputs(sizes, dtype, given.device)
        check(made, data, dtype)
        for names in GROUPS[given.layer]:
            found = measure(made, data, names, given.rounds, given.device)
            known = {(row["dtype"], row["provider"]) for row in rows}
            fresh = [row for row in found if (row["dtype"], row["provider"]) not in known]
            rows += fresh
            given.json.write_text(json.dumps(result, indent=1))
            print("\n".join(map(_line, fresh)), flush=True)
    return 0


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['dtype']:9} {row['provider']:7} {row['seconds'] * 1e3:9.1f} ms  {row['ratio']:6.2f} of frozen "
        f"({row['p20']:.2f}-{row['p80']:.2f})  peak {row['peak_bytes'] / 2**20:8.1f} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
