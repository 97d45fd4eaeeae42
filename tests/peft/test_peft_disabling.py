"""``adapters_disabled`` on PEFT models: what ``disable_adapter`` does, for fused layers and PEFT's own alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lora_kernels import adapters_disabled, fuse_peft
from lora_kernels.errors import LoRAStateError
from numerics import same_bits
from peft_models import Small, make, peft

ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "plain": [{}],
    "dropout": [{"lora_dropout": 0.5}],
    "DoRA": [{"use_dora": True}],
    "PEFT's own forward": [{"use_dora": True}, {"use_dora": True}],
}


def fused(*adapters: dict[str, Any]) -> Any:
    model = make(*adapters)
    fuse_peft(model)
    if len(adapters) > 1:
        model.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    return model


@pytest.mark.parametrize("kind", ["fused", "PEFT's", "half", "modules_to_save"])
def test_it_is_what_pefts_disable_adapter_gives(kind: str) -> None:
    settings = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]} if kind == "modules_to_save" else {}
    model, x = make(settings), torch.randn(5, 24)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(float("modules_to_save" in name))
    if kind in ("fused", "modules_to_save"):
        fuse_peft(model)
    if kind == "half":
        fuse_peft(model.base_model.model.lin0)
    adapted, trained = model(x), [parameter.requires_grad for parameter in model.parameters()]
    with model.disable_adapter():
        base = model(x)
    with adapters_disabled(model):
        assert same_bits(model(x), base)
        assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert same_bits(model(x), adapted)
    assert not same_bits(adapted, base)


def test_it_nests_with_pefts_own_and_restores_after_an_exception() -> None:
    model, x = fused({}), torch.randn(5, 24)
    adapted = model(x)
    with model.disable_adapter():
        base = model(x)
        with pytest.raises(ZeroDivisionError), adapters_disabled(model):
            model(1 / 0)
        assert same_bits(model(x), base)
    assert same_bits(model(x), adapted)


def test_prompts_are_off_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    base, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.arange(6)[None]
    expected = base(tokens).logits
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with adapters_disabled(model):
        assert same_bits(model(tokens).logits, expected)
    assert model(tokens).logits.shape[1] == 9


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["forward", "backward"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_checkpoint_runs_again_as_in_its_forward(kind: str, inside: str, reentrant: bool) -> None:
    model = fused(*ADAPTERS[kind])
    found = []
    for own in (False, True):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.zero_grad()
        torch.manual_seed(0)
        if inside == "forward":
            with adapters_disabled(model):
                y = checkpoint(model, x, use_reentrant=reentrant) if own else model(x)
            y.square().sum().backward()
        else:
            y = checkpoint(model, x, use_reentrant=reentrant) if own else model(x)
            with adapters_disabled(model):
                y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters())])
    assert all(a is b or same_bits(a, b) for a, b in zip(*found, strict=True))


def test_a_compiled_model_has_two_graphs_however_often_it_is_switched() -> None:
    model, x, counter = fused({}), torch.randn(5, 24), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        adapted = model(x)
        with adapters_disabled(model):
            base = model(x)
        for _ in range(3):
            assert same_bits(compiled(x), adapted)
            with adapters_disabled(compiled):
                assert same_bits(compiled(x), base)
    assert counter.frame_count == 2


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(LoRAStateError, match="PEFT model"), adapters_disabled(Small()):
        pass
