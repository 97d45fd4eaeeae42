"""The suite can fail: each seeded fault is caught by the same check that the correct operators pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BACKENDS, Case, expected, keep_mask, make, run
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
    y, h = true.forward(**given)
    y[-1] = 0
    return y, h


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "device"), [pair for pair in BACKENDS if pair[1] == "cpu"])
@pytest.mark.parametrize(("output", "fault"), FAULTS.values(), ids=FAULTS)
def test_fault_is_caught(
    output: str,
    fault: Callable[[Operators, Given], Any],
    backend: str,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = replace(CASE, dtype=dtype)
    inputs = make(case, device)
    mask = keep_mask(case, inputs, backend)
    exact, yardstick = expected(case, inputs, mask, torch.float64), expected(case, inputs, mask, dtype)
    check_all(run(case, inputs, backend), exact, yardstick, dtype)

    dispatch.select(device, dtype, backend)
    monkeypatch.setitem(ops._direct, backend, _with_fault(ops.operators(backend), output, fault))
    with pytest.raises(AssertionError, match=rf"\b{output} FAILS"):
        check_all(run(case, inputs, backend), exact, yardstick, dtype)
