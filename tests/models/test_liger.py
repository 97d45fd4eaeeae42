"""Beside Liger: in any order, with its own model's results; an adapter on ``lm_head`` is not lost in silence."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from liger_on_cpu import stand_in
from lora_kernels import LoRAConfig, mark_only_lora_as_trainable, replace_linear
from lora_kernels.benchmark import llama_models
from lora_kernels.errors import LoRAKernelsWarning
from numerics import check_all

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
modeling = pytest.importorskip("transformers.models.llama.modeling_llama")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="these are for a CPU; on a GPU, bench runs Liger's own kernels"
)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in(monkeypatch)
    with llama_models.unpatched():
        yield


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, initializer_range=0.2, **sizes)
    return transformers.LlamaForCausalLM(config).train()


def with_liger(model: Any = None, **settings: bool) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    liger.apply_liger_kernel_to_llama(model=inner, **settings)


def by_peft(model: Any, targets: list[str] = PROJECTIONS, dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    settings = {"target_modules": targets, "init_lora_weights": False, "lora_dropout": dropout}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings)).train()


def replaced(model: Any, targets: list[str] = PROJECTIONS) -> Any:
    torch.manual_seed(1)
    config = LoRAConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    replace_linear(model, config)
    mark_only_lora_as_trainable(model)
    return model


def fused(model: Any) -> Any:
    lora_kernels.fuse_peft(model)
    return model


def then_liger(model: Any, **settings: bool) -> Any:
    with_liger(model, **settings)
    return model


def liger_classes_first() -> Any:
    """Before the model is made, as most trainers do."""
    with_liger()
    return llama()


def results(model: Any) -> dict[str, Tensor]:
    """The loss, and the adapters' gradients by the plain model's names."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    found = {"loss": loss.detach().reshape(1)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
            found[plain] = parameter.grad
    return found


# Each order with what becomes of the MLPs: in one pass; or by Liger's forward, and who says so.
ORDERS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "Liger's classes, PEFT, ours": (lambda: fused(by_peft(liger_classes_first())), "Liger's"),
    "Liger, PEFT, ours": (lambda: fused(by_peft(then_liger(llama()))), "Liger's"),
    "PEFT, Liger, ours": (lambda: fused(then_liger(by_peft(llama()))), "Liger's"),
    "PEFT, ours, Liger": (lambda: then_liger(fused(by_peft(llama()))), "Liger's"),
    "PEFT, ours, Liger without SwiGLU": (lambda: then_liger(fused(by_peft(llama())), swiglu=False), None),
    "Liger without SwiGLU, PEFT, ours": (lambda: fused(by_peft(then_liger(llama(), swiglu=False))), None),
}
REPLACED: dict[str, tuple[Callable[[], Any], str | None]] = {
    "Liger's classes, replaced": (lambda: replaced(liger_classes_first()), "Liger's"),
    "Liger, replaced": (lambda: replaced(then_liger(llama())), "Liger's"),
    "replaced, Liger": (lambda: then_liger(replaced(llama())), "Liger's"),
    "replaced, Liger without SwiGLU": (lambda: then_liger(replaced(llama()), swiglu=False), None),
}


def same_as(model: Any, plain: Any) -> None:
    """In float64, as for other whole models: the other model has Liger too."""
    exact = results(then_liger(plain.double()))
    check_all(results(model.double()), exact, exact, torch.float64)


def check_mlps(model: Any, why: str | None) -> None:
    mlp = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    if not hasattr(mlp, "why_plain"):
        assert why is not None
        assert why in str(lora_kernels.share_inputs(model))
    elif why is None:
        assert mlp.why_plain() is None
    else:
        assert why in mlp.why_plain()


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_with_peft_gives_pefts_loss_and_gradients(order: str) -> None:
    make, why = ORDERS[order]
    model = make()
    check_mlps(model, why)
    same_as(model, by_peft(llama()))
    assert lora_kernels.peft.calls(model).share == 1.0


@pytest.mark.parametrize("order", REPLACED)
def test_every_order_of_replaced_layers_gives_the_plain_ones(order: str) -> None:
    make, why = REPLACED[order]
    model = make()
    check_mlps(model, why)
    same_as(model, replaced(llama()))


def test_liger_itself_gives_transformers_loss_and_gradients() -> None:
    """Or the comparisons with Liger on both sides would not tell."""
    plain = by_peft(llama())
    exact = partial(results, copy.deepcopy(plain).double())
    check_all(results(then_liger(by_peft(llama()))), exact, results(plain), torch.float32)


def test_unfusing_leaves_pefts_model_with_liger() -> None:
    model = then_liger(fused(by_peft(llama())))
    lora_kernels.unfuse_peft(model)
    same_as(model, by_peft(llama()))


# An adapter on lm_head

HEAD = [*PROJECTIONS, "lm_head"]
HEADS: dict[str, Callable[[], Any]] = {
    "Liger, PEFT, ours": lambda: fused(by_peft(then_liger(llama()), HEAD)),
    "PEFT, ours, Liger": lambda: then_liger(fused(by_peft(llama(), HEAD))),
    "Liger, replaced": lambda: replaced(then_liger(llama()), HEAD),
    "replaced, Liger": lambda: then_liger(replaced(llama(), HEAD)),
}


def told(model: Any, steps: int = 2) -> list[str]:
    """What is warned of in some steps, after an evaluation, which calls the head."""
    model.eval()(input_ids=IDS, labels=IDS)
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            results(model)
    return [str(warning.message) for warning in caught if issubclass(warning.category, LoRAKernelsWarning)]


@pytest.mark.parametrize("order", HEADS)
def test_an_adapter_that_the_loss_in_chunks_passes_by_is_told_once(order: str) -> None:
    (sentence,) = told(HEADS[order]())
    assert sentence.startswith("lm_head has an adapter that trains, and this step never called lm_head")
    assert "fused_linear_cross_entropy=False" in sentence


@pytest.mark.parametrize("order", ["fused", "replaced"])
def test_with_the_loss_of_the_logits_it_trains(order: str) -> None:
    settings = {"fused_linear_cross_entropy": False}
    make = {"fused": lambda: fused(by_peft(llama(), HEAD)), "replaced": lambda: replaced(llama(), HEAD)}[order]
    model = then_liger(make(), **settings)
    assert told(model) == []
    plain = make()
    assert any("lm_head" in name for name in results(plain))
    assert results(model).keys() == results(plain).keys()


QUIET: dict[str, Callable[[], Any]] = {
    "no adapter there": lambda: then_liger(fused(by_peft(llama()))),
    "unfused and taken out": lambda: then_liger(fused(by_peft(llama(), HEAD)).unload()),
    "restored": lambda: _restored(then_liger(replaced(llama(), HEAD))),
    "frozen": lambda: _frozen(then_liger(replaced(llama(), HEAD))),
    "checkpointed": lambda: _checkpointed(replaced(llama(), HEAD)),
}


def _restored(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora_kernels.restore_linear(model)
    return model.requires_grad_(True)


def _frozen(model: Any) -> Any:
    model.lm_head.requires_grad_(False)
    return model


def _checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("case", QUIET)
def test_there_is_no_false_alarm(case: str) -> None:
    assert told(QUIET[case]().requires_grad_(True) if case == "unfused and taken out" else QUIET[case]()) == []


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_watched_model_is_copied_and_pickled(carry: Callable[[nn.Module], nn.Module]) -> None:
    model = replaced(llama(), HEAD)
    model(input_ids=IDS)  # begun, without a backward
    copied: Any = carry(model)
    assert told(copied) == []
    assert not model.model._forward_hooks
