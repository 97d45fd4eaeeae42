"""A decoder block of transformers, trained for a step: tokens a second and memory, ours beside PEFT's.

One block of Llama's kind with random weights and rank-16 adapters on its seven projections, x and dy random. The floor
is the same block without adapters: forward, and backward to x. Every provider has a copy of the weights, and the same
adapters, whose B is not zero. Before the clock, y of the first tokens is compared with float64 (attention is causal, so
they depend on no later one), ours by the policy of ``accuracy`` with PEFT's as the yardstick.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import accuracy
from ..config import LoRAConfig
from ..console import Progress, count_of
from ..errors import InvalidArgumentError
from ..models.model import replace_linear
from .memory import peak_of, storages_kept
from .report import Table, software
from .results import environment
from .timing import Candidate, Timing, measure

__all__ = [
    "BLOCK",
    "DROPOUTS",
    "KEPT",
    "TARGETS",
    "BlockSizes",
    "block_bytes",
    "missing",
    "run_block",
    "sizes_of",
    "table",
    "told",
]

BLOCK = "gpu-block"
DROPOUTS = (0.0, 0.05)
SPEED, KEPT = "tokens a second over PEFT's", "bytes kept over PEFT's"
TARGETS = {SPEED: 1.25, KEPT: 0.70}  # at least, at most
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CHECKED = 64  # tokens
_R = 16


@dataclass(frozen=True)
class BlockSizes:
    """Llama-3-8B's block by default; ``tokens``: the sequence lengths, of one sequence each."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    tokens: tuple[int, ...] = (2048, 4096)


@dataclass
class _Entry:
    """One provider: its model, and what a gradient is taken of beside x."""

    model: nn.Module
    trainable: list[Tensor]

    def step(self, x: Tensor, dy: Tensor) -> Any:
        y = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return torch.autograd.grad(y, [x, *self.trainable], dy)


def sizes_of(text: str | None) -> BlockSizes:
    """Of ``hidden=64,inner=96,heads=4,key_heads=2,tokens=16/32``; what is not named is Llama-3-8B's.

    Raises:
        InvalidArgumentError: another name, or no positive integer.
    """
    named = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        numbers = tuple(map(count_of, value.split("/")))
        known = name in {f.name for f in fields(BlockSizes)}
        if not known or not all(numbers) or (len(numbers) > 1 and name != "tokens"):
            raise InvalidArgumentError(
                f"--block {part} was given: it must be positive integers below 2^31 for hidden, inner, heads, "
                "key_heads, and for tokens one or several, such as hidden=64,inner=96,heads=4,key_heads=2,tokens=16/32."
            )
        named[name] = numbers if name == "tokens" else numbers[0]
    sizes = BlockSizes(**named)  # type: ignore[arg-type]
    if sizes.hidden % (2 * sizes.heads) or sizes.heads % sizes.key_heads:
        raise InvalidArgumentError(
            f"{sizes}: hidden must be a multiple of 2 heads, and heads of key_heads, as in every Llama."
        )
    return sizes


def missing() -> str | None:
    """A sentence that says what is not installed, or None."""
    absent = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    return (
        f"{' and '.join(absent)} is not installed: pip install 'lora-kernels[bench]' transformers." if absent else None
    )


def run_block(
    sizes: BlockSizes,
    device: str,
    date: str,
    budget: float,
    seed: int = 0,
    progress: Progress = lambda label, done, total: None,
) -> dict[str, Any]:
    """Everything measured, as JSON knows it; where a package is missing, the sentence under ``left_out`` alone."""
    head = {"preset": BLOCK, "date": date, "seed": seed, "sizes": asdict(sizes), "targets": TARGETS}
    if (absent := missing()) is not None:
        return {**head, "left_out": absent, "cells": []}
    cells = []
    places = [(tokens, p) for tokens in sizes.tokens for p in DROPOUTS]
    for done, (tokens, p) in enumerate(places):
        progress("block", done, len(places))
        cells.append(_cell(sizes, tokens, p, device, budget / len(places), seed))
    progress("block", len(places), len(places))
    return {**head, "environment": environment(device), "left_out": None, "cells": cells}


