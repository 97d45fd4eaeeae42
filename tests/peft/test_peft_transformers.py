"""``fuse_peft`` on models of transformers with random weights: the same loss and gradients, every call fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import fuse_peft, unfuse_peft
from numerics import check_all

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from lora_kernels.peft import calls  # noqa: E402
from peft_models import acting, fused, lora_layers  # noqa: E402

TOKENS = torch.arange(12).reshape(2, 6)


def _llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def _bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=32, **sizes))


LAYERS = {_llama: 14, _gpt2: 8, _bert: 13}  # in all-linear, without the head
every_family = pytest.mark.parametrize("family", list(LAYERS))


def _made(family: Callable[[], Any]) -> Any:
    config = peft.LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=family is _gpt2)
    return acting(peft.get_peft_model(family().eval(), config))


def _trained(model: Any) -> dict[str, Tensor]:
    """The loss and the gradient of every adapter."""
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return {"loss": loss.detach().reshape(1)} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_pefts(family: Callable[[], Any], checkpointing: bool) -> None:
    """In float64: what a whole model makes of two roundings of one product in fp32 is chance."""
    stock = _made(family).double()
    model = fused(stock)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None)
    exact = _trained(stock)
    check_all(_trained(model), exact, exact, torch.float64)
    counted = calls(model)
    assert not counted.own
    assert counted.fused > LAYERS[family] if checkpointing else counted.fused == LAYERS[family]


def test_generating_a_mixed_batch_and_merging() -> None:
    model = _made(_llama).eval()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    arguments = {"max_new_tokens": 3, "do_sample": False, "adapter_names": ["default", "other"]}
    expected = model.generate(input_ids=TOKENS, **arguments)
    assert len(fuse_peft(model)) == LAYERS[_llama]
    assert torch.equal(model.generate(input_ids=TOKENS, **arguments), expected)
    assert not calls(model).own
    unfuse_peft(model)
    assert len(lora_layers(model)) == LAYERS[_llama]
    assert not lora_layers(model.merge_and_unload())
