"""What autograd, autocast and transforms promise of a plain layer holds over quantised weights too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from lora_kernels import FusedLoRAGroup, FusedLoRALinear, lora_linear, use_backend
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError
from quantised import adapted, quantised, values

ODD = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("dtype", ODD, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_x_of_no_floating_dtype_is_refused_under_autocast_too(kind: str, dtype: torch.dtype, on: bool) -> None:
    layer = adapted(kind, 64, 32, torch.float32)
    x = torch.ones(2, 64).to(dtype)
    refused = pytest.raises((InvalidArgumentError, InvalidTypeError), match=str(dtype))
    with layer.enable_lora(on), torch.autocast("cpu", torch.bfloat16), refused:
        layer(x)


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_autocast_leaves_fp64_as_it_is(options: dict[str, Any], on: bool) -> None:
    layer = adapted("int8", 64, 32, **options)
    x = torch.randn(3, 64, dtype=torch.float64)
    with layer.enable_lora(on):
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("state", ["off", "merged"])
@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_base_alone_has_forward_mode_derivatives(kind: str, records: bool, state: str) -> None:
    layer = adapted(kind, 64, 32, torch.float32)
    layer.enable_lora(False) if state == "off" else layer.merge(quantize=True)
    x, tangent = torch.randn(3, 64, requires_grad=records), torch.randn(3, 64)
    expected = F.linear(tangent, values(layer))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.jvp(layer, (x.detach(),), (tangent,))[1], expected)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    gradient = torch.func.grad(lambda own: layer(own).sum())(x.detach())
    torch.testing.assert_close(gradient, F.linear(torch.ones(3, 32), values(layer).t()))


@pytest.mark.parametrize("kind", ["nf4", "int8", "ao-int8", "fp8"])
def test_a_weight_that_was_written_to_since_forward_is_told_of(kind: str) -> None:
    layer = adapted(kind, 64, 32, torch.float32)
    y = layer(torch.randn(3, 64, requires_grad=True))
    with torch.no_grad():
        (layer.weight.qdata if kind.startswith("ao") else layer.weight).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_first_call_within_another_default_device_leaves_nothing_behind() -> None:
    text = (
        "import torch; from quantised import adapted\n"
        "layer = adapted('nf4', 64, 32, torch.float32); x = torch.ones(2, 64)\n"
        "with torch.device('meta'):\n"
        "    y = layer(x)\n"
        "assert torch.equal(y, layer(x))\n"
    )
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", text], cwd=tests, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["nf4", "plain"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_a_double_backward_of_no_tokens(kind: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    base = torch.nn.Linear(64, 32) if kind == "plain" else quantised(kind, 64, 32, torch.float32)
    layer = FusedLoRALinear.from_linear(base, r=4, **options)
    x = torch.randn(*shape, 64, requires_grad=True)
    dx, da = torch.autograd.grad(layer(x).sum(), (x, layer.lora_A), create_graph=True)
    assert dx.shape == x.shape
    assert not da.any()


def test_a_double_backward_of_a_weight_beside_an_activation() -> None:
    torch.manual_seed(0)
    weight, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((5, 6), (2, 6), (5, 2)))
    weight.requires_grad_()
    x, dy = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    for trains in (False, True):
        y = lora_linear(x, weight, a.requires_grad_(trains), b, activation="gelu")
        (dw,) = torch.autograd.grad(y, weight, dy, create_graph=True)
        torch.testing.assert_close(dw, dy.t() @ x)
        (twice,) = torch.autograd.grad(dw.square().sum(), dy)
        torch.testing.assert_close(twice, 2.0 * x @ (dy.t() @ x).t())


def test_a_double_backward_of_a_group_one_of_whose_layers_trains_nothing() -> None:
    layers = [FusedLoRALinear(8, 4, r=2) for _ in range(2)]
    layers[0].requires_grad_(False)
    with use_backend("eager"):
        ys = FusedLoRAGroup(layers)(torch.randn(20, 8))
    (db,) = torch.autograd.grad([y.sum() for y in ys], layers[1].lora_B, create_graph=True)
    assert db.shape == layers[1].lora_B.shape
    assert db.any()
