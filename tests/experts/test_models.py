"""Whole mixtures, small and random: names that match, PEFT's own results, and its two matrices."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
import mixtures
from lora_kernels import LoRAConfig, replace_linear, restore_linear
from lora_kernels.accuracy import judge
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAKernelsError, LoRAStateError
from lora_kernels.experts.layer import FusedLoRAExperts
from lora_kernels.experts.peft_form import from_peft, to_peft
from mixtures import TARGETS, TOKENS, logits
from numerics import check_all, same_bits

pytest.importorskip("transformers")

CONFIG = LoRAConfig(r=3, lora_alpha=6)


def adapted(name: str, targets: list[str] = TARGETS, config: LoRAConfig = CONFIG) -> nn.Module:
    model = mixtures.made(name)
    replace_linear(model, replace(config, target_parameters=targets))
    mixtures.move(p for layer in layers_of(model).values() for p in layer.adapter.values())
    return model


def layers_of(model: nn.Module) -> dict[str, FusedLoRAExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLoRAExperts)}


def with_pefts(ours: nn.Module, name: str, targets: list[str], **arguments: Any) -> nn.Module:
    """PEFT's model with the same adapters, by :func:`to_peft`."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_parameters=targets, target_modules=[], **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(mixtures.made(name), config)
    for layer, theirs in pairs(ours, model):
        for own, wrapper in theirs.items():
            a, b = to_peft(layer.lora_A[own].detach(), layer.lora_B[own].detach())
            wrapper.lora_A["default"].weight.data.copy_(a)
            wrapper.lora_B["default"].weight.data.copy_(b)
    return model.eval()


def pairs(ours: nn.Module, model: nn.Module) -> list[tuple[FusedLoRAExperts, dict[str, Any]]]:
    """Each of our modules with PEFT's wrappers of it, by the Parameter that they adapt."""
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "parameter_name"):
            found.setdefault(path.replace(".base_layer", ""), {})[module.parameter_name] = module
    return [(ours.get_submodule(path), wrappers) for path, wrappers in found.items()]


