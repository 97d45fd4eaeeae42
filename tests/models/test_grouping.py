"""Which layers are found to read one x, how one names them oneself, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import architectures
from common_passes import passes, waiting
from lora_kernels import FusedLoRAGroup, FusedLoRALinear, LoRAConfig, replace_linear, share_inputs, unshare_inputs
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from made_models import acting, layer_state, refused


def bart() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartModel(transformers.BartConfig(vocab_size=24, max_position_embeddings=16, **sizes, **heads))


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.T5Model(
        transformers.T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )


def other(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {**architectures.SIZES, "num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")(vocab_size=24, pad_token_id=0, **sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FAMILIES: dict[str, tuple[Callable[[], nn.Module], set[tuple[str, ...]]]] = {
    "llama": (architectures.llama, {QKV, GATED}),
    "qwen2": (architectures.qwen2, {QKV, GATED}),
    "qwen3": (lambda: other("Qwen3"), {QKV, GATED}),
    "mistral": (lambda: other("Mistral"), {QKV, GATED}),
    "gemma": (lambda: other("Gemma"), {QKV, GATED}),
    "bert": (architectures.bert, {("query", "key", "value")}),
    "bart": (bart, set()),
    "t5": (t5, set()),
    "gpt2": (architectures.gpt2, set()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_self_attention_and_gated_mlps_are_found_and_cross_attention_is_not(family: str) -> None:
    make, names = FAMILIES[family]
    report = replace_linear(make(), LoRAConfig(r=2, target_modules="all-linear"))
    assert {tuple(name.rpartition(".")[2] for name in found) for found in report.groups} == names


def test_a_model_of_each_family_trains_with_every_pass_taken_whole() -> None:
    for family in ("llama", "qwen3", "mistral"):
        model = FAMILIES[family][0]()
        replace_linear(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"]))
        with passes() as counted:
            model(input_ids=architectures.TOKENS, labels=architectures.TOKENS).loss.backward()
        assert counted == [2] * 4
        assert not waiting(model)


def test_one_can_name_them_oneself() -> None:
    model = nn.ModuleDict({"left": nn.Linear(8, 8), "right": nn.Linear(8, 4), "narrow": nn.Linear(4, 4)})
    assert not replace_linear(model, LoRAConfig(r=2, target_modules=["left", "right", "narrow"])).groups
    refused(model, lambda m: share_inputs(m, [["left", "narrow"]]), InvalidArgumentError, "left 8, narrow 4")
    refused(model, lambda m: share_inputs(m, [["left", "middle"]]), InvalidArgumentError, "'middle'", "no module")
    assert str(share_inputs(model, [["left", "right"]])) == "1 group of layers with one input:\n  left + right"
    refused(model, lambda m: share_inputs(m, [["left", "right"]]), InvalidArgumentError, "run by themselves")
    x = torch.ones(3, 8)
    with passes() as counted:
        model["right"](x), model["left"](x)
    assert counted == [2]
    assert str(share_inputs(model)) == "no group of layers with one input"


def test_layers_made_in_inference_mode_run_in_common() -> None:
    with torch.inference_mode():
        layers = [acting(8, 4), acting(8, 6)]
    with passes() as counted, torch.no_grad():
        ys = FusedLoRAGroup(layers)(torch.randn(20, 8))
    assert counted == [2]
    assert [y.shape for y in ys] == [(20, 4), (20, 6)]


def test_bad_groups_are_refused() -> None:
    layer, single = acting(8, 4), acting(8, 4)
    together = FusedLoRAGroup([layer, acting(8, 6)])
    before = layer_state(together)
    for given, error, word in (
        ([single], InvalidArgumentError, "1 layer"),
        ([single, acting(6, 4)], InvalidArgumentError, "0 8, 1 6"),
        ([single, nn.ReLU()], InvalidTypeError, "ReLU"),
        ([single, layer], LoRAStateError, "'1' runs in common"),
    ):
        with pytest.raises(error, match=word):
            FusedLoRAGroup(given)
    assert layer_state(together).keys() == before.keys()
    assert "_shared" not in vars(single)
    for function in (share_inputs, unshare_inputs):
        with pytest.raises(InvalidTypeError, match="a str"):
            function("model")


def test_a_group_of_plain_layers_is_joined_when_they_are_replaced() -> None:
    together = FusedLoRAGroup([nn.Linear(8, 4), nn.Linear(8, 6), nn.Linear(8, 2)])
    x = torch.randn(3, 8)
    assert [y.shape[-1] for y in together(x)] == [4, 6, 2]
    assert replace_linear(together, LoRAConfig(r=2, target_modules=["0", "2"])).groups == (("0", "2"),)
    with passes() as counted:
        together(x)
    assert counted == [2]
    assert isinstance(together.get_submodule("0"), FusedLoRALinear)