def _cell(sizes: BlockSizes, tokens: int, p: float, device: str, budget: float, seed: int) -> dict[str, Any]:
    entries, x, dy = _made(sizes, tokens, p, device, torch.bfloat16 if device == "cuda" else torch.float32, seed)
    verdict = _judged(entries, x)
    if not verdict.passed:
        return {"tokens": tokens, "p": p, "failed": str(verdict)}

    def candidate(name: str) -> Candidate:
        return Candidate(name, lambda i: entries[name].step(x, dy))

    timings = measure([candidate(name) for name in entries], "linear", budget, 5, device)
    found = {name: {**_numbers(timings[name], tokens), **_bytes(entry, x, dy)} for name, entry in entries.items()}
    ours, theirs = found["auto"], found["peft"]
    reached = {
        SPEED: ours["tokens_per_second"] / theirs["tokens_per_second"],
        KEPT: ours["bytes_kept"] / theirs["bytes_kept"],
    }
    return {"tokens": tokens, "p": p, "failed": None, "error": verdict.error, "providers": found, "reached": reached}


def block_bytes(
    sizes: BlockSizes, tokens: int, p: float, device: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, dict[str, int]]:
    """``bytes_kept`` and ``bytes_peak`` of PEFT's block ("peft") and of ours ("auto"), without a clock."""
    entries, x, dy = _made(sizes, tokens, p, device, dtype, seed)
    return {name: _bytes(entries[name], x, dy) for name in ("peft", "auto")}


def _made(
    sizes: BlockSizes, tokens: int, p: float, device: str, dtype: torch.dtype, seed: int
) -> tuple[dict[str, _Entry], Tensor, Tensor]:
    """The providers, x and dy."""
    torch.manual_seed(seed)
    plain = _plain(sizes, device, dtype, tokens)
    entries = {"linear": _Entry(plain, []), "peft": _peft(plain, p), "auto": _ours(plain, p)}
    _same_adapters(entries["peft"].model, entries["auto"].model)
    x = torch.randn(1, tokens, sizes.hidden, device=device).to(dtype).requires_grad_()
    return entries, x, torch.randn_like(x)


def _bytes(entry: _Entry, x: Tensor, dy: Tensor) -> dict[str, int]:
    """What forward keeps for backward, and the most that both hold at once, their gradients included."""
    return {"bytes_kept": _kept(entry, x), "bytes_peak": peak_of(lambda: entry.step(x, dy), x.device.type)}


def _plain(sizes: BlockSizes, device: str, dtype: torch.dtype, tokens: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,  # of embeddings that nothing reads
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        num_hidden_layers=1,
        max_position_embeddings=tokens,
    )
    with torch.device(device):
        model: nn.Module = LlamaModel(config).to(dtype)
    return model.train().requires_grad_(False)


def _peft(plain: nn.Module, p: float) -> _Entry:
    import peft

    config = peft.LoraConfig(r=_R, lora_alpha=2 * _R, lora_dropout=p, target_modules=_PROJECTIONS)
    model = peft.get_peft_model(copy.deepcopy(plain), config).get_base_model()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # PEFT's default over a base that was loaded in 16 bits
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return _Entry(model.train(), [t for t in model.parameters() if t.requires_grad])


def _ours(plain: nn.Module, p: float) -> _Entry:
    model = copy.deepcopy(plain)
    replace_linear(model, LoRAConfig(r=_R, lora_alpha=2 * _R, lora_dropout=p, target_modules=_PROJECTIONS))
    return _Entry(model.train(), [t for name, t in model.named_parameters() if "lora_" in name])


@torch.no_grad()
def _same_adapters(theirs: nn.Module, ours: nn.Module) -> None:
    """PEFT's values for ours."""
    modules = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if name.endswith(tuple(_PROJECTIONS)):
            module.lora_A.copy_(modules[name].lora_A["default"].weight)
            module.lora_B.copy_(modules[name].lora_B["default"].weight)


@torch.no_grad()
def _judged(entries: dict[str, _Entry], x: Tensor) -> accuracy.Accuracy:
    """y of the first tokens, without dropout."""
    first = x.detach()[:, :_CHECKED]

    def y(model: nn.Module, given: Tensor) -> Tensor:
        found: Tensor = model.eval()(inputs_embeds=given, use_cache=False).last_hidden_state[0]
        return found

    exact = y(copy.deepcopy(entries["peft"].model).double(), first.double())
    ours, theirs = (y(entries[name].model, first) for name in ("auto", "peft"))
    for entry in entries.values():
        entry.model.train()
    return accuracy.judge("y", ours, exact, theirs, x.dtype)


