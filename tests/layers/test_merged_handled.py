"""Merged layers that other code moves, copies and calls: accelerate, DataParallel, earlier pickles, TorchScript."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lora_kernels import FusedLoRALinear, LoRAConfig, merge_lora, replace_linear, unmerge_lora
from lora_kernels.errors import LoRAStateError
from made_models import acting, layer_state, same_state
from numerics import check_linear, same_bits

K, N = 8, 6
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora_bias": {"lora_bias": True},
    "lora_bias alone": {"lora_bias": True, "bias": False},
    "DoRA": {"use_dora": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind: str) -> FusedLoRALinear:
    layer = acting(K, N, **KINDS[kind]).eval()
    if layer.lora_bias is not None:
        nn.init.normal_(layer.lora_bias)
    return layer


def all_outputs(model: nn.Module, layer: FusedLoRALinear, x: Tensor) -> list[Tensor]:
    """Merged; switched off while merged; merged again."""
    found = []
    for enabled in (True, False, True):
        layer.enable_lora(enabled)
        found.append(model(x).clone())
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(one, other, strict=True))


# accelerate: it reads layer.weight, which is the merged one, to move the registered


def dispatched(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dispatch_model`` to another device, which here it is only told is another."""
    accelerate, modeling = pytest.importorskip("accelerate"), pytest.importorskip("accelerate.utils.modeling")
    with monkeypatch.context() as patched:
        patched.setattr(modeling, "check_device_same", lambda one, other: False)
        accelerate.dispatch_model(model, {"block": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("hooked_still", [True, False])
@kinds
def test_a_merged_layer_that_is_dispatched_keeps_its_base(
    kind: str, hooked_still: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = made(kind), torch.randn(5, K)
    model = nn.Sequential()
    model.block = nn.Sequential(layer)
    before, y = layer_state(layer), layer(x)
    layer.merge()
    expected = all_outputs(model, layer, x)
    dispatched(model, monkeypatch)
    assert same_state(layer_state(layer), before)
    assert same(all_outputs(model, layer, x), expected)
    if not hooked_still:
        pytest.importorskip("accelerate.hooks").remove_hook_from_submodules(model)
        assert same(all_outputs(model, layer, x), expected)
    layer.unmerge()
    assert same_state(layer_state(layer), before)
    assert same_bits(model(x), y)


@pytest.mark.parametrize("offload_buffers", [True, False])
@pytest.mark.parametrize("merged_until_the_end", [True, False])
@kinds
def test_a_merged_layer_is_offloaded_and_taken_back(
    kind: str, merged_until_the_end: bool, offload_buffers: bool
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(made(kind)), torch.randn(5, K)
    layer: Any = model[0]
    before, y, weight = layer_state(layer), model(x), layer.base_weight
    layer.merge()
    expected = all_outputs(model, layer, x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert layer.base_weight.is_meta
    assert all(own.is_meta for own in layer._base._parameters.values() if own is not None), "the base is kept twice"
    assert same(all_outputs(model, layer, x), expected)
    if not merged_until_the_end:
        layer.unmerge()
        assert same_bits(model(x), y)
    accelerate.hooks.remove_hook_from_submodules(model)
    if merged_until_the_end:
        assert same(all_outputs(model, layer, x), expected)
        layer.unmerge()
    assert same_state(layer_state(layer), before)
    assert same_bits(model(x), y)
    assert same_bits(layer.weight, weight)


@kinds
def test_what_merging_has_added_to_an_offloaded_layer_is_not_put_back(kind: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(made(kind)), torch.randn(5, K)
    before, y, bias = layer_state(model), model(x), model[0].bias
    trains = bias is not None and bias.requires_grad_(True).requires_grad
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    merge_lora(model)
    merged = model(x)
    unmerge_lora(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert same_state(layer_state(model), before)
    assert (model[0].bias is not None and model[0].bias.requires_grad) == trains
    assert same_bits(model(x), y)
    merge_lora(model)
    assert same_bits(model(x), merged)


# DataParallel's replicas, which have tensors where their module has Parameters


def replicate(model: nn.Module) -> Any:
    """``torch.nn.parallel.replicate``, which is for GPUs, on the CPU: a copy made in the same steps."""
    modules: list[Any] = list(model.modules())
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for name, child in module._modules.items():
            setattr(replica, name, replicas[modules.index(child)])
        for table, own in (("_parameters", module._parameters), ("_buffers", module._buffers)):
            for name, tensor in own.items():
                if tensor is None:
                    getattr(replica, table)[name] = None
                else:
                    setattr(replica, name, tensor.detach().clone())
    return replicas[0]


@pytest.mark.parametrize("merged", [True, False])
@kinds
def test_a_replica_gives_what_its_layer_does_and_tells_nothing(kind: str, merged: bool) -> None:
    model, x = nn.Sequential(made(kind)), torch.randn(5, K)
    if merged:
        merge_lora(model)
    layer: Any = model[0]
    expected = all_outputs(model, layer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replica = replicate(model)
        assert same(all_outputs(replica, replica[0], x), expected)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, N) for _ in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        found: Tensor = self.q_proj(hidden_states) + self.k_proj(hidden_states) + self.v_proj(hidden_states)
        return found


def test_a_replica_does_not_run_with_the_members_of_another_device() -> None:
    model = Attention()
    replace_linear(model, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    replica, x = replicate(model), torch.randn(5, K)
    expected = model(x)
    assert model.q_proj._shared is not None
    for layer in model.children():
        layer.lora_B.data.zero_()
    assert same_bits(replica(x), expected)


# Pickles of before merged values were buffers


@pytest.mark.parametrize("copied", [lambda layer: layer, copy.deepcopy])
@kinds
def test_a_merged_layer_of_an_earlier_pickle_is_read(kind: str, copied: Callable[[Any], Any]) -> None:
    layer, x = made(kind), torch.randn(5, K)
    before, y, names = layer_state(layer), layer(x), ("weight", "bias")[: 1 + (layer.lora_bias is not None)]
    other = copy.deepcopy(layer)
    other.merge()
    expected, aside = all_outputs(other, other, x), nn.Module()
    for name in names:
        aside.register_parameter(name, layer._parameters[name])
    state = layer.__dict__ | {"_base": aside, "_parameters": dict(layer._parameters)}
    state["_parameters"].update({name: nn.Parameter(getattr(other, name), requires_grad=False) for name in names})
    read: Any = FusedLoRALinear.__new__(FusedLoRALinear)
    read.__setstate__(state)
    read = copied(read)
    assert same(all_outputs(read, read, x), expected)
    assert same_state(layer_state(read), before)
    read.unmerge()
    assert same_state(layer_state(read), before)
    assert same_bits(read(x), y)


# Calls and other kinds of modules


@kinds
def test_a_merged_layer_is_called_with_its_own_state(kind: str) -> None:
    layer, x = made(kind), torch.randn(5, K)
    layer.merge()
    assert same_bits(torch.func.functional_call(layer, layer.state_dict(), x), layer(x))


def test_a_batch_of_merged_weights_is_refused_in_a_sentence() -> None:
    layer, x = made("plain"), torch.randn(5, K)
    layer.merge()
    batch = {name: torch.stack([tensor, tensor]) for name, tensor in layer.state_dict().items()}
    call = lambda own: torch.func.functional_call(layer, own, x)  # noqa: E731
    with pytest.raises(LoRAStateError, match=r"unmerge\(\)"):
        torch.func.vmap(call)(batch)
    y = torch.func.vmap(layer)(x)  # its own
    check_linear(y, x, layer.weight, layer.bias)


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


def test_a_parametrization_of_the_adapter_ends_while_merged() -> None:
    layer, x = made("plain"), torch.randn(5, K)
    parametrize.register_parametrization(layer, "lora_A", Doubled())
    y = layer(x)
    layer.merge()
    merged = layer(x)
    parametrize.remove_parametrizations(layer, "lora_A")
    assert same_bits(layer(x), merged)
    layer.unmerge()
    assert same_bits(layer(x), y)


def _pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "bias", 0.5)


def _parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "bias", nn.Tanh())


@pytest.mark.parametrize("computed", [_pruned, _parametrized])
def test_a_merged_layer_adds_a_bias_that_is_computed(computed: Callable[[nn.Module], None]) -> None:
    """It was left out, in silence."""
    layer, x = made("plain").eval(), torch.randn(5, K)
    layer.merge()
    computed(layer)
    check_linear(layer(x), x, layer.weight, layer.bias)
    layer.enable_lora(False)
    check_linear(layer(x), x, layer.base_weight, layer.bias)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_children_of_a_scripted_module_are_exchanged_as_ever() -> None:
    acting()
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    other = torch.jit.script(nn.Linear(2, 2))
    scripted.add_module("0", other)
    x = torch.randn(3, 2)
    assert same_bits(scripted(x), other(x))
