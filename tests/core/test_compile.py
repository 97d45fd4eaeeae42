"""torch.compile: no graph break, no recompilation over M, the same results; torch.export for inference.

``aot_eager`` runs PyTorch's own operators in the order of the program, so with one seed it gives the bits of the layer
that is not compiled, dropout included. Inductor draws other numbers, and compiles C++ for seconds: few tests take it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cases import BACKENDS, Case, make
from lora_kernels import FusedLoRALinear, lora_linear, use_backend
from lora_kernels.accuracy import sum_error
from lora_kernels.backends import composed
from lora_kernels.branches import Branch
from lora_kernels.errors import UnsupportedTransformError
from lora_kernels.gate import run_branches
from made_models import acting
from numerics import check, same_bits


@pytest.mark.parametrize(
    ("backend", "device", "compiler"), [*((*on, "aot_eager") for on in BACKENDS), (*BACKENDS[0], "inductor")]
)
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


class Group(nn.Module):
    """Three outputs of one x, each with an adapter of its own; one bends, one is scaled."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.layers, self.p = nn.ModuleList(acting(24, n, lora_dropout=p) for n in (16, 8, 12)), p
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, input: Tensor) -> Tensor:
        own = [(e.weight, e.lora_A, e.lora_B, e.bias, e.scaling) for e in self.layers]
        branches = [Branch(*own[0]), Branch(*own[1], self.gain), Branch(*own[2], None, "silu")]
        return torch.cat(run_branches(input, branches, self.p if self.training else 0.0), -1)


BF16 = {"dtype": torch.bfloat16}
KINDS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: acting(24, 16, lora_dropout=0.3),
    "bias": lambda: acting(24, 16, lora_dropout=0.3, lora_bias=True),
    "fp32 over bf16": lambda: acting(24, 16, lora_dropout=0.3, **BF16),
    "bf16": lambda: acting(24, 16, lora_dropout=0.3, adapter_dtype=torch.bfloat16, **BF16),
    "autocast": lambda: acting(24, 16, lora_dropout=0.3),
    "dora": lambda: acting(24, 16, use_dora=True),
    "dora, dropout": lambda: acting(24, 16, use_dora=True, lora_dropout=0.3),
    "group": lambda: Group(0.0),
    "group, dropout": lambda: Group(0.3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_compiles_once_for_all_sizes_and_gives_the_same_bits(kind: str) -> None:
    """Training; then evaluation without gradients, which is a graph of its own."""
    module = KINDS[kind]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    dtype = next(module.parameters()).dtype
    cast = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()

    def run(of: Any, m: int) -> list[Tensor]:
        x = torch.randn(m, 2, 24, dtype=dtype, generator=torch.Generator().manual_seed(m)).requires_grad_(of.training)
        torch._dynamo.mark_dynamic(x, 0)
        torch.manual_seed(m)
        with torch.set_grad_enabled(of.training), cast:
            y = of(x)
        trained = [x, *(p for p in module.parameters() if p.requires_grad)]
        return [y.detach(), *(torch.autograd.grad(y.sum(), trained) if of.training else ())]

    for training in (True, False):
        module.train(training), compiled.train(training)
        for m in (3, 7, 20, 64, 129):
            assert all(same_bits(ours, plain) for ours, plain in zip(run(compiled, m), run(module, m), strict=True))
    assert counter.frame_count == 2


@pytest.mark.parametrize("reduce", [Tensor.sum, lambda y: (y * torch.arange(y.shape[-1])).sum()])
@pytest.mark.parametrize("kind", ["dropout", "bias", "dora"])
def test_what_libraries_sum_lies_alike_compiled_and_not(
    kind: str, reduce: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a sum is one number, expanded; a GPU's library sums in an order that it chooses by the layout."""
    seen: list[Any] = []

    def recorded(function: Any) -> Any:
        def called(*arguments: Any) -> Tensor:
            seen.append([a.stride() for a in arguments if isinstance(a, Tensor)])
            return function(*arguments)

        return called

    for name in ("scaled_product", "sum_of_rows"):
        monkeypatch.setattr(composed, name, recorded(getattr(composed, name)))
    module, x = KINDS[kind](), torch.randn(3, 2, 24, requires_grad=True)
    with use_backend("eager"):
        for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            reduce(function(x)).backward()
    middle = len(seen) // 2
    assert middle > 1
    assert seen[:middle] == seen[middle:]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["dropout", "dora, dropout", "group, dropout"])
def test_checkpointed_compiled_dropout_gives_the_same_bits(kind: str, reentrant: bool) -> None:
    module, x = KINDS[kind](), torch.randn(6, 24, requires_grad=True)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=reentrant)

    trained = [x, *(p for p in module.parameters() if p.requires_grad)]
    results = []
    for function in (module, checkpointed, torch.compile(checkpointed, fullgraph=True, backend="aot_eager")):
        for leaf in trained:
            leaf.grad = None
        torch.manual_seed(5)
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in trained)])
    for other in results[1:]:
        assert all(same_bits(left, right) for left, right in zip(other, results[0], strict=True))


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_dropout_uses_one_mask_for_forward_and_backward(checkpointing: bool) -> None:
    """With W = 0 and B = 1, y of a row is the sum of kept x A: its gradient tells the mask, and must agree with y."""
    x = torch.rand(16, 40).add_(0.5).requires_grad_()
    weight, a, b = torch.zeros(1, 40), torch.ones(1, 40), torch.ones(1, 1, requires_grad=True)

    def layer(t: torch.Tensor) -> torch.Tensor:
        return lora_linear(t, weight, a, b, dropout_p=0.5, training=True)

    @torch.compile(fullgraph=True, backend="inductor")
    def compiled(t: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, t, use_reentrant=False) if checkpointing else layer(t)

    y = compiled(x)
    y.sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}
    from_mask = (x.detach().double() * x.grad.double()).sum(1)
    expected = sum_error(x * x.grad, a.t()).squeeze(1)
    check("y", y.squeeze(1), from_mask, from_mask.float(), torch.float32, expected=expected)


