"""An adapter in memory: what an engine is given is what the files hold, and a served copy computes the same."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, adapter_config, lora_state_dict, replace_linear, save_adapter
from lora_kernels.checkpoint import files
from lora_kernels.errors import InvalidArgumentError, LoRAStateError
from numerics import check_all, same_bits

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

# What vLLM and SGLang read of a key: the module's path, and which factor.
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
IDS = torch.arange(12).reshape(2, 6)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "dropout": {"lora_dropout": 0.5},
}
ENGINES = ["plain", "rslora", "pissa", "dropout"]  # lora_A and lora_B of linear layers, of one rank and alpha


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=32, initializer_range=0.2, **sizes)
    return transformers.LlamaForCausalLM(config).double()


def replaced(**options: Any) -> Any:
    model = llama()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
    replace_linear(model, LoRAConfig(**settings))
    lora_kernels.mark_only_lora_as_trainable(model)
    return model


def trained(model: Any, steps: int = 2) -> Any:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def logits(model: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model.eval()(input_ids=IDS).logits.flatten(0, 1)}


@pytest.mark.parametrize("case", OPTIONS)
def test_it_is_what_the_files_hold(case: str, tmp_path: Path) -> None:
    model = trained(replaced(**OPTIONS[case]))
    save_adapter(model, tmp_path)
    fields, tensors = files.read_pair(tmp_path)
    found = lora_state_dict(model, format="peft")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    assert not any(tensor.requires_grad for tensor in found.values())
    assert {key: value for key, value in adapter_config(model).items() if key in fields} == fields


@pytest.mark.parametrize("case", ENGINES)
def test_keys_are_those_that_engines_parse(case: str) -> None:
    model = replaced(**OPTIONS[case])
    found = {(key["module"], key["factor"]) for key in map(KEY.fullmatch, lora_state_dict(model, format="peft")) if key}
    assert found == {(name, factor) for name, _ in lora_kernels.models.layers.lora_layers(model) for factor in "AB"}
    fields = adapter_config(model)
    assert {"r", "lora_alpha", "target_modules", "use_rslora", "bias"} <= fields.keys()  # what they read of it
    assert (fields["peft_type"], fields["bias"], fields["use_dora"]) == ("LORA", "none", False)


@pytest.mark.parametrize("case", OPTIONS)
def test_a_served_copy_gives_the_logits_of_the_model_in_training(case: str) -> None:
    """transformers and PEFT, made once; then new values at each step, as an RL loop sends them."""
    peft = pytest.importorskip("peft")
    model, served = replaced(**OPTIONS[case]), None
    for _ in range(3):
        trained(model, steps=1)
        if served is None:
            served = peft.get_peft_model(llama(), peft.LoraConfig(**adapter_config(model)))
        left = peft.set_peft_model_state_dict(served, lora_state_dict(model, format="peft"))
        assert not left.unexpected_keys
        exact = logits(served)
        check_all(logits(model), exact, exact, torch.float64)


def test_a_fused_model_of_peft_gives_the_same_keys_by_pefts_own_function() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**adapter_config(replaced()))
    config.inference_mode = False
    model = peft.get_peft_model(llama(), config)
    lora_kernels.fuse_peft(model)
    trained(model)
    tensors = peft.get_peft_model_state_dict(model)
    assert tensors.keys() == lora_state_dict(replaced(), format="peft").keys()
    served = peft.get_peft_model(llama(), config)
    peft.set_peft_model_state_dict(served, tensors)
    exact = logits(served)
    check_all(logits(model), exact, exact, torch.float64)


def test_two_adapters_are_switched_in_place_without_a_compilation() -> None:
    """The Parameters stay, so a compiled or recorded graph reads the other values from the same addresses."""
    first, second = replaced(), trained(replaced())
    values = [{name: tensor.clone() for name, tensor in lora_state_dict(each).items()} for each in (first, second)]
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(first.eval(), backend=counter, fullgraph=True)
    places = [p.data_ptr() for p in first.parameters()]
    outputs = []
    for adapter in (0, 1, 0, 1):
        first.load_state_dict(values[adapter], strict=False)
        with torch.no_grad():
            outputs.append(compiled(input_ids=IDS, use_cache=False).logits)
    assert counter.frame_count == 1
    assert [p.data_ptr() for p in first.parameters()] == places
    assert same_bits(outputs[0], outputs[2])
    assert same_bits(outputs[1], outputs[3])
    exact = logits(second)
    check_all({"logits": outputs[1].flatten(0, 1)}, exact, exact, torch.float64)


def test_adapters_of_different_alphas_are_switched_with_their_scaling() -> None:
    """The tensors hold no alpha: each layer has it, and the second value makes it an input of the graph."""
    first, second = replaced(), replaced(lora_alpha=32)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(first.eval(), backend=counter, fullgraph=True)
    values = [{name: tensor.clone() for name, tensor in lora_state_dict(each).items()} for each in (first, second)]
    expected = [logits(each)["logits"] for each in (first, second)]
    counts = []
    for adapter, scaling in ((0, 2.0), (1, 8.0), (0, 2.0), (1, 8.0)):
        first.load_state_dict(values[adapter], strict=False)
        for _, layer in lora_kernels.models.layers.lora_layers(first):
            layer.scaling = scaling
        with torch.no_grad():
            found = {"logits": compiled(input_ids=IDS, use_cache=False).logits.flatten(0, 1)}
        check_all(found, exact := {"logits": expected[adapter]}, exact, torch.float64)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]


def test_two_adapters_of_peft_are_two_graphs_however_often_they_are_switched() -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
    model.add_adapter("other", peft.LoraConfig(**settings))
    lora_kernels.fuse_peft(model.eval())
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        with torch.no_grad():
            compiled(input_ids=IDS, use_cache=False)
    seen = counter.frame_count
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        expected = logits(model)
        with torch.no_grad():
            actual = compiled(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
        check_all({"logits": actual}, expected, expected, torch.float64)
    assert counter.frame_count == seen


def test_what_cannot_be_given_is_a_sentence() -> None:
    with pytest.raises(InvalidArgumentError, match="it must be 'peft', or None"):
        lora_state_dict(replaced(), format="vllm")
    for function in (adapter_config, lambda model: lora_state_dict(model, format="peft")):
        with pytest.raises(LoRAStateError, match=r"(adapter_config|lora_state_dict) was called on a LoRA layer itself"):
            function(FusedLoRALinear(4, 4, r=2))
        with pytest.raises(LoRAStateError, match="holds no FusedLoRALinear"):
            function(nn.Linear(4, 4))


def test_a_model_of_peft_is_told_pefts_own_functions() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    lora_kernels.fuse_peft(model)
    for function in (adapter_config, lora_state_dict, lambda model: lora_state_dict(model, format="peft")):
        with pytest.raises(LoRAStateError, match=r"layers are PEFT's.*get_peft_model_state_dict\(model\)"):
            function(model)


def test_warnings_stand_at_the_users_line() -> None:
    model = replaced()
    model.model.norm.weight.requires_grad_(True)
    for function in (adapter_config, lora_state_dict, lambda model: lora_state_dict(model, format="peft")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(model)
        assert [(each.filename, "model.norm.weight" in str(each.message)) for each in caught] == [(__file__, True)]
