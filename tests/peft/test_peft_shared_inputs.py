"""Live PEFT models whose fused layers read one x: values and gradients beside PEFT's, counts, PEFT's own switches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import architectures
from common_passes import passes
from lora_kernels import fuse_peft, share_inputs, unfuse_peft, unshare_inputs
from lora_kernels.shared_input import shared_inputs
from numerics import check, check_all

peft = pytest.importorskip("peft")
from lora_kernels.peft import calls  # noqa: E402
from peft_models import OPTIONS, Option, Small, SmallConv1D, lora_layers, results  # noqa: E402


class Beside(Small):
    """Two linear layers that read one x, 24 -> 40 and 24 -> 16."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias)
        self.lin1 = nn.Linear(24, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.lin0(x), self.lin1(x)], -1)


# Those with a mixed batch, a Conv1D or one layer without an adapter run each layer by itself: tested elsewhere.
TOGETHER = [
    option
    for option in OPTIONS
    if option.rows is None and option.base is not SmallConv1D and "one" not in option.name.split()[:1]
]


def joined(stock: Any) -> Any:
    model = copy.deepcopy(stock)
    fuse_peft(model)
    share_inputs(model, [["lin0", "lin1"]])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", TOGETHER, ids=str)
def test_parity(option: Option, dtype: torch.dtype) -> None:
    """Every option trains in common, PEFT with adapters of the compute dtype being the yardstick."""
    option = Option(option.name, option.adapters, option.active, beside(option), option.prepare, shape=option.shape)
    stock = option.make(dtype).train()
    model, x = joined(stock), option.x(dtype)
    yardstick = copy.deepcopy(stock)
    for layer in lora_layers(yardstick):
        layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    exact = copy.deepcopy(yardstick).double()
    with passes() as counted:
        actual = results(model, x)
    assert counted == [2]
    check_all(actual, partial(results, exact, x.double()), results(yardstick, x), dtype)
    assert (calls(model).fused, calls(model).own) == (2, {})


def beside(option: Option) -> Any:
    return (lambda: Beside(bias=False)) if option.base().lin0.bias is None else Beside


def test_pefts_switches_between_the_calls() -> None:
    model = joined(Option("two", ({"r": 4}, {"r": 3}), base=Beside).make().train())
    first, second = lora_layers(model)
    single = copy.deepcopy(model)
    unfuse_peft(single)
    fuse_peft(single)
    alone = lora_layers(single)[1]
    x = torch.randn(5, 24)
    for switch in (lambda layer: layer.set_adapter("a1"), lambda layer: layer.set_scale("a1", 3.0),
                   lambda layer: layer.enable_adapters(False), lambda layer: layer.enable_adapters(True),
                   lambda layer: layer.merge(), lambda layer: layer.unmerge()):  # fmt: skip
        first(x)
        switch(second), switch(alone)
        exact = partial(copy.deepcopy(alone).double(), x.double())
        check("y", second(x).detach(), exact, alone(x).detach(), torch.float32)


def test_an_adapter_that_begins_to_train_between_the_calls_has_its_gradient() -> None:
    model = joined(Option("one", ({"r": 4},), base=Beside).make().train())
    first, second = lora_layers(model)
    x, (begins,) = torch.randn(5, 24), second.lora_B.parameters()
    begins.requires_grad_(False)
    first(x)
    begins.requires_grad_()
    second(x).sum().backward()
    assert begins.grad is not None


def test_a_fused_llama_reports_its_groups_and_copies_and_unfusing_keep_them_apart() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj", "gate_proj"])
    model = peft.get_peft_model(architectures.llama(), config)
    report = fuse_peft(model)
    assert [[name.rpartition(".")[2] for name in names] for names in report.groups[:2]] == [
        ["q_proj", "v_proj"],
        ["gate_proj", "up_proj"],
    ]
    assert "4 groups of layers with one input" in str(report)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with passes() as counted:
            copied(input_ids=architectures.TOKENS, labels=architectures.TOKENS).loss.backward()
        assert counted == [2] * 4
    unfuse_peft(model)
    assert not any("_shared_inputs" in vars(holder) or "_shared" in vars(holder) for holder in model.modules())


def test_unloading_leaves_no_group() -> None:
    model = peft.get_peft_model(architectures.llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    fuse_peft(model)
    plain = model.merge_and_unload()
    assert not any(shared_inputs(holder) for holder in plain.modules())
    assert b"lora_kernels" not in pickle.dumps(plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_unloaded_model_can_be_fused_again(copied: Callable[[Any], Any]) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(architectures.llama(), config)
    fuse_peft(model)
    plain = copied(model.unload())
    assert unshare_inputs(plain) == 0
    report = fuse_peft(peft.get_peft_model(copied(model.unload()), config))
    assert len(report.groups) == 2
