"""Backward of a batch of gradients in one call, and under autocast: each as by itself, over every weight, by every
backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixtures
from cases import BACKENDS
from lora_kernels import FusedLoRALinear, FusedLoRAMLP, share_inputs, use_backend
from lora_kernels.config import AdapterOptions
from lora_kernels.experts.layer import around_experts
from made_models import acting
from numerics import same_bits

every_backend = pytest.mark.parametrize(("backend", "device"), [pair for pair in BACKENDS if pair[1] == "cpu"])


def _over_quantised(kind: str, **options: Any) -> Any:
    from quantised import quantised

    return FusedLoRALinear.from_linear(quantised(kind, 64, 48), r=3, init_lora_weights=False, **options)


def _switched_off() -> Any:
    layer = _over_quantised("nf4")
    layer.enable_lora(False)
    return layer.eval().requires_grad_(False)


class _Group(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = acting(64, 48, lora_dropout=0.3), acting(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x)


def _group() -> Any:
    model = _Group()
    assert share_inputs(model).groups
    return model


def _mlp() -> Any:
    return FusedLoRAMLP(acting(64, 24, lora_dropout=0.3), acting(64, 24, lora_dropout=0.3), acting(24, 48))


MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: acting(64, 48),
    "dropout": lambda: acting(64, 48, lora_dropout=0.3),
    "DoRA": lambda: acting(64, 48, use_dora=True),
    "DoRA and dropout": lambda: acting(64, 48, use_dora=True, lora_dropout=0.3),
    "activation": lambda: acting(64, 48, activation="gelu"),
    "NF4": lambda: _over_quantised("nf4", lora_dropout=0.3),
    "NF4 and DoRA": lambda: _over_quantised("nf4", use_dora=True),
    "int8": lambda: _over_quantised("int8"),
    "switched off": _switched_off,
    "group": _group,
    "gated MLP": _mlp,
}


def by_is_grads_batched(y: Tensor, due: list[Tensor], dys: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, due, dys, is_grads_batched=True, retain_graph=True)


def by_vmap(y: Tensor, due: list[Tensor], dys: Tensor) -> tuple[Tensor, ...]:
    one = torch.vmap(lambda dy: torch.autograd.grad(y, due, dy, retain_graph=True), in_dims=1)
    return one(dys.transpose(0, 1).contiguous())


WAYS = [by_is_grads_batched, by_vmap]


def check(y: Tensor, due: list[Tensor], way: Callable[..., tuple[Tensor, ...]]) -> None:
    dys = torch.randn(3, *y.shape)
    together = way(y, due, dys)
    apart = [torch.autograd.grad(y, due, dy, retain_graph=True) for dy in dys]
    for found, *alone in zip(together, *apart, strict=True):
        torch.testing.assert_close(found, torch.stack(alone))


@every_backend
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("kind", MODELS)
def test_each_is_as_by_itself(kind: str, tokens: int, way: Any, backend: str, device: str) -> None:
    model, x = MODELS[kind](), torch.randn(tokens, 64, requires_grad=True)
    with use_backend(backend):
        check(model(x), [x, *(p for p in model.parameters() if p.requires_grad)], way)


def _experts() -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """A mixture's, and what it is given: tokens, which experts' they are, and by which weights."""
    pytest.importorskip("transformers")
    layer = around_experts(
        mixtures.experts("mixtral"), dict.fromkeys(("gate_up_proj", "down_proj"), AdapterOptions(3, 6.0))
    )
    mixtures.move(p for p in layer.parameters() if p.requires_grad)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    return layer, (torch.randn(7, 16, requires_grad=True), index, torch.rand(7, 2, requires_grad=True))


@every_backend
@pytest.mark.parametrize("way", WAYS)
def test_of_stacked_experts(way: Any, backend: str, device: str) -> None:
    layer, given = _experts()
    with use_backend(backend):
        check(layer(*given), [given[0], given[2], *(p for p in layer.parameters() if p.requires_grad)], way)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "DoRA and dropout"])  # that is PyTorch's in part
def test_autocast_around_backward_alone_changes_no_bit(
    kind: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    model, x = MODELS[kind](), torch.randn(20, 64, requires_grad=True)
    with use_backend(backend):
        y = model(x)
        due, dy = [x, *(p for p in model.parameters() if p.requires_grad)], torch.randn_like(y)
        plain = torch.autograd.grad(y, due, dy, retain_graph=True)
        with torch.autocast(device, dtype):
            found = torch.autograd.grad(y, due, dy)
    assert all(same_bits(one, other) for one, other in zip(found, plain, strict=True))


@every_backend
def test_autocast_around_backward_of_experts(backend: str, device: str) -> None:
    layer, given = _experts()
    with use_backend(backend):
        y = layer(*given)
        due = [given[0], given[2], *(p for p in layer.parameters() if p.requires_grad)]
        plain = torch.autograd.grad(y, due, torch.ones_like(y), retain_graph=True)
        with torch.autocast(device, torch.bfloat16):
            found = torch.autograd.grad(y, due, torch.ones_like(y))
    assert all(same_bits(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_autocast_around_a_compiled_backward_alone_changes_no_bit(backend: str) -> None:
    """The graph's operators run within it; a composition's products were cast there, or met two dtypes."""
    model, x = MODELS["group"](), torch.randn(20, 64, requires_grad=True)
    with use_backend(backend):
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        due, dy = [x, *(p for p in model.parameters() if p.requires_grad)], torch.randn_like(y)
        plain = torch.autograd.grad(y, due, dy, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(y, due, dy)
    assert all(same_bits(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("kind", ["plain", "group", "switched off"])
def test_a_compiled_backward_multiplies_as_its_forward_did(kind: str) -> None:
    """A compiler traces it under the autocast of forward's caller, and forward itself may have run without."""
    model, x = MODELS[kind](), torch.randn(20, 64, requires_grad=True)
    trained = [x, *(p.requires_grad_() for p in model.parameters() if kind != "switched off")]

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y: Tensor = model(x)
        return y

    with use_backend("eager"):
        found = []
        for way in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(4)
            with torch.autocast("cpu", torch.bfloat16):
                y = way(x)
            found.append(torch.autograd.grad(y, trained, torch.ones_like(y)))
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("kind", ["dropout", "NF4", "group", "gated MLP"])
def test_second_derivatives_of_a_batch(kind: str, backend: str) -> None:
    model, x = MODELS[kind](), torch.randn(3, 64, requires_grad=True)
    dys = torch.randn(2, 3, 48, requires_grad=True)

    def second(batched: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        y, due = model(x), [x, *(p for p in model.parameters() if p.requires_grad)]
        if batched:
            first = torch.autograd.grad(y, due, dys, is_grads_batched=True, create_graph=True)
        else:
            alone = [torch.autograd.grad(y, due, dy, create_graph=True) for dy in dys]
            first = tuple(torch.stack(of) for of in zip(*alone, strict=True))
        return torch.autograd.grad(sum(g.square().sum() for g in first), [dys, *due])

    with use_backend(backend):
        for found, alone in zip(second(True), second(False), strict=True):
            torch.testing.assert_close(found, alone)
