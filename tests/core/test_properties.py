"""Random problems of any shape, dtype mix, stride and dropout, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import BACKENDS, Case, keep_mask, make, measures, run
from numerics import check_all
from random_examples import examples

_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])

problems = st.builds(
    Case,
    m=st.integers(1, 80),
    k=st.integers(8, 70),
    n=st.integers(8, 70),
    r=st.integers(2, 40),
    dtype=_dtypes,
    adapter_dtype=st.one_of(st.none(), st.just(torch.float32)),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    bias=st.booleans(),
    scaling=st.sampled_from([0.25, 1.0, 2.0]),
    x_layout=st.sampled_from(["contiguous", "rows", "transposed"]),
)


@pytest.mark.parametrize("backend", [name for name, device in BACKENDS if device == "cpu" and name != "triton"])
@examples(150)
@given(case=problems, seed=st.integers(0, 2**31))
def test_any_problem(backend: str, case: Case, seed: int) -> None:
    _check(case, seed, backend, "cpu")


@examples(15)
@given(case=problems, seed=st.integers(0, 2**31))
def test_any_problem_in_triton(triton_device: str, case: Case, seed: int) -> None:
    _check(case, seed, "triton", triton_device)


def _check(case: Case, seed: int, backend: str, device: str) -> None:
    inputs = make(case, device, seed)
    actual = run(case, inputs, backend, seed)
    mask = keep_mask(case, inputs, backend, seed)
    exact, yardstick, errors = measures(case, inputs, mask)
    check_all(actual, exact, yardstick, case.dtype, expected=errors)
