"""Blocks that are compiled one by one and differ in a number only: two graphs, the first one's constants included.

``aot_eager`` runs the operators in the program's order, so the bits are those of the model that is not compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from cases import BACKENDS, Case, make
from lora_kernels import FusedLoRALinear, dispatch, fuse_peft, lora_linear, ops, use_backend
from numerics import same_bits

COUNT, WIDTH = 4, 16


class Block(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.up(x)
        return y


def _own(device: str, alphas: list[float], ps: list[float], **options: Any) -> nn.Module:
    def layer(alpha: float, p: float) -> nn.Module:
        own = FusedLoRALinear(WIDTH, WIDTH, r=4, lora_alpha=alpha, lora_dropout=p, device=device, **options)
        if own.lora_bias is not None:
            nn.init.normal_(own.lora_bias)
        nn.init.normal_(own.lora_B)
        return own

    return nn.Sequential(*[Block(layer(alpha, p)) for alpha, p in zip(alphas, ps, strict=True)])


def _peft(device: str, alphas: list[float], ps: list[float], **options: Any) -> nn.Module:
    assert len(set(ps)) == 1
    model = nn.Sequential(*[Block(nn.Linear(WIDTH, WIDTH)) for _ in alphas]).to(device)
    pattern = {f"{i}.up": alpha for i, alpha in enumerate(alphas)}
    common = {"r": 4, "target_modules": ["up"], "alpha_pattern": pattern, "init_lora_weights": False}
    whole = peft.get_peft_model(model, peft.LoraConfig(lora_dropout=ps[0], **common, **options))
    fuse_peft(whole)
    return model


ALPHAS, SAME = [3.0, 5.0, 7.0, 11.0], [4.0] * COUNT
EXACT = [2.0, 4.0, 8.0, 16.0]  # by whose scalings a product is exact: uncompiled, s b_B is rounded with its sum only
KINDS: dict[str, tuple[Callable[..., nn.Module], list[float], list[float], dict[str, Any]]] = {
    "own": (_own, ALPHAS, [0.0] * COUNT, {}),
    "p": (_own, SAME, [0.1, 0.2, 0.3, 0.4], {}),
    "both": (_own, ALPHAS, [0.1, 0.2, 0.3, 0.4], {}),
    "dora": (_own, ALPHAS, [0.0] * COUNT, {"use_dora": True}),
    "lora_bias": (_own, EXACT, [0.0] * COUNT, {"lora_bias": True}),
    "activation": (_own, ALPHAS, [0.0] * COUNT, {"activation": "gelu"}),
    "peft": (_peft, ALPHAS, [0.0] * COUNT, {}),
    "peft with dropout": (_peft, ALPHAS, [0.3] * COUNT, {}),
    "peft's dora": (_peft, ALPHAS, [0.0] * COUNT, {"use_dora": True}),
}


def _run(model: nn.Module, x: Tensor, record: bool) -> list[Tensor]:
    torch.manual_seed(3)
    with torch.set_grad_enabled(record):
        y = model(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sum(), trained)] if record else [y]


def _check(kind: str, device: str, backend: str, compiler: str = "aot_eager") -> None:
    build, alphas, ps, options = KINDS[kind]
    model, counter = build(device, alphas, ps, **options), CompileCounterWithBackend(compiler)
    x = torch.randn(5, WIDTH, device=device)
    with use_backend(backend):
        for record in (True, False):
            expected = _run(model, x, record)
            before = counter.frame_count
            for block in model:
                block._compiled_call_impl = None
                block.compile(backend=counter, fullgraph=True)
            actual = _run(model, x, record)
            for block in model:
                block._compiled_call_impl = None
            assert all(same_bits(left, right) for left, right in zip(actual, expected, strict=True))
            assert counter.frame_count - before <= 2


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("kind", ["own", "both"])
def test_blocks_that_differ_in_numbers_are_two_graphs(kind: str, backend: str, device: str) -> None:
    _check(kind, device, backend)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"own", "both"}))
def test_of_every_kind(kind: str) -> None:
    _check(kind, "cpu", "eager")


def test_with_inductor() -> None:
    _check("own", "cpu", "eager", "inductor")


def test_a_number_that_changes_from_call_to_call_is_an_input_in_the_end() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lora_linear, backend=counter, fullgraph=True)
    given = make(Case(), "cpu")
    tensors = [tensor.detach() for tensor in (given.x, given.weight, given.lora_a, given.lora_b)]
    for scaling in (0.5, 0.75, 3.0, 2, 4, 1.25):
        assert same_bits(compiled(*tensors, scaling=scaling), lora_linear(*tensors, scaling=scaling))
    assert counter.frame_count <= 4  # a float and an int, fixed and not


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_the_overload_by_tensors_obeys_torch_library(backend: str, device: str) -> None:
    case = Case(m=6, k=10, n=8, r=3)
    dispatch.select(device, case.dtype, backend)
    i = make(case, device)
    x, weight, lora_a, lora_b = (tensor.detach() for tensor in (i.x, i.weight, i.lora_a, i.lora_b))
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.7, 0.0)]
    packet = ops._packets[backend]["forward"]
    torch.library.opcheck(packet.Tensor, (x, weight, lora_a, lora_b, None, *numbers, None))
    assert torch.Tag.cudagraph_unsafe in packet.Tensor.tags
    by_tensors = packet.Tensor(x, weight, lora_a, lora_b, None, *numbers, None)[0]
    assert same_bits(by_tensors, packet(x, weight, lora_a, lora_b, None, 0.7, 0.0, None)[0])