def loss_and_gradients(ours: nn.Module, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The logits and every gradient of the adapters as PEFT has them, of ``ours`` or of PEFT's model."""
    acting = ours if model is None else model
    acting.zero_grad()
    found = {"logits": logits(acting)}
    found["logits"].square().mean().backward()
    for path, layer in ours.named_modules():
        for own in layer.options if isinstance(layer, FusedLoRAExperts) else ():
            if model is None:
                a, b = to_peft(layer.lora_A[own].grad, layer.lora_B[own].grad)
            else:
                wrapper = next(w[own] for of, w in pairs(ours, model) if of is layer)
                a, b = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
            found |= {f"{path}.{own} a": a, f"{path}.{own} b": b}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", mixtures.MODELS)
def test_a_model_gives_what_pefts_gives(name: str, targets: list[str]) -> None:
    ours = adapted(name, targets)
    theirs = with_pefts(ours, name, targets, r=3, lora_alpha=6)
    found, yardstick = loss_and_gradients(ours), loss_and_gradients(ours, theirs)
    wide = copy.deepcopy(theirs).double()
    wide.base_model.model.set_experts_implementation("eager")  # grouped_mm has no fp64
    assert len(found) == 1 + 2 * len(targets) * len(pairs(ours, theirs)) > 1
    check_all(found, partial(loss_and_gradients, ours, wide), yardstick, torch.float32, depth=8)


@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_pefts_matrices_hold_each_experts_update(name: str, rank: int) -> None:
    ours = adapted(name, config=LoRAConfig(r=rank, lora_alpha=6))
    for layer, wrappers in pairs(ours, with_pefts(ours, name, TARGETS, r=rank, lora_alpha=6)):
        for own, wrapper in wrappers.items():
            a, b = layer.lora_A[own].double(), layer.lora_B[own].double()
            update = layer.scaling(own) * (b @ a)
            theirs = wrapper.double().get_delta_weight("default")
            for e in range(layer.num_experts):
                delta = theirs[e].t() if layer.is_transposed else theirs[e]
                verdict = judge(f"expert {e}", delta, update[e], update[e], torch.float32)
                assert verdict.passed, str(verdict)


def test_exchanged_experts_are_seen() -> None:
    ours = adapted("qwen3_moe")
    before = logits(ours).detach()
    layer = next(m for m in ours.modules() if isinstance(m, FusedLoRAExperts))
    for factors in (layer.lora_A, layer.lora_B):
        factors["down_proj"].data = factors["down_proj"].data[[1, 0, *range(2, 8)]]
    assert not judge("logits", logits(ours), before.double(), before, torch.float32, depth=8).passed


@pytest.mark.parametrize(("experts", "r"), [(1, 1), (4, 3), (7, 64)])
def test_pefts_matrices_and_back(experts: int, r: int) -> None:
    a, b = torch.randn(experts, r, 5), torch.randn(experts, 6, r)
    lora_a, lora_b = to_peft(a, b)
    e, i = experts - 1, r // 2
    assert torch.equal(lora_a[e * r + i], a[e, i])  # the expert is the slowest of A's rows
    assert torch.equal(lora_b[:, i * experts + e], b[e, :, i])  # and the fastest of B's columns
    back = from_peft(lora_a, lora_b, experts)
    assert torch.equal(back[0], a)
    assert torch.equal(back[1], b)
    with pytest.raises(InvalidArgumentError, match="number of experts"):
        from_peft(lora_a, lora_b[:, 1:], experts)


def test_names_match_as_in_peft() -> None:
    model = mixtures.made("qwen3_moe")
    targets = ["model.layers.1.mlp.experts.down_proj", "experts.gate_up_proj"]
    replace_linear(model, replace(CONFIG, target_parameters=targets))
    assert {name: list(layer.options) for name, layer in layers_of(model).items()} == {
        "model.layers.0.mlp.experts": ["gate_up_proj"],
        "model.layers.1.mlp.experts": ["gate_up_proj", "down_proj"],
    }


def test_ranks_and_alphas_by_the_parameters_name() -> None:
    patterns = {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {r"layers\.1\..*\.gate_up_proj": 12}}
    ours = adapted("qwen3_moe", config=LoRAConfig(r=3, lora_alpha=6, use_rslora=True, **patterns))
    theirs = with_pefts(ours, "qwen3_moe", TARGETS, r=3, lora_alpha=6, use_rslora=True, **patterns)
    for layer, wrappers in pairs(ours, theirs):
        for own, wrapper in wrappers.items():
            assert layer.options[own].r == wrapper.r["default"]
            assert layer.scaling(own) == wrapper.scaling["default"]


def test_restoring_leaves_the_model_that_was() -> None:
    model, plain = adapted("qwen3_moe"), mixtures.made("qwen3_moe")
    former = plain.config._experts_implementation
    assert model.config._experts_implementation == former
    assert not torch.equal(logits(model), logits(plain))
    with pytest.warns(match="drops the adapters"):
        restored = restore_linear(model)
    assert [row.name for row in restored] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert same_bits(logits(model), logits(plain))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_modules_without_an_adapter_run_as_the_config_says() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ran: list[str] = []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ran.append(type(module).__name__)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *args, **kwargs)

    ALL_EXPERTS_FUNCTIONS["counted"] = counted
    try:
        model = adapted("qwen3_moe", ["layers.0.mlp.experts.down_proj"])
        model.set_experts_implementation("counted")
        logits(model)
    finally:
        del ALL_EXPERTS_FUNCTIONS["counted"]
    assert ran == ["Qwen3MoeExperts"]


def test_a_trained_model_goes_on_where_it_was_saved() -> None:
    model = adapted("mixtral")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = mixtures.made("mixtral")
    replace_linear(other, replace(CONFIG, target_parameters=TARGETS))
    other.load_state_dict(state)
    assert same_bits(logits(other), logits(model))
    assert not mixtures.made("mixtral").load_state_dict(state, strict=False).missing_keys  # the base keeps its names


