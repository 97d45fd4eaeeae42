"""The packed mask's specification: against plain integers, its layout, and that its bits are random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_kernels.kept import row_words
from lora_kernels.packed_mask import dropout_threshold, pack, packed_keep_words, unpack
from lora_kernels.reference import philox_keep_mask

LOW = 0xFFFFFFFF
SEEDS = [(0, 0), (1234567890123, 8), (-(2**62) - 12345, 2**63 - 7), (-1, -1)]
# Standard scores: of one sum, and of the worst of some hundreds.
ONE_SCORE, WORST_SCORE = 5.0, 6.0


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32 of 7 rounds, by the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(7):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & LOW, (a >> 32) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def word_of(seed: tuple[int, int], row: int, word: int, p: float) -> int:
    """One word, with all its columns there, in Python's integers."""
    keep = 65536 - dropout_threshold(p)
    key, stream = (value % 2**64 for value in seed)
    kept = 0
    for call in range(4):
        drawn = philox((4 * word + call, row, stream & LOW, stream >> 32), (key & LOW, key >> 32))
        for index, bits in enumerate(drawn):
            digit = LOW if keep >> (4 * call + index) & 1 else 0
            kept = (kept & bits) | (digit & (kept | bits))
    return kept


def words_of(seed: tuple[int, int], rows: int, columns: int, p: float) -> Tensor:
    return packed_keep_words(torch.tensor(seed), rows, columns, p)


def test_plain_philox_gives_the_published_answers() -> None:
    """Random123's known answers for philox4x32 with 7 rounds."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox((LOW,) * 4, (LOW,) * 2) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (0.5, 32768), (0.1, 6554), (0.9999999, 65535)])
def test_threshold(p: float, threshold: int) -> None:
    assert dropout_threshold(p) == threshold


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 1 - 3 / 256, 1 - 17 / 4096, 1 / 3, 2**-16, 0.99999])
def test_words_are_the_specified_ones(seed: tuple[int, int], p: float) -> None:
    found = words_of(seed, 5, 256, p)
    assert [[word % 2**32 for word in row] for row in found.tolist()] == [
        [word_of(seed, row, word, p) for word in range(8)] for row in range(5)
    ]


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 128, 129, 250])
def test_the_layout(columns: int) -> None:
    """Rows of whole 16 bytes, bits beyond the last column 0, those before as in a wider mask; packed again."""
    words, wide = words_of(SEEDS[1], 7, columns, 0.5), words_of(SEEDS[1], 7, 512, 0.5)
    assert words.shape == (7, row_words(columns))
    assert words.shape[1] % 4 == 0
    assert torch.equal(unpack(words, columns), unpack(wide, 512)[:, :columns])
    assert not bool(unpack(words, 32 * words.shape[1])[:, columns:].any())
    assert torch.equal(pack(unpack(words, columns)), words)
    assert torch.equal(philox_keep_mask(torch.tensor(SEEDS[1]), 7, columns, 0.5), unpack(words, columns))


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_mask_of_nothing(rows: int, columns: int, p: float) -> None:
    words = words_of(SEEDS[1], rows, columns, p)
    assert words.shape == (rows, row_words(columns))
    assert unpack(words, columns).shape == (rows, columns)


@pytest.mark.parametrize("p", [0.0, 2**-18])
def test_a_p_that_rounds_to_zero_keeps_all(p: float) -> None:
    assert bool(unpack(words_of(SEEDS[1], 3, 70, p), 70).all())
    assert torch.equal(words_of(SEEDS[1], 3, 70, p), pack(torch.ones(3, 70, dtype=torch.bool)))


def test_a_p_near_one_keeps_one_in_65536() -> None:
    mask = unpack(words_of(SEEDS[1], 1024, 8192, 1 - 2**-20), 8192)
    assert abs(score(mask, 2**-16)) < ONE_SCORE


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
@pytest.mark.parametrize("which", [0, 1])
def test_every_bit_of_key_and_stream_counts(bit: int, which: int) -> None:
    changed = [*SEEDS[1]]
    changed[which] ^= 1 << bit if bit < 63 else -(1 << 63)
    first, second = (unpack(words_of((*seed,), 64, 512, 0.5), 512) for seed in (SEEDS[1], changed))
    assert abs(score(first == second, 0.5)) < ONE_SCORE


def score(mask: Tensor, q: float) -> float:
    """Standard score of the number of True, which has probability q each."""
    count = mask.numel()
    return float((mask.sum() - q * count) / (count * q * (1 - q)) ** 0.5)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_bits_are_independent(p: float) -> None:
    """Share, rows, columns and bits of a word; neighbours in a row, in a word's place, in a column; other streams."""
    q = 1 - dropout_threshold(p) / 65536
    mask = unpack(words_of(SEEDS[2], 512, 4096, p), 4096)
    z = (mask.double() - q) / (q * (1 - q)) ** 0.5
    other = (unpack(words_of((SEEDS[2][0], 12), 512, 4096, p), 4096).double() - q) / (q * (1 - q)) ** 0.5

    def product(left: Tensor, right: Tensor) -> float:
        return abs(float((left * right).sum() / left.numel() ** 0.5))

    assert abs(score(mask, q)) < ONE_SCORE
    assert float((z.sum(1) / 4096**0.5).abs().max()) < WORST_SCORE
    assert float((z.sum(0) / 512**0.5).abs().max()) < WORST_SCORE
    assert float((z.view(512, 128, 32).sum((0, 1)) / (512 * 128) ** 0.5).abs().max()) < ONE_SCORE
    for left, right in [
        (z[:, 1:], z[:, :-1]),
        (z[:, 32:], z[:, :-32]),
        (z[:, 128:], z[:, :-128]),
        (z[1:], z[:-1]),
        (z[64:], z[:-64]),
        (z, other),
    ]:
        assert product(left, right) < ONE_SCORE
