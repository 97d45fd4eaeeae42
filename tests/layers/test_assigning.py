"""Other code takes a LoRA layer for an ``nn.Linear``: what it assigns, reads by name, and puts in the layer's place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, replace_linear
from lora_kernels.accuracy import sum_error
from lora_kernels.errors import InvalidArgumentError, LoRAKernelsWarning, LoRAStateError
from made_models import acting, formula, layer_refused, layer_state, same_state
from numerics import check, check_linear, same_bits

K, N = 8, 6
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "lora_bias": {"lora_bias": True},
    "lora_bias alone": {"lora_bias": True, "bias": False},
    "DoRA": {"use_dora": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind: str) -> FusedLoRALinear:
    return acting(K, N, **KINDS[kind])


def conv1d() -> Any:
    """A layer around a Conv1D, whose weight is stored (K, N)."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(N, K))
    replace_linear(model, LoRAConfig(r=3, target_modules=["0"], init_lora_weights=False))
    return model[0]


def exact(layer: FusedLoRALinear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """y of the layer's Parameters."""
    bias = None if layer.base_bias is None else layer.base_bias.to(dtype)
    y = F.linear(x.to(dtype), formula(layer, dtype), bias)
    return y if layer.lora_bias is None else y + layer.scaling * layer.lora_bias.to(dtype)


def check_output(layer: FusedLoRALinear) -> None:
    x = torch.randn(5, K)
    with torch.no_grad():
        wide, plain = exact(layer, x, torch.float64), exact(layer, x, torch.float32)
        expected = sum_error(x, formula(layer, torch.float32).t())
        check("y", layer(x), wide, plain, torch.float32, expected=expected)


# Names, while merged


@kinds
def test_while_merged_all_that_names_parameters_says_the_same(kind: str) -> None:
    layer = made(kind)
    before, names = list(layer.parameters()), [name for name, _ in layer.named_parameters()]
    layer.merge()
    after = dict(layer.named_parameters())
    assert list(after) == names == list(layer.state_dict())
    assert [id(p) for p in layer.parameters()] == [id(p) for p in before]
    assert all(same_bits(after[name], value) for name, value in layer.state_dict().items())
    assert isinstance(layer.weight, nn.Parameter)
    assert same_bits(layer.weight, dict(layer.named_buffers())["merged_weight"])


def test_an_optimizer_made_while_merged_trains_what_is_there_afterwards() -> None:
    layer, x = made("lora_bias"), torch.randn(5, K)
    layer.bias.requires_grad_(True)
    layer.merge()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer.unmerge()
    before = layer_state(layer)
    layer(x).sum().backward()
    optimizer.step()
    moved = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"bias", "lora_A", "lora_B", "lora_bias"}


@kinds
def test_a_merged_layer_is_called_with_the_parameters_that_it_names(kind: str) -> None:
    layer, x = made(kind).eval(), torch.randn(5, K)
    layer.merge()
    assert torch.equal(torch.func.functional_call(layer, dict(layer.named_parameters()), x), layer(x))
    others = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    call = lambda: torch.func.functional_call(layer, others, x)  # noqa: E731
    layer_refused(layer, call, LoRAStateError, "weight of a merged layer", "unmerge()")


def test_what_goes_behind_a_merged_layers_back_is_noticed_at_the_next_call() -> None:
    x = torch.ones(K)
    layer = made("plain").eval()
    layer.merge()
    layer.weight.data = torch.zeros(N, K)
    with pytest.raises(LoRAStateError, match=r"weight\.data"):
        layer(x)
    for change in (parametrizations.weight_norm, lambda layer: prune.random_unstructured(layer, "weight", amount=1)):
        layer = made("plain").eval()
        layer.merge()
        with pytest.raises(LoRAStateError, match=r"on a merged layer.*unmerge\(\)"):
            change(layer)
        check_output(layer)
    layer = made("plain").eval()
    layer.merge()
    layer.weight.data.mul_(2)  # in place it is the merged weight that acts
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


# Assignment


@kinds
def test_a_weight_of_the_same_shape_is_the_new_base(kind: str) -> None:
    layer = made(kind)
    new = nn.Parameter(torch.randn(N, K))
    if kind == "DoRA":
        with pytest.warns(LoRAKernelsWarning, match="lora_magnitude_vector is kept"):
            layer.weight = new
    else:
        layer.weight = new
    assert layer.weight is new
    check_output(layer)
    layer.merge()
    check_output(layer)
    layer.unmerge()
    assert layer.weight is new


def test_an_untrained_dora_layer_is_the_new_base_layer() -> None:
    layer, x = FusedLoRALinear(K, N, r=3, use_dora=True), torch.randn(5, K)
    layer.weight = nn.Parameter(torch.randn(N, K))
    check_output(layer)
    check_linear(layer(x), x, layer.weight, layer.bias)


