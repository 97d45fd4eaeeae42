"""What keeps the native library from running, and nobody chose, is told once, at the first use."""

from __future__ import annotations

import warnings

import pytest
import torch

from lora_kernels import dispatch, lora_linear, telling, use_backend
from lora_kernels.errors import InvalidArgumentError, LoRAKernelsWarning
from stand_in import StandIn

LOST = {
    "an unknown word for what may be compiled": ("LORA_KERNELS_BUILD", "no", "cpu, cuda, launch, all or off"),
    "an unknown instruction set": ("LORA_KERNELS_CPU_CAPABILITY", "avx1024", "must be one of portable"),
    "an unknown product": ("LORA_KERNELS_CPU_PRODUCT", "mine", "must be one of own"),
    "no compiler": ("CXX", "/no/such/compiler", "there is no such program"),
}


@pytest.fixture(autouse=True)
def _no_memory(native: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_environment", None)
    monkeypatch.setattr(telling, "_told", set())


def run() -> None:
    """In three dtypes, which are chosen for one by one."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, a, b = (torch.ones(shape, dtype=dtype) for shape in ((2, 4), (1, 4), (4, 1)))
        lora_linear(x, torch.ones(4, 4, dtype=dtype), a, b)
        assert dispatch.select("cpu", dtype) == "eager"


@pytest.mark.parametrize("case", LOST)
def test_what_was_not_meant_is_told_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, word, sentence = LOST[case]
    monkeypatch.setenv(variable, word)
    with pytest.warns(LoRAKernelsWarning, match=f"'eager' runs.*{variable}={word}.*{sentence}") as warned:
        run()
    assert len(warned) == 1


def test_a_compile_that_failed_in_another_process_is_told_once(native: StandIn) -> None:
    native.compiler.tell("fail")
    with pytest.warns(RuntimeWarning, match="passed over"):
        dispatch.select("cpu", torch.float32)
    dispatch._choices.clear()
    with warnings.catch_warnings():  # this process has said so
        warnings.simplefilter("error")
        run()
    native.forget()
    dispatch._choices.clear()
    with pytest.warns(LoRAKernelsWarning, match="'eager' runs.*could not be compiled") as warned:
        run()
    assert len(warned) == 1


@pytest.mark.parametrize("word", ["off", "0", "cuda", "OFF"])
def test_what_was_meant_is_not_told(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_BUILD", word)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    monkeypatch.setenv("LORA_KERNELS_BUILD", "no")
    with warnings.catch_warnings(), use_backend("eager"):
        warnings.simplefilter("error")
        run()


def test_an_unknown_backend_says_who_named_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_environment", "eagr")
    with pytest.raises(InvalidArgumentError, match=r"'eagr', named by .*LORA_KERNELS_BACKEND=eagr, is not known"):
        dispatch.select("cpu", torch.float32)