def test_a_fine_tune_learns() -> None:
    model = adapted("qwen3_moe", config=LoRAConfig(r=3, lora_alpha=6, lora_dropout=0.1)).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if n.endswith("experts.down_proj")}
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(adapters, lr=3e-2)
    losses = []
    for _ in range(10):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(same_bits(model.get_parameter(n), p) for n, p in frozen.items())


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (["experts.nothing"], InvalidArgumentError, r"matches no Parameter.*mlp\.experts\.gate_up_proj"),
        (["gate.weight"], InvalidTypeError, r"TopKRouter\.weight is \(4, 16\).*stacked"),
        (["q_proj.weight"], InvalidTypeError, "name the module in target_modules"),
    ],
)
def test_names_of_nothing_that_can_be_adapted(targets: Any, error: type[LoRAKernelsError], words: str) -> None:
    model = mixtures.made("mixtral")
    kept = list(model.modules())
    with pytest.raises(error, match=words):
        replace_linear(model, replace(CONFIG, target_parameters=targets))
    assert list(model.modules()) == kept
    assert all(p.requires_grad for p in model.parameters())


def test_names_are_a_list() -> None:
    with pytest.raises(InvalidTypeError, match="must be a list of names of Parameters"):
        LoRAConfig(target_parameters="experts.down_proj")


@pytest.mark.parametrize("option", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_what_experts_cannot_have_changes_nothing(option: dict[str, Any]) -> None:
    model = mixtures.made("mixtral")
    kept = list(model.modules())
    with pytest.raises(InvalidArgumentError, match=next(iter(option))):
        replace_linear(model, LoRAConfig(r=3, target_modules=["q_proj"], target_parameters=TARGETS, **option))
    assert list(model.modules()) == kept
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_is_refused() -> None:
    model = adapted("mixtral", TARGETS[:1])
    with pytest.raises(LoRAStateError, match="has adapters on its experts already"):
        replace_linear(model, replace(CONFIG, target_parameters=TARGETS[1:]))
    module = mixtures.experts("mixtral")
    with pytest.raises(LoRAStateError, match="is itself what target_parameters names"):
        replace_linear(module, replace(CONFIG, target_parameters=["down_proj"]))


@pytest.mark.parametrize("name", mixtures.MODELS)
def test_all_linear_says_what_it_leaves_out_and_target_parameters_takes_it(name: str) -> None:
    report = replace_linear(mixtures.made(name), LoRAConfig(r=3, target_modules="all-linear"))
    assert {row.name.rpartition(".")[2] for row in report.skipped} == {"experts"}
    words = "LoRAConfig(target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']) adapts them"
    assert all(words in row.reason for row in report.skipped)
    assert words in str(report)
    both = replace_linear(
        model := mixtures.made(name), LoRAConfig(r=3, target_modules="all-linear", target_parameters=TARGETS)
    )
    assert not both.skipped
    assert not both.notes
    assert [row.name for row in both if not row.experts] == [row.name for row in report]
    rows = {row.name: row for row in both if row.experts}
    for path, layer in layers_of(model).items():
        for own in layer.options:
            row, (experts, n, k) = rows.pop(f"{path}.{own}"), layer.stacked(own).shape
            assert (row.in_features, row.out_features, row.experts, row.r) == (k, n, experts, 3)
            assert row.parameters == experts * 3 * (n + k)
    assert not rows
    alone = replace_linear(mixtures.made(name), LoRAConfig(r=3, target_parameters=TARGETS))
    assert f"of {experts} experts, r = 3" in str(alone)
    assert f"of each of {experts} experts" in both.details()


def test_the_report_follows_the_model() -> None:
    model = mixtures.made("qwen3_moe")
    report = replace_linear(model, replace(CONFIG, target_parameters=[*TARGETS, "experts.nothing"]))
    assert [note.partition(",")[0] for note in report.notes] == ["target_parameters names 'experts.nothing'"]
    assert report.trainable - report.adapter_parameters > 0
    lora_kernels.mark_only_lora_as_trainable(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.{own}" for path, layer in layers_of(model).items() for own in layer.adapter}
    assert f"trainable parameters: {report.adapter_parameters:,} of" in str(report)
    restore_linear(model)
    assert "since then all 4 layers were taken out of the model" in str(report)


def test_modules_that_exclude_modules_names_count_as_in_peft() -> None:
    config = LoRAConfig(r=3, target_modules=["q_proj"], exclude_modules=["experts"], target_parameters=TARGETS)
    report = replace_linear(mixtures.made("mixtral"), config)
    assert any("as in PEFT, target_parameters counts there" in note for note in report.notes)
    assert sum(row.experts > 0 for row in report) == 4
