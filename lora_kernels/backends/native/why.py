"""Why the native library runs as it does: on a CPU who multiplies by W, and what decides it; on a GPU its one order."""

from __future__ import annotations

from dataclasses import dataclass

from ... import traffic
from ...dispatch import Problem
from ...explaining.report import Launch, Other, PassPlan, by_how_much
from . import choice
from .choice import Decision
from .choice_table import CHOICES, DIRECTIONS, ProductCell, Row

__all__ = ["plans"]

_JOINT_RANKS = 16  # DhDb::RANKS of csrc/cuda/dh_db.h
_NAMES = {"own": "own product, the low-rank part inside", "library": "PyTorch's product, onto the low-rank part"}
_BASIS = {"table": "measured", "model": "predicted"}


def plans(problem: Problem, tokens: int) -> tuple[PassPlan, ...]:
    """Of both passes; dx, dA and dB are due."""
    if problem.device_type == "meta":
        return ()
    sizes = _Sizes.of(problem, tokens)
    if problem.device_type == "cuda":
        return _on_cuda(sizes)
    return tuple(_on_cpu(problem, sizes, direction) for direction in DIRECTIONS)


@dataclass(frozen=True)
class _Sizes:
    m: int
    k: int
    n: int
    r: int
    size: int

    @staticmethod
    def of(p: Problem, tokens: int) -> _Sizes:
        assert p.in_features is not None
        assert p.out_features is not None
        assert p.r is not None
        return _Sizes(tokens, p.in_features, p.out_features, p.r, p.dtype.itemsize)

    def base(self, what: str, accumulated: int = 0) -> Launch:
        """``accumulated``: elements that it reads as well."""
        return Launch(what, traffic.large(self.m, self.k, self.n, self.size) + self.size * accumulated)

    def skinny(self, what: str, columns: int) -> Launch:
        return Launch(what, traffic.skinny(self.m, self.m * columns, self.r, self.size))


def _on_cpu(problem: Problem, s: _Sizes, direction: str) -> PassPlan:
    cell = ProductCell(direction, s.m, s.k, s.n, str(problem.dtype).removeprefix("torch."))
    found = choice.decide(cell, in_place=not problem.transposed)
    if found is None:
        why = "The library makes the choice, and it is not compiled yet: `lora-kernels build` does that."
        return PassPlan(direction, "not known yet", "fixed", why, None, ())
    row, measured = found.row, None
    basis = _BASIS.get(found.by, "fixed")
    if row is not None:
        other = next(name for name in CHOICES if name != found.choice)
        measured = _other(row, found.choice, other)
        basis = basis if row.cell == cell else "neighbour"
    us = row.ratios[found.choice] * row.floor_us if row is not None and basis == "measured" else None
    return PassPlan(
        direction=direction,
        plan=f"{_NAMES[found.choice]}; kernels in {found.capability}",
        basis=basis,
        why=_why(found),
        us=us,
        launches=_launches(s, direction, found.choice == "own"),
        runner_up=measured,
        passed_over=() if row is None or "addmm" not in row.ratios else (_other(row, found.choice, "addmm"),),
        notes=found.passed_over,
    )


def _why(found: Decision) -> str:
    row = found.row
    if row is not None:
        us = row.ratios[found.choice] * row.floor_us
        return (
            f"measured: {us:.4g} µs, {row.ratios[found.choice]:.4g} of the frozen layer's time, for {row.cell}, on "
            f"{row.machine.processor} with {row.machine.threads} threads, {row.date[:10]} (torch {row.machine.torch})."
        )
    return {
        "environment": f"fixed: {choice.PRODUCT_VARIABLE} names it.",
        "layout": "fixed: W is stored (K, N), and only PyTorch's product reads that in place.",
        "model": f'predicted: a model of the CPU ("{found.features}"); `lora-kernels tune --device cpu` measures.',
    }[found.by]


def _other(row: Row, chosen: str, name: str) -> Other:
    slower = row.ratios[name] / row.ratios[chosen] - 1.0
    plan = _NAMES.get(name, "the plain composition (base, then addmm_)")
    return Other(plan, f"measured at {row.ratios[name]:.4g} of the frozen layer's time, {by_how_much(slower)}.", slower)


def _launches(s: _Sizes, direction: str, own: bool) -> tuple[Launch, ...]:
    if direction == "forward":
        hidden = s.skinny("h = x Aᵀ", s.k)
        if own:
            return hidden, s.base("y = x Wᵀ + s h Bᵀ + bias")
        return hidden, s.skinny("bias + s h Bᵀ", s.n), s.base("x Wᵀ onto it, by PyTorch", s.m * s.n)
    small = s.skinny("dh and dB in one read of dy", s.n), s.skinny("dA = dhᵀ (D * x)", s.k)
    if own:
        return *small, s.base("dx = dy W + D * (dh A)")
    return *small, s.skinny("D * (dh A)", s.k), s.base("dy W onto it, by PyTorch", s.m * s.k)


def _on_cuda(s: _Sizes) -> tuple[PassPlan, ...]:
    why, plan = "fixed: there is no other order.", "LoRA first, then PyTorch's product onto it (beta = 1)"
    forward = s.skinny("h = x Aᵀ", s.k), s.skinny("bias + s h Bᵀ", s.n), s.base("x Wᵀ onto it, by PyTorch", s.m * s.n)
    if s.r <= _JOINT_RANKS:
        small = [s.skinny("dh and dB in parts, in one read of dy", s.n), Launch("the sum of dh's parts", 0)]
    else:
        small = [s.skinny("dh = s dy B", s.n), s.skinny("dB = s dyᵀ h in parts", s.n)]
    small += [Launch("the sum of dB's parts", 0), s.skinny("dA = dhᵀ (D * x) in parts", s.k)]
    small += [Launch("the sum of dA's parts", 0), s.skinny("D * (dh A)", s.k)]
    backward = *small, s.base("dy W onto it, by PyTorch", s.m * s.k)
    split = ("Where K of h or N of dh is split, the sum of its parts is one more launch; parts stay in the L2 cache.",)
    return (
        PassPlan("forward", plan, "fixed", why, None, forward, notes=split),
        PassPlan("backward", plan, "fixed", why, None, backward, notes=split),
    )
