"""What is adapted besides one layer with LoRA: DoRA, several adapters, several layers, a decoder block.

A ``ModelSetup`` holds a frozen module whose linear layers, its sites, each have the values of one or more adapters and
of DoRA's magnitudes; every provider adapts a copy of the module that shares its Parameters.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..console import MissingExtraError
from .setups import Setup
from .workloads import Workload

__all__ = ["BASE_ROWS", "ModelSetup", "Site", "elements", "make_model_setups", "names", "shared"]

BASE_ROWS = "__base__"  # PEFT's name for rows without an adapter
_ROWS = ("a0", "a1", BASE_ROWS, "a0")
_ADAPTERS = {"two-adapters": 2, "three-adapters": 3, "mixed-batch": 2}
_HEAD = 64  # features of an attention head
_BLOCK_DEPTH = 4  # q, k, v; o; gate and up; down
_SCALING = 2.0


@dataclass(frozen=True)
class Site:
    """A linear layer's adapters: each A (R, K) and B (N, R), and DoRA's magnitudes (N,), exact in the compute dtype."""

    adapters: tuple[tuple[Tensor, Tensor], ...]
    magnitude: Tensor


@dataclass(frozen=True)
class ModelSetup(Setup):
    """One cell's tensors; of the fields of one layer, ``linear``, ``lora_a`` and ``lora_b`` are the first site's.

    Attributes:
        base: the frozen module.
        run: calls it, or an adapted copy of it: one output, or a tuple of them.
        sites: by the names of the linear layers in it.
        rows: of a mixed batch, each row's adapter.
        output_grads: for each output; empty where no gradient is due.
        expected: what the gate has found to be right, with LoRA and with DoRA, for every provider to come.
    """

    base: nn.Module
    run: Callable[[nn.Module, Tensor], Any]
    sites: dict[str, Site]
    rows: tuple[str, ...] | None
    output_grads: tuple[Tensor, ...]
    expected: dict[bool, Any] = field(default_factory=dict)

    @property
    def dys(self) -> tuple[Tensor, ...]:
        return self.output_grads

    @property
    def depth(self) -> int:
        return _BLOCK_DEPTH if self.workload.subject == "decoder-block" else 1


def names(setup: ModelSetup, dora: bool) -> list[str]:
    """The trainable tensors, in order."""
    parts = ("A", "B", "magnitude") if dora else ("A", "B")
    return [
        f"{site}.{i}.{part}" for site, its in setup.sites.items() for i in range(len(its.adapters)) for part in parts
    ]


def shared(module: nn.Module) -> nn.Module:
    """A copy that shares the Parameters: with a copy of those too, caches would favour whoever comes first."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def elements(workload: Workload) -> int:
    """Numbers that a call reads and writes besides what lies in the cache anyway."""
    m, k, n = workload.tokens, workload.in_features, workload.out_features
    gradients = int(workload.has_backward)
    if workload.subject == "three-layers":
        return m * k + 3 * n * k // 2 + gradients * 3 * m * n // 2
    if workload.subject == "decoder-block":
        return m * k + 4 * k * k + 3 * n * k + gradients * m * k
    return m * k + n * k + gradients * m * n  # y lies where the last y lay


def make_model_setups(workload: Workload, device: str, count: int = 1, seed: int = 0) -> list[ModelSetup]:
    """``count`` random sets for a cell; the terms of base and adapters are of one size.

    Raises:
        MissingExtraError: the block is transformers', which is not installed.
    """
    return [_make(workload, device, seed + i) for i in range(count)]


def _make(workload: Workload, device: str, seed: int) -> ModelSetup:
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, workload.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    base, run, sites = _base(workload, device, dtype)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 2:
            parameter.copy_(draw(*parameter.shape, scale=parameter.shape[1] ** -0.5))
    adapted = {name: _site(base.get_submodule(name), workload, draw) for name in sites}
    rows = _ROWS if workload.subject == "mixed-batch" else None
    shape = (len(rows), workload.tokens // len(rows)) if rows else (1, workload.tokens)
    x = draw(*shape, workload.in_features).requires_grad_(workload.records)
    dys: tuple[Tensor, ...] = ()
    if workload.has_backward:
        sizes = [_features(base.get_submodule(name))[1] for name in sites]
        outputs = [workload.in_features] if workload.subject == "decoder-block" else sizes
        dys = tuple(draw(*shape, n) for n in outputs)
    first = base.get_submodule(sites[0])
    assert isinstance(first, nn.Linear)
    (a, b), *_ = adapted[sites[0]].adapters
    dy = dys[0] if dys else x.new_empty(0)
    return ModelSetup(workload, first, a, b, x, dy, _SCALING, base, run, adapted, rows, dys)


def _site(linear: nn.Module, workload: Workload, draw: Callable[..., Tensor]) -> Site:
    (k, n), r = _features(linear), workload.r
    count = _ADAPTERS.get(workload.subject, 1)
    adapters = tuple((draw(r, k, scale=k**-0.5), draw(n, r, scale=r**-0.5 / _SCALING)) for _ in range(count))
    a, b = (tensor.float() for tensor in adapters[0])
    norms = torch.linalg.vector_norm(linear.get_parameter("weight").float() + _SCALING * (b @ a), dim=1)
    return Site(adapters, (norms * draw(n).sigmoid().add(0.5)).bfloat16().to(norms.dtype))


def _features(linear: nn.Module) -> tuple[int, int]:
    n, k = linear.get_parameter("weight").shape
    return k, n


def _base(workload: Workload, device: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[..., Any], list[str]]:
    """The module, how it is called, and the names of its linear layers."""
    k, n = workload.in_features, workload.out_features
    if workload.subject == "decoder-block":
        return _decoder_block(k, n, workload.tokens, device, dtype)
    sizes = {"q": n, "k": n // 4, "v": n // 4} if workload.subject == "three-layers" else {"layer": n}
    layers = {name: nn.Linear(k, size, bias=workload.bias, device=device, dtype=dtype) for name, size in sizes.items()}
    return nn.ModuleDict(layers), partial(_run_layers, list(layers)), list(layers)


def _run_layers(layers: list[str], module: nn.Module, x: Tensor) -> Any:
    outputs = tuple(module.get_submodule(name)(x) for name in layers)
    return outputs if len(outputs) > 1 else outputs[0]


def _decoder_block(
    hidden: int, intermediate: int, tokens: int, device: str, dtype: torch.dtype
) -> tuple[nn.Module, Callable[..., Any], list[str]]:
    """transformers' Llama block with a quarter of key and value heads, and the rotary embedding of its positions."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError(
            "a decoder block is transformers', which is not installed. Run: pip install transformers; or leave these "
            "cells out with --only subject=dora,two-adapters,three-adapters,mixed-batch,three-layers."
        )
    from transformers.models.llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    heads = max(4, hidden // _HEAD)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        block = LlamaDecoderLayer(config, 0).to(dtype)
        positions = torch.arange(tokens).unsqueeze(0)
        rotary = LlamaRotaryEmbedding(config)(torch.empty(1, device=device, dtype=dtype), positions)
    sites = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    return block, partial(_run_block, rotary), sites


def _run_block(rotary: tuple[Tensor, Tensor], module: nn.Module, x: Tensor) -> Any:
    return module(x, position_embeddings=tuple(part.to(x.dtype) for part in rotary))
