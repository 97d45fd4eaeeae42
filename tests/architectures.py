"""Tiny transformers models with random weights, one a kind of architecture, and inputs for them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from made_models import disturb

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.arange(10).reshape(2, 5)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, **SIZES))


def qwen2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(vocab_size=24, num_key_value_heads=1, tie_word_embeddings=True, **SIZES)
    return transformers.Qwen2ForCausalLM(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=24, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=24, max_position_embeddings=8, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES)
    return transformers.ViTForImageClassification(config)


MAKERS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "bert": bert, "vit": vit}


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with the same random weights at every call, biases included, in evaluation."""
    torch.manual_seed(3)
    model = MAKERS[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter.data, -0.5, 0.5)
    return model.eval().to(dtype)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """What the model, or the one within PEFT's, says of one fixed input, as rows."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs: dict[str, Tensor] = {"input_ids": TOKENS}
    if plain.config.model_type == "vit":
        inputs = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=plain.dtype).reshape(2, 3, 8, 8)}
    return model(**inputs).logits.flatten(0, -2)


def peft_model(name: str, **arguments: Any) -> nn.Module:
    """A PEFT model whose adapter, biases and whole modules have moved."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on Conv1D and on DoRA's biases
        return disturb(peft.get_peft_model(made(name), config)).eval()
