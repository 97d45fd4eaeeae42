"""Whole models for the benchmarks: one random Llama, its adapters by PEFT or by this package, from the same values."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import LoRAConfig

__all__ = ["AGAIN", "PROVIDERS", "Sizes", "adapted", "adapters", "llama"]

AGAIN = "again"  # PEFT with lora_A one rounding away, and with masks of another seed
PROVIDERS = {"peft": "PEFT", AGAIN: "PEFT again", "ours": "lora_kernels", "compiled": "lora_kernels, blocks compiled"}


@dataclass(frozen=True)
class Sizes:
    """Of a Llama whose heads have 64 dimensions."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 256
    positions: int = 512

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, intermediate {self.intermediate}"


def llama(sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A ``LlamaForCausalLM`` with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.hidden // 64),
        max_position_embeddings=sizes.positions,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(base: Any, provider: str, r: int, p: float, seed: int = 0) -> Any:
    """A copy of ``base`` with adapters on all its linear layers but the head, training; fp32 adapters in any case."""
    arguments: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "lora_dropout": p, "target_modules": "all-linear"}
    model = copy.deepcopy(base)
    if provider in ("peft", AGAIN):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**arguments))
    else:
        lora_kernels.replace_linear(model, LoRAConfig(**arguments))
        lora_kernels.mark_only_lora_as_trainable(model)
    if provider == "compiled":
        for block in model.model.layers:
            block.compile(fullgraph=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
                parameter.mul_(1.0 + torch.finfo(parameter.dtype).eps if provider == AGAIN else 1.0)
            else:
                parameter.zero_()
    return model.train()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """What trains, in the order of the model; the order is the same for every provider."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
