"""A loss in chunks that goes past an adapter on ``lm_head``, in a model that is compiled whole: told at once."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

import lora_kernels
from lora_kernels import LoRAConfig, mark_only_lora_as_trainable, replace_linear
from lora_kernels.errors import LoRAKernelsWarning

transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "up_proj", "lm_head"]
IDS = torch.arange(12).reshape(2, 6)


class Chunked(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    """Its loss multiplies by ``lm_head.weight``, as Liger's does, or calls the layer."""

    calls_the_head = False

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.model(input_ids=input_ids, use_cache=False)[0]
        logits = self.lm_head(h) if self.calls_the_head else F.linear(h, self.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1), input_ids.flatten())


def llama(calls_the_head: bool = False) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = Chunked(transformers.LlamaConfig(vocab_size=32, **sizes)).train()
    model.calls_the_head = calls_the_head
    return model


def fused(**settings: bool) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(**settings), peft.LoraConfig(r=4, target_modules=TARGETS)).train()
    lora_kernels.fuse_peft(model)
    return model


def replaced(**settings: bool) -> Any:
    model = llama(**settings)
    replace_linear(model, LoRAConfig(r=4, target_modules=TARGETS))
    mark_only_lora_as_trainable(model)
    return model


def frozen(**settings: bool) -> Any:
    model = replaced(**settings)
    model.lm_head.requires_grad_(False)
    return model


def told(model: Any, backend: Any = "aot_eager", steps: int = 2) -> list[str]:
    """What is warned of in some steps of the compiled model."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            compiled(input_ids=IDS).backward()
    return [str(warning.message) for warning in caught if issubclass(warning.category, LoRAKernelsWarning)]


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [fused, replaced])
def test_an_adapter_that_a_compiled_loss_passes_by_is_told_once(make: Callable[..., Any]) -> None:
    (sentence,) = told(make())
    assert sentence.startswith("lm_head has an adapter that trains, and this step never called lm_head")


@pytest.mark.parametrize("make", [fused, replaced])
def test_one_that_is_called_in_a_graph_is_quiet(make: Callable[..., Any]) -> None:
    assert told(make(calls_the_head=True)) == []


def test_one_that_is_frozen_is_quiet() -> None:
    assert told(frozen()) == []


def test_a_training_step_that_calls_no_body_is_quiet() -> None:
    """Elsewhere something was compiled in training; this model runs a layer of its own."""
    told(replaced(calls_the_head=True))
    model = replaced()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.model.layers[0].self_attn.q_proj(torch.ones(2, 32)).sum().backward()


def test_it_is_told_without_a_second_compilation() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    assert len(told(replaced(), counter, steps=1)) == 1
    first = counter.frame_count
    assert len(told(replaced(), counter, steps=4)) == 1
    assert counter.frame_count == 2 * first


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_watch_nothing(carry: Callable[[Any], Any]) -> None:
    assert told(carry(replaced())) == []