def test_the_same_weight_again_leaves_trained_magnitudes_alone() -> None:
    layer = made("DoRA")
    layer.lora_magnitude_vector.data.uniform_(1, 2)
    before = layer_state(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight = layer.weight
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert same_state(layer_state(layer), before)


def test_a_weight_for_a_residual_is_refused() -> None:
    layer = acting(init_lora_weights="pissa")
    assign = lambda: setattr(layer, "weight", nn.Parameter(torch.randn(N, K)))  # noqa: E731
    layer_refused(layer, assign, LoRAStateError, "'pissa'", "load_state_dict")
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert same_state(layer_state(layer), state)


ASSIGNED: dict[str, Callable[[Any], Any]] = {
    "weight": lambda layer: nn.Parameter(layer.weight.detach().clone()),
    "lora_A": lambda layer: nn.Parameter(layer.lora_A.detach().clone()),
    "lora_B": lambda layer: nn.Parameter(layer.lora_B.detach().clone()),
    "scaling": lambda layer: 2 * layer.scaling,
}


@kinds
@pytest.mark.parametrize("name", ASSIGNED)
def test_what_merged_values_come_from_is_not_exchanged(kind: str, name: str) -> None:
    layer, x = made(kind).eval(), torch.randn(5, K)
    layer.merge()
    before = layer(x)
    layer_refused(layer, lambda: setattr(layer, name, ASSIGNED[name](layer)), LoRAStateError, name, "unmerge()")
    for same in (name, "bias"):
        setattr(layer, same, getattr(layer, same))
    assert torch.equal(layer(x), before)
    layer.unmerge()
    setattr(layer, name, value := ASSIGNED[name](layer))
    assert getattr(layer, name) is value


def test_a_merged_bias_is_not_exchanged_and_one_that_is_not_merged_is() -> None:
    layer = made("lora_bias")
    layer.merge()
    assign = lambda: setattr(layer, "bias", nn.Parameter(torch.zeros(N)))  # noqa: E731
    layer_refused(layer, assign, LoRAStateError, "bias", "unmerge()")
    layer = made("plain")
    layer.merge()
    for other in (nn.Parameter(torch.ones(N)), None):
        layer.bias = other
        assert layer.base_bias is other
        check_output(layer.eval())
    layer.unmerge()
    check_output(layer)
    layer.merge()
    layer.bias = layer.lora_magnitude_vector = None  # as they are
    for name in ("weight", "lora_A"):
        layer_refused(layer, lambda name=name: setattr(layer, name, None), LoRAStateError, name, "unmerge()")


@pytest.mark.parametrize("merged", [False, True])
def test_a_weight_stored_the_other_way_round(merged: bool) -> None:
    layer = conv1d().eval()
    new = nn.Parameter(torch.randn(K, N))
    if merged:
        layer.merge()
        layer.weight = layer.base_weight
        layer_refused(layer, lambda: setattr(layer, "weight", new), LoRAStateError, "unmerge()")
        assert [name for name, _ in layer.named_parameters()] == list(layer.state_dict())
        return
    layer.weight = new
    x = torch.randn(5, K)
    wide = x.double() @ (new.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).t())
    whole = new + layer.scaling * (layer.lora_B @ layer.lora_A).t()
    plain, expected = x @ whole + layer.bias, sum_error(x, whole)
    check("y", layer(x), wide + layer.bias.double(), plain, torch.float32, expected=expected)
    grown = nn.Parameter(torch.cat([new.detach(), torch.randn(K, 2)], 1))
    layer.weight = grown
    assert (layer.nf, layer.out_features, *layer.lora_B.shape) == (N + 2, N + 2, N + 2, 3)
    layer_refused(layer, lambda: setattr(layer, "weight", nn.Parameter(torch.ones(K + 1, N))), InvalidArgumentError)


# Another shape


def resized(layer: FusedLoRALinear, rows: int) -> Tensor:
    return torch.cat([layer.base_weight.detach(), torch.randn(3, K)])[:rows].clone()


@kinds
@pytest.mark.parametrize("rows", [N + 3, N - 2])
def test_a_resized_weight_resizes_the_adapter_in_place(kind: str, rows: int) -> None:
    layer, x = made(kind).eval(), torch.randn(5, K)
    parameters = list(layer.parameters())[1:]
    before, kept = exact(layer, x, torch.float64), min(rows, N)
    layer.weight = nn.Parameter(resized(layer, rows))
    assert [id(p) for p in list(layer.parameters())[1:]] == [id(p) for p in parameters]
    assert (layer.out_features, layer(x).shape[-1]) == (rows, rows)
    check_output(layer)
    after = exact(layer, x, torch.float64)
    check("y", after[:, :kept], before[:, :kept], before[:, :kept], torch.float64)
    added = F.linear(x.double(), layer.weight[N:].double(), None if layer.bias is None else layer.bias[N:].double())
    check("added", after[:, N:], added, added.float(), torch.float32)  # DoRA's magnitude is fp32
    layer.merge()
    check_output(layer)
    layer.unmerge()
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.shape == (rows, 3)


