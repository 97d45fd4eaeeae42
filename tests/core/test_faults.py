"""The suite can fail: each seeded fault is caught by the same check that the correct operators pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BACKENDS, Case, Inputs, keep_mask, make, measures, run
from lora_kernels import dispatch, ops
from lora_kernels.ops import Operators
from numerics import check_all

CASE = Case(m=33, k=40, n=40, r=4, p=0.2)
FORWARD = ("x", "weight", "lora_a", "lora_b", "bias", "scaling", "p", "state")
BACKWARD = ("dy", "x", "weight", "lora_a", "lora_b", "bias", "h", "scaling", "p", "state")
DX, DA, DB, DBIAS = range(4)
Given = dict[str, Any]  # an operator's arguments by name

# Faults of y: what a wrong ``forward`` returns.


def _scaling_dropped(true: Operators, given: Given) -> Any:
    return true.forward(**given | {"scaling": 1.0})


def _bias_forgotten(true: Operators, given: Given) -> Any:
    return true.forward(**given | {"bias": None})


def _last_k_block_skipped(true: Operators, given: Given) -> Any:
    weight = given["weight"].clone()
    weight[:, 32:] = 0
    return true.forward(**given | {"weight": weight})


def _last_rank_skipped(true: Operators, given: Given) -> Any:
    lora_a = given["lora_a"].clone()
    lora_a[-1:] = 0
    return true.forward(**given | {"lora_a": lora_a})


def _last_row_unwritten(true: Operators, given: Given) -> Any:
    y, h, words = true.forward(**given)
    y[-1] = 0
    return y, h, words


def _one_term_missing(true: Operators, given: Given) -> Any:
    """One feature's product with W."""
    weight = given["weight"].clone()
    weight[:, -1] = 0
    return true.forward(**given | {"weight": weight})


def _coarse(tensor: Tensor, bits: int) -> Tensor:
    """fp32 with that many bits of significand: 11 are TF32's and fp16's, 8 bf16's."""
    scale = 2.0 ** (24 - bits) + 1.0  # Veltkamp's splitting
    return scale * tensor - (scale * tensor - tensor)


def _hidden_once_in_16_bits(true: Operators, given: Given) -> Any:
    x, lora_b, s = given["x"], given["lora_b"], given["scaling"]
    keep = true.mask(given["state"], *x.shape, given["p"]) / (1.0 - given["p"])
    h = _coarse((x * keep) @ given["lora_a"].t(), 11)
    return x @ given["weight"].t() + s * h @ lora_b.t() + given["bias"], h, true.forward(**given)[2]


def _in_tf32(true: Operators, given: Given) -> Any:
    """What enters the large product alone."""
    y, h, words = true.forward(**given)
    x, weight = given["x"], given["weight"]
    return y + (_coarse(x, 11) @ _coarse(weight, 11).t() - x @ weight.t()), h, words


# Faults of one gradient: what a wrong ``backward`` returns for it.


def _transposed_a(true: Operators, given: Given) -> Tensor:
    lora_a = given["lora_a"]
    return true.backward(**given | {"lora_a": lora_a.t().reshape(lora_a.shape).contiguous()})[DX]


def _mask_off_by_one(true: Operators, given: Given) -> Tensor:
    dy, weight, p = given["dy"], given["weight"], given["p"]
    mask = true.mask(given["state"], dy.shape[0], weight.shape[1], p)
    low_rank = given["scaling"] * (dy @ given["lora_b"]) @ given["lora_a"]
    return dy @ weight + torch.roll(mask, 1, dims=1) * low_rank / (1 - p)


def _no_low_rank_part(true: Operators, given: Given) -> Tensor:
    return true.backward(**given | {"lora_b": torch.zeros_like(given["lora_b"])})[DX]


def _no_mask(true: Operators, given: Given) -> Tensor:
    return true.backward(**given | {"state": None, "p": 0.0})[DA]


def _no_rescaling(true: Operators, given: Given) -> Tensor:
    return true.backward(**given)[DA] * (1 - given["p"])


def _stale_h(true: Operators, given: Given) -> Tensor:
    return true.backward(**given | {"h": torch.roll(given["h"], 1, dims=0)})[DB]


