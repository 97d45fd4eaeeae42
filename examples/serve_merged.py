"""Serving: one adapter merged into a plain model, and several adapters in one batch by PEFT's ``adapter_names``.

Needs no download and takes seconds on a CPU; random weights, fixed seeds.

    python examples/serve_merged.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig
from lora_kernels.peft import calls

TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPT = torch.arange(12).reshape(2, 6)


def base_model() -> LlamaForCausalLM:
    """Two layers, random weights, ready to generate."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()


def generate(model: Any, prompt: Tensor, **arguments: object) -> Tensor:
    """Eight tokens after ``prompt``, the likeliest ones."""
    tokens: Tensor = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, **arguments)
    return tokens


def serve_merged(base: LlamaForCausalLM) -> None:
    """Merges an adapter: afterwards the model holds plain ``nn.Linear`` layers and needs no package to run."""
    model = copy.deepcopy(base)
    config = LoRAConfig(r=4, target_modules=TARGETS, init_lora_weights=False)  # random: stands for a trained adapter
    lora_kernels.replace_linear(model, config)
    adapted = generate(model, PROMPT)
    lora_kernels.merge_lora(model)
    print(lora_kernels.restore_linear(model))
    assert not any(isinstance(module, FusedLoRALinear) for module in model.modules())
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(generate(model, PROMPT), adapted), "merging has changed what is generated"
    print(f"merged, plain layers: {generate(model, PROMPT)[0].tolist()}")


def serve_several(base: LlamaForCausalLM) -> None:
    """Keeps two adapters apart over one base; each row of a batch names its own."""
    settings = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings), adapter_name="first")
    model.add_adapter("second", LoraConfig(**settings))
    model.eval()
    expected = []
    for row, name in enumerate(["first", "second"]):
        model.set_adapter(name)
        expected.append(generate(model, PROMPT[row : row + 1])[0])  # by PEFT, one adapter at a time
    lora_kernels.fuse_peft(model)
    mixed = generate(model, PROMPT, adapter_names=["first", "second"])
    assert torch.equal(mixed, torch.stack(expected)), "a row of the mixed batch differs from its adapter alone"
    assert calls(model).share == 1.0, "some calls went by PEFT's own forward"
    print(f"two adapters in one batch: each row is what its adapter gives alone\n{calls(model)}")


def main() -> None:
    """Serve merged, then unmerged with two adapters."""
    set_seed(0)
    base = base_model()
    with torch.no_grad():
        serve_merged(base)
        serve_several(base)


if __name__ == "__main__":
    main()
