"""A whole Llama, or Qwen2, trained for some steps: tokens a second, memory and launches, beside PEFT's and frozen.

A step is forward, transformers' own loss over random tokens, backward, and AdamW over rank-16 adapters on all seven
projections, with dropout. One provider after the other is built over the same frozen weights, timed and freed: models
of this size have no room side by side, so rounds cannot be interleaved. The frozen model is timed again near the end,
to show how far the clock has drifted. The cells go by importance, each is told as soon as it is there, and none is
begun that the budget would not hold.

Before the clock each provider is compared with PEFT under the very dropout that is timed: the last hidden states, and
the gradients of the first and the last block's adapters. They may be as far from PEFT's as PEFT's are from its own
under another seed, and half as far again. What exactly each layer computes, ``lora-kernels verify`` and the tests say.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..console import Progress
from ..errors import InvalidArgumentError
from .device import DeviceLostError, first_line, must_live
from .llama_models import (
    ALPHA,
    DROPOUT,
    MODELS,
    PROVIDERS,
    Built,
    LlamaSizes,
    base_model,
    built,
    free,
    missing,
    needs_liger,
    unpatched,
)
from .llama_report import LARGE, published, reached
from .results import environment
from .steps import launched, measured_steps

__all__ = ["BUDGET", "run_llama"]

BUDGET = 150.0  # seconds
_SMALL, _LARGE = 0, 1  # of the two batches
_WORK = (  # by importance
    ("frozen", _SMALL),
    ("fused", _SMALL),
    ("peft", _SMALL),
    ("fused", _LARGE),
    ("peft", _LARGE),
    ("compiled", _SMALL),
    ("frozen", _LARGE),
    ("compiled", _LARGE),
    ("peft32", _SMALL),
    ("frozen", _SMALL),  # again
    ("fused-liger", _LARGE),
    ("peft-liger", _LARGE),
    ("fused-liger", _SMALL),
    ("peft-liger", _SMALL),
)
_CHECKED = 64  # tokens
_APART = 1.5


@dataclass
class _Run:
    """What the cells have in common; ``yardstick``: PEFT's step under two seeds, or a sentence on why there is none."""

    sizes: LlamaSizes
    device: str
    seed: int
    base: Any
    tokens: Tensor
    yardstick: list[dict[str, Tensor]] | str = "PEFT's own step was not run."


def run_llama(
    preset: str,
    device: str,
    date: str,
    budget: float = BUDGET,
    seed: int = 0,
    progress: Progress = lambda label, done, total: None,
    keep: Callable[[dict[str, Any]], None] = lambda document: None,
    model: str = "Llama-3-8B",
) -> dict[str, Any]:
    """Everything measured, as JSON knows it; ``keep`` is given it after each cell.

    Raises:
        InvalidArgumentError: the large model on a CPU; or ``model`` is none of ``MODELS``.
    """
    if model not in MODELS:
        raise InvalidArgumentError(f"--model {model} was given: it must be one of {', '.join(MODELS)}.")
    sizes, began = MODELS[model].sizes[preset], time.monotonic()
    if preset == LARGE and device != "cuda":
        raise InvalidArgumentError(
            f"--preset {LARGE} trains a model of 16 GB, and no GPU was given: run it on a machine with one, or run "
            "--preset llama-small, which any device can."
        )
    document: dict[str, Any] = {
        "preset": preset,
        "model": model,
        "date": date,
        "seed": seed,
        "budget": budget,
        "sizes": asdict(sizes),
    }
    document |= {"alpha": ALPHA, "dropout": DROPOUT, "published": published(model), "left_out": missing(), "cells": []}
    if document["left_out"]:
        return document
    document["environment"] = environment(device)
    run = _begun(sizes, device, seed)
    if isinstance(run, str):
        return {**document, "left_out": run}
    document["parameters"] = sum(p.numel() for p in run.base.parameters())
    document["compared"] = "with PEFT" if isinstance(run.yardstick, list) else f"not at all: {run.yardstick}"
    cells: list[dict[str, Any]] = document["cells"]
    lost = None
    for done, (name, size) in enumerate(_WORK):
        progress("llama", done, len(_WORK))
        left = budget - (time.monotonic() - began)
        reason = lost or needs_liger(name, device) or _no_time(name, left, budget)
        found = {"status": "left out", "reason": reason}
        if reason is None:
            found = _cell(run, name, sizes.batches[size])
            lost = found.get("lost")
        again = any(cell["provider"] == name and cell["batch"] == sizes.batches[size] for cell in cells)
        place = {"provider": name, "batch": sizes.batches[size], "tokens": sizes.tokens, "again": again}
        cells.append({**place, **found})
        document |= {"reached": reached(document), "seconds": time.monotonic() - began}
        keep(document)
    progress("llama", len(_WORK), len(_WORK))
    return document


