"""transformers' own housekeeping on a model with LoRA layers: tying, resizing, and ``save_pretrained``."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import LoRAConfig, load_adapter, replace_linear, save_adapter
from lora_kernels.errors import LoRAKernelsError, LoRAKernelsWarning, LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import formula
from numerics import check, same_bits

transformers = pytest.importorskip("transformers")

V = 64
TOKENS = torch.arange(6)[None]
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "DoRA": {"use_dora": True}, "bias of B": {"lora_bias": True}}
kinds = pytest.mark.parametrize("kind", KINDS)
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
merges = pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=V, **sizes, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def adapted(tied: bool, kind: str = "plain", merged: bool = False, **settings: Any) -> Any:
    model, usual = llama(tied), {"r": 4, "init_lora_weights": False, "target_modules": ["lm_head"]}
    replace_linear(model, LoRAConfig(**{**usual, **KINDS[kind], **settings}))
    if merged:
        lora_kernels.merge_lora(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def off(model: Any) -> Tensor:
    with model.lm_head.enable_lora(False):
        return logits(model)


@kinds
@merges
def test_tying_again_changes_nothing(kind: str, merged: bool) -> None:
    model = adapted(True, kind, merged)
    before, base = logits(model), off(model)
    model.tie_weights()
    assert model.lm_head.merged == merged
    assert model.lm_head.base_weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), before)
    assert torch.equal(off(model), base)
    if merged:
        lora_kernels.unmerge_lora(model)
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tying_to_another_embedding() -> None:
    model = adapted(True)
    other = nn.Embedding(V, 32)
    model.set_input_embeddings(other)
    model.tie_weights()
    assert model.lm_head.weight is other.weight
    expected = copy.deepcopy(model)
    lora_kernels.merge_lora(model)
    model.set_input_embeddings(nn.Embedding(V, 32))
    with pytest.raises(LoRAStateError, match=r"merged layer.*unmerge\(\)"):
        model.tie_weights()
    lora_kernels.unmerge_lora(model)
    model.set_input_embeddings(other)
    assert torch.equal(logits(model), logits(expected))


def test_tying_a_residual_to_the_whole_weight_is_refused() -> None:
    model = adapted(True, init_lora_weights="pissa")
    before = logits(model)
    with pytest.raises(LoRAStateError, match="'pissa'"):
        model.tie_weights()
    assert torch.equal(logits(model), before)


@kinds
@ties
@merges
@pytest.mark.parametrize("size", [70, V, 50])
def test_resized_token_embeddings_keep_the_adapter(kind: str, tied: bool, merged: bool, size: int) -> None:
    model = adapted(tied, kind, merged)
    layer, parameters, kept = model.lm_head, list(model.lm_head.adapter.values()), min(size, V)
    before = by_formula(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoRAKernelsWarning)
        model.resize_token_embeddings(size)
    assert model.lm_head is layer
    assert layer.merged == merged
    assert (layer.base_weight is model.model.embed_tokens.weight) == tied
    assert all(now is then for now, then in zip(layer.adapter.values(), parameters, strict=True))
    for _ in range(2):
        after = logits(model)
        assert after.shape[-1] == layer.out_features == size
        check_columns(after, before, slice(kept))
        check_columns(after, by_formula(model, adapter=False), slice(kept, None))
        lora_kernels.unmerge_lora(model) if layer.merged else lora_kernels.merge_lora(model)
    if layer.merged:
        lora_kernels.unmerge_lora(model)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in parameters)


@torch.no_grad()
def by_formula(model: Any, adapter: bool = True) -> tuple[Tensor, Tensor]:
    """The logits that are due for the head as it is now, in float64 and as its plain composition in fp32."""
    hidden, layer = model.model(TOKENS).last_hidden_state, model.lm_head
    found = []
    for dtype in (torch.float64, torch.float32):
        weight = formula(layer, dtype) if adapter else layer.base_weight.to(dtype)
        bias = layer.scaling * layer.lora_bias.to(dtype) if adapter and layer.lora_bias is not None else 0.0
        found.append(hidden.to(dtype) @ weight.t() + bias)
    return found[0], found[1]


def check_columns(actual: Tensor, due: tuple[Tensor, Tensor], columns: slice) -> None:
    exact, yardstick = (each[..., columns] for each in due)
    check("logits", actual[..., columns], exact, yardstick, actual.dtype)


def test_a_resized_residual_keeps_its_adapter() -> None:
    model = adapted(False, init_lora_weights="olora")
    model.lm_head.lora_B.data.mul_(2)
    before = by_formula(model)
    model.resize_token_embeddings(70)
    check_columns(logits(model), before, slice(V))
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
        lora_kernels.restore_linear(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.shape[0] == 70


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT's own", "fused"])
@ties
def test_a_peft_model_that_is_resized_never_runs_with_wrong_numbers(fused: bool, tied: bool) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of an adapter on a tied head
        model = peft.get_peft_model(llama(tied), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    if fused:
        lora_kernels.fuse_peft(model)
    with pytest.raises((TypeError, KeyError, RuntimeError, LoRAKernelsError)):
        resized_logits(model.base_model.model)


def resized_logits(model: Any) -> Tensor:
    model.resize_token_embeddings(70)
    return logits(model)


# save_pretrained


@ties
@merges
def test_save_pretrained_tells_that_the_adapters_do_not_come_back(tied: bool, merged: bool, tmp_path: Path) -> None:
    model = adapted(tied, merged=merged)
    with pytest.warns(LoRAKernelsWarning, match=r"save_adapter.*restore_linear") as warned:
        model.save_pretrained(tmp_path)
    assert [w.filename for w in warned if w.category is LoRAKernelsWarning] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
    save_adapter(model, tmp_path / "adapter")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    assert torch.equal(logits(again), off(model))
    load_adapter(again, tmp_path / "adapter")
    if merged:
        lora_kernels.merge_lora(again)
    assert torch.equal(logits(again), logits(model))


@ties
def test_a_merged_and_restored_model_is_what_save_pretrained_writes(tied: bool, tmp_path: Path) -> None:
    model = adapted(tied, merged=True)
    before = logits(model)
    model.config.tie_word_embeddings = False  # a merged head is tied no longer
    lora_kernels.restore_linear(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), before)


def test_names_agree_in_a_merged_model() -> None:
    model = adapted(True, "bias of B", target_modules="all-linear")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    lora_kernels.merge_lora(model)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names == list(model.state_dict())
    for name, parameter in model.named_parameters():
        assert same_bits(parameter, model.state_dict()[name])
    assert all(layer.weight is not layer.base_weight for _, layer in lora_layers(model))
