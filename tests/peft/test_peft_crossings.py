"""Several active adapters of PEFT's beside each other feature; ``crossings.py`` has the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cases import BACKENDS
from lora_kernels import use_backend

pytest.importorskip("peft")
from peft_models import CONV1D, LORA_THEN_DORA, TWO, Option, Small, SmallConv1D, assert_parity, lora_layers

BOTH = ("a0", "a1")


class Strided(Option):
    """x: every second column of a larger one."""

    def x(self, dtype: torch.dtype) -> Tensor:
        x = super().x(dtype)
        return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2]


class Checkpointed(Small):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return y


class Reentrant(Checkpointed):
    reentrant = True


def _frozen(part: str, adapter: str) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        for layer in lora_layers(model):
            getattr(layer, part)[adapter].requires_grad_(False)

    return prepare


def _biases_train(model: Any) -> None:
    """PEFT itself has them train for one adapter alone."""
    for layer in lora_layers(model):
        layer.base_layer.bias.requires_grad_()


FROZEN = [(part, name) for part in ("lora_A", "lora_B") for name in BOTH]
OPTIONS = [
    *[Option(f"frozen {part} of {name}", TWO, BOTH, prepare=_frozen(part, name)) for part, name in FROZEN],
    Option("frozen magnitudes", LORA_THEN_DORA, BOTH, prepare=_frozen("lora_magnitude_vector", "a1")),
    Option("biases train", TWO, BOTH, prepare=_biases_train),
    Option("lora_bias of one", ({"lora_bias": True}, TWO[1]), BOTH),
    Option("conv1d", (CONV1D, CONV1D | TWO[1]), BOTH, base=SmallConv1D),
    *[Option(f"{m} tokens", TWO, BOTH, shape=(m,)) for m in (0, 1, 3)],
    *[Option(base.__name__, TWO, BOTH, base=base) for base in (Checkpointed, Reentrant)],
    Strided("strided", TWO, BOTH),
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_parity_of_two_adapters(option: Option) -> None:
    assert_parity(option)


@pytest.mark.parametrize("backend", [name for name, device in BACKENDS if device == "cpu"])
def test_parity_of_two_adapters_by_every_backend(backend: str) -> None:
    with use_backend(backend):
        assert_parity(Option("two", TWO, BOTH))
