"""A whole model without its adapters for a block: exactly the base, then as before; checkpoints, compile."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import lora_kernels
from lora_kernels import FusedLoRAGroup, LoRAConfig, adapters_disabled, replace_linear, switching, telling
from lora_kernels.errors import InvalidTypeError, LoRAKernelsWarning, LoRAStateError
from lora_kernels.rerun import Blocks
from made_models import TOKENS, UP, Net, acting, refused
from numerics import same_bits

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: acting(8, 6),
    "dropout": lambda: acting(8, 6, lora_dropout=0.5),
    "DoRA": lambda: acting(8, 6, use_dora=True),
    "activation": lambda: acting(8, 6, activation="relu"),
    "group": lambda: Joined(FusedLoRAGroup([acting(8, 6, lora_dropout=0.5), acting(8, 4, lora_dropout=0.5)])),
}


class Joined(nn.Module):
    def __init__(self, group: nn.Module) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.group(x), -1)


@pytest.fixture(autouse=True)
def _fresh_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switching, "_blocks", Blocks())


def replaced() -> Net:
    model = Net()
    replace_linear(model, UP)
    return model


def flags(model: nn.Module) -> list[bool]:
    return [layer._lora_enabled for _, layer in lora_kernels.models.model.lora_layers(model)]


def test_within_the_block_it_is_the_base_and_after_it_what_it_was() -> None:
    model = Net()
    base = model(TOKENS)
    replace_linear(model, UP)
    adapted = model(TOKENS)
    with adapters_disabled(model):
        assert same_bits(model(TOKENS), base)
        with adapters_disabled(model.blocks):
            assert same_bits(model(TOKENS), base)
        assert same_bits(model(TOKENS), base)
    assert same_bits(model(TOKENS), adapted)
    assert not same_bits(adapted, base)


def test_a_merged_model_runs_its_base_within() -> None:
    model = Net().eval()
    base = model(TOKENS)
    replace_linear(model, UP)
    lora_kernels.merge_lora(model)
    merged = model(TOKENS)
    with adapters_disabled(model):
        assert same_bits(model(TOKENS), base)
    assert same_bits(model(TOKENS), merged)


def test_it_is_restored_after_an_exception_and_what_was_off_stays_off() -> None:
    model = replaced()
    model.blocks[0]["up"].enable_lora(False)
    with pytest.raises(ZeroDivisionError), adapters_disabled(model), model.blocks[0]["up"].enable_lora(True):
        model(1 / 0)
    assert flags(model) == [False, True]
    assert model.blocks[0]["up"]._left_off
    with adapters_disabled(model):
        assert flags(model) == [False, False]
        model.blocks[0]["up"].enable_lora(True)
    assert flags(model) == [False, True]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(2, 2)), "model"], ids=["no adapter", "no module"])
def test_what_has_no_adapter_is_refused(model: Any) -> None:
    error, word = (InvalidTypeError, "str") if isinstance(model, str) else (LoRAStateError, "replace_linear")
    refused(model, lambda model: adapters_disabled(model).__enter__(), error, word)


def test_training_in_the_block_is_meant_and_not_warned_of() -> None:
    model = replaced()
    telling.forget("training")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapters_disabled(model):
            model(TOKENS)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
    ],
)
def test_what_keeps_the_block_from_the_base_is_told_once(settings: dict[str, Any], word: str) -> None:
    model = Net()
    replace_linear(model, LoRAConfig(**{"r": 2, "target_modules": ["up"], **settings}))
    telling.forget("adapters_disabled with others")
    telling.forget("adapters_disabled over residuals")
    with pytest.warns(LoRAKernelsWarning, match=word) as caught, adapters_disabled(model):
        pass
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapters_disabled(model):
            pass


# What a checkpoint runs again acts as in its forward


BLOCKS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "outside": lambda model: nullcontext(),
    "disabled": adapters_disabled,
}


def gradients(model: nn.Module, x: Tensor, forward: str, backward: str, reentrant: bool | None) -> list[Any]:
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(0)
    with BLOCKS[forward](model):
        y = model(leaf) if reentrant is None else checkpoint(model, leaf, use_reentrant=reentrant)
    with BLOCKS[backward](model):
        y.square().sum().backward()
    return [y.detach(), leaf.grad, *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward", BLOCKS)
@pytest.mark.parametrize("forward", BLOCKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_checkpoint_runs_again_as_in_its_forward(kind: str, forward: str, backward: str, reentrant: bool) -> None:
    model, x = LAYERS[kind](), torch.randn(6, 8)
    kept = gradients(model, x, forward, forward, None)
    again = gradients(model, x, forward, backward, reentrant)
    assert all(a is b or same_bits(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_so_does_one_of_a_layers_own_block(reentrant: bool) -> None:
    layer, x = acting(), torch.randn(6, 8, requires_grad=True)
    with layer.enable_lora(False):
        y = checkpoint(layer, x, use_reentrant=reentrant)
    (found,) = torch.autograd.grad(y.sum(), x) if not reentrant else [(y.sum().backward(), x.grad)[1]]
    assert same_bits(found, torch.ones(6, 6) @ layer.weight.detach())


def test_the_innermost_block_of_forward_counts() -> None:
    """An outer block stays known however many inner ones have recorded since."""
    layer, x = acting(), torch.randn(6, 8, requires_grad=True)
    with adapters_disabled(layer):
        y = checkpoint(layer, x, use_reentrant=False)
        for _ in range(70):
            with layer.enable_lora():
                z = checkpoint(layer, x, use_reentrant=False)
    (off,) = torch.autograd.grad(y.sum(), x)
    (on,) = torch.autograd.grad(z.sum(), x)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    assert same_bits(off, torch.ones(6, 6) @ layer.weight.detach())
    assert same_bits(on, plain)


def test_a_block_within_a_region_holds_there_again() -> None:
    layer, x = acting(), torch.randn(6, 8, requires_grad=True)

    def region(x: Tensor) -> Tensor:
        with adapters_disabled(layer):
            reference = layer(x)
        return layer(x) * reference.sigmoid()

    (found,) = torch.autograd.grad(checkpoint(region, x, use_reentrant=False).sum(), x)
    (plain,) = torch.autograd.grad(region(x).sum(), x)
    assert same_bits(found, plain)


def test_a_block_without_recording_leaves_nothing_behind() -> None:
    model = replaced()
    with torch.no_grad(), adapters_disabled(model):
        model(TOKENS)
    assert not switching._blocks
    assert not any(layer._asks for _, layer in lora_kernels.models.model.lora_layers(model))


def test_copies_and_other_threads() -> None:
    layer, x, found = acting(), torch.randn(6, 8), []
    base = nn.functional.linear(x, layer.weight, layer.bias)
    with adapters_disabled(layer):
        thread = threading.Thread(target=lambda: found.append(layer(x)))
        thread.start()
        thread.join()
        layer(x.requires_grad_())
    again = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    assert same_bits(found[0], base)
    assert all(same_bits(other(x), layer(x)) for other in again)


# Compiled


def test_a_compiled_model_has_two_graphs_however_often_it_is_switched() -> None:
    model, counter = replaced(), CompileCounter()
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), TOKENS
    with adapters_disabled(model):
        base = model(x)
    adapted = model(x)
    for _ in range(3):
        assert same_bits(compiled(x), adapted)
        with torch.no_grad(), adapters_disabled(compiled):
            assert same_bits(compiled(x), base)
    assert counter.frame_count == 2
