"""What the Triton backend keeps of dropout's mask: by the layer's width, or by the option."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lora_kernels import LoRAKernelsError, dispatch
from lora_kernels.backends import triton

PROBLEM = dispatch.Problem("cpu", torch.bfloat16, 64, 64, 8, dropout_p=0.1)


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    triton.kept.cache_clear()
    yield
    triton.kept.cache_clear()


@pytest.mark.parametrize(("word", "narrow", "wide"), [("", True, False), ("mask", True, True), ("seed", False, False)])
def test_the_option_decides_else_the_width(
    word: str, narrow: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS_DROPOUT_KEEPS", word)
    kept = triton.kept()
    assert kept.packs_mask
    assert (kept.prefers_words(8191), kept.prefers_words(8192)) == (narrow, wide)
    assert ("K / 8 bytes" in kept.tells(PROBLEM)) == narrow


def test_an_unknown_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_DROPOUT_KEEPS", "words")
    with pytest.raises(LoRAKernelsError, match=r"DROPOUT_KEEPS=words was given: it must be one of mask, seed\. Set"):
        triton.BACKEND.register("cpu")