def _hidden_gradient_once_in_16_bits(true: Operators, given: Given) -> Tensor:
    x, p = given["x"], given["p"]
    dh = _coarse(given["scaling"] * given["dy"] @ given["lora_b"], 11)
    return dh.t() @ (x * true.mask(given["state"], *x.shape, p) / (1.0 - p))


def _one_token_missing(true: Operators, given: Given) -> Tensor:
    h = given["h"].clone()
    h[-1] = 0
    return true.backward(**given | {"h": h})[DB]


def _last_row_of_dy_skipped(true: Operators, given: Given) -> Tensor:
    return true.backward(**given | {"dy": given["dy"].clone().index_fill_(0, torch.tensor([CASE.m - 1]), 0.0)})[DBIAS]


def _unscaled(gradient: int) -> Callable[[Operators, Given], Tensor]:
    return lambda true, given: true.backward(**given | {"scaling": 1.0})[gradient]


FAULTS = {
    "scaling dropped": ("y", _scaling_dropped),
    "bias forgotten": ("y", _bias_forgotten),
    "last K block skipped": ("y", _last_k_block_skipped),
    "last rank skipped": ("y", _last_rank_skipped),
    "last row unwritten": ("y", _last_row_unwritten),
    "transposed A": ("dx", _transposed_a),
    "mask off by one": ("dx", _mask_off_by_one),
    "no low-rank part": ("dx", _no_low_rank_part),
    "unscaled dh in dx": ("dx", _unscaled(DX)),
    "no mask": ("da", _no_mask),
    "no rescaling": ("da", _no_rescaling),
    "unscaled dh in da": ("da", _unscaled(DA)),
    "stale h": ("db", _stale_h),
    "unscaled db": ("db", _unscaled(DB)),
    "last row of dy skipped": ("dbias", _last_row_of_dy_skipped),
    "one term missing": ("y", _one_term_missing),
    "one token missing": ("db", _one_token_missing),
}
# What plain PyTorch does too in 16 bits, so that only fp32 can tell it.
FAULTS_IN_FP32 = {
    "h once in 16 bits": ("y", _hidden_once_in_16_bits),
    "the base in TF32": ("y", _in_tf32),
    "dh once in 16 bits": ("da", _hidden_gradient_once_in_16_bits),
}


def _with_fault(true: Operators, output: str, fault: Callable[[Operators, Given], Any]) -> Operators:
    def forward(*arguments: Any) -> Any:
        return fault(true, dict(zip(FORWARD, arguments, strict=True)))

    def backward(*arguments: Any) -> Any:
        gradients = list(true.backward(*arguments))
        given = dict(zip(BACKWARD, arguments, strict=True))
        gradients[("dx", "da", "db", "dbias").index(output)] = fault(true, given)
        return tuple(gradients)

    return replace(true, forward=forward) if output == "y" else replace(true, backward=backward)


@cache
def without_a_fault(case: Case, backend: str, device: str) -> tuple[Inputs, Any, Any, Any]:
    """Inputs of which the backend's results pass, and what they are judged by."""
    inputs = make(case, device)
    exact, yardstick, errors = measures(case, inputs, keep_mask(case, inputs, backend))
    check_all(run(case, inputs, backend), exact, yardstick, case.dtype, expected=errors)
    return inputs, exact, yardstick, errors


EACH = [
    pytest.param(*fault, dtype, id=f"{name}-{dtype}")
    for faults, dtypes in ((FAULTS, (torch.float32, torch.bfloat16)), (FAULTS_IN_FP32, (torch.float32,)))
    for dtype in dtypes
    for name, fault in faults.items()
]


@pytest.mark.parametrize(("backend", "device"), [pair for pair in BACKENDS if pair[1] == "cpu"])
@pytest.mark.parametrize(("output", "fault", "dtype"), EACH)
def test_fault_is_caught(
    output: str,
    fault: Callable[[Operators, Given], Any],
    backend: str,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = replace(CASE, dtype=dtype)
    inputs, exact, yardstick, errors = without_a_fault(case, backend, device)
    dispatch.select(device, dtype, backend)
    monkeypatch.setitem(ops._direct, backend, _with_fault(ops.operators(backend), output, fault))
    with pytest.raises(AssertionError, match=rf"\b{output} FAILS"):
        check_all(run(case, inputs, backend), exact, yardstick, dtype, expected=errors)
