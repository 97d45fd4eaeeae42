"""Which of transformers' attentions and MLPs are found to read one x: a table, and each that is found is seen to."""

from __future__ import annotations

import importlib
import inspect
import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, replace_linear

pytest.importorskip("transformers", minversion="5")

QKV, NAMED, GATED = ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj")
TOGETHER = {
    "beit": {"BeitAttention": QKV},
    "bert": {"BertSelfAttention": NAMED},
    "clip": {"CLIPAttention": QKV},
    "cohere": {"CohereAttention": QKV, "CohereMLP": GATED},
    "deepseek_v3": {"DeepseekV3MLP": GATED},
    "dinov2": {"Dinov2Attention": QKV, "Dinov2SwiGLUFFN": GATED},
    "electra": {"ElectraSelfAttention": NAMED},
    "gemma": {"GemmaAttention": QKV, "GemmaMLP": GATED},
    "granite": {"GraniteAttention": QKV, "GraniteMLP": GATED},
    "llama": {"LlamaAttention": QKV, "LlamaMLP": GATED},
    "lw_detr": {"LwDetrViTAttention": QKV},
    "mistral": {"MistralAttention": QKV, "MistralMLP": GATED},
    "mixtral": {"MixtralAttention": QKV},
    "mllama": {"MllamaTextSelfAttention": QKV, "MllamaTextMLP": GATED, "MllamaVisionAttention": QKV},
    "olmo2": {"Olmo2Attention": QKV, "Olmo2MLP": GATED},
    "opt": {"OPTAttention": QKV},
    "phi": {"PhiAttention": QKV},
    "qwen2": {"Qwen2Attention": QKV, "Qwen2MLP": GATED},
    "qwen3": {"Qwen3Attention": QKV, "Qwen3MLP": GATED},
    "rf_detr": {"RfDetrDinov2Attention": QKV, "RfDetrDinov2SwiGLUFFN": GATED},
    "roberta": {"RobertaSelfAttention": NAMED},
    "siglip": {"SiglipAttention": QKV},
    "stablelm": {"StableLmAttention": QKV, "StableLmMLP": GATED},
    "starcoder2": {"Starcoder2Attention": QKV},
    "vit": {"ViTAttention": QKV},
}
APART = {  # q, k and v do not read one x, or their signature looks as if (chameleon, parakeet)
    "bert": ["BertCrossAttention"],
    "canine": ["CanineSelfAttention"],
    "chameleon": ["ChameleonAttention"],
    "conditional_detr": ["ConditionalDetrSelfAttention"],
    "d_fine": ["DFineSelfAttention"],
    "deformable_detr": ["DeformableDetrSelfAttention"],
    "deimv2": ["Deimv2SelfAttention"],
    "detr": ["DetrSelfAttention", "DetrCrossAttention", "DetrMHAttentionMap"],
    "luke": ["LukeSelfAttention"],
    "lw_detr": ["LwDetrAttention"],
    "maskformer": ["MaskFormerDetrSelfAttention", "MaskFormerDetrMHAttentionMap"],
    "mllama": ["MllamaTextCrossAttention"],
    "mobilebert": ["MobileBertSelfAttention"],
    "parakeet": ["ParakeetEncoderAttention"],
    "perceiver": ["PerceiverSelfAttention"],
    "rf_detr": ["RfDetrAttention"],
    "rt_detr": ["RTDetrSelfAttention"],
    "rt_detr_v2": ["RTDetrV2SelfAttention"],
    "rwkv": ["RwkvSelfAttention", "RwkvFeedForward"],
    "sam": ["SamAttention"],
}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 32, "d_model": 32, "num_heads": 4, "num_attention_heads": 4, "layer_idx": 0,
    "layer_id": 0, "dropout": 0.0, "attention_dropout": 0.0, "dropout_prob": 0.0, "is_cross_attention": False,
    "qk_channels": 32, "v_channels": 32, "q_dim": 32, "kv_dim": 32, "is_causal": False,
    "decoder_self_attention_heads": 4,
}  # fmt: skip
ROWS = [(family, kind, names) for family, kinds in TOGETHER.items() for kind, names in kinds.items()]
ROWS += [(family, kind, None) for family, kinds in APART.items() for kind in kinds]


def made(family: str, kind: str) -> nn.Module:
    """The module with the sizes of its configuration's defaults, on the meta device."""
    file: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configurations = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    base = importlib.import_module("transformers").PreTrainedConfig
    own = [value for value in vars(configurations).values() if inspect.isclass(value) and issubclass(value, base)]
    parameters = list(inspect.signature(getattr(file, kind)).parameters)
    arguments = {name: SIZES[name] for name in parameters if name in SIZES}
    errors = []
    for configuration in own:
        try:
            config = configuration()
            config._attn_implementation = "eager"
            with torch.device("meta"):
                return getattr(file, kind)(**({"config": config} if "config" in parameters else {}), **arguments)
        except Exception as error:  # noqa: BLE001 - of another part of the model
            errors.append(error)
    raise AssertionError(f"{kind} is not made: {errors}")


def called(module: nn.Module, names: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """What each of ``names`` is called with in one forward; what fails after them is no matter."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        layer: Any = getattr(module, name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    width: Any = getattr(module, names[0]).in_features
    arguments: dict[str, Any] = {}
    for i, (name, parameter) in enumerate(inspect.signature(type(module).forward).parameters.items()):
        if i == 1:
            arguments[name] = torch.empty(1, 4, width, device="meta")
        elif name == "position_embeddings":
            pair = "tuple" in str(parameter.annotation)
            one = torch.empty(1, 4, 8 if pair else width, device="meta")
            arguments[name] = (one, one) if pair else one
        elif i > 1 and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments[name] = None
    with suppress(Exception):
        module(**arguments)
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "kind", "names"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_found_reads_one_x(family: str, kind: str, names: tuple[str, ...] | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = made(family, kind)
    report = replace_linear(nn.ModuleDict({"it": module}), LoRAConfig(r=2, target_modules=[*QKV, *NAMED, *GATED]))
    assert report.groups == (() if names is None else (tuple(f"it.{name}" for name in names),))
    if names is not None:
        tensors = called(module, names)
        assert {name: len(given) for name, given in tensors.items()} == dict.fromkeys(names, 1)
        first = tensors[names[0]][0]
        assert all(given[0] is first for given in tensors.values())
