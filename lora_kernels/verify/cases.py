"""What ``verify`` tries, as data, and the tensors of each case."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CASES", "Case", "Inputs", "make"]

SCALING = 1.5  # not 1, so that a scaling that is dropped or applied twice shows


@dataclass(frozen=True)
class Case:
    """One problem: sizes M, K, N, R and what is special about it.

    Attributes:
        p: dropout probability.
        zero: a parameter that is zero ("weight", "lora_b"), so that no other term hides the rest's error.
        adapters: dtype of lora_a and lora_b where it is not the compute dtype.
        strided: x, weight and dy are transposed views.
        gain: y's columns have factors, as DoRA gives them.
        activation: what stands between A and B.
        factors: of x, lora_a, lora_b and dy, which carry what fp32 adapters meet beyond fp16's range; for fp16 alone.
        beside: N and R of further branches that read the same x, with the same settings.
        large: too much for an interpreter; on a CPU it runs in all threads, the others in one.
    """

    name: str
    m: int
    k: int
    n: int
    r: int
    p: float = 0.0
    bias: bool = True
    zero: str = ""
    adapters: torch.dtype | None = None
    strided: bool = False
    gain: bool = False
    activation: str = "identity"
    factors: tuple[float, float, float, float] | None = None
    beside: tuple[tuple[int, int], ...] = ()
    large: bool = False

    @property
    def branched(self) -> bool:
        """Whether it is more than ``lora_linear`` computes in its one product: see ``branches.py``."""
        return self.gain or self.activation != "identity" or bool(self.beside)

    def applies(self, dtype: torch.dtype) -> bool:
        """Whether the case says something new for the compute dtype ``dtype``."""
        return self.adapters != dtype and (self.factors is None or dtype == torch.float16)

    def yardstick(self, dtype: torch.dtype) -> torch.dtype:
        """What the yardstick computes in: beyond fp16's range fp32, as PEFT's adapters do, its results then rounded."""
        return dtype if self.factors is None else torch.float32


CASES = (
    Case("square", 64, 64, 64, 8),
    Case("square, dropout", 64, 64, 64, 8, p=0.1),
    Case("ragged, rank 17, no bias", 37, 83, 51, 17, bias=False),
    Case("ragged, rank 17, dropout", 37, 83, 51, 17, p=0.1),
    Case("rank 1", 40, 56, 48, 1),
    Case("rank 64, dropout", 48, 96, 72, 64, p=0.1),
    Case("one token", 1, 100, 90, 8),
    Case("one token, dropout", 1, 96, 90, 8, p=0.1),
    Case("no tokens", 0, 32, 24, 4, p=0.1),
    Case("fp32 adapters", 48, 64, 40, 8, p=0.1, adapters=torch.float32),
    Case("weight zero", 40, 72, 56, 8, p=0.1, bias=False, zero="weight"),
    Case("lora_b zero", 40, 72, 56, 8, zero="lora_b"),
    Case("transposed x, weight, dy", 50, 70, 44, 8, p=0.1, strided=True),
    Case("gain", 37, 56, 48, 8, gain=True),
    Case("gain, four tokens, no bias", 4, 64, 48, 8, bias=False, gain=True),
    Case("gain and SiLU, dropout", 33, 48, 40, 5, p=0.1, gain=True, activation="silu"),
    Case("ReLU", 37, 56, 48, 8, activation="relu"),
    Case("GELU, dropout", 33, 48, 40, 5, p=0.1, activation="gelu"),
    Case("three branches", 37, 56, 48, 8, beside=((24, 8), (24, 3))),
    Case("two branches, dropout", 33, 48, 40, 5, p=0.1, beside=((24, 8),)),
    Case("h above 65504, dropout", 37, 56, 48, 8, p=0.1, adapters=torch.float32, factors=(60.0, 1e3, 1e-3, 1.0)),
    Case("dh below 6e-8", 40, 56, 48, 8, adapters=torch.float32, factors=(1.0, 1e5, 1e-5, 1e-3)),
    Case("A of 1e8, B of 1e-9, one token", 1, 64, 48, 8, adapters=torch.float32, factors=(30.0, 1e9, 1e-9, 1.0)),
    Case(
        "h above 65504, SiLU, two branches",
        37,
        56,
        48,
        8,
        adapters=torch.float32,
        activation="silu",
        factors=(60.0, 1e3, 1e-3, 1.0),
        beside=((24, 3),),
    ),
    Case("large", 256, 512, 384, 16, large=True),
    Case("large, ragged, dropout", 333, 1001, 700, 17, p=0.1, large=True),
)


@dataclass(frozen=True)
class Inputs:
    """x (M, K), weight (N, K), lora_a (R, K), lora_b (N, R), bias (N,) or None, and the gradient dy (M, N) of y."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    dy: Tensor


def make(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random tensors for ``case``: x, dy, bias, x Wᵀ and s h Bᵀ all have entries of about one, but for its factors.

    So the adapter's term is as large as the base's, and an error in either shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, deviation: float, dtype: torch.dtype, transposed: bool = False) -> Tensor:
        shape = (columns, rows) if transposed else (rows, columns)
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) * deviation).to(device, dtype)
        return drawn.t() if transposed else drawn

    adapters = case.adapters or dtype
    of_x, of_a, of_b, of_dy = case.factors or (1.0, 1.0, 1.0, 1.0)
    inputs = Inputs(
        x=normal(case.m, case.k, of_x, dtype, case.strided),
        weight=normal(case.n, case.k, case.k**-0.5, dtype, case.strided),
        lora_a=normal(case.r, case.k, of_a * case.k**-0.5, adapters),
        lora_b=normal(case.n, case.r, of_b * case.r**-0.5 / SCALING, adapters),
        bias=normal(1, case.n, 1.0, dtype).flatten() if case.bias else None,
        dy=normal(case.m, case.n, of_dy, dtype, case.strided),
    )
    if case.zero:
        getattr(inputs, case.zero).zero_()
    return inputs
