"""What ``fuse_peft`` and its counts print: a screen, and what holds when it is printed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from lora_kernels import fuse_peft, unfuse_peft  # noqa: E402
from lora_kernels.peft import Calls, calls  # noqa: E402

X = torch.ones(2, 8)


def blocks(count: int = 12) -> Any:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(count))})
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up"]), model)


def test_the_report_is_a_screen_and_details_name_every_layer() -> None:
    model = blocks()
    report = fuse_peft(model)
    assert str(report).splitlines() == [
        "fused 12 layers:",
        "  12 × up (8→8), default r = 2",
        "calls so far: 0 fused, 0 by PEFT's own forward, 0 base alone",
    ]
    assert repr(report) == str(report)
    assert "  layers.11.up (8 -> 8), default r=2" in report.details()
    assert str(fuse_peft(model)).splitlines()[:2] == ["fused no layer", "fused before: 12 × up"]


def test_calls_go_on_in_the_report_and_are_of_a_moment_elsewhere() -> None:
    model = blocks()
    report = fuse_peft(model)
    copied, pickled, counted = copy.deepcopy(report), pickle.dumps(report), calls(model)
    with torch.no_grad():
        model["layers"][3]["up"](X)
    assert str(copied) == str(report)
    assert "calls so far: 1 fused" in str(report)
    assert "calls when counted: 0 fused" in str(pickle.loads(pickled))
    assert str(counted) == repr(counted) == "calls when counted: 0 fused, 0 by PEFT's own forward, 0 base alone"
    assert str(unfuse_peft(model)).splitlines() == [
        "unfused 12 layers: 12 × up",
        "calls while fused: 1 fused, 0 by PEFT's own forward, 0 base alone",
    ]


def test_what_became_of_fused_layers_is_told() -> None:
    model = blocks()
    report = fuse_peft(model)
    model["layers"][3]["up"].update_layer("more", r=4, lora_alpha=8, config=peft.LoraConfig(r=4))
    assert "since then 1 of the 12 layers was given other adapters, ranks or alphas" in str(report)
    model["layers"][4]["up"] = nn.Linear(8, 8)
    assert "since then 1 of the 12 layers was unfused or taken out of the model" in str(report)
    unfuse_peft(model)
    assert "since then all 12 layers were unfused or taken out of the model" in report.details()


def test_many_adapters_and_many_reasons_stay_short() -> None:
    model = blocks(1)
    for number in range(40):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up"]), model, adapter_name=f"a{number}")
    assert "default r = 2, a0 r = 2, a1 r = 2, a2 r = 2 and 37 more" in str(fuse_peft(model))
    many = Calls(own={f"reason {number}": 100 - number for number in range(40)})
    assert len(str(many).splitlines()) == 6
    assert str(many).splitlines()[-1].endswith("by PEFT: 36 other reasons; details() has them")
    assert len(many.details().splitlines()) == 41


def test_an_encoder_layer_that_skips_the_adapters_in_evaluation_is_noted() -> None:
    inner = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    config = peft.LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)
    model = peft.get_peft_model(inner, config).eval()
    report = fuse_peft(model)
    (note,) = report.notes
    assert "base_model.model.0: in evaluation" in note
    assert "set_fastpath_enabled(False)" in str(report)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        model(x)
        assert calls(model).fused == 0  # as the note says
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)
    assert calls(model).fused == 2


@pytest.mark.parametrize(("batch_first", "target"), [(False, "0.linear1"), (True, "1")])
def test_an_encoder_layer_that_calls_its_layers_is_not_noted(batch_first: bool, target: str) -> None:
    inner = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), nn.Linear(8, 8))
    assert fuse_peft(peft.get_peft_model(inner, peft.LoraConfig(target_modules=[target]))).notes == ()
