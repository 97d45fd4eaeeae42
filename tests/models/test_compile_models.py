"""A transformers Llama with fused layers, compiled and exported: no graph break, with dropout and checkpointing too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_kernels
from lora_kernels import LoRAConfig, fuse_peft, replace_linear
from lora_kernels.models.model import lora_layers
from numerics import check_all, same_bits

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from transformers.models.llama.modeling_llama import LlamaDecoderLayer  # noqa: E402

SIZES = (5, 9, 16, 21, 33)
SETTINGS = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
# transformers' own: its activation checkpointing says so for a model that is not in training.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


def llama(kind: str, p: float, **settings: Any) -> Any:
    """One block in float64, its seven layers fused; the adapters act."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, use_cache=False, **sizes)).double()
    arguments = SETTINGS | {"lora_dropout": p} | settings
    if kind == "replaced":
        replace_linear(model, LoRAConfig(**arguments, adapter_dtype=torch.float64))
        lora_kernels.mark_only_lora_as_trainable(model)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**arguments), autocast_adapter_dtype=False)
        fuse_peft(model)
    return model.train()


def checkpointing(model: Any, reentrant: bool) -> None:
    """As a trainer switches it on. The hook that makes embeddings require gradients serves the reentrant kind alone,
    and is the one thing in it that dynamo cannot put into a graph of the whole model."""
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not reentrant:
        model.disable_input_require_grads()


def tokens(m: int) -> Tensor:
    return torch.randint(64, (2, m), generator=torch.Generator().manual_seed(m))


def trained(model: Any, forward: Any, m: int) -> dict[str, Tensor]:
    """The loss and the gradient of every adapter, dropout from a seed."""
    model.zero_grad()
    ids = tokens(m)
    torch._dynamo.mark_dynamic(ids, 1)
    torch.manual_seed(m)
    loss = forward(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach().reshape(1)} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def same_for_every_size(model: Any, forward: Any) -> None:
    """In float64, for compiled elementwise chains round elsewhere; aot_eager draws the masks that the model draws."""
    for m in SIZES:
        exact = trained(model, model, m)
        check_all(trained(model, forward, m), exact, exact, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "recompute"), [("replaced", True), ("fused", False)])
def test_a_whole_model_is_one_graph_for_all_sizes(kind: str, recompute: bool) -> None:
    model = llama(kind, 0.1)
    if recompute:
        checkpointing(model, reentrant=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    same_for_every_size(model, compiled)
    assert counter.frame_count == 1
    with torch.no_grad():
        model.eval()
        found = [(compiled(input_ids=ids).logits, model(input_ids=ids).logits) for ids in map(tokens, SIZES)]
    for ours, exact in found:
        check_all({"y": ours.flatten(0, 1)}, {"y": exact.flatten(0, 1)}, {"y": exact.flatten(0, 1)}, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reentrant"), [("replaced", True), ("fused", False)])
def test_compiled_blocks_train_under_checkpointing(kind: str, reentrant: bool) -> None:
    """Block by block, as accelerate's regional compilation does it, with dropout."""
    model = llama(kind, 0.1)
    checkpointing(model, reentrant)
    compiled = copy.deepcopy(model)
    for block in (module for module in compiled.modules() if isinstance(module, LlamaDecoderLayer)):
        block.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    for m in SIZES:
        exact = trained(model, model, m)
        check_all(trained(compiled, compiled, m), exact, exact, torch.float64)


def test_inductor_recomputes_with_the_masks_of_forward() -> None:
    """Its numbers are its own. But the block's output is linear in down_proj's A, and in its B: their gradients, which
    are of the recomputed mask, times themselves are what the adapter adds in forward."""
    model = llama("replaced", 0.3).model
    model.norm = nn.Identity()
    checkpointing(model, reentrant=False)
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    last = model.layers[0].mlp.down_proj

    def output() -> Tensor:
        torch.manual_seed(3)
        return compiled(input_ids=tokens(6)).last_hidden_state

    y = output()
    y.sum().backward()
    assert all(layer.lora_B.grad.any() for _, layer in lora_layers(model))
    added = [(p.detach() * p.grad).sum().reshape(1) for p in (last.lora_A, last.lora_B)]
    with torch.no_grad():
        last.lora_B.zero_()
    exact = (y - output()).detach().sum().reshape(1)
    for name, found in zip(("da", "db"), added, strict=True):
        check_all({name: found}, {name: exact}, {name: exact}, torch.float64)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_replaced_model_is_exported_for_inference(use_dora: bool) -> None:
    model = llama("replaced", 0.1, use_dora=use_dora).eval()
    sizes = {"input_ids": {1: torch.export.Dim("m", min=2, max=64)}}
    program = torch.export.export(model, (), {"input_ids": tokens(8)}, dynamic_shapes=sizes)
    count = sum("lora_kernels" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert count == len(list(lora_layers(model))) * (2 if use_dora else 1)
    for m in (8, 13):
        assert same_bits(program.module()(input_ids=tokens(m)).logits, model(input_ids=tokens(m)).logits.detach())


def test_a_fused_peft_model_is_exported_by_pefts_own_forward() -> None:
    model = llama("fused", 0.1).eval()
    inner: nn.Module = model.base_model.model
    program = torch.export.export(inner, (), {"input_ids": tokens(8)})
    exact = model(input_ids=tokens(8)).logits.detach().flatten(0, 1)
    found = program.module()(input_ids=tokens(8)).logits.detach().flatten(0, 1)
    check_all({"y": found}, {"y": exact}, {"y": exact}, torch.float64)
