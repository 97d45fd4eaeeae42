"""Correctness before each timing: a provider that computes something else is reported, not timed.

This package's backends are held to its own policy (``lora_kernels.accuracy``), with the very dropout mask that they
draw. Rivals are checked with dropout off, and only to compute the same function: below the policy's ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import accuracy, dispatch, reference
from ..ops import operators
from ..rounding import Arithmetic
from . import model_gate
from .models import ModelSetup
from .providers import FLOOR, Layer, Provider, Setup

__all__ = ["Verdict", "check"]

_ROWS = 64
_SEED = 1234


@dataclass(frozen=True)
class Verdict:
    """``failure``: a sentence, or None. ``errors``: relative Frobenius error of each output against float64."""

    failure: str | None
    errors: dict[str, float]


def check(provider: Provider, layer: Layer, setup: Setup) -> Verdict:
    """Runs the layer once, forward and, where the cell has one, backward, and judges every output.

    y and dx are compared on up to 64 rows, first and last among them: float64 products of all would outlast the
    benchmark. da and db are compared whole.
    """
    if provider.name == FLOOR or provider.frozen:
        return Verdict(None, {})
    if isinstance(setup, ModelSetup):
        return _verdict(provider, setup, model_gate.judge(layer, setup, _tf32(setup)))
    p = setup.workload.p if provider.ours else 0.0
    mask = _mask(provider, setup) if p else None
    actual = _run(layer, setup, dropout=p > 0)
    tf32 = _tf32(setup)
    exact, yardstick = (
        _expected(partial(torch.Tensor.to, dtype=d), setup, mask, p) for d in (torch.float64, setup.dtype)
    )
    errors: dict[str, Tensor] = {}
    if setup.workload.tokens <= _ROWS:  # of more, no yardstick is lucky
        carried = _expected(Arithmetic(setup.dtype, tf32).of, setup, mask, p)
        errors = {name: noisy.error for name, noisy in carried.items()}
    judged = [
        accuracy.judge(name, value, exact[name], yardstick[name], setup.dtype, tf32, expected=errors.get(name))
        for name, value in actual.items()
    ]
    return _verdict(provider, setup, judged)


def _tf32(setup: Setup) -> bool:
    return setup.device.type == "cuda" and setup.dtype == torch.float32 and accuracy.tf32_allowed()


def _verdict(provider: Provider, setup: Setup, judged: list[accuracy.Accuracy]) -> Verdict:
    ceiling = accuracy.ceiling_of(setup.dtype, _tf32(setup), setup.depth)
    failures = [
        str(one) for one in judged if not (one.passed if provider.ours else one.finite and one.error <= ceiling)
    ]
    errors = {one.name: one.error for one in judged}
    return Verdict("It computes something else: " + " ".join(failures) if failures else None, errors)


def _run(layer: Layer, setup: Setup, dropout: bool) -> dict[str, Tensor]:
    rows = _rows(setup)
    x, dy = setup.x, setup.dy
    if layer.module is not None:  # where there is no dropout its mode is left alone: a compiler knows two of them
        layer.module.train(dropout or setup.workload.p == 0)
    try:
        with layer.context():
            torch.manual_seed(_SEED)
            if not setup.workload.has_backward:
                with torch.no_grad():
                    return {"y": layer.call(x)[rows]}
            y = layer.call(x)
            dx, *adapters = torch.autograd.grad(y, [x, *layer.trainable], dy)
    finally:
        if layer.module is not None:
            layer.module.train()
    return {"y": y.detach()[rows], "dx": dx[rows], **dict(zip(("da", "db", "dbias"), adapters, strict=False))}


def _mask(provider: Provider, setup: Setup) -> Tensor:
    """The mask that the provider is going to draw: the same draw of its state, from the same seed."""
    x, p = setup.x.detach(), setup.workload.p
    name = dispatch.select(x.device.type, x.dtype, provider.backend)
    torch.manual_seed(_SEED)
    return operators(name).mask(dispatch.backend(name).dropout_state(x, p), x.shape[0], x.shape[1], p)


def _expected(number: Callable[[Tensor], Any], setup: Setup, mask: Tensor | None, p: float) -> dict[str, Any]:
    """The reference's outputs on what ``number`` makes of tensors: y and dx of the chosen rows, da and db of all."""
    rows = _rows(setup)
    x, dy, lora_a, lora_b = (number(t.detach()) for t in (setup.x, setup.dy, setup.lora_a, setup.lora_b))
    weight, s = number(setup.linear.weight.detach()), setup.scaling
    bias = None if setup.linear.bias is None else number(setup.linear.bias.detach())
    row_mask = None if mask is None else mask[rows]
    y, _ = reference.forward(x[rows], weight, lora_a, lora_b, bias, s, row_mask, p)
    if not setup.workload.has_backward:
        return {"y": y}
    dx = reference.backward(dy[rows], x[rows], weight, lora_a, lora_b, s, row_mask, p).dx
    dropped = reference.drop(x, mask, p)
    dh = s * (dy @ lora_b)
    da, db = dh.t() @ dropped, s * (dy.t() @ (dropped @ lora_a.t()))
    return {"y": y, "dx": dx, "da": da, "db": db, "dbias": dy.sum(0)}


def _rows(setup: Setup) -> Tensor:
    m = setup.workload.tokens
    return torch.linspace(0, m - 1, min(m, _ROWS), device=setup.device).long()
