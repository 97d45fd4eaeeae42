"""Replacing the layers of a model: what is replaced, what trains, and what is shared, tied or wrapped."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, replace_linear, restore_linear, use_backend
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsWarning, LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import TOKENS, UP, Net, kinds, refused, replacing, tied
from numerics import check, same_bits


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
    with use_backend("eager"):  # PyTorch's own product on both sides: the same bits
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
    model = Net()
    report = replace_linear(model, config)
    assert [(layer.r, layer.parameters) for layer in report] == [(3, 60), (2, 40)]
    assert report.adapter_parameters == 100
    assert (len(report), report.total) == (2, 80 + 2 * (8 * 12 + 12 + 12 * 8 + 8) + 80 + 100)
    assert report.trainable == report.total - 2 * (8 * 12 + 12)
    assert report.percent == 100 * report.trainable / report.total
    text = str(report)
    for line in [
        "replaced 2 layers:",
        "  blocks.0.up (8→12), r = 3, alpha = 16: 60 parameters",
        "  embed: Embedding is no linear layer, and lora_kernels adapts linear layers only.",
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


def test_modules_to_save_train_whole_and_are_not_replaced() -> None:
    model = Net().requires_grad_(False)
    config = LoRAConfig(r=2, target_modules=["up", "head"], modules_to_save=["head", "nowhere"])
    report = replace_linear(model, config)
    assert {layer.name: layer.reason for layer in report.skipped} == {
        "head": "modules_to_save names it ('head'), so it trains whole."
    }
    assert report.notes == ("modules_to_save names 'nowhere', which matches nothing.",)
    expected = {"head.weight"} | {f"blocks.{i}.up.lora_{x}" for i in (0, 1) for x in "AB"}
    for _ in range(2):
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
        lora_kernels.mark_only_lora_as_trainable(model)
    restore_linear(model)
    refused(
        Net(), replacing(target_modules=["head"], modules_to_save=["head"]), InvalidArgumentError, "modules_to_save"
    )


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
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
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
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
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
    assert [layer.name for layer in report] == ["blocks.0.up", "blocks.1.up"]


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
    wide, slow = copy.deepcopy(model).double(), model(x)
    exact = lambda: wide(x.double()).flatten(0, 1)  # noqa: E731 (with a graph: not the fast path)
    with torch.no_grad():
        fast = model(x).flatten(0, 1)
    check("y", fast, exact, slow.flatten(0, 1), torch.float32)
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
        restore_linear(model)
    assert not model[0].linear1._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("transform", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_replaced_model_is_copied_and_pickled(transform: Callable[[nn.Module], nn.Module]) -> None:
    model = Net().eval()
    replace_linear(model, UP)
    lora_kernels.merge_lora(model)
    other = transform(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    lora_kernels.unmerge_lora(other)
    lora_kernels.unmerge_lora(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
        restore_linear(other)
    assert set(kinds(other).values()) == {"Linear"}


def test_an_encoder_that_would_nest_its_batches_is_noted() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    config = LoRAConfig(r=2, target_modules=["linear1"])
    assert "use_nested_tensor" in replace_linear(model, config).notes[0]
    restore_linear(model)
    model.use_nested_tensor = False
    assert replace_linear(model, config).notes == ()