@pytest.mark.parametrize("transform", ["grad", "vmap", "parameters"])
@pytest.mark.parametrize("kind", ["plain", "dora", "group"])
def test_compiled_transforms_are_refused_with_a_sentence(kind: str, transform: str) -> None:
    """A graph would give zeros for gradients: what PyTorch records of a Function there does not reach the transform."""
    module = acting(24, 16) if kind == "plain" else KINDS[kind]()
    parameters = dict(module.named_parameters())

    def of_parameters(x: Tensor) -> Any:
        return torch.func.grad(lambda own: torch.func.functional_call(module, own, (x,)).sum())(parameters)

    by = {
        "grad": torch.func.grad(lambda x: module(x).sum()),
        "vmap": torch.vmap(module),
        "parameters": of_parameters,
    }
    with pytest.raises(UnsupportedTransformError, match=r"torch\.func or vmap"):
        torch.compile(by[transform], backend="aot_eager")(torch.randn(3, 24))


@pytest.mark.parametrize("kind", ["plain", "dora", "group"])
def test_a_compiled_forward_mode_is_refused_with_a_sentence(kind: str) -> None:
    """A compiler's tensors tell no tangent: under no_grad the graph gave y without one."""
    module = acting(24, 16) if kind == "plain" else KINDS[kind]()
    compiled = torch.compile(module, backend="aot_eager")
    x = torch.randn(3, 24)
    with torch.no_grad():
        compiled(x)
        with forward_ad.dual_level(), pytest.raises(UnsupportedTransformError, match=r"forward_ad"):
            compiled(forward_ad.make_dual(x, x))


def exported(module: nn.Module, x: Tensor, **arguments: Any) -> Any:
    """``module`` as a program for any number of rows, written to a file and read again."""
    rows = {"input": {0: torch.export.Dim("m", min=2)}}
    program = torch.export.export(module, (x,), dynamic_shapes=rows, **arguments)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["dropout", "bias", "fp32 over bf16", "dora, dropout", "group"])
def test_export_for_inference(kind: str, strict: bool) -> None:
    """With gradients on or off, whether the adapters train or not; the operators stay in the program."""
    layer = KINDS[kind]().eval()
    x = torch.randn(5, 24, dtype=next(layer.parameters()).dtype)
    program = exported(layer, x, strict=strict)
    names = {str(n.target) for g in program.graph_module.modules() if hasattr(g, "graph") for n in g.graph.nodes}
    assert any(name.startswith("lora_kernels.") for name in names)
    for m in (5, 9):
        x = torch.randn(m, 24, dtype=x.dtype)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                assert same_bits(program.module()(x).detach(), layer(x).detach())


def test_merged_and_disabled_layers_are_exported() -> None:
    x = torch.randn(5, 24)
    layer = acting(24, 16).eval()
    layer.enable_lora(False)
    assert same_bits(exported(layer, x).module()(x).detach(), layer(x).detach())
    layer.enable_lora()
    layer.merge()
    assert same_bits(exported(layer, x).module()(x).detach(), layer(x).detach())


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
