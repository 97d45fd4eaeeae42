"""torch.compile's default compiler over quantised weights: it gives the operators the packages' own Parameters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import ops
from lora_kernels.backends.native import coded, load
from numerics import same_bits
from quantised import BITSANDBYTES, KINDS, adapted

NAMES = ("coded_values", "coded_product", "coded_input_grad")


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    if reasons := load.why_not("cpu"):
        pytest.skip(" ".join(reasons))
    load.load("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the library's functions for codes that run, as they run."""
    names: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            names.append(name)
            return function(*arguments)

        return noted

    for name in NAMES:
        noted = noting(name, getattr(ops, name))
        for module in (ops, coded):
            monkeypatch.setattr(module, name, noted)
    return names


class _Layers(nn.ModuleDict):
    """A layer of each kind, each with an x of its own."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.values(), xs, strict=True)]


@pytest.mark.parametrize("package", ["", "ao", "fp8"], ids=["bitsandbytes", "torchao", "transformers"])
def test_each_form_compiles_to_the_same_bits_by_the_same_kernels(package: str, calls: list[str]) -> None:
    """One graph for both numbers of tokens: of few the codes are read, of many the values are made."""
    kinds = [kind for kind in KINDS if (kind in BITSANDBYTES if not package else kind.startswith(package))]
    if not kinds:
        pytest.skip("this version of the package has no such layers")
    layers = _Layers({kind: adapted(kind, 64, 96, torch.bfloat16) for kind in kinds})
    compiled = torch.compile(layers, fullgraph=True, dynamic=True)
    for m in (3, 40):
        xs, dys = torch.randn(len(kinds), m, 64).bfloat16(), torch.randn(len(kinds), m, 96).bfloat16()
        expected, due = _pass(layers, layers, xs, dys), Counter(calls)
        calls.clear()
        found = _pass(compiled, layers, xs, dys)
        assert Counter(calls) == due
        assert [name for name, one in found.items() if not same_bits(one, expected[name])] == []
        calls.clear()


def _pass(run: Any, layers: _Layers, xs: Tensor, dys: Tensor) -> dict[str, Tensor]:
    """y, dx, dA and dB of each layer."""
    layers.zero_grad()
    given = [x.clone().requires_grad_() for x in xs]
    ys = run(given)
    torch.autograd.backward(ys, list(dys))
    found: dict[str, Any] = {}
    for (kind, layer), x, y in zip(layers.items(), given, ys, strict=True):
        own: Any = layer
        found |= {f"{kind} y": y.detach(), f"{kind} dx": x.grad}
        found |= {f"{kind} dA": own.lora_A.grad, f"{kind} dB": own.lora_B.grad}
    return found
