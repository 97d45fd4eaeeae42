"""A local hub cache with small random models under the ids that PEFT's tests name.

``fill(folder)`` writes each model of ``MODELS`` as Hugging Face's own cache holds one (``models--OWNER--NAME`` with
``refs/main`` and one snapshot: the configuration, safetensors, and what ``generate`` starts from), so that
``from_pretrained(id)`` finds it under ``HF_HUB_CACHE`` and asks nobody. The weights are drawn with a fixed seed: two
runs of a suite see the same models. They have the architecture that the id names at the least size on which LoRA's
tests mean something, and no tokenizer: only the tests of prompt learning ask for one. ``scripts/peft_suite.py --hub``
is its user.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 32, 64, 2, 4, 1000

_common = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
_rotary = _common | {"intermediate_size": INNER, "num_key_value_heads": 2, "max_position_embeddings": 512}
_encoder = _common | {"intermediate_size": INNER, "max_position_embeddings": 512}
_gpt = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 512, "vocab_size": VOCABULARY}
_bart: dict[str, Any] = {"d_model": WIDTH, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
for side in ("encoder", "decoder"):
    _bart |= {f"{side}_layers": LAYERS, f"{side}_attention_heads": HEADS, f"{side}_ffn_dim": INNER}
_gpt_ends = {"bos_token_id": VOCABULARY - 1, "eos_token_id": VOCABULARY - 1}  # theirs are of a vocabulary of 50,257

# Id, class of the model in transformers, and what its configuration has besides the defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        _common | {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 512},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _gpt | _gpt_ends),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", _gpt | _gpt_ends | {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (
        "LlamaForCausalLM",
        _rotary | {"num_key_value_heads": HEADS},  # a test takes rank 20, which must not exceed the values' width
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _rotary),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _rotary | {"head_dim": 8}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {"d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS}
        | {"vocab_size": VOCABULARY, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _bart),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _encoder),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _encoder),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _encoder),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _encoder),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _encoder),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _encoder,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        _rotary | {"pad_token_id": 0},  # without one it takes no batches
    ),
}


def fill(folder: Path, names: Iterable[str] = MODELS) -> None:
    """Writes the models that the cache has not yet."""
    for name in names:
        if not (reference := entry(folder, name) / "refs" / "main").exists():
            revision = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
            build(name).save_pretrained(entry(folder, name) / "snapshots" / revision)
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(revision)  # last: what has it is whole


def entry(folder: Path, name: str) -> Path:
    """The folder in which the cache holds a model."""
    return folder / "--".join(["models", *name.split("/")])


def build(name: str) -> Any:
    """The model of that id, its weights drawn anew from the same seed."""
    import torch
    import transformers

    kind, sizes = MODELS[name]
    model_class = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(model_class.config_class(**sizes)).eval()


def environment(folder: Path) -> dict[str, str]:
    """The variables under which a process knows this cache and no other hub."""
    return {"HF_HUB_CACHE": os.fspath(folder.resolve()), "HF_HUB_OFFLINE": "1"}


class Visited(dict[str, int]):
    """How often each id was looked up, where each has been before: for PEFT's ``hub_online_once``.

    It switches the offline mode off for a model's first use, which costs minutes of retries where there is no network.
    """

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1
