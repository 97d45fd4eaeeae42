"""``torch.compile`` of experts: one graph for every routing and number of tokens, and what eager mode gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import mixtures
from lora_kernels.accuracy import judge
from lora_kernels.config import AdapterOptions
from lora_kernels.errors import UnsupportedTransformError
from lora_kernels.experts.layer import FusedLoRAExperts, around_experts
from numerics import same_bits

pytest.importorskip("transformers")

NAMES = ("gate_up_proj", "down_proj")


def adapted(kind: str, dropout: float = 0.0) -> FusedLoRAExperts:
    module = mixtures.experts(kind)
    names = NAMES if module.has_gate else ("up_proj", "down_proj")
    layer = around_experts(module, dict.fromkeys(names, AdapterOptions(3, 6.0, lora_dropout=dropout)))
    mixtures.move(p for p in layer.parameters() if p.requires_grad)
    return layer.train()


def step(
    layer: FusedLoRAExperts, call: Any, seed: int, tokens: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """y and every gradient, for a routing of its own."""
    torch.manual_seed(seed)
    x, weights = (make(tokens, n).to(dtype).requires_grad_() for make, n in ((torch.randn, 16), (torch.rand, 2)))
    index = torch.stack([torch.randperm(layer.num_experts)[:2] for _ in range(tokens)])
    index[seed % tokens] = layer.num_experts  # sentinels
    layer.zero_grad()
    y = call(x, index, weights)
    y.backward(torch.ones_like(y))
    return [y.detach(), x.grad, weights.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_one_graph_for_every_routing(kind: str, dropout: float) -> None:
    torch.compiler.reset()
    layer, graphs = adapted(kind, dropout), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    call = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for seed, tokens in ((0, 40), (1, 40), (2, 17)):
        found, expected = step(layer, call, seed, tokens), step(layer, layer, seed, tokens)
        assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
    assert len(graphs) == 1


def test_inductor_trains_them() -> None:
    torch.compiler.reset()
    layer = adapted("qwen3_moe")
    call = torch.compile(layer, fullgraph=True)
    wide = copy.deepcopy(layer).double()
    exact = step(wide, wide, 3, 24, torch.float64)
    results = zip(step(layer, call, 3, 24), exact, step(layer, layer, 3, 24), strict=True)
    verdicts = [judge(str(i), *each, torch.float32, depth=2) for i, each in enumerate(results)]
    assert not (failed := [str(verdict) for verdict in verdicts if not verdict.passed]), "\n".join(failed)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_they_are_exported_for_every_routing(kind: str) -> None:
    layer = adapted(kind).eval()

    def given(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(tokens, 16), torch.randint(5, (tokens, 2)), torch.rand(tokens, 2)  # 4 is a sentinel

    rows = ({0: torch.export.Dim("m", min=2)},) * 3
    program = torch.export.export(layer, given(7), dynamic_shapes=rows, strict=False).module()
    for tokens in (7, 12):
        each = given(tokens)
        assert same_bits(program(*each).detach(), layer(*each).detach())


def test_a_negative_index_is_refused_in_a_graph_too() -> None:
    torch.compiler.reset()
    layer = adapted("mixtral")
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="negative index"):
        call(torch.randn(2, 16), torch.tensor([[0, -1], [1, 2]]), torch.rand(2, 2))


def test_a_compiled_forward_mode_is_refused_with_a_sentence() -> None:
    torch.compiler.reset()
    call = torch.compile(adapted("mixtral"), backend="aot_eager")
    x, index = torch.randn(2, 16), torch.tensor([[0, 1], [1, 2]])
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(UnsupportedTransformError, match="forward_ad"):
        call(forward_ad.make_dual(x, x), index, torch.rand(2, 2))
