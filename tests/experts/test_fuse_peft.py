"""``fuse_peft`` on PEFT's wrappers of stacked experts: PEFT's results, its switches, and its classes back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mixtures
from lora_kernels import adapters_disabled, fuse_peft, unfuse_peft
from lora_kernels.accuracy import judge
from lora_kernels.peft import calls
from mixtures import TARGETS, TOKENS, logits
from numerics import same_bits

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


def made(name: str, targets: list[str] = TARGETS, **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            **{"r": 3, "lora_alpha": 6, "target_modules": [], **arguments}, target_parameters=targets
        )
        model = peft.get_peft_model(mixtures.made(name), config)
    mixtures.move(p for n, p in model.named_parameters() if "lora_" in n)
    model.base_model.model.set_experts_implementation("eager")  # grouped_mm has no fp64
    return model.eval().double()


def results(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    found = {"logits": logits(model)}
    found["logits"].square().mean().backward()
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}


def check(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """In fp64, so PEFT's own numbers are the yardstick; ``test_products`` judges the other dtypes."""
    found = results(model)
    assert found.keys() == expected.keys()
    verdicts = [judge(n, found[n], expected[n], expected[n], torch.float64, depth=8) for n in found]
    assert not (failed := [str(verdict) for verdict in verdicts if not verdict.passed]), "\n".join(failed)


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", mixtures.MODELS)
def test_fused_gives_what_peft_gives_and_back(name: str, targets: list[str]) -> None:
    model = made(name, targets)
    before = results(model)
    kinds, state = [type(m) for m in model.modules()], {n: id(p) for n, p in model.named_parameters()}
    report = fuse_peft(model)
    assert len(report) == len([k for k in kinds if k.__name__ == "ParamWrapper"]) > 0
    assert not report.skipped
    check(model, before)
    assert {n: id(p) for n, p in model.named_parameters()} == state
    counted = calls(model)
    assert counted.fused == len(report) // len(targets)  # the outermost wrapper computes for all
    assert not counted.own
    unfuse_peft(model)
    assert [type(m) for m in model.modules()] == kinds
    assert same_bits(results(model)["logits"], before["logits"])


def test_linear_layers_and_experts_together() -> None:
    model = made("qwen3_moe", target_modules=["q_proj", "o_proj"])
    before = results(model)
    report = fuse_peft(model)
    assert len(report) == 8
    assert fuse_peft(model).already == tuple(layer.name for layer in report)
    check(model, before)


def test_pefts_switches_work_as_before(tmp_path: Path) -> None:
    model = made("qwen3_moe")
    base = mixtures.made("qwen3_moe", torch.float64)
    base.set_experts_implementation("eager")
    base, on = logits(base), logits(model)
    fuse_peft(model)
    fused = logits(model)
    with model.disable_adapter():
        assert same_bits(logits(model), base)
    with adapters_disabled(model):
        assert same_bits(logits(model), base)
    assert same_bits(logits(model), fused)
    model.merge_adapter()
    assert judge("merged", logits(model), on, on, torch.float64, depth=8).passed
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    unfuse_peft(model)
    model.save_pretrained(tmp_path / "plain")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "plain"))
    assert all(same_bits(tensor, one[name]) for name, tensor in other.items())


