"""Tiny mixtures of experts with random weights, a kind of transformers' each, and experts modules by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENS = torch.arange(12).reshape(2, 6)
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        num_experts=8, num_experts_per_tok=4, moe_intermediate_size=8, head_dim=8, norm_topk_prob=True, **SIZES
    )
    return transformers.Qwen3MoeForCausalLM(config)


def olmoe() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {**SIZES, "num_key_value_heads": 2}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(num_experts=8, num_experts_per_tok=8, **sizes))


def deepseek_v3() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
        **ranks,
        **{**SIZES, "num_key_value_heads": 2},
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=8, **SIZES)
    return transformers.GptOssForCausalLM(config)


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "olmoe": olmoe, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss}


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with the same random weights at every call, in evaluation."""
    torch.manual_seed(3)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval().to(dtype)


def experts(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The experts module of a model, or of one of the kinds below, in training; Parameters do not require gradients."""
    if name in MODELS:
        model = made(name, dtype)
        module = next(m for m in model.modules() if hasattr(m, "down_proj") and hasattr(m, "has_gate"))
    else:
        torch.manual_seed(3)
        module = _KINDS[name]()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
        module = module.to(dtype)
    return module.train().requires_grad_(False)


def _without_gate() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = transformers.NemotronHConfig(
        n_routed_experts=4, hidden_size=16, moe_intermediate_size=8, moe_latent_size=None, mlp_hidden_act="relu2"
    )
    return NemotronHExperts(config)


def _with_norm() -> nn.Module:
    """gpt-oss's kind, with what some other models add: a norm after each expert."""
    pytest.importorskip("transformers")
    module = next(m for m in gpt_oss().modules() if hasattr(m, "has_gate"))
    module.has_post_expert_norm = True
    module.post_expert_norm = nn.LayerNorm(16)
    return module


_KINDS = {"without gate": _without_gate, "with norm": _with_norm}
KINDS = [*MODELS, *_KINDS]


def move(tensors: Any) -> None:
    """Gives adapters values that add about as much as the base does."""
    torch.manual_seed(11)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64) * 0.25)


def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits.flatten(0, -2)
