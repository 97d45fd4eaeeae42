"""The suite can fail: each seeded fault is caught by the same check that the correct operators pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, expected, keep_mask, make, run
from lora_kernels import dispatch, ops
from numerics import check_all

CASE = Case(m=33, k=40, n=40, r=4, p=0.2)


def _scaling_dropped(true: Any) -> Callable[..., Any]:
    return lambda x, w, a, b, bias, scaling, p, state: true(x, w, a, b, bias, 1.0, p, state)


def _bias_forgotten(true: Any) -> Callable[..., Any]:
    return lambda x, w, a, b, bias, scaling, p, state: true(x, w, a, b, None, scaling, p, state)


def _last_k_block_skipped(true: Any) -> Callable[..., Any]:
    def forward(x: Tensor, w: Tensor, a: Tensor, *rest: Any) -> Any:
        short = torch.cat([w[:, :32], torch.zeros_like(w[:, 32:])], dim=1)
        return true(x, short, a, *rest)

    return forward


def _last_rank_skipped(true: Any) -> Callable[..., Any]:
    def forward(x: Tensor, w: Tensor, a: Tensor, *rest: Any) -> Any:
        return true(x, w, torch.cat([a[:-1], torch.zeros_like(a[-1:])]), *rest)

    return forward


def _last_row_unwritten(true: Any) -> Callable[..., Any]:
    def forward(*arguments: Any) -> Any:
        y, h = true(*arguments)
        y[-1] = 0
        return y, h

    return forward


def _transposed_a(true: Any) -> Callable[..., Any]:
    def dx(dy: Tensor, w: Tensor, dh: Tensor, a: Tensor, *rest: Any) -> Any:
        return true(dy, w, dh, a.t().reshape(a.shape).contiguous(), *rest)

    return dx


def _mask_off_by_one(true: Any) -> Callable[..., Any]:
    def dx(dy: Tensor, w: Tensor, dh: Tensor, a: Tensor, p: float, state: Tensor) -> Any:
        mask = ops.operators("eager").mask(state, dy.shape[0], w.shape[1], p)
        return dy @ w + torch.roll(mask, 1, dims=1) * (dh @ a) / (1 - p)

    return dx


def _no_low_rank_part(true: Any) -> Callable[..., Any]:
    return lambda dy, w, dh, a, p, state: true(dy, w, torch.zeros_like(dh), a, p, state)


def _no_mask(true: Any) -> Callable[..., Any]:
    return lambda dh, x, a, p, state: true(dh, x, a, p, None)


def _no_rescaling(true: Any) -> Callable[..., Any]:
    return lambda dh, x, a, p, state: true(dh, x, a, p, state) * (1 - p)


def _stale_h(true: Any) -> Callable[..., Any]:
    return lambda dy, b, h, scaling: true(dy, b, torch.roll(h, 1, dims=0), scaling)


def _unscaled_db(true: Any) -> Callable[..., Any]:
    return lambda dy, b, h, scaling: (true(dy, b, h, scaling)[0], true(dy, b, h, 1.0)[1])


def _unscaled_dh(true: Any) -> Callable[..., Any]:
    return lambda dy, b, h, scaling: (true(dy, b, h, 1.0)[0], true(dy, b, h, scaling)[1])


FAULTS = [
    ("forward", _scaling_dropped, "y"),
    ("forward", _bias_forgotten, "y"),
    ("forward", _last_k_block_skipped, "y"),
    ("forward", _last_rank_skipped, "y"),
    ("forward", _last_row_unwritten, "y"),
    ("dx", _transposed_a, "dx"),
    ("dx", _mask_off_by_one, "dx"),
    ("dx", _no_low_rank_part, "dx"),
    ("da", _no_mask, "da"),
    ("da", _no_rescaling, "da"),
    ("dh_db", _stale_h, "db"),
    ("dh_db", _unscaled_db, "db"),
    ("dh_db", _unscaled_dh, "dx"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operator", "fault", "output"), FAULTS, ids=[fault.__name__ for _, fault, _ in FAULTS])
def test_fault_is_caught(
    operator: str, fault: Callable[[Any], Any], output: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, dtype=dtype)
    inputs = make(case)
    mask = keep_mask(case, inputs, "eager")
    exact, yardstick = expected(case, inputs, mask, torch.float64), expected(case, inputs, mask, dtype)
    check_all(run(case, inputs, "eager"), exact, yardstick, dtype)

    dispatch.select("cpu", dtype, "eager")
    true = ops.operators("eager")
    faulty = replace(true, **{operator: fault(getattr(true, operator))})
    monkeypatch.setitem(ops._direct, "eager", faulty)
    with pytest.raises(AssertionError, match=rf"\b{output} FAILS"):
        check_all(run(case, inputs, "eager"), exact, yardstick, dtype)
