"""Whole models: what is replaced, what trains, merging and restoring; and that a failure leaves the model as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, LoRAKernelsError, replace_linear, restore_linear
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from lora_kernels.model import lora_layers
from numerics import check, same_bits


class Net(nn.Module):
    """An embedding, two blocks of two linear layers each, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(x)


TOKENS = torch.arange(6).reshape(2, 3)
UP = LoRAConfig(r=2, lora_alpha=4, target_modules=["up"], init_lora_weights=False)


class Snapshot:
    """All that a failure may not change: modules, Parameters, their values, what trains."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.named_modules(remove_duplicate=False))
        self.parameters = list(model.named_parameters(remove_duplicate=False))
        self.trains = [parameter.requires_grad for _, parameter in self.parameters]
        held = [p for _, p in self.parameters if not (is_lazy(p) or p.is_meta)]
        self.values = [parameter.detach().clone() for parameter in held]

    def assert_unchanged(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert [name for name, _ in now.modules] == [name for name, _ in self.modules]
        assert all(a is b for (_, a), (_, b) in zip(now.modules, self.modules, strict=True))
        assert all(a is b for (_, a), (_, b) in zip(now.parameters, self.parameters, strict=True))
        assert now.trains == self.trains
        assert all(same_bits(a, b) for a, b in zip(now.values, self.values, strict=True))


def refused(model: Any, function: Callable[[Any], Any], error: type[Exception], *words: str) -> None:
    """``function(model)`` raises one sentence with all the words, and leaves the model as it was."""
    before = Snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        function(model)
    assert isinstance(caught.value, LoRAKernelsError)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if before is not None:
        before.assert_unchanged(model)


def replacing(**arguments: Any) -> Callable[[Any], Any]:
    return lambda model: replace_linear(model, LoRAConfig(**{"r": 2, **arguments}))


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# Replacing


def test_what_is_named_is_replaced_and_nothing_else() -> None:
    model = Net().eval()
    plain = dict(model.named_parameters())
    report = replace_linear(model, UP)
    assert [name for name, kind in kinds(model).items() if kind == "FusedLoRALinear"] == ["blocks.0.up", "blocks.1.up"]
    assert [layer.name for layer in report] == ["blocks.0.up", "blocks.1.up"]
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in plain.items())
    assert not model.blocks[0]["up"].training
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {f"blocks.{i}.up.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert trains == set(dict(model.named_parameters())) - frozen


def test_a_fresh_adapter_changes_no_output() -> None:
    model = Net()
    before = model(TOKENS)
    replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert torch.equal(model(TOKENS), before)


def test_the_model_trains_through_its_adapters() -> None:
    model = Net()
    replace_linear(model, UP)
    lora_kernels.mark_only_lora_as_trainable(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = model(TOKENS).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(same_bits(dict(model.named_parameters())[name], value) for name, value in frozen.items())


def test_the_report_counts_and_prints() -> None:
    config = LoRAConfig(r=2, target_modules=["up", "embed", "dwn"], rank_pattern={"blocks.0.up": 3})
    report = replace_linear(Net(), config)
    assert [(layer.r, layer.parameters) for layer in report] == [(3, 60), (2, 40)]
    assert report.adapter_parameters == 100
    assert (len(report), report.total) == (2, 80 + 2 * (8 * 12 + 12 + 12 * 8 + 8) + 80 + 100)
    assert report.trainable == report.total - 2 * (8 * 12 + 12)
    assert report.percent == 100 * report.trainable / report.total
    text = str(report)
    for line in [
        "replaced 2 layers:",
        "  blocks.0.up (8 -> 12), r=3, alpha=16, 60 parameters",
        "  embed: Embedding is not a plain torch.nn.Linear",
        "note: target_modules names 'dwn', which matches nothing (close: 'down').",
        f"trainable parameters: {report.trainable:,} of {report.total:,}",
        "mark_only_lora_as_trainable(model) freezes them",
    ]:
        assert line in text, text


def test_patterns_and_options_reach_the_layers() -> None:
    model = Net()
    config = LoRAConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.25,
        target_modules="all-linear",
        exclude_modules=["head"],
        rank_pattern={"up": 2},
        alpha_pattern={r"blocks\.1\..*": 32},
        use_rslora=True,
        use_dora=True,
        adapter_dtype=torch.float64,
    )
    replace_linear(model, config)
    layers = dict(lora_layers(model))
    assert {name: (layer.r, layer.lora_alpha) for name, layer in layers.items()} == {
        "blocks.0.up": (2, 8),
        "blocks.0.down": (4, 8),
        "blocks.1.up": (2, 32),
        "blocks.1.down": (4, 32),
    }
    for layer in layers.values():
        assert (layer.lora_dropout, layer.use_rslora, layer.use_dora) == (0.25, True, True)
        assert layer.lora_A.dtype == torch.float64
        assert layer.scaling == layer.lora_alpha / layer.r**0.5


def test_patterns_and_excludes_without_effect_are_noted() -> None:
    report = replace_linear(
        Net(), LoRAConfig(r=2, target_modules=["up"], exclude_modules=["nowhere"], rank_pattern={"dwn": 4})
    )
    assert len(report.notes) == 2
    assert "nowhere" in report.notes[0]
    assert "'dwn'" in report.notes[1]


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", set()), ("lora_only", {"blocks.0.up.bias"}), ("all", {"blocks.0.up.bias", "blocks.0.down.bias"})],
)
def test_which_biases_train(bias: str, expected: set[str]) -> None:
    for through_mark in (False, True):
        model = Net().requires_grad_(False)
        model.blocks = model.blocks[:1]
        replace_linear(model, LoRAConfig(r=2, target_modules=["up"], bias="none" if through_mark else bias))
        if through_mark:
            lora_kernels.mark_only_lora_as_trainable(model, bias=bias)
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trains == expected | {"blocks.0.up.lora_A", "blocks.0.up.lora_B"}


def test_mark_freezes_everything_else_merged_or_not() -> None:
    model = Net()
    replace_linear(model, UP)
    model.blocks[0]["up"].weight.requires_grad_(True)
    lora_kernels.merge_lora(model)
    lora_kernels.mark_only_lora_as_trainable(model)
    lora_kernels.unmerge_lora(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {f"blocks.{i}.up.lora_{x}" for i in (0, 1) for x in "AB"}


def test_a_second_call_may_replace_other_layers() -> None:
    model = Net()
    replace_linear(model, UP)
    replace_linear(model, LoRAConfig(r=4, target_modules=["down"]))
    assert [layer.r for _, layer in lora_layers(model)] == [2, 4, 2, 4]
    refused(model, replacing(target_modules="all-linear"), LoRAStateError, "'blocks.0.up'", "exclude_modules")
    replace_linear(model, LoRAConfig(target_modules="all-linear", exclude_modules=["up", "down"]))
    assert set(kinds(model).values()) == {"FusedLoRALinear"}


def test_hooks_and_their_handles_survive_replacing_and_restoring() -> None:
    model, seen = Net(), []
    handle = model.blocks[0]["up"].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    replace_linear(model, UP)
    model(TOKENS)
    restore_linear(model)
    model(TOKENS)
    handle.remove()
    model(TOKENS)
    assert seen == [FusedLoRALinear, nn.Linear]


def test_a_rank_that_is_too_high_warns_once_for_the_model() -> None:
    with pytest.warns(UserWarning, match="the rank is above") as caught:
        replace_linear(Net(), LoRAConfig(r=9, target_modules="all-linear"))
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in ("blocks.0.up", "blocks.1.down", "head"))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_linear(Net(), LoRAConfig(r=8, target_modules="all-linear"))


# Shared, tied, placed


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert model[0] is model[2]
    assert report.layers[0].places == ("0", "2")
    assert "also 2" in str(report)
    assert list(lora_kernels.lora_state_dict(model)) == ["0.lora_A", "0.lora_B"]
    lora_kernels.merge_lora(model)
    lora_kernels.unmerge_lora(model)
    assert len(restore_linear(model)) == 1
    assert model[0] is model[2]
    assert type(model[0]) is nn.Linear


def test_a_shared_parent_is_handled() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    model = nn.Sequential(block, block)
    assert replace_linear(model, LoRAConfig(r=2, target_modules=["1.0"])).layers[0].places == ("0.0", "1.0")
    assert isinstance(block[0], FusedLoRALinear)


def test_excluding_one_place_of_a_shared_module_excludes_it() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Linear(8, 8), shared)
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["2"]))
    assert [layer.name for layer in report] == ["1"]
    assert "'2'" in report.skipped[0].reason


def tied() -> Net:
    model = Net()
    model.head.weight = model.embed.weight
    return model


def test_a_head_tied_to_a_trained_embedding_is_left_alone() -> None:
    model = tied()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["head", "up"]))
    assert type(model.head) is nn.Linear
    assert model.embed.weight.requires_grad
    assert [layer.name for layer in report.skipped] == ["head"]
    assert "embed.weight" in report.skipped[0].reason
    refused(tied(), replacing(target_modules=["head"]), InvalidTypeError, "embed.weight", "requires_grad_(False)")


def test_a_tie_to_a_frozen_embedding_stays_through_merging_and_is_reported_when_it_breaks() -> None:
    model = tied()
    model.embed.weight.requires_grad_(False)
    replace_linear(model, LoRAConfig(r=2, target_modules=["head"], init_lora_weights=False))
    assert model.head.weight is model.embed.weight
    before = model.embed.weight.detach().clone()
    lora_kernels.merge_lora(model)
    assert same_bits(model.embed.weight, before)
    lora_kernels.unmerge_lora(model)
    assert model.head.weight is model.embed.weight
    lora_kernels.merge_lora(model)
    report = restore_linear(model)
    assert report.layers[0].untied_from == ("embed.weight",)
    assert "no longer shares its weight with embed.weight" in str(report)


def test_two_replaced_layers_may_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    replace_linear(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    assert model[0].weight is model[1].weight
    assert not model[0].weight.requires_grad


def test_a_layer_left_alone_passes_its_tie_on() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight, model[2].weight = model[0].weight, model[3].weight
    model[2].bias = model[1].bias
    report = replace_linear(
        nn.Sequential(model, nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=["0.1", "0.2", "0.3", "1"])
    )
    assert [layer.name for layer in report.skipped] == ["0.1", "0.2", "0.3"]
    assert [layer.name for layer in report] == ["1"]


def test_layers_on_meta_and_in_other_dtypes_keep_their_place() -> None:
    places = [{"device": "meta"}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}]
    model = nn.Sequential(*(nn.Linear(8, 8, **place) for place in places))
    replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert [layer.lora_A.device.type for layer in model] == ["meta", "cpu", "cpu"]
    assert [layer.lora_A.dtype for layer in model] == [torch.float32, torch.float32, torch.float64]
    refused(model, lora_kernels.merge_lora, LoRAStateError, "'0'", "meta")
    model[0].to_empty(device="cpu")
    model[0].load_state_dict(nn.Linear(8, 8).state_dict(), strict=False)
    model[0].reset_lora_parameters()
    assert torch.equal(model[0].lora_B, torch.zeros(8, 2))
    assert torch.isfinite(model[0](torch.ones(8))).all()


def test_a_wrapped_model_is_looked_into() -> None:
    model = nn.DataParallel(Net())
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["up"]))
    assert [layer.name for layer in report] == ["module.blocks.0.up", "module.blocks.1.up"]


def test_a_compiled_model_runs_what_was_replaced() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(TOKENS)
        replace_linear(compiled, UP)
        assert not torch.equal(compiled(TOKENS), before)
        assert torch.equal(compiled(TOKENS), model(TOKENS))


def test_the_fast_path_of_an_encoder_layer_does_not_leave_the_adapter_out() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        base = model(x)
    replace_linear(model, LoRAConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False))
    exact, slow = copy.deepcopy(model).double()(x.double()), model(x)
    with torch.no_grad():
        check("y", model(x).flatten(0, 1), exact.flatten(0, 1), slow.flatten(0, 1), torch.float32)
    restore_linear(model)
    assert not model[0].linear1._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("transform", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_replaced_model_is_copied_and_pickled(transform: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    replace_linear(model, UP)
    lora_kernels.merge_lora(model)
    other = transform(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    lora_kernels.unmerge_lora(other)
    lora_kernels.unmerge_lora(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    restore_linear(other)
    assert set(kinds(other).values()) == {"Linear"}


def test_an_encoder_that_would_nest_its_batches_is_noted() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    config = LoRAConfig(r=2, target_modules=["linear1"])
    assert "use_nested_tensor" in replace_linear(model, config).notes[0]
    restore_linear(model)
    model.use_nested_tensor = False
    assert replace_linear(model, config).notes == ()


# Refusing


class Own(nn.Linear):
    pass


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


def offloaded() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    return model


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    return nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=1))


def integer() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def packed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(8, 2))
    return model


REFUSED = {
    "no match": (
        Net,
        {"target_modules": ["q_proj"]},
        InvalidArgumentError,
        ["'q_proj'", "Net", "'up', 'down', 'head'"],
    ),
    "close": (Net, {"target_modules": ["dwn", "hed"]}, InvalidArgumentError, ["Close names are 'down', 'head'"]),
    "no match of a pattern": (Net, {"target_modules": "up"}, InvalidArgumentError, ["whole dotted name", "'up'"]),
    "none": (Net, {}, InvalidArgumentError, ["target_modules=None", "all-linear"]),
    "no linear": (
        lambda: nn.Sequential(nn.ReLU()),
        {"target_modules": "all-linear"},
        InvalidArgumentError,
        ["no nn.Linear"],
    ),
    "all excluded": (
        Net,
        {"target_modules": ["up"], "exclude_modules": ["up"]},
        InvalidArgumentError,
        ["'blocks.0.up'", "exclude_modules"],
    ),
    "root": (lambda: nn.Linear(4, 4), {"target_modules": "all-linear"}, InvalidTypeError, ["from_linear"]),
    "root replaced": (lambda: FusedLoRALinear(4, 4, r=2), {"target_modules": ".*"}, LoRAStateError, ["already"]),
    "scripted": (
        lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))),
        {"target_modules": ["0"]},
        InvalidTypeError,
        ["ScriptModule", "before torch.jit.script"],
    ),
    "scripted part": (
        lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 4))),
        {"target_modules": ["0"]},
        InvalidTypeError,
        ["ScriptModule", "before torch.jit.script"],
    ),
    "subclass": (
        lambda: nn.Sequential(Own(4, 4)),
        {"target_modules": "all-linear"},
        InvalidTypeError,
        ["Own", "plain"],
    ),
    "attention's": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2)),
        {"target_modules": "all-linear"},
        InvalidTypeError,
        ["NonDynamicallyQuantizableLinear", "plain"],
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), {"target_modules": ["0"]}, InvalidTypeError, ["LazyLinear"]),
    "parametrized": (parametrized, {"target_modules": ["0"]}, InvalidTypeError, ["parametrized", "remove_parametr"]),
    "pruned": (pruned, {"target_modules": ["0"]}, InvalidTypeError, ["hook", "pruning"]),
    "offloaded": (offloaded, {"target_modules": ["0"]}, InvalidTypeError, ["forward of its own", "accelerate"]),
    "integer": (integer, {"target_modules": ["0"]}, InvalidTypeError, ["quantized", "torch.int8"]),
    "packed": (packed, {"target_modules": ["0"]}, InvalidTypeError, ["(8, 2)", "(4, 4)"]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Lazy modules", "ignore:.*is deprecated")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replaced_is_refused_with_a_sentence(name: str) -> None:
    make, arguments, error, words = REFUSED[name]
    refused(make(), replacing(**arguments), error, *words)


def test_a_model_and_a_configuration_of_other_types_are_refused() -> None:
    refused("model", replacing(target_modules=["up"]), InvalidTypeError, "str", "torch.nn.Module")
    refused(Net(), lambda model: replace_linear(model, {"r": 2}), InvalidTypeError, "dict", "LoRAConfig")
    for function in (lora_kernels.merge_lora, restore_linear, lora_kernels.lora_state_dict):
        refused(3, function, InvalidTypeError, "int", "torch.nn.Module")


def test_models_that_are_distributed_already_are_refused(tmp_path: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Net())
        refused(model, replacing(target_modules=["up"]), LoRAStateError, "DistributedDataParallel", "then wrap it")
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
        with pytest.raises(InvalidTypeError, match=r"DTensor.*then call parallelize_module"):
            replace_linear(sharded, LoRAConfig(r=2, target_modules=["0"]))
        assert sharded[0].weight.requires_grad
    finally:
        torch.distributed.destroy_process_group()


def test_a_failure_while_the_layers_are_made_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reset = Net(), FusedLoRALinear.reset_lora_parameters
    calls = []

    def fail_on_the_second(layer: FusedLoRALinear) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("full")
        reset(layer)

    monkeypatch.setattr(FusedLoRALinear, "reset_lora_parameters", fail_on_the_second)
    before = Snapshot(model)
    with pytest.raises(torch.OutOfMemoryError):
        replace_linear(model, UP)
    before.assert_unchanged(model)


def test_what_is_left_alone_does_not_stop_the_rest() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4))
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert [layer.name for layer in report] == ["0", "2"]
    assert [(layer.name, "Own" in layer.reason) for layer in report.skipped] == [("1", True)]


# Merging, restoring, saving


def test_merging_gives_each_layer_its_own_merge_and_unmerging_is_exact() -> None:
    model = Net()
    replace_linear(model, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    expected = copy.deepcopy(model)
    for _, layer in lora_layers(expected):
        layer.merge()
    before = Snapshot(model)
    lora_kernels.merge_lora(model)
    assert torch.equal(model(TOKENS), expected(TOKENS))
    lora_kernels.unmerge_lora(model)
    before.assert_unchanged(model)


def test_a_layer_that_cannot_be_merged_undoes_those_that_were() -> None:
    model = Net()
    replace_linear(model, UP)
    with torch.no_grad():
        model.blocks[1]["up"].lora_A.fill_(float("nan"))
    refused(model, lora_kernels.merge_lora, LoRAStateError, "'blocks.1.up'", "not finite")
    assert not any(layer.merged for _, layer in lora_layers(model))


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused() -> None:
    model = Net()
    replace_linear(model, UP)
    refused(model, lora_kernels.unmerge_lora, LoRAStateError, "'blocks.0.up', 'blocks.1.up'", "merge_lora(model) first")
    model.blocks[0]["up"].merge()
    refused(model, lora_kernels.merge_lora, LoRAStateError, "'blocks.0.up'", "unmerge_lora(model) first")
    refused(model, lora_kernels.unmerge_lora, LoRAStateError, "'blocks.1.up'")
    model.blocks[0]["up"].unmerge()
    lora_kernels.merge_lora(model)
    refused(model, lora_kernels.merge_lora, LoRAStateError, "merged already")


@pytest.mark.parametrize(
    "function",
    [
        lora_kernels.merge_lora,
        lora_kernels.unmerge_lora,
        restore_linear,
        lora_kernels.lora_state_dict,
        lora_kernels.mark_only_lora_as_trainable,
    ],
)
def test_a_model_without_lora_is_refused(function: Callable[[nn.Module], Any]) -> None:
    refused(Net(), function, LoRAStateError, function.__name__, "Net", "replace_linear")


@pytest.mark.parametrize("function", [lora_kernels.mark_only_lora_as_trainable, lora_kernels.lora_state_dict])
def test_another_bias_is_refused(function: Callable[..., Any]) -> None:
    model = Net()
    replace_linear(model, UP)
    refused(model, lambda model: function(model, bias="some"), InvalidArgumentError, "bias='some'", "lora_only")


def test_restoring_drops_what_is_not_merged() -> None:
    model = Net()
    plain, before = Snapshot(model), model(TOKENS)
    replace_linear(model, UP)
    report = restore_linear(model)
    assert report.dropped == ("blocks.0.up", "blocks.1.up")
    assert report.kept == ()
    assert "base weight; adapter dropped" in str(report)
    assert set(kinds(model).values()) == {"Linear"}
    assert [id(p) for _, p in model.named_parameters()] == [id(p) for _, p in plain.parameters]
    assert torch.equal(model(TOKENS), before)
    assert not model.blocks[0]["up"].weight.requires_grad
    assert not model._load_state_dict_pre_hooks


def test_restoring_keeps_what_is_merged() -> None:
    model = Net().eval()
    replace_linear(model, UP)
    model.blocks[0]["up"].merge()
    before = model.blocks[0]["up"](torch.ones(8))
    report = restore_linear(model)
    assert (report.kept, report.dropped) == (("blocks.0.up",), ("blocks.1.up",))
    assert torch.equal(model.blocks[0]["up"](torch.ones(8)), before)
    assert not model.blocks[0]["up"].training
    replace_linear(model, UP)


def test_restoring_a_layer_itself_is_refused() -> None:
    refused(FusedLoRALinear(4, 4, r=2), restore_linear, LoRAStateError, "to_linear()")


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapters_state_is_loaded_back(use_dora: bool) -> None:
    config = LoRAConfig(r=2, target_modules=["up"], init_lora_weights=False, use_dora=use_dora)
    model = Net()
    other = copy.deepcopy(model)
    replace_linear(model, config)
    replace_linear(other, config)
    tensors = lora_kernels.lora_state_dict(model)
    per_layer = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * use_dora
    assert list(tensors) == [f"blocks.{i}.up.{name}" for i in (0, 1) for name in per_layer]
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert not torch.equal(other(TOKENS), model(TOKENS))
    assert other.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert torch.equal(other(TOKENS), model(TOKENS))
    lora_kernels.merge_lora(other)
    lora_kernels.merge_lora(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert all(same_bits(tensor, lora_kernels.lora_state_dict(other)[name]) for name, tensor in tensors.items())


def test_the_adapters_state_with_biases() -> None:
    model = Net()
    replace_linear(model, UP)
    lora = set(lora_kernels.lora_state_dict(model))
    assert set(lora_kernels.lora_state_dict(model, bias="lora_only")) - lora == {f"blocks.{i}.up.bias" for i in (0, 1)}
    every = {f"blocks.{i}.{name}.bias" for i in (0, 1) for name in ("up", "down")}
    assert set(lora_kernels.lora_state_dict(model, bias="all")) - lora == every


@pytest.mark.parametrize("merged", [False, True])
def test_a_plain_models_state_dict_loads(merged: bool) -> None:
    plain, model = Net(), Net()
    replace_linear(model, LoRAConfig(r=2, target_modules=["up"]))
    if merged:
        lora_kernels.merge_lora(model)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == set(lora_kernels.lora_state_dict(model))
    assert result.unexpected_keys == []
    assert torch.equal(model(TOKENS), plain(TOKENS))


def test_an_adapter_of_another_rank_is_refused_before_anything_is_loaded() -> None:
    model, other = Net(), Net()
    replace_linear(model, LoRAConfig(r=2, target_modules=["up"]))
    replace_linear(other, LoRAConfig(r=2, target_modules=["up"], rank_pattern={"blocks.1.up": 4}))
    load = lambda model: model.load_state_dict(other.state_dict())  # noqa: E731
    refused(model, load, InvalidArgumentError, "blocks.1.up.lora_A has rank 4", "r=2")
    wrapped = nn.Sequential(model)
    load = lambda model: model.load_state_dict({f"0.{k}": v for k, v in other.state_dict().items()})  # noqa: E731
    refused(wrapped, load, InvalidArgumentError, "0.blocks.1.up.lora_A has rank 4", "r=2")


# transformers


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


SETTINGS = [
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "target_modules": "all-linear"},
    {"r": 4, "target_modules": "all-linear", "exclude_modules": ["k_proj", "down_proj"], "use_dora": True},
    {"r": 4, "target_modules": r".*\.1\..*_proj", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}},
    {"r": 2, "target_modules": ["o_proj", "lm_head"], "bias": "all", "use_rslora": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_llama_trains_as_many_parameters_as_with_peft(llama: nn.Module, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(llama)
    report = replace_linear(model, LoRAConfig(**settings))
    lora_kernels.mark_only_lora_as_trainable(model, bias=settings.get("bias", "none"))
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(**settings))
    expected = theirs.get_nb_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (trainable, report.total) == expected
    assert (report.adapter_parameters, len(report)) == (
        expected[0],
        sum(isinstance(module, peft.tuners.lora.Linear) for module in theirs.modules()),
    )


def test_a_llama_runs_trains_merges_and_is_restored(llama: nn.Module) -> None:
    model, tokens = copy.deepcopy(llama).eval(), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        base = model(tokens).logits
    replace_linear(model, LoRAConfig(r=4, target_modules="all-linear"))
    assert type(model.lm_head) is nn.Linear
    lora_kernels.mark_only_lora_as_trainable(model)
    assert torch.equal(model(tokens).logits, base)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.lora_B.grad is not None for _, layer in lora_layers(model))
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=2), llama.generate(tokens[:1], max_new_tokens=2))
    restore_linear(model)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, base)


def test_gpt2s_conv1d_is_named_and_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    for target in (["c_attn"], "all-linear"):
        refused(model, replacing(target_modules=target), InvalidTypeError, "transformer.h.0.attn.c_attn", "Conv1D")


def test_the_parts_of_a_peft_layer_are_left_alone() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up"]))
    report = replace_linear(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert {layer.name.rpartition(".")[2] for layer in report} == {"down", "head"}
    assert len(report.skipped) == 6
    assert all("PEFT" in layer.reason for layer in report.skipped)
