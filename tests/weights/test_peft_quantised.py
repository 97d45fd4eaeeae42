"""PEFT's own layers over quantised weights, fused: values, gradients, what is counted, undoing, refusals."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import LoRAConfig
from lora_kernels.models.model import lora_layers
from quantised import CALLABLE, KINDS, check_beside, quantised, results_of, values

peft = pytest.importorskip("peft", reason="peft is not installed")


def _model(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PEFT model over a layer of ``kind`` 64 -> 96, its adapter's term about as large as the base's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")  # PEFT's, of its own merging
        base = nn.Sequential(quantised(kind, 64, 96, dtype))
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], **options)
        model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def _plain(model: Any, dtype: torch.dtype) -> Any:
    """The same PEFT model over the dequantised weight."""
    found = copy.deepcopy(model)
    lora_kernels.unfuse_peft(found)
    layer = found.base_model.model[0]
    n, k = layer.out_features, layer.in_features
    plain = peft.get_peft_model(
        nn.Sequential(nn.Linear(k, n, dtype=dtype)), copy.deepcopy(found.peft_config["default"])
    )
    target = plain.base_model.model[0]
    target.base_layer.weight.data = values(layer.base_layer).to(dtype)
    target.base_layer.bias.data = layer.base_layer.bias.detach().to(dtype)
    plain.load_state_dict({k: v for k, v in found.state_dict().items() if "lora_" in k}, strict=False)
    return plain.train(model.training)


OPTIONS: tuple[dict[str, Any], ...] = ({}, {"use_dora": True}, {"lora_dropout": 0.5})


CASES = [  # PEFT makes no DoRA over FP8
    (kind, options) for kind in KINDS for options in OPTIONS if not (kind.startswith("fp8") and "use_dora" in options)
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_a_fused_layer_gives_what_pefts_gives_over_the_values(kind: str, options: dict[str, Any]) -> None:
    model = _model(kind, **options)
    lora_kernels.fuse_peft(model)
    plain, x, dy = _plain(model, torch.float32), torch.randn(40, 64), torch.randn(40, 96)
    lora_kernels.fuse_peft(plain)  # the same dropout
    check_beside(results_of(model, x, dy), results_of(plain, x, dy), partial(results_of, plain.double(), x, dy))
    assert lora_kernels.peft.calls(model).own == {}


@pytest.mark.parametrize("kind", CALLABLE)
def test_unfusing_gives_pefts_own_layer_back(kind: str) -> None:
    model = _model(kind)
    own, x = type(model.base_model.model[0]), torch.randn(8, 64)
    expected = model(x)
    lora_kernels.fuse_peft(model)
    assert type(model.base_model.model[0]) is not own
    model(x).sum().backward()
    lora_kernels.unfuse_peft(model)
    assert type(model.base_model.model[0]) is own
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_fused_model_computes_the_same(kind: str) -> None:
    model, x = _model(kind), torch.randn(8, 64)
    lora_kernels.fuse_peft(model)
    y = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), y)
    assert lora_kernels.peft.calls(other).own == {}


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_act_together(kind: str) -> None:
    model = _model(kind)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    lora_kernels.fuse_peft(model)
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["second"].weight, std=0.5)
    x = torch.randn(8, 64)
    plain = nn.functional.linear(x, values(layer.base_layer).float(), layer.base_layer.bias)
    for name in ("default", "second"):
        a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
        plain = plain + layer.scaling[name] * (x @ a.t()) @ b.t()
    torch.testing.assert_close(model(x), plain)
    assert lora_kernels.peft.calls(model).own == {}


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_file_loads_onto_the_quantised_model(kind: str, tmp_path: Any) -> None:
    model, x = _model(kind), torch.randn(8, 64)
    plain = nn.Sequential(_base(model))
    model.save_pretrained(tmp_path)
    lora_kernels.fuse_peft(model)
    lora_kernels.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x), model(x))


def _base(model: Any) -> Any:
    return copy.deepcopy(model.base_model.model[0].base_layer)


def test_a_report_names_a_base_that_quantises_its_input() -> None:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = nn.Sequential(nn.Linear(64, 96))
    ao.quantize_(base, ao.Int8DynamicActivationInt8WeightConfig())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"]))
    report = lora_kernels.fuse_peft(model)
    assert "weight-only" in str(report)


def test_replace_linear_takes_every_form_by_its_name() -> None:
    model = nn.Sequential(*(quantised(kind, 64, 64, torch.float32) for kind in KINDS), nn.Linear(64, 8))
    lora_kernels.replace_linear(model, LoRAConfig(r=2, target_modules=[str(i) for i in range(len(KINDS))]))
    assert len(list(lora_layers(model))) == len(KINDS)
    assert model(torch.randn(3, 64)).shape == (3, 8)


class HQQLinear(nn.Module):
    """As HQQ's: a module with ``in_features`` and no weight that has a form here."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 64, 96
        self.register_buffer("W_q", torch.randint(-8, 8, (96, 64), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.get_buffer("W_q").to(x.dtype).t()


class HqqLoraLinear(nn.Module, peft.tuners.lora.LoraLayer):  # type: ignore[misc]
    """As PEFT's for HQQ, which is there where hqq is installed."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        peft.tuners.lora.LoraLayer.__init__(self, base_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_base_layer()(x)


def test_a_layer_of_pefts_for_another_package_is_left_to_peft_and_told_of() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96)), peft.LoraConfig(r=4, target_modules=["0"])
    )
    model.base_model.model[1] = kept = HqqLoraLinear(HQQLinear())
    report = lora_kernels.fuse_peft(model)
    (skipped,) = report.skipped
    assert (skipped.name, type(model.base_model.model[1])) == ("base_model.model.1", HqqLoraLinear)
    assert "HqqLoraLinear; only lora.Linear itself is fused" in skipped.reason
    assert skipped.reason in report.details()
    x = torch.randn(3, 64)
    assert torch.equal(model(x), kept(model.base_model.model[0](x)))
