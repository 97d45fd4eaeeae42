"""torch.compile: no graph break, no recompilation over M, the same results; torch.export for inference."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cases import BACKENDS, Case, make
from lora_kernels import FusedLoRALinear, lora_linear, use_backend
from numerics import check, same_bits


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False])
def test_layer_compiles_whole(backend: str, device: str, compiler: str, training: bool) -> None:
    layer = FusedLoRALinear(24, 16, r=4, lora_dropout=0.0, init_lora_weights=False, device=device).train(training)
    x = torch.randn(2, 5, 24, device=device, requires_grad=True)
    with use_backend(backend):
        expected = layer(x)
        by_eager = torch.autograd.grad(expected.sum(), (x, layer.lora_A, layer.lora_B))
        actual = torch.compile(layer, fullgraph=True, backend=compiler)(x)
        by_compiled = torch.autograd.grad(actual.sum(), (x, layer.lora_A, layer.lora_B))
    assert same_bits(actual.detach(), expected.detach())
    assert all(same_bits(left, right) for left, right in zip(by_compiled, by_eager, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_compilation_serves_every_number_of_tokens(compiler: str, p: float) -> None:
    counter = CompileCounterWithBackend(compiler)
    layer = FusedLoRALinear(24, 16, r=4, lora_dropout=p)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for m in (3, 7, 20, 64, 129):
        x = torch.randn(m, 24, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).sum().backward()
        assert x.grad.shape == (m, 24)
    assert counter.frame_count == 1


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_mixed_dtypes_and_no_grad(p: float) -> None:
    layer = FusedLoRALinear(24, 16, r=4, lora_dropout=p, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(torch.randn(5, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    full = torch.compile(FusedLoRALinear(24, 16, r=4, lora_dropout=p), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y = full(torch.randn(5, 24))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    with torch.no_grad():
        assert full(torch.randn(5, 24)).grad_fn is None


def test_compiled_dropout_uses_one_mask_for_forward_and_backward() -> None:
    """With W = 0 and B = 1, y of a row is the sum of kept x A: its gradient tells the mask, and must agree with y."""
    x = torch.rand(16, 40).add_(0.5).requires_grad_()
    weight, a, b = torch.zeros(1, 40), torch.ones(1, 40), torch.ones(1, 1)

    @torch.compile(fullgraph=True, backend="inductor")
    def layer(t: torch.Tensor) -> torch.Tensor:
        return lora_linear(t, weight, a, b, dropout_p=0.5, training=True)

    y = layer(x)
    y.sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}
    from_mask = (x.detach().double() * x.grad.double()).sum(1)
    check("y", y.squeeze(1), from_mask, from_mask.float(), torch.float32)


def test_export_for_inference() -> None:
    layer = FusedLoRALinear(24, 16, r=4, lora_dropout=0.5, init_lora_weights=False).eval()
    x = torch.randn(5, 24)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: torch.export.Dim("m", min=2)}})
    for m in (5, 9):
        x = torch.randn(m, 24)
        assert same_bits(exported.module()(x).detach(), layer(x).detach())


def test_merged_and_disabled_layers_compile() -> None:
    layer = FusedLoRALinear(24, 16, r=4, init_lora_weights=False)
    x = torch.randn(5, 24)
    layer.merge()
    assert same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(x).detach(), layer(x).detach())
    layer.unmerge()
    layer.enable_lora(False)
    assert same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(x).detach(), layer(x).detach())


def test_functional_case_with_changing_weights() -> None:
    """Sizes that dynamo takes for dynamic must not break the capture: the choice of backend rests on none of them."""
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for case in (Case(), Case(m=5, k=9, n=12, r=3), Case(m=7, k=33, n=20, r=5)):
        i = make(case)
        tensors = (i.x, i.weight, i.lora_a, i.lora_b)
        assert same_bits(compiled(*tensors).detach(), lora_linear(*tensors).detach())
