"""What a provider is built around and gives back: a cell's tensors, a layer, a provider.

Every layer reads the same weight: with a copy each, caches would favour whoever comes after the floor. Adapters start
from the same values, which the compute dtype represents exactly, so that no rival is charged for rounding them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import samples
from .workloads import LAYERS, NF4, SUBJECTS, Workload

__all__ = ["FLOOR", "Layer", "Provider", "Setup", "make_setups"]

FLOOR = "linear"
_ALPHA_OVER_R = 2.0


@dataclass(frozen=True)
class Setup:
    """One cell's tensors. On CUDA a cell has several of them, taken in turn, so that no run finds its own in the cache.

    Attributes:
        linear: the frozen layer, weight (N, K).
        lora_a, lora_b: the adapters' values, (R, K) and (N, R), in the compute dtype.
        x, dy: input (M, K) and output gradient (M, N); dy is empty where no gradient is due.
        scaling: s.
    """

    workload: Workload
    linear: nn.Linear
    lora_a: Tensor
    lora_b: Tensor
    x: Tensor
    dy: Tensor
    scaling: float

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.linear.weight.device

    @property
    def dys(self) -> tuple[Tensor, ...]:
        """The gradient of each output."""
        return (self.dy,)

    @property
    def depth(self) -> int:
        """How many layers follow one another."""
        return 1

    @property
    def adapter_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.workload.adapters)
        return dtype


@dataclass(frozen=True)
class Layer:
    """A layer ready to be called: y = call(x); ``trainable``: A, B and the bias if it trains; the floor has none.

    Of a model with several layers or adapters, y may be a tuple, and what trains comes in the order of
    ``models.names``; ``dora`` says whether its magnitudes act. ``owned``: the tensors of a quantised weight.
    """

    call: Callable[[Tensor], Any]
    trainable: tuple[Tensor, ...] = ()
    module: nn.Module | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    dora: bool = False
    owned: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Provider:
    """One column of a table.

    Attributes:
        name, title: for the command line and JSON, and for people.
        ours: whether it is this package, and so judged by this package's own tolerance policy.
        why_not: a sentence that says why it cannot run this cell here, or None.
        build: makes its layer.
        backend: for ours, the backend's name; None is the automatic choice.
        of_models: whether it is for the subjects with several layers or adapters, or with DoRA.
        of_nf4: whether it is for a weight in NF4, which it makes of the setup's.
        frozen: whether it has no adapter, so that there is nothing to check.
    """

    name: str
    title: str
    build: Callable[[Any], Layer]
    why_not: Callable[[Any], str | None] = lambda setup: None
    ours: bool = False
    backend: str | None = None
    of_models: bool = False
    of_nf4: bool = False
    frozen: bool = False

    def why_not_subject(self, subject: str) -> str | None:
        """A sentence where it is not made for this subject."""
        made = (self.of_models, self.of_nf4) == (subject not in LAYERS, subject == NF4)
        return None if made or self.name == FLOOR else f"It is not made for {SUBJECTS[subject]}."


def nf4_values(weight: Tensor) -> Tensor:
    """What NF4 makes of ``weight``, and makes of that again: so every provider quantises to the same values.

    Twice, because a block's largest magnitude is rounded to the weight's dtype at first.
    """
    for _ in range(2):
        weight = samples.packed(NF4, weight).dequantize(weight.dtype)
    return weight


def make_setups(workload: Workload, device: str, count: int = 1, seed: int = 0) -> list[Setup]:
    """``count`` random sets for a cell; base and adapter terms are of one size, so that an error in either shows."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, workload.dtype)
    m, k, n, r = workload.tokens, workload.in_features, workload.out_features, workload.r

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    weight, bias = draw(n, k, scale=k**-0.5), draw(n) if workload.bias else None
    if workload.subject == NF4:
        weight = nf4_values(weight)
    lora_a, lora_b = draw(r, k, scale=k**-0.5), draw(n, r, scale=r**-0.5 / _ALPHA_OVER_R)
    x = draw(m, k)
    dy = draw(m, n) if workload.has_backward else x.new_empty(0)

    def rolled(tensor: Tensor, i: int) -> Tensor:
        """The same kind of data in other memory, without another turn of the generator."""
        return tensor if i == 0 else tensor.flatten().roll(i).view_as(tensor)

    setups = []
    for i in range(count):
        linear = nn.Linear(k, n, bias=False, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(rolled(weight, i), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(rolled(bias, i), requires_grad=False)
        own_x = rolled(x, i).detach().requires_grad_(workload.records)
        setups.append(Setup(workload, linear, lora_a, lora_b, own_x, rolled(dy, i), _ALPHA_OVER_R))
    return setups