def _kept(entry: _Entry, x: Tensor) -> int:
    """Bytes of the storages that forward keeps for backward, each once, without x's and the parameters'."""
    saved = storages_kept(lambda: entry.model(inputs_embeds=x, use_cache=False).last_hidden_state)
    owned = {t.untyped_storage().data_ptr() for t in (x, *entry.model.parameters(), *entry.model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in owned)


def _numbers(timing: Timing, tokens: int) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens / timing.median,
        "ms": 1e3 * timing.median,
        "ratio": timing.ratio,
        "ratio_p20": timing.ratio_p20,
        "ratio_p80": timing.ratio_p80,
        "rounds": timing.rounds,
        "clock": timing.clock,
    }


def told(document: dict[str, Any]) -> Sequence[str]:
    """A line for each cell and target."""
    if document["left_out"]:
        return [f"The block was not run: {document['left_out']}"]
    lines = []
    for cell in document["cells"]:
        place = f"{cell['tokens']} tokens, p = {cell['p']:g}"
        if cell["failed"]:
            lines.append(f"{place}: it computes something else: {cell['failed']}")
            continue
        for name, title in (("linear", "frozen block"), ("peft", "PEFT"), ("auto", "lora_kernels")):
            n = cell["providers"][name]
            kept, peak = (f"{n[name] / 2**20:.1f} MiB" for name in ("bytes_kept", "bytes_peak"))
            lines.append(
                f"{place}: {title}: {n['tokens_per_second']:.0f} tokens/s, {_with_spread(n)}, "
                f"{kept} kept, at most {peak}"
            )
        speed, kept_ratio = (cell["reached"][name] for name in TARGETS)
        least, most = TARGETS.values()
        lines.append(f"{place}: {'ok  ' if speed >= least else 'MISS'} {SPEED} {speed:.3f} (>= {least})")
        lines.append(f"{place}: {'ok  ' if kept_ratio <= most else 'MISS'} {KEPT} {kept_ratio:.3f} (<= {most})")
    return lines


def _with_spread(numbers: dict[str, Any]) -> str:
    """The ratio, with half the range of the rounds from the 20th to the 80th percentile."""
    return f"{numbers['ratio']:.3f} ±{(numbers['ratio_p80'] - numbers['ratio_p20']) / 2:.3f}"


def table(document: dict[str, Any]) -> Table:
    """For a page: a row for each length and dropout, with what was aimed at and is missed."""
    titles = {"peft": "PEFT", "auto": "lora_kernels"}
    header = ["tokens", "dropout", "frozen block, tokens/s", *(f"{title}, tokens/s" for title in titles.values())]
    header += [f"ratio, {title}" for title in titles.values()] + ["tokens/s over PEFT's", "bytes kept over PEFT's"]
    rows, missed = [], 0
    cells = [cell for cell in document["cells"] if not cell["failed"]]
    least, most = (document["targets"][name] for name in TARGETS)
    for cell in cells:
        providers = cell["providers"]
        speed, kept = (cell["reached"][name] for name in TARGETS)
        missed += speed < least or kept > most
        told = [f"{providers[name]['tokens_per_second']:.0f}" for name in ("linear", *titles)]
        told += [_with_spread(providers[name]) for name in titles]
        rows.append([str(cell["tokens"]), f"{cell['p']:g}", *told, f"{speed:.2f}", f"{kept:.2f}"])
    sizes = BlockSizes(**document["sizes"])
    caption = (
        f"A training step of one decoder block (hidden {sizes.hidden}, inner {sizes.inner}, {sizes.heads} heads, "
        f"{sizes.key_heads} of keys; adapters of rank {_R} on its seven projections). Ratio: time over the frozen "
        f"block's of the same round, median, ± half the range of the rounds from the 20th to the 80th percentile. "
        f"{document['environment']['device']}; {software(document['environment'], document['date'])}."
    )
    aim = f"Aimed at: at least {least:g} and at most {most:g} in the last two columns"
    return Table(caption, header, rows, frozenset(), frozenset(), [f"{aim}; {missed} of {len(rows)} rows miss."])
