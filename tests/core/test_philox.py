"""The mask that the kernels draw is the specification's, bit for bit: Triton's and the native library's alike."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from cases import BACKENDS
from lora_kernels import dispatch, ops, reference
from lora_kernels.backends.triton.kernels.philox import keep_tile, load_seed
from lora_kernels.ops import Operators

SEEDS = [(0, 0), (1, 2), (-1, -1), (-(2**63), 2**63 - 1), (123456789012345, -987654321)]


every_philox = pytest.mark.parametrize(("backend", "device"), [pair for pair in BACKENDS if pair[0] != "eager"])


def operators(backend: str, device: str) -> Operators:
    dispatch.select(device, torch.float32, backend)
    return ops.operators(backend)


@every_philox
@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (33, 8), (5, 131), (70, 40)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9999999])
def test_mask_is_the_references(
    backend: str, device: str, seed: tuple[int, int], rows: int, columns: int, p: float
) -> None:
    state = torch.tensor(seed, device=device)
    actual = operators(backend, device).mask(state, rows, columns, p)
    assert actual.dtype == torch.bool
    assert torch.equal(actual, reference.philox_keep_mask(state, rows, columns, p))


@every_philox
@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_empty_mask(backend: str, device: str, size: tuple[int, int]) -> None:
    assert operators(backend, device).mask(torch.tensor((1, 2), device=device), *size, 0.5).shape == size


@every_philox
def test_share_of_kept_elements(backend: str, device: str) -> None:
    """Three standard deviations around 1 - p; adjacent elements, rows and seeds agree as often as chance has it."""
    rows, columns, p = 256, 256, 0.25
    mask = operators(backend, device).mask
    first, second = (mask(torch.tensor(seed, device=device), rows, columns, p) for seed in ((1, 2), (1, 3)))
    agreement = p**2 + (1 - p) ** 2
    for sample, share in [
        (first, 1 - p),
        (first == second, agreement),
        (first[1:] == first[:-1], agreement),
        (first[:, 1:] == first[:, :-1], agreement),
    ]:
        deviation = (share * (1 - share) / sample.numel()) ** 0.5
        assert abs(float(sample.double().mean()) - share) < 3 * deviation


@triton.jit
def keep_far_rows(seed_ptr, keep_ptr, first_row, groups, threshold):
    """keep (4, 32): columns 16 to 47 of four rows from ``first_row`` on."""
    rows = first_row + tl.arange(0, 4).to(tl.int64)
    keep = keep_tile(load_seed(seed_ptr), rows, 16, groups, threshold, 32)
    tl.store(keep_ptr + tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :], keep)


def test_counters_beyond_32_bits(triton_device: str) -> None:
    """Rows so far down that their counters need the second word, against Philox in plain integers."""
    first_row, groups, p, seed = 2**40 + 3, 9, 0.5, (-5, 77)
    keep = torch.empty((4, 32), dtype=torch.bool, device=triton_device)
    keep_far_rows[(1,)](
        torch.tensor(seed, device=triton_device), keep, first_row, groups, reference.dropout_threshold(p)
    )
    for row in range(4):
        for column in range(32):
            index = (first_row + row) * groups + (16 + column) // 8
            words = philox(index % 2**32, index >> 32, seed[1] % 2**32, (seed[1] >> 32) % 2**32, seed[0])
            bits = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
            assert bool(keep[row, column]) == (bits >= 2**15)


def philox(c0: int, c1: int, c2: int, c3: int, key: int) -> tuple[int, int, int, int]:
    """Philox4x32 with seven rounds, in plain integers."""
    k0, k1 = key % 2**32, (key >> 32) % 2**32
    for _ in range(7):
        high, low = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high % 2**32, (low >> 32) ^ c3 ^ k1, low % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def test_plain_philox_gives_the_published_answers() -> None:
    """Random123's known answers for philox4x32 with 7 rounds."""
    assert philox(0, 0, 0, 0, 0) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    ones = 2**32 - 1
    assert philox(ones, ones, ones, ones, 2**64 - 1) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
