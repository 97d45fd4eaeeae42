"""Correctness of the providers of ``models``: outputs and every gradient against the module in float64.

Dropout is off: with several layers no mask could be told. The norms of DoRA are constants, taken in float64.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import accuracy
from ..drawn import drawn_errors
from .models import ModelSetup, Site, names
from .setups import Layer

__all__ = ["judge"]

_MAY_BE_LUCKY = 64  # tokens: of more, no yardstick is


def judge(layer: Layer, setup: ModelSetup, tf32: bool) -> list[accuracy.Accuracy]:
    """The verdicts on every output and, where the cell has a backward, on dx and each adapter's gradients."""
    actual = _by(layer, setup)
    if layer.dora not in setup.expected:
        in_float64, in_dtype = (
            partial(_by, _reference(setup, dtype, layer.dora), setup, dtype) for dtype in (torch.float64, setup.dtype)
        )
        exact, errors = in_float64(), {}
        if setup.workload.tokens <= _MAY_BE_LUCKY:
            errors = drawn_errors(setup.dtype, in_float64, exact, tf32)
        setup.expected[layer.dora] = exact, in_dtype(), errors
    exact, yardstick, errors = setup.expected[layer.dora]
    return [
        accuracy.judge(name, value, exact[name], yardstick[name], setup.dtype, tf32, setup.depth, errors.get(name))
        for name, value in actual.items()
    ]


def _by(layer: Layer, setup: ModelSetup, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What ``layer`` gives, by name; as matrices, x and dy in ``dtype``."""
    x = setup.x.detach().to(dtype or setup.dtype)
    assert layer.module is not None
    layer.module.eval()
    try:
        with layer.context(), torch.set_grad_enabled(setup.workload.has_backward):
            found = layer.call(x.requires_grad_(setup.workload.has_backward))
            ys = found if isinstance(found, tuple) else (found,)
            gradients: tuple[Tensor, ...] = ()
            if setup.workload.has_backward:
                dys = [dy.to(y.dtype) for dy, y in zip(setup.dys, ys, strict=True)]
                gradients = torch.autograd.grad(ys, [x, *layer.trainable], dys)
    finally:
        layer.module.train()
    results = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    results |= dict(zip(("dx", *names(setup, layer.dora)), gradients, strict=False))
    return {name: value.flatten(0, -2) if value.dim() > 2 else value for name, value in results.items()}


def _reference(setup: ModelSetup, dtype: torch.dtype, dora: bool) -> Layer:
    """The module in ``dtype`` with plain PyTorch in the place of its linear layers."""
    module = copy.deepcopy(setup.base).to(dtype)
    trainable: list[Tensor] = []
    for name, site in setup.sites.items():
        part = _ReferenceSite(setup, site, module.get_submodule(name), dtype, dora)
        module.set_submodule(name, part)
        trainable += part.trainable
    return Layer(lambda x: setup.run(module, x), tuple(trainable), module, dora=dora)


class _ReferenceSite(nn.Module):
    """g * (x Wᵀ + s Σ h Bᵀ) + b in one dtype; of a mixed batch, each row with its adapter."""

    def __init__(self, setup: ModelSetup, site: Site, linear: nn.Module, dtype: torch.dtype, dora: bool) -> None:
        super().__init__()
        self.linear, self.rows, self.scaling, self.gain = linear, setup.rows, setup.scaling, None
        self.adapters = [tuple(value.to(dtype, copy=True).requires_grad_() for value in pair) for pair in site.adapters]
        self.trainable = [value for pair in self.adapters for value in pair]
        if dora:
            a, b = (value.double() for value in site.adapters[0])
            norms = torch.linalg.vector_norm(linear.get_parameter("weight").double() + self.scaling * (b @ a), dim=1)
            magnitude = site.magnitude.to(dtype, copy=True).requires_grad_()
            self.trainable.append(magnitude)
            self.gain = lambda: magnitude / norms.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.get_parameter("weight"), self.linear._parameters["bias"]
        if self.rows is None:
            y = F.linear(x, weight)
            for a, b in self.adapters:
                y = y + self.scaling * F.linear(F.linear(x, a), b)
        else:
            parts = [F.linear(row, weight) for row in x]
            for i, name in enumerate(self.rows):
                if name.startswith("a"):
                    a, b = self.adapters[int(name[1:])]
                    parts[i] = parts[i] + self.scaling * F.linear(F.linear(x[i], a), b)
            y = torch.stack(parts)
        y = y if self.gain is None else self.gain() * y
        return y if bias is None else y + bias
