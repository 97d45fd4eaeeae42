"""What is kept for backward, counted tensor by tensor: x once for all that read it, h, seeds; no casts, no masks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels
from cases import BACKENDS
from lora_kernels import LoRAConfig, replace_linear, use_backend
from lora_kernels.benchmark.memory import storages_kept
from lora_kernels.branches import Branch
from lora_kernels.console import one_thread
from lora_kernels.gate import run_branches
from lora_kernels.kept import row_words
from made_models import acting
from numerics import same_bits

ON_CPU = [name for name, device in BACKENDS if device == "cpu"]
M, K, N, R = 32, 64, 48, 4
SEED = 16  # bytes


def kept(function: Any, *, but: Any = ()) -> list[Tensor]:
    """One tensor for each storage that ``function`` hands to autograd, without those of ``but``."""
    own = {tensor.untyped_storage().data_ptr() for tensor in but}
    return [tensor for address, tensor in storages_kept(function).items() if address not in own]


def sizes(tensors: list[Tensor]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tensor.shape) for tensor in tensors)


def size_of(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_three_layers_of_one_input_keep_it_once(backend: str, p: float) -> None:
    """fp32 adapters over a bf16 base, as PEFT makes them: x is not cast for them."""
    layers = nn.ModuleList(acting(K, N, r=R, lora_dropout=p, dtype=torch.bfloat16) for _ in range(3))
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    with use_backend(backend):
        found = kept(lambda: [layer(x) for layer in layers], but=[x, *layers.parameters()])
    masks = (M, row_words(K)) if backend == "triton" else (2,)  # one bit an element, or the seed
    assert sizes(found) == Counter([(M, R)] * 3 + ([masks] * 3 if p else []))
    bytes_of_mask = 4 * M * row_words(K) if backend == "triton" else SEED
    assert size_of([t for t in found if t.dtype in (torch.int32, torch.int64)]) == (3 * bytes_of_mask if p else 0)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_group_keeps_its_input_once(backend: str, p: float) -> None:
    layers = nn.ModuleList(acting(K, N, r=R) for _ in range(3))
    x = torch.randn(M, K, requires_grad=True)
    branches = [Branch(e.weight, e.lora_A, e.lora_B, e.bias, e.scaling) for e in layers]
    found = kept(lambda: run_branches(x, branches, p, backend), but=[x, *layers.parameters()])
    assert size_of(found) == 3 * M * R * found[0].itemsize + (3 * SEED if p else 0)


def test_dora_keeps_h_the_norms_and_what_its_magnitude_needs() -> None:
    """Its gradient is of x Wᵀ + s h Bᵀ, (M, N), which nothing smaller tells."""
    layer = acting(K, N, r=R, use_dora=True)
    x = torch.randn(M, K, requires_grad=True)
    found = sizes(kept(lambda: layer(x), but=[x, *layer.parameters()]))
    assert found.pop((N,)) <= 2
    assert found == Counter({(M, R): 1, (M, N): 1})


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_block_keeps_no_more_than_the_frozen_one_the_inputs_and_h(dtype: torch.dtype, p: float) -> None:
    """Seven layers read four inputs: attention's, o_proj's, the gate's and down_proj's."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, use_cache=False, **shape)).to(dtype)
    model.requires_grad_(False).train()
    embedded = torch.randn(2, M // 2, 64, dtype=dtype, requires_grad=True)

    def of_model() -> int:
        return size_of(kept(lambda: model(inputs_embeds=embedded).logits, but=[embedded, *model.parameters()]))

    frozen = of_model()
    replace_linear(model, LoRAConfig(r=R, lora_dropout=p, target_modules="all-linear"))
    lora_kernels.mark_only_lora_as_trainable(model)
    inputs = M * (3 * 64 + 96) * dtype.itemsize
    hidden = 7 * M * R * 4
    assert of_model() <= frozen + inputs + hidden + (7 * SEED if p else 0)


def test_checkpointing_keeps_the_input_alone() -> None:
    """In bytes: PyTorch 2.11 keeps an empty tensor of its own."""
    layer, x = acting(K, N, r=R, lora_dropout=0.1), torch.randn(M, K, requires_grad=True)
    but = [x, *layer.parameters()]
    assert size_of(kept(lambda: checkpoint(layer, x, use_reentrant=False), but=but)) == 0
    assert size_of(kept(lambda: layer(x), but=but)) == M * R * x.itemsize + SEED


# What a training loop does with gradients


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_gradients_accumulate_and_are_cleared(options: dict[str, Any], to_none: bool) -> None:
    layer = acting(K, N, **options)
    batches = [torch.randn(M, K) for _ in range(2)]

    def gradients(*of: Tensor) -> list[Tensor]:
        layer.zero_grad(set_to_none=to_none)
        for x in of:
            layer(x).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters() if p.requires_grad]

    first, second = gradients(batches[0]), gradients(batches[1])
    both = gradients(*batches)
    assert all(same_bits(sum_, a + b) for sum_, a, b in zip(both, first, second, strict=True))
    layer.zero_grad(set_to_none=to_none)
    assert all((p.grad is None) if to_none else not p.grad.any() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_optimizer_is_fp32_over_a_16_bit_base(checkpointing: bool) -> None:
    """Steps of 1e-5 move the adapters and the layer's function; in bf16 adapters of size one they would be lost."""
    layer = acting(K, N, r=R, dtype=torch.bfloat16, lora_dropout=0.1)
    with torch.no_grad():
        layer.lora_A.fill_(1.0)
    trained = [layer.lora_A, layer.lora_B]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    x = torch.randn(M, K, dtype=torch.bfloat16).requires_grad_()
    with one_thread():
        for _ in range(20):
            y = checkpoint(layer, x, use_reentrant=True) if checkpointing else layer(x)
            y.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(value.dtype == torch.float32 for state in optimizer.state.values() for value in state.values())
    assert all(bool((now != then).all()) for now, then in zip(trained, before, strict=True))
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.grad is None
