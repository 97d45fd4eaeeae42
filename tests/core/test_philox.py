"""The mask that the kernels draw is the specification's, bit for bit: Triton's and the native library's alike."""

from __future__ import annotations

import pytest
import torch

from cases import BACKENDS
from lora_kernels import dispatch, ops, reference
from lora_kernels.ops import Operators

SEEDS = [(0, 0), (1, 2), (-1, -1), (-(2**63), 2**63 - 1), (123456789012345, -987654321)]
# Words that end within a row, within 16 bytes and with them; rows that share a vector of words; more words than are
# drawn at once.
SIZES = [(1, 1), (3, 7), (33, 8), (5, 31), (5, 32), (9, 33), (5, 131), (70, 40), (7, 257), (2, 4100)]
# Digits that all count, that begin with zeros (a quarter, two, three of them), and the lowest and the highest alone.
PROBABILITIES = [0.0, 2**-18, 2**-16, 1 - 17 / 4096, 1 - 3 / 256, 0.75, 0.5, 0.9999999]

every_philox = pytest.mark.parametrize(("backend", "device"), [pair for pair in BACKENDS if pair[0] != "eager"])


def operators(backend: str, device: str) -> Operators:
    dispatch.select(device, torch.float32, backend)
    return ops.operators(backend)


@pytest.mark.own_kernels
@every_philox
@pytest.mark.parametrize(
    ("seed", "p"), [*((seed, 0.1) for seed in SEEDS), *((SEEDS[-1], p) for p in PROBABILITIES)], ids=str
)
def test_mask_is_the_references(backend: str, device: str, seed: tuple[int, int], p: float) -> None:
    """Words know nothing of each other: each seed with one probability, and each probability with one seed."""
    state = torch.tensor(seed, device=device)
    for rows, columns in SIZES:
        actual = operators(backend, device).mask(state, rows, columns, p)
        assert actual.dtype == torch.bool
        assert torch.equal(actual, reference.philox_keep_mask(state, rows, columns, p)), (rows, columns)


@pytest.mark.own_kernels
@every_philox
@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_an_empty_mask(backend: str, device: str, size: tuple[int, int], p: float) -> None:
    assert operators(backend, device).mask(torch.tensor((1, 2), device=device), *size, p).shape == size
