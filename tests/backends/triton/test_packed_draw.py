"""The draw's device code, run by Python with NumPy for Gluon: the words are the specified ones, bit for bit."""

from __future__ import annotations

import sys
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lora_kernels.kept import row_words
from lora_kernels.packed_mask import packed_keep_words
from lora_kernels.reference import dropout_threshold

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from lora_kernels.backends.triton.kernels.hopper import packed_draw


class Block(np.ndarray):
    """A tensor of the device: an array that can be converted. Integers wrap, as they do there."""

    def to(self, dtype: Any) -> Block:
        return self.astype(dtype)


def block(values: Any, dtype: Any) -> Block:
    return np.atleast_1d(np.asarray(values, dtype)).view(Block)


class Pointer:
    def __init__(self, values: list[int], place: int = 0) -> None:
        self.values, self.place = values, place

    def __add__(self, steps: int) -> Pointer:
        return Pointer(self.values, self.place + steps)


GLUON = SimpleNamespace(
    uint32=np.uint32,
    uint64=np.uint64,
    int32=np.int32,
    static_range=range,
    minimum=np.minimum,
    maximum=np.maximum,
    where=lambda condition, left, right: np.where(condition, left, right).view(Block),
    load=lambda pointer: block(pointer.values[pointer.place], np.int64),
)


def in_python(name: str) -> Any:
    """The device function, with NumPy for Gluon and its callees treated likewise."""
    code = getattr(packed_draw, name).fn.__code__
    callees = [other for other in code.co_names if other.startswith("_") and hasattr(packed_draw, other)]
    return FunctionType(code, {"gl": GLUON, "range": range, **{other: in_python(other) for other in callees}}, name)


@pytest.mark.parametrize("seed", [(0, 0), (1234567890123, 8), (-(2**62) - 12345, 2**63 - 7), (-1, -(2**31))])
@pytest.mark.parametrize(("p", "columns"), [(0.1, 256), (0.5, 250), (2**-16, 33), (0.99999, 129), (1 / 3, 32)])
def test_the_device_draws_the_specified_words(seed: tuple[int, int], p: float, columns: int) -> None:
    width = row_words(columns)
    row, word = (
        grid.view(Block)
        for grid in np.meshgrid(np.arange(6, dtype=np.uint32), np.arange(width, dtype=np.uint32), indexing="ij")
    )
    loaded = in_python("load_seed")(Pointer([*seed]))
    keep16 = block(65536 - dropout_threshold(p), np.int32)
    found = in_python("draw_words")(word, row, keep16, loaded, columns)
    expected = packed_keep_words(torch.tensor(seed), 6, columns, p)
    assert found.dtype == np.uint32
    assert np.array_equal(np.asarray(found).view(np.int32), expected.numpy())