def test_several_active_adapters_and_ones_that_come_later() -> None:
    model = made("mixtral")
    fuse_peft(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=9, target_modules=[], target_parameters=TARGETS)
        model.add_adapter("second", config)
    mixtures.move(p for n, p in model.named_parameters() if "lora_" in n)
    model.base_model.set_adapter(["default", "second"])
    plain = copy.deepcopy(model)
    unfuse_peft(plain)
    plain.eval()
    check(model.double().eval(), results(plain.double()))
    assert not calls(model).own
    model.set_adapter("second")
    plain.set_adapter("second")
    check(model, results(plain))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_compiled_they_are_fused_in_one_graph_and_see_each_change(name: str) -> None:
    torch.compiler.reset()
    model = made(name)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS))
    mixtures.move(p for n, p in model.named_parameters() if "lora_" in n)
    layer, graphs = model.double().get_submodule(fuse_peft(model).layers[0].name), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    call = torch.compile(layer, backend=backend, dynamic=True)

    def step(run: Any, tokens: int) -> list[Tensor]:
        torch.manual_seed(tokens)
        x, weights = (make(tokens, n, dtype=torch.float64) for make, n in ((torch.randn, 16), (torch.rand, 2)))
        index = torch.stack([torch.randperm(layer.num_experts)[:2] for _ in range(tokens)])
        model.zero_grad()
        y = run(x.requires_grad_(), index, weights.requires_grad_())
        y.square().sum().backward()
        return [y.detach(), x.grad, weights.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    def check_bits() -> None:
        for tokens in (9, 14):
            assert all(same_bits(*pair) for pair in zip(step(call, tokens), step(layer, tokens), strict=True))

    check_bits()
    assert len(graphs) == 1
    model.set_adapter("second")
    check_bits()
    model.base_model.set_adapter(["default", "second"])
    check_bits()
    layer.scale_layer(1.5)
    check_bits()
    with model.disable_adapter():
        check_bits()
    model.merge_adapter()
    check_bits()
    model.unmerge_adapter()
    check_bits()
    assert not calls(model).own


def test_gradients_of_several_adapters_keep_fp32s_range() -> None:
    """dyᵀ h is beyond fp16's range, and s dyᵀ h is not: each adapter's gradient is what it gives when it acts alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of = [
            peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=[], target_parameters=TARGETS[1:])
            for alpha in (0.002, 0.004)
        ]
        model = peft.get_peft_model(mixtures.made("qwen3_moe", torch.float16), of[0], autocast_adapter_dtype=False)
        model.add_adapter("second", of[1], autocast_adapter_dtype=False)
    mixtures.move(p for n, p in model.named_parameters() if "lora_" in n)
    layer = model.get_submodule(fuse_peft(model).layers[0].name).train()
    x, index = torch.randn(20, 16, dtype=torch.float16), torch.arange(80).view(20, 4) % 8
    found = []
    for active in (["default", "second"], ["default"], ["second"]):
        model.base_model.set_adapter(active)
        model.zero_grad()
        y = layer(x, index, torch.ones(20, 4, dtype=torch.float16))
        y.backward(torch.full_like(y, 6e4))
        found.append({name: layer.lora_B[name].weight.grad.clone() for name in active})
    together, *alone = found
    for one in alone:
        for name, gradient in one.items():
            assert gradient.isfinite().all()
            assert judge(name, together[name], gradient.double(), gradient, torch.float16, depth=2).passed
    assert not calls(model).own


def test_what_cannot_be_fused_is_pefts_own_and_counted() -> None:
    model = made("qwen3_moe")
    expected = logits(model)
    report = fuse_peft(model)
    inner = model.get_submodule(report.layers[0].name).get_base_layer()
    handle = inner.register_forward_hook(lambda *_: None)
    found = logits(model)
    handle.remove()
    assert "a module within it has hooks" in calls(model).own
    assert judge("logits", found, expected, expected, torch.float64, depth=8).passed


@pytest.mark.parametrize("trained", ["gate_up_proj", "down_proj"])
def test_a_weight_of_the_experts_that_trains_is_pefts_own(trained: str) -> None:
    model = made("gpt_oss", TARGETS[:1])
    for name, parameter in model.named_parameters():
        if name.endswith((trained, "_bias")):
            parameter.requires_grad_()
    expected = results(model)
    fuse_peft(model)
    check(model, expected)
    assert any(name.endswith(trained) for name in expected)
    assert set(calls(model).own) == {"a weight of its experts trains"}


def test_a_linear_layers_weight_stays_pefts() -> None:
    model = made("mixtral", ["q_proj.weight", *TARGETS])
    report = fuse_peft(model)
    assert {row.name.rpartition(".")[2] for row in report.skipped} == {"q_proj"}
    assert all("ParamWrapper" in row.reason for row in report.skipped)


def test_checkpoints_run_again_as_they_ran() -> None:
    model = made("qwen3_moe").train()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    fuse_peft(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.base_model.model.gradient_checkpointing_disable()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert kept
    assert all(same_bits(kept[n], p.grad) for n, p in model.named_parameters() if p.grad is not None)
