"""Each pair of features, and many at once, beside plain formulas: outputs, every gradient, and that they have acted.

Features are switches: :func:`made` builds what they ask for, :func:`called` calls it as they ask, and :func:`measured`
says what is right. ``crossings.py`` names the pairs that cannot be, with the reason.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import BACKENDS
from common_passes import passes
from crossings import REASONS, SWITCHES
from lora_kernels import FusedLoRAGroup, LoRAConfig, dispatch, ops, replace_linear
from lora_kernels.accuracy import expected_errors, run_reference
from made_models import formula
from numerics import check, check_all

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

K, SIZES, P = 24, (40, 16), 0.3
PAIRS = [pair for pair in combinations(SWITCHES, 2) if pair not in REASONS]
NARROW = {"16-bit", "autocast", "backends"}  # not in float64
BF16, FP16 = torch.bfloat16, torch.float16
Results = dict[str, Tensor]


def goes_together(features: set[str]) -> bool:
    """DoRA with dropout has float64 alone to be judged by."""
    refused = any({*both} <= features for both in REASONS)
    return not refused and not ({"dora", "dropout"} <= features and NARROW & features)


def many() -> list[tuple[str, ...]]:
    """Sets of features, of which each three that go together are in one at least; none that compiles for seconds."""
    names, draw, found = [name for name in SWITCHES if name != "compile"], random.Random(0), []
    left = {three for three in combinations(names, 3) if goes_together({*three})}
    while left:
        wanted = min(left)
        drawn = [{*wanted, *draw.sample(names, 4)} for _ in range(40)]
        chosen = max(
            filter(goes_together, [{*wanted}, *drawn]), key=lambda some: sum({*three} <= some for three in left)
        )
        left -= {three for three in left if {*three} <= chosen}
        found.append(tuple(name for name in names if name in chosen))
    return found


@dataclass(frozen=True)
class Way:
    """One way of having all of ``features``: each may have several."""

    features: tuple[str, ...]
    frozen: str = ""  # the end of a name: of x, of the first layer's A or B
    reentrant: bool = False
    dtype: torch.dtype = torch.float64
    backend: str | None = None

    def has(self, feature: str) -> bool:
        return feature in self.features

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the products."""
        return BF16 if self.has("autocast") else self.dtype

    @property
    def name(self) -> str:
        """The backend that runs."""
        return dispatch.select("cpu", self.compute, self.backend)


def ways(features: tuple[str, ...]) -> list[Way]:
    """Without rounding in the way: float64, but where the features ask for something else."""
    frozen = ("x", ".lora_A", ".lora_B") if "frozen" in features else ("",)
    reentrant = (False, True) if "checkpoint" in features else (False,)
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    if "16-bit" in features:
        dtypes = (BF16, FP16)
    elif "autocast" in features or "backends" in features:
        dtypes = (torch.float32,)
    backends = [name for name, device in BACKENDS if device == "cpu"] if "backends" in features else [None]
    lists = (frozen, reentrant, dtypes, backends)
    if len(features) > 2:  # each value once
        chosen = [tuple(values[i % len(values)] for values in lists) for i in range(max(map(len, lists)))]
    else:
        chosen = _product(*lists)
    every = [Way(features, *way) for way in chosen]
    return [
        way for way in every if not (way.reentrant and way.frozen == "x")
    ]  # torch itself wants an input that trains


def _product(*lists: Any) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = [()]
    for values in lists:
        found = [(*before, value) for before in found for value in values]
    return found


class Beside(nn.Module):
    """One layer alone, whose outputs are a tuple as a group's are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x),)


def made(way: Way) -> nn.Module:
    """Layers whose adapters act, biases too."""
    kind = (lambda k, n: Conv1D(n, k)) if way.has("conv1d") else nn.Linear
    plain = nn.ModuleList(kind(K, n) for n in SIZES).to(way.dtype)
    config = LoRAConfig(
        r=3, lora_alpha=4, target_modules=["0", "1"], init_lora_weights=False, lora_dropout=P * way.has("dropout"),
        use_dora=way.has("dora"), lora_bias=way.has("lora_bias"), bias="lora_only" if way.has("bias") else "none",
        activation="gelu" if way.has("activation") else "identity",
    )  # fmt: skip
    replace_linear(plain, config)
    layers: list[Any] = list(plain)
    for layer in layers:
        layer.bias.data.normal_()
        if way.has("dora"):
            magnitude = layer.lora_magnitude_vector.data
            magnitude.mul_(torch.linspace(0.5, 2.0, len(magnitude), dtype=magnitude.dtype))
    if way.has("frozen") and way.frozen != "x":
        getattr(layers[0], way.frozen[1:]).requires_grad_(False)
    return FusedLoRAGroup({"0": layers[0], "1": layers[1]}) if way.has("group") else Beside(layers[0])


def members(model: nn.Module) -> list[Any]:
    return list(model.children())


def drawn(way: Way) -> tuple[Tensor, list[Tensor]]:
    """x and each layer's dy, in one dimension more than a matrix has where they are not few."""
    generator = torch.Generator().manual_seed(1)
    leading, step = ((3,) if way.has("few tokens") else (3, 7)), 2 if way.has("strided") else 1

    def draw(width: int, dtype: torch.dtype) -> Tensor:
        wide = torch.randn(*leading, step * width, generator=generator, dtype=torch.float64)
        return wide.to(way.compute).to(dtype)[..., ::step]

    x = draw(K, way.dtype).requires_grad_(way.frozen != "x")
    sizes = SIZES if way.has("group") else SIZES[:1]
    return x, [draw(n, way.compute) for n in sizes]


