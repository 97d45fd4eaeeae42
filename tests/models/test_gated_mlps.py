"""Gated MLPs that ``replace_linear`` and ``fuse_peft`` find in models; and those that are left as they are."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRAMLP, LoRAConfig, replace_linear, restore_linear, share_inputs, unshare_inputs
from numerics import check_all

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Phi3"]
ALL = LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]


def made(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    more = {"num_key_value_heads": 1, "head_dim": 8} if kind != "Phi3" else {"pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(vocab_size=24, **SIZES, **more)
    torch.manual_seed(3)
    return getattr(transformers, f"{kind}Model")(config).requires_grad_(False).train()


def results(mlp: Any) -> dict[str, Tensor]:
    dtype = next(mlp.parameters()).dtype
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    x.requires_grad_()
    torch.manual_seed(2)
    y = mlp(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in mlp.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def of(model: Any) -> Any:
    return next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_mlps_are_found_and_given_back(kind: str) -> None:
    model = made(kind)
    plain = type(of(model))
    report = replace_linear(model, ALL)
    assert report.mlps == ("layers.0.mlp",)
    assert report.plain_mlps == ()
    assert isinstance(of(model), FusedLoRAMLP)
    assert isinstance(of(model), plain)
    assert of(model).why_plain() is None
    single = copy.deepcopy(model)
    unshare_inputs(single)
    assert type(of(single)) is plain
    exact = partial(results, copy.deepcopy(of(single)).double())
    check_all(results(of(model)), exact, results(of(single)), torch.float32)
    restore_linear(model)
    assert type(of(model)) is plain


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.2}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Phi3"])
def test_pefts_are_found_and_given_back(kind: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False, **options)
    model = peft.get_peft_model(made(kind), config).train()
    plain = type(of(model))
    report = lora_kernels.fuse_peft(model)
    assert len(report.mlps) == 1
    assert "1 gated MLP in one pass" in str(report)
    single = copy.deepcopy(model)
    unshare_inputs(single)
    with lora_kernels.use_backend("eager"):  # its mask is the same in every dtype
        exact = partial(results, copy.deepcopy(of(single)).double())
        check_all(results(of(model)), exact, results(of(single)), torch.float32)
    assert lora_kernels.peft.calls(of(model)).fused == len(of(model)._roles) - 1
    lora_kernels.unfuse_peft(model)
    assert type(of(model)) is plain


def test_several_adapters_of_peft_run_in_one_pass() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False)
    model = peft.get_peft_model(made("Llama"), config).train()
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=5, target_modules=PROJECTIONS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    lora_kernels.fuse_peft(model)
    single = copy.deepcopy(model)
    unshare_inputs(single)
    assert of(model).why_plain() is None
    exact = partial(results, copy.deepcopy(of(single)).double())
    check_all(results(of(model)), exact, results(of(single)), torch.float32)
    with model.disable_adapter():
        assert "no adapter acts" in of(model).why_plain()


def test_recomputation_is_asked_for_and_taken_back() -> None:
    model = made("Llama")
    replace_linear(model, ALL)
    share_inputs(model, recompute=True)
    assert of(model).recompute
    share_inputs(model, recompute=False)
    assert not of(model).recompute


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Watched(Own):
    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(x)


class Clamped(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(max=7.0))


class Renamed(Own):
    """Inherits the forward."""


class Squared(Own):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.ReLU()


def test_an_own_mlp_is_found_by_what_its_forward_does() -> None:
    for kind in (Own, Renamed):
        model = kind()
        assert replace_linear(model, ALL).mlps == ("",)
        assert type(copy.deepcopy(model)) is type(model)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Watched, "not one that is known"), (Clamped, "not one"), (Squared, "none of SiLU and GELU")]
)
def test_another_forward_or_activation_is_left_and_told(kind: type[Own], reason: str) -> None:
    model = kind()
    report = replace_linear(model, ALL)
    assert report.mlps == ()
    assert reason in report.plain_mlps[0].reason
    assert "layer by layer 1 gated MLP:" in str(report)
    model(torch.ones(2, 16)).sum().backward()


def test_one_without_all_adapters_is_left_and_told() -> None:
    model = Own()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["gate_proj", "up_proj"]))
    assert "down_proj has no adapter" in report.plain_mlps[0].reason


def test_a_forward_on_the_instance_is_left_and_told() -> None:
    model = Own()
    model.forward = lambda x: x  # type: ignore[method-assign]
    report = replace_linear(model, ALL)
    assert "on the instance" in report.plain_mlps[0].reason
    x = torch.ones(2, 16)
    assert model(x) is x


def test_a_class_that_is_patched_later_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Own()
    replace_linear(model, ALL)
    monkeypatch.setattr(Own, "forward", lambda self, x: 2.0 * x)
    x = torch.ones(2, 16)
    assert torch.equal(model(x), 2.0 * x)
    assert "Own.forward was replaced" in (model.why_plain() or "")  # type: ignore[operator]
