"""Small PEFT models whose adapters act, the options that they are made with, and the parity that holds for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import fuse_peft
from lora_kernels.peft import calls
from numerics import check_all

peft = pytest.importorskip("peft")
from peft.tuners.lora import Linear  # noqa: E402
from peft.utils.hotswap import prepare_model_for_compiled_hotswap  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402


class Small(nn.Module):
    """Two linear layers, 24 -> 40 -> 16."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(24, 40, bias=bias), nn.Linear(40, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.lin0(x)))


class SmallConv1D(Small):
    """The same of transformers' ``Conv1D``, which holds its weight as (K, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = Conv1D(40, 24), Conv1D(16, 40)


def make(
    *adapters: dict[str, Any],
    base: Callable[[], nn.Module] = Small,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
) -> Any:
    """A PeftModel with adapters "a0", "a1", ... whose terms are about as large as the base's."""
    settings = [
        {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], **adapter} for adapter in adapters or ({},)
    ]
    model = peft.get_peft_model(base().to(dtype), peft.LoraConfig(**settings[0]), adapter_name="a0")
    for i, setting in enumerate(settings[1:], 1):
        model.add_adapter(f"a{i}", peft.LoraConfig(**setting))
    return acting(model, adapter_dtype)


@torch.no_grad()
def acting(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Random adapters of visible size, in ``dtype``."""
    for layer in lora_layers(model):
        for name in layer.lora_A:
            a, b = layer.lora_A[name].to(dtype), layer.lora_B[name].to(dtype)
            a.weight.normal_(std=layer.in_features**-0.5)
            b.weight.normal_(std=a.weight.shape[0] ** -0.5 / float(layer.scaling[name]))
            if b.bias is not None:
                b.bias.normal_()
            if name in layer.lora_magnitude_vector:  # of half to twice the norms, and exact in every dtype
                own = layer.lora_magnitude_vector[name].to(dtype).weight
                own.mul_(torch.empty_like(own).uniform_(0.5, 2.0)).copy_(own.bfloat16())
    return model


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def fused(model: Any) -> Any:
    """A fused copy."""
    other = copy.deepcopy(model)
    fuse_peft(other)
    return other


def results(model: Any, x: Tensor, seed: int | None = None, **arguments: Any) -> dict[str, Tensor]:
    """y, dx, and the gradient of every parameter that trains, by its name; dy is random and always the same."""
    x = x.detach().requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    y = model(x, **arguments)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **gradients}


def _all_train(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _no_b_trains(model: Any) -> None:
    for layer in lora_layers(model):
        layer.lora_B.requires_grad_(False)


def _no_magnitude_trains(model: Any) -> None:
    for layer in lora_layers(model):
        layer.lora_magnitude_vector.requires_grad_(False)


def _weights_train(model: Any) -> None:
    for layer in lora_layers(model):
        layer.base_layer.requires_grad_()


def _rescaled(model: Any) -> None:
    for layer in lora_layers(model):
        layer.set_scale("a0", 0.7)


def _hot_swappable(model: Any) -> None:
    prepare_model_for_compiled_hotswap(model, target_rank=9)


@dataclass(frozen=True)
class Option:
    """One way of using PEFT."""

    name: str
    adapters: tuple[dict[str, Any], ...] = ({},)
    active: tuple[str, ...] = ("a0",)
    base: Callable[[], nn.Module] = Small
    prepare: Callable[[Any], None] = lambda model: None
    rows: tuple[str, ...] | None = None  # adapter_names of a mixed batch
    shape: tuple[int, ...] = (5, 7)

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype = torch.float32) -> Any:
        model = make(*self.adapters, base=self.base, dtype=dtype, adapter_dtype=adapter_dtype).eval()
        model.base_model.set_adapter(list(self.active))
        self.prepare(model)
        return model

    def arguments(self) -> dict[str, Any]:
        return {} if self.rows is None else {"adapter_names": list(self.rows)}

    def x(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(*self.shape, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


TWO = ({"r": 4}, {"r": 3, "lora_alpha": 2})
CONV1D = {"fan_in_fan_out": True}
DORA = {"use_dora": True}
MIXED_ROWS = ("a1", "a0", "__base__", "a1", "a0")
OPTIONS = [
    Option("plain"),
    Option("one dimension", shape=()),
    Option("no tokens", shape=(0,)),
    Option("rslora", ({"use_rslora": True},)),
    Option("no bias", base=lambda: Small(bias=False)),
    Option("lora_bias", ({"lora_bias": True},)),
    Option("lora_bias alone", ({"lora_bias": True},), base=lambda: Small(bias=False)),
    Option("bias lora_only", ({"bias": "lora_only"},)),
    Option("bias all", ({"bias": "all"},)),
    Option("patterns", ({"rank_pattern": {"lin1": 7}, "alpha_pattern": {"lin0": 11}},)),
    Option("one layer", ({"target_modules": ["lin1"]},)),
    Option("conv1d", (CONV1D,), base=SmallConv1D),
    Option("conv1d trains", (CONV1D,), base=SmallConv1D, prepare=_weights_train),
    Option("weights train", prepare=_weights_train),
    Option("lora_B frozen", prepare=_no_b_trains),
    Option("scale set", prepare=_rescaled),
    Option("hot-swappable", prepare=_hot_swappable),
    Option("second active", TWO, ("a1",)),
    Option("two active", TWO, ("a0", "a1")),
    Option("two active, one scaling", ({}, {"r": 8, "lora_alpha": 12}), ("a0", "a1")),
    Option("two active, lora_bias", ({"lora_bias": True}, {"r": 3, "lora_bias": True}), ("a0", "a1")),
    Option("two active, hot-swappable", TWO, ("a0", "a1"), prepare=_hot_swappable),
    Option("two active, one here", ({}, {"target_modules": ["lin1"]}), ("a1", "a0")),
    Option("mixed batch", TWO, rows=MIXED_ROWS, prepare=_all_train),
    Option("mixed batch of one", TWO, rows=("a1",) * 5, prepare=_all_train),
    Option("mixed batch, one here", ({}, {"target_modules": ["lin1"]}), rows=MIXED_ROWS, prepare=_all_train),
    Option("mixed batch, conv1d", (CONV1D, CONV1D), base=SmallConv1D, rows=MIXED_ROWS, prepare=_all_train),
]


LORA_THEN_DORA = ({}, {"r": 3, "lora_alpha": 2, **DORA})
DORA_OPTIONS = [
    Option("dora", (DORA,)),
    Option("dora, no tokens", (DORA,), shape=(0,)),
    Option("dora, one token", (DORA,), shape=(1,)),
    Option("dora, no bias", (DORA,), base=lambda: Small(bias=False)),
    Option("dora, bias all", ({"bias": "all", **DORA},)),
    Option("dora, rslora", ({"use_rslora": True, **DORA},)),
    Option("dora, conv1d", (CONV1D | DORA,), base=SmallConv1D),
    Option("dora, weights train", (DORA,), prepare=_weights_train),
    Option("dora, conv1d trains", (CONV1D | DORA,), base=SmallConv1D, prepare=_weights_train),
    Option("dora, lora_B frozen", (DORA,), prepare=_no_b_trains),
    Option("dora, magnitudes frozen", (DORA,), prepare=_no_magnitude_trains),
    Option("dora, scale set", (DORA,), prepare=_rescaled),
    Option("dora, hot-swappable", (DORA,), prepare=_hot_swappable),
    Option("dora beside an idle one", LORA_THEN_DORA, ("a1",)),
    Option("lora beside an idle dora", LORA_THEN_DORA, ("a0",)),
    Option("lora, then dora", LORA_THEN_DORA, ("a0", "a1")),
    Option("lora, then dora, conv1d", tuple(CONV1D | a for a in LORA_THEN_DORA), ("a0", "a1"), base=SmallConv1D),
    Option("lora, then dora, hot-swappable", LORA_THEN_DORA, ("a0", "a1"), prepare=_hot_swappable),
]


def assert_parity(
    option: Option,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    seed: int | None = None,
) -> None:
    """The fused model's results pass the policy, stock PEFT with adapters of the compute dtype as the yardstick.

    *Exact* is stock PEFT in float64 on the same rounded values. Under autocast all weights are rounded for it. With a
    ``seed`` all of them train, and drop what that seed says.
    """
    stock = option.make(dtype, adapter_dtype).train(seed is not None)
    model, x, arguments = fused(stock), option.x(dtype), option.arguments()
    compute = torch.bfloat16 if autocast else dtype
    yardstick = copy.deepcopy(stock)
    if not autocast:
        for layer in lora_layers(yardstick):
            layer.lora_A.to(compute), layer.lora_B.to(compute)
    exact = copy.deepcopy(stock if autocast else yardstick).to(compute).double()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        actual, by_peft = (results(m, x, seed, **arguments) for m in (model, yardstick))
    check_all(actual, lambda: results(exact, x.to(compute).double(), seed, **arguments), by_peft, compute)
    assert set(actual) == set(by_peft)
    assert [(n, g.dtype) for n, g in actual.items()] == [(n, g.dtype) for n, g in results_dtypes(stock, actual)]
    assert not calls(model).own
    assert calls(model).fused


def results_dtypes(model: Any, actual: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """``actual``'s names with tensors of the dtypes that they must have: a parameter's gradient has its dtype."""
    parameters = dict(model.named_parameters())
    return [(name, parameters.get(name, tensor)) for name, tensor in actual.items()]