@pytest.mark.parametrize("shape", [(N + 1, K), (N, K + 1), (N * K,), (K, N)])
def test_a_weight_of_another_shape_that_is_not_its_own_is_refused(shape: tuple[int, ...]) -> None:
    layer = made("plain")
    new = nn.Parameter(torch.randn(shape))
    layer_refused(layer, lambda: setattr(layer, "weight", new), InvalidArgumentError, str(shape), f"{N} outputs")


@pytest.mark.parametrize("merged", [False, True])
@kinds
def test_a_tied_weight_that_was_resized_takes_the_adapter_along(kind: str, merged: bool) -> None:
    """In place, as an embedding's is; whoever did it then tells the layer its size, or ties it again."""
    for told in ("out_features", "weight"):
        layer = made(kind).eval()
        if merged:
            layer.merge()
        weight = layer.base_weight
        weight.data = resized(layer, N + 3)
        setattr(layer, told, N + 3 if told == "out_features" else weight)
        assert (layer.merged, layer.out_features, layer.base_weight is weight) == (merged, N + 3, True)
        check_output(layer)


# Taking the layer's place


@pytest.mark.parametrize("merged", [False, True])
@kinds
def test_a_resized_copy_in_its_place_gives_its_weight_to_the_layer(kind: str, merged: bool) -> None:
    parent = nn.Sequential(made(kind)).eval()
    layer, x = parent[0], torch.randn(5, K)
    if merged:
        layer.merge()
    y, new = layer(x).detach(), nn.Linear(K, N + 3, bias=layer.bias is not None)
    new.weight.data[:N] = layer.weight
    if layer.bias is not None:
        new.bias.data[:N] = layer.bias
    parent[0] = new
    assert parent[0] is layer
    assert layer.merged == merged
    check_output(layer)
    twice = sum_error(x, 2 * formula(layer, torch.float32).t())  # both are computed
    check("y", layer(x)[:, :N], y.double(), y, torch.float32, expected=twice[:, :N])
    added = F.linear(x, new.weight[N:], None if layer.base_bias is None else new.bias[N:])
    check("added", layer(x)[:, N:], added.double(), added, torch.float32, expected=twice[:, N:])


def test_another_module_in_its_place_is_told_of_where_it_drops_something() -> None:
    parent = nn.Sequential(made("plain"))
    with pytest.warns(LoRAKernelsWarning, match=r"Sequential\.0 .*a Linear takes its place"):
        parent[0] = nn.Linear(K, N)
    assert type(parent[0]) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for silent in (made("plain"), FusedLoRALinear(K, N, r=3)):
            parent = nn.Sequential(silent)
            parent[0] = nn.Sequential(silent)  # wrapped
            if silent.lora_B.any():
                silent.merge()
            parent = nn.Sequential(silent)
            parent[0] = silent.to_linear()
        parent = nn.Sequential(made("plain"))
        copy.deepcopy(parent)


# What trains nothing, or drops what has trained, is told


def test_training_while_merged_is_told_once_each_time() -> None:
    layer, x = made("plain"), torch.ones(2, K)
    for _ in range(2):
        layer.merge()
        with pytest.warns(LoRAKernelsWarning, match="while its adapter is merged") as warned:
            nn.Sequential(layer, nn.Linear(N, K), layer)(x)
        assert len(warned) == 1
        layer.unmerge()


def test_training_while_switched_off_for_good_is_told_once() -> None:
    layer, x = made("plain"), torch.ones(2, K)
    layer.enable_lora(False)
    with pytest.warns(LoRAKernelsWarning, match=r"enable_lora\(False\)") as warned:
        nn.Sequential(layer, nn.Linear(N, K), layer)(x)
    assert len(warned) == 1


def test_what_is_meant_is_not_told() -> None:
    layer, x = made("plain"), torch.ones(2, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        with layer.enable_lora(False):
            layer(x)
        layer.merge()
        with torch.no_grad():
            layer(x)
        layer.eval()(x)
        layer.train().requires_grad_(False)(x)


@pytest.mark.parametrize("init", [True, "zero", "gaussian", "orthogonal", "pissa", "olora", "moved", "merged"])
def test_restoring_tells_of_adapters_that_it_drops(init: Any) -> None:
    model = nn.Sequential(nn.Linear(K, N))
    start = "pissa" if init in ("moved", "merged") else init
    replace_linear(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=start))
    if init in ("moved", "merged"):
        model[0].lora_B.data.add_(1)
    if init == "merged":
        lora_kernels.merge_lora(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        lora_kernels.restore_linear(model)
    told = [str(w.message) for w in warned if w.category is LoRAKernelsWarning]
    assert [text[:38] for text in told] == ["restore_linear drops the adapters of '"] * (init == "moved")