def called(way: Way, model: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """How the features call the model; ``torch.compile`` holds all of it in one graph."""
    run: Any = model
    if way.has("compile"):
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        with ExitStack() as stack:
            stack.enter_context(dispatch.use_backend(way.backend) if way.backend else nullcontext())
            stack.enter_context(torch.autocast("cpu", BF16) if way.has("autocast") else nullcontext())
            torch.manual_seed(2)
            ys = checkpoint(run, x, use_reentrant=way.reentrant) if way.has("checkpoint") else run(x)
            return tuple(ys)

    return call


def found(way: Way, model: nn.Module, x: Tensor, dys: list[Tensor]) -> Results:
    """By ``backward``, for a reentrant checkpoint has no other way."""
    leaves = {"dx": x} | dict(model.named_parameters())
    for leaf in leaves.values():
        leaf.grad = None
    ys = called(way, model)(x)
    torch.autograd.backward(ys, dys)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert set(gradients) == {name for name, leaf in leaves.items() if leaf.requires_grad}
    return {f"y{i}": y.detach().flatten(0, -2) for i, y in enumerate(ys)} | gradients


def masks(way: Way, x: Tensor, count: int) -> list[Tensor | None]:
    """What each layer drops, drawn in their order by who runs; DoRA's is torch's own dropout."""
    if not way.has("dropout"):
        return [None] * count
    torch.manual_seed(2)
    flat = x.detach().to(way.compute)
    if way.has("dora"):
        return [F.dropout(flat, P).flatten(0, -2) != 0 for _ in range(count)]
    flat = flat.flatten(0, -2)
    states = [dispatch.backend(way.name).dropout_state(flat, P) for _ in range(count)]
    return [ops.operators(way.name).mask(state, *flat.shape, P) for state in states]


@dataclass
class Measures:
    """What results are judged by."""

    exact: Results = field(default_factory=dict)
    yardstick: Results = field(default_factory=dict)
    errors: Results = field(default_factory=dict)

    def add(self, name: str, values: Any) -> None:
        for results, value in zip((self.exact, self.yardstick, self.errors), values, strict=True):
            results[name] = value


def measured(way: Way, model: nn.Module, x: Tensor, dys: list[Tensor]) -> Measures:
    """The reference's, layer by layer; a magnitude's and a bias of B's gradient follow from a gain's and a bias's."""
    measures, dxs = Measures(), []
    names = list(dict(model.named_children()))
    shape, x = x.shape, x.detach().to(way.compute).flatten(0, -2)
    for i, (layer, mask) in enumerate(zip(members(model), masks(way, x.view(shape), len(dys)), strict=True)):
        dy = dys[i].flatten(0, -2)
        own = _dora_with_dropout(layer, x, dy, mask) if way.has("dora") and mask is not None else _by_reference(
            way, layer, x, dy, mask)  # fmt: skip
        measures.add(f"y{i}", own.pop("y"))
        dxs.append(own.pop("dx"))
        for name, values in own.items():
            measures.add(f"{names[i]}.{name}", values)
    sums = [sum(values) for values in zip(*(dx[:2] for dx in dxs), strict=True)]
    errors = torch.stack([dx[2] for dx in dxs]).norm(dim=0)
    measures.add("dx", [value.view(shape) for value in (*sums, errors)])
    return measures


def _by_reference(way: Way, layer: Any, x: Tensor, dy: Tensor, mask: Tensor | None) -> dict[str, list[Tensor]]:
    scaling, weight, bias = layer.scaling, layer.matrix(layer.base_weight).detach().to(way.compute), layer.bias
    if layer.lora_bias is not None:
        bias = bias.double() + scaling * layer.lora_bias.double()
    gain, norms = None, None
    if layer.lora_magnitude_vector is not None:
        norms = _norms(layer)
        gain = (layer.lora_magnitude_vector.double() / norms).to(layer.lora_magnitude_vector.dtype)
    given = (x, weight, layer.lora_A, layer.lora_B, bias, dy, scaling, mask, P if mask is not None else 0.0, gain,
             layer.activation)  # fmt: skip
    dtype = way.compute
    three = run_reference(torch.float64, *given), run_reference(dtype, *given), expected_errors(dtype, *given)
    own = {name: [results[name] for results in three] for name in three[0]}
    renamed = {"y": own["y"], "dx": own["dx"], "lora_A": own["da"], "lora_B": own["db"], "bias": own["dbias"]}
    if layer.lora_bias is not None:
        renamed["lora_bias"] = [scaling * value for value in own["dbias"]]
    if norms is not None:
        renamed["lora_magnitude_vector"] = [value / norms for value in own["dgain"]]
    return renamed


def _norms(layer: Any) -> Tensor:
    """In float64, A and B rounded to W's dtype."""
    weight = layer.matrix(layer.base_weight).detach()
    a, b = (factor.detach().to(weight.dtype).double() for factor in (layer.lora_A, layer.lora_B))
    return (weight.double() + layer.scaling * b @ a).norm(dim=1)


def _dora_with_dropout(layer: Any, x: Tensor, dy: Tensor, mask: Tensor) -> dict[str, list[Tensor]]:
    """g (d Wᵀ + s h Bᵀ) + (x - d) Wᵀ + b by torch's own gradients, in float64."""
    names = ("lora_A", "lora_B", "bias", "lora_magnitude_vector")
    x, a, b, bias, magnitude = leaves = [
        t.detach().double().requires_grad_() for t in (x, *(getattr(layer, name) for name in names))
    ]
    weight, dropped = layer.matrix(layer.base_weight).detach().double(), x * mask / (1.0 - P)
    adapted = dropped @ weight.t() + layer.scaling * (dropped @ a.t()) @ b.t()
    y = magnitude / _norms(layer) * adapted + (x - dropped) @ weight.t() + bias
    gradients = torch.autograd.grad(y, leaves, dy.double())
    values = {"y": y.detach()} | dict(zip(("dx", *names), gradients, strict=True))
    return {name: [value, value, torch.zeros_like(value)] for name, value in values.items()}


@pytest.mark.parametrize("features", PAIRS, ids=" x ".join)
def test_it_is_as_in_plain_formulas(features: tuple[str, str]) -> None:
    check_features(features)


@pytest.mark.parametrize("features", many(), ids=" x ".join)
def test_many_are_as_in_plain_formulas(features: tuple[str, ...]) -> None:
    check_features(features)


def check_features(features: tuple[str, ...]) -> None:
    for way in ways(features):
        torch.manual_seed(0)
        model = made(way)
        x, dys = drawn(way)
        if way.has("merging"):
            _check_merging(way, model, x, dys)
        measures = measured(way, model, x, dys)
        with passes() as counted:
            results = found(way, model, x, dys)
        together = way.has("group") and not (way.has("dora") and way.has("dropout"))
        assert bool(counted) == together, f"passes in common: {counted}"
        due = {name: leaf.dtype for name, leaf in model.named_parameters() if leaf.requires_grad}
        assert {name: results[name].dtype for name in due} == due
        assert all(results[name].dtype == way.compute for name in results if name.startswith("y"))
        check_all(results, measures.exact, measures.yardstick, way.compute, expected=measures.errors)


def _check_merging(way: Way, model: nn.Module, x: Tensor, dys: list[Tensor]) -> None:
    """Merged it is the product of one weight, in training too; unmerged it has the bits of before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in members(model):
        layer.merge()
        exact = formula(layer, torch.float64)
        check("merged", layer.matrix(layer.weight).detach(), exact, exact.to(way.dtype), way.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training while merged is told; see test_told.py
        ys = called(way, model)(x)
    flat = x.detach().to(way.compute).flatten(0, -2)
    for layer, y, dy in zip(members(model), ys, dys, strict=True):
        nothing, weight = torch.zeros_like(layer.lora_B), layer.matrix(layer.weight).detach().to(way.compute)
        bias = layer.base_bias.double()
        if layer.lora_bias is not None:
            bias = bias + layer.scaling * layer.lora_bias.double()
        given = (flat, weight, layer.lora_A, nothing, bias, dy.flatten(0, -2), 1.0, None, 0.0)
        three = run_reference(torch.float64, *given), run_reference(way.compute, *given), expected_errors(
            way.compute, *given)  # fmt: skip
        check("y", y.detach().flatten(0, -2), three[0]["y"], three[1]["y"], way.compute, expected=three[2]["y"])
        layer.unmerge()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