def _begun(sizes: LlamaSizes, device: str, seed: int) -> _Run | str:
    """The base, its tokens and the yardstick; a sentence where the base alone has no room."""
    torch.manual_seed(seed)
    try:
        base = base_model(sizes, device, torch.bfloat16 if device == "cuda" else torch.float32)
        tokens = torch.randint(sizes.vocabulary, (max(sizes.batches), sizes.tokens), device=device)
    except torch.OutOfMemoryError as error:
        return f"The base model has no room on this device: {first_line(error)}"
    run = _Run(sizes, device, seed, base, tokens)
    try:
        run.yardstick = _pefts(run)
    except Exception as error:  # noqa: BLE001 (PEFT may have no room here, or be of a kind that fails)
        must_live(device, "PEFT", error)
        run.yardstick = f"PEFT's own step failed: {first_line(error)}"
    free(device)
    launched(lambda: tokens + 1, device, 1.0)  # or the profiler's start would fall between the first cells
    return run


def _pefts(run: _Run) -> list[dict[str, Tensor]]:
    entry = built("peft", run.base, run.seed)
    return [_observed(run, entry, 1, run.seed + i) for i in (1, 2)]


def _no_time(name: str, left: float, budget: float) -> str | None:
    needed = PROVIDERS[name].seconds
    if left >= needed:
        return None
    return f"No time: {max(left, 0.0):.0f} s of the budget of {budget:g} s were left, and it may need {needed:g} s."


def _cell(run: _Run, name: str, batch: int) -> dict[str, Any]:
    """One provider at one batch; whatever happens to it is told in its row."""
    began = time.monotonic()
    found: dict[str, Any]
    try:
        with unpatched():
            found = _measured(run, name, batch)
    except torch.OutOfMemoryError as error:
        found = {"status": "out of memory", "reason": first_line(error)}
    except Exception as error:  # noqa: BLE001 (a rival's or a compiler's error costs its own row alone)
        found = {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        try:
            must_live(run.device, PROVIDERS[name].title, error)
        except DeviceLostError as device_lost:
            found["lost"] = str(device_lost)
    if "lost" not in found:  # here the error is gone, and with it the frames that held the model
        free(run.device, compiled=name == "compiled")
    return {**found, "seconds": time.monotonic() - began}


def _measured(run: _Run, name: str, batch: int) -> dict[str, Any]:
    entry = built(name, run.base, run.seed)
    began = time.monotonic()
    observed = _observed(run, entry, batch, run.seed + 3)
    first_s = time.monotonic() - began
    distances, apart = _judged(run, name, batch, observed)
    told = {"note": entry.note, "loss": observed["loss"].item(), "first_step_s": first_s, "distances": distances}
    if apart:
        return {"status": "failed", "reason": apart, **told}
    tokens = run.tokens[:batch]
    numbers = measured_steps(lambda: entry.step(tokens), tokens.numel(), run.device)
    flops = 4.0 * sum(p.numel() for p in run.base.parameters())  # of a token: forward, and backward to x
    numbers["tflops"] = flops * numbers["tokens_per_second"] / 1e12
    return {"status": "timed", "reason": None, **told, "note": entry.note_of_calls(), "numbers": numbers}


def _observed(run: _Run, entry: Built, batch: int, seed: int) -> dict[str, Tensor]:
    """One forward and backward: the loss, the first sequence's last hidden states, gradients of the outer blocks."""
    kept: list[Tensor] = []
    handle = entry.llama.model.norm.register_forward_hook(
        lambda module, args, y: kept.append(y[0, -_CHECKED:].detach().float().cpu())
    )
    torch.manual_seed(seed)
    try:
        loss = entry.loss(run.tokens[:batch])
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        handle.remove()
    found = {"loss": loss.detach().float().cpu(), "hidden states": kept[0].flatten()}
    outer = (".layers.0.", f".layers.{run.sizes.layers - 1}.")
    for part in ("lora_A", "lora_B"):
        grads = [
            parameter.grad.detach().flatten().float().cpu()
            for name, parameter in sorted(entry.model.named_parameters())
            if parameter.grad is not None and part in name and any(block in name for block in outer)
        ]
        if grads:
            found[f"gradients of {part}"] = torch.cat(grads)
    entry.model.zero_grad(set_to_none=True)
    return found


def _judged(run: _Run, name: str, batch: int, observed: dict[str, Tensor]) -> tuple[dict[str, list[float]], str | None]:
    """How far each observation is from PEFT's, PEFT's own distance beside it; a sentence where that is too far.

    The gradients of another batch are others; the first sequence's hidden states are the same. The frozen model, and
    every one where PEFT has no room, is not compared.
    """
    loss = observed["loss"].item()
    if not abs(loss) < float("inf"):
        return {}, f"The loss is {loss}."
    if isinstance(run.yardstick, str) or name == "frozen":
        return {}, None
    first, second = run.yardstick
    names = [key for key in first if key != "loss" and (batch == 1 or key == "hidden states")]
    if absent := [key for key in names if key not in observed or observed[key].shape != first[key].shape]:
        return {}, f"It has no {', '.join(absent)}, or not as many as PEFT's."
    distances = {key: [_apart(observed[key], first[key]), _apart(second[key], first[key])] for key in names}
    for key, (ours, own) in distances.items():
        if not ours <= _APART * own:
            return distances, (
                f"It computes something else than PEFT: {key} are {ours:.3g} away from PEFT's, whose own are "
                f"{own:.3g} apart under two seeds."
            )
    return distances, None


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
