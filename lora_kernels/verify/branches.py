"""The cases with an activation between A and B, a gain of y's columns (DoRA), or several layers of one x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..accuracy import Accuracy, expected_errors, judge, run_reference
from ..branches import Branch, PackedBranch
from ..gate import run_branches
from ..weights import samples
from .cases import SCALING, Case, Inputs, make
from .draws import drawn_masks, seeded

__all__ = ["judge_case"]

_LEAVES = {"da": "lora_a", "db": "lora_b", "dbias": "bias", "dgain": "gain"}


def judge_case(
    name: str, case: Case, dtype: torch.dtype, device: torch.device, seed: int, tf32: bool, weights: str = ""
) -> list[Accuracy]:
    """The verdicts on every output: dx once, for it is the branches' sum, and the others for each branch.

    ``weights`` is a form that W is quantised in; all is then measured beside the same layer over its values.
    """
    x, branches, dys = _drawn(case, dtype, device, seed)
    given: Sequence[Branch] = branches
    if weights:
        packed = [samples.packed(weights, b.weight) for b in branches]
        rest = [field.name for field in fields(Branch)[1:]]
        given = [PackedBranch(w, *(getattr(b, name) for name in rest)) for w, b in zip(packed, branches, strict=True)]
        branches = [replace(b, weight=w.dequantize(dtype)) for w, b in zip(packed, branches, strict=True)]
    actual = _outputs(name, x, given, dys, case.p, seed)
    masks: list[Tensor | None] = [None] * len(branches)
    if case.p:
        masks = [*drawn_masks(name, x, case.p, seed, len(branches))]
    exact, yardstick = (
        _expected(wide, x, branches, dys, masks, case.p) for wide in (torch.float64, case.yardstick(dtype))
    )
    errors = _expected_errors(dtype, x, branches, dys, masks, case.p, tf32)
    return [
        judge(
            output,
            value,
            exact[output, i],
            yardstick[output, i].to(value.dtype),
            dtype,
            tf32,
            expected=errors[output, i],
        )
        for (output, i), value in actual.items()
    ]


def _drawn(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, list[Branch], list[Tensor]]:
    """x, the branches and each one's dy; the gains are of both signs and far from 1."""
    sizes = ((case.n, case.r), *case.beside)
    drawn: list[Inputs] = [make(replace(case, n=n, r=r), dtype, device, seed + i) for i, (n, r) in enumerate(sizes)]
    wide = torch.promote_types(dtype, torch.float32)
    branches = []
    for inputs, (n, _) in zip(drawn, sizes, strict=True):
        gain = torch.linspace(-1.0, 2.0, n, dtype=wide, device=device) if case.gain else None
        of_branch = inputs.weight, inputs.lora_a, inputs.lora_b, inputs.bias
        branches.append(Branch(*of_branch, SCALING, gain, case.activation))
    return drawn[0].x, branches, [inputs.dy for inputs in drawn]


def _outputs(
    name: str, x: Tensor, branches: Sequence[Branch], dys: list[Tensor], p: float, seed: int
) -> dict[tuple[str, int], Tensor]:
    """y and every gradient by backend ``name``, by name and the branch's number."""
    due = {("dx", 0): x.detach().requires_grad_()}
    leaves = []
    for i, branch in enumerate(branches):
        own = {leaf: getattr(branch, leaf) for leaf in _LEAVES.values()}
        own = {leaf: None if t is None else t.detach().requires_grad_() for leaf, t in own.items()}
        due |= {(output, i): own[leaf] for output, leaf in _LEAVES.items() if own[leaf] is not None}
        leaves.append(replace(branch, **own))
    with seeded(seed, x.device):
        ys = run_branches(due["dx", 0], leaves, p, name)
    gradients = dict(zip(due, torch.autograd.grad(ys, list(due.values()), dys), strict=True))
    for output, gradient in gradients.items():
        if gradient.dtype != due[output].dtype:
            raise TypeError(f"{output[0]} is {gradient.dtype}, and should be {due[output].dtype}")
    return {("y", i): y.detach() for i, y in enumerate(ys)} | gradients


def _expected(
    dtype: torch.dtype, x: Tensor, branches: list[Branch], dys: list[Tensor], masks: list[Tensor | None], p: float
) -> dict[tuple[str, int], Tensor]:
    """The same by the reference in ``dtype``."""
    expected: dict[tuple[str, int], Tensor] = {}
    for i, (b, dy, mask) in enumerate(zip(branches, dys, masks, strict=True)):
        own = run_reference(dtype, *_given(x, b, dy, mask, p))
        dx = own.pop("dx")
        expected |= {(output, i): value for output, value in own.items()}
        expected["dx", 0] = expected["dx", 0] + dx if i else dx
    return expected


def _expected_errors(
    dtype: torch.dtype,
    x: Tensor,
    branches: list[Branch],
    dys: list[Tensor],
    masks: list[Tensor | None],
    p: float,
    tf32: bool,
) -> dict[tuple[str, int], Tensor]:
    """The errors to expect of them; dx's are the branches' together."""
    errors: dict[tuple[str, int], Tensor] = {}
    for i, (b, dy, mask) in enumerate(zip(branches, dys, masks, strict=True)):
        own = expected_errors(dtype, *_given(x, b, dy, mask, p), tf32=tf32)
        dx = own.pop("dx")
        errors |= {(output, i): value for output, value in own.items()}
        errors["dx", 0] = torch.hypot(errors["dx", 0], dx) if i else dx
    return errors


def _given(x: Tensor, b: Branch, dy: Tensor, mask: Tensor | None, p: float) -> tuple[Any, ...]:
    """What the policy's functions take, for one branch."""
    return x, b.weight, b.lora_a, b.lora_b, b.bias, dy, b.scaling, mask, p, b.gain, b.activation
