"""What cannot be replaced is refused with a sentence, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, replace_linear, restore_linear
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from made_models import UP, Net, Snapshot, refused, replacing


class Own(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


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
    "no such block": (
        Net,
        {"target_modules": ["up"], "layers_to_transform": [1]},
        InvalidArgumentError,
        ["'blocks.0.up', 'blocks.1.up'", "layers_to_transform=[1]", "layers_pattern"],
    ),
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
    "of the same name": (
        lambda: nn.Sequential(type("Linear", (Own,), {})(4, 4)),
        {"target_modules": ["0"]},
        InvalidTypeError,
        [f"{__name__}.Linear is not a plain torch.nn.Linear"],
    ),
    "attention's": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2)),
        {"target_modules": "all-linear"},
        InvalidTypeError,
        ["NonDynamicallyQuantizableLinear", "its weight is read"],
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4)), {"target_modules": ["0"]}, InvalidTypeError, ["LazyLinear"]),
    "parametrized": (parametrized, {"target_modules": ["0"]}, InvalidTypeError, ["parametrized", "remove_parametr"]),
    "pruned": (pruned, {"target_modules": ["0"]}, InvalidTypeError, ["hook", "pruning"]),
    "offloaded": (offloaded, {"target_modules": ["0"]}, InvalidTypeError, ["forward of its own", "accelerate"]),
    "integer": (integer, {"target_modules": ["0"]}, InvalidTypeError, ["quantized", "torch.int8"]),
    "packed": (packed, {"target_modules": ["0"]}, InvalidTypeError, ["(8, 2)", "(4, 4)"]),
}


class Experts(nn.Module):
    """A mixture's, as transformers has them: one Parameter for all, and no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))


def mixture() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(4, 4), "experts": Experts()})


REFUSED |= {
    f"stacked experts, {target}": (
        mixture,
        {"target_modules": target},
        InvalidTypeError if named else InvalidArgumentError,
        ["Experts keeps its experts stacked in gate_up_proj (3, 8, 4) and down_proj (3, 4, 4)", "target_parameters"],
    )
    for target, named in ((["experts"], True), (["gate_up_proj"], True), (r".*\.down_proj", True), (["w1"], False))
}


def test_stacked_experts_are_left_alone_with_the_reason() -> None:
    (skipped,) = replace_linear(mixture(), LoRAConfig(target_modules="all-linear")).skipped
    assert skipped.name == "experts"
    assert "target_parameters" in skipped.reason
    (note,) = replace_linear(mixture(), LoRAConfig(target_modules=["q", "down_proj"])).notes
    assert "'experts.down_proj' is no module" in note


def test_a_configuration_of_pefts_is_refused_with_the_way_to_ours() -> None:
    peft = pytest.importorskip("peft")
    words = ["peft.LoraConfig", "LoRAConfig.from_peft(config)"]
    refused(Net(), lambda model: replace_linear(model, peft.LoraConfig(r=2)), InvalidTypeError, *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Conv2d(3, 3, 3), ["type Conv2d", "linear layers only", "peft.get_peft_model", "one element"]),
        (nn.Embedding(3, 3), ["type Embedding", "modules_to_save"]),
        (nn.ReLU(), ["type ReLU", "linear layers only"]),
        (nn.Sequential(nn.Linear(3, 3)), ["type Sequential", "replace_linear", "'0'"]),
        (3, ["type int", "takes an nn.Linear."]),
    ],
)
def test_from_linear_says_what_fits_the_class_it_is_given(given: Any, words: list[str]) -> None:
    with pytest.raises(InvalidTypeError) as caught:
        FusedLoRALinear.from_linear(given)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "exclude it" not in str(caught.value)


OTHERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 3, 1), ["Conv1d", "nn.Linear if its kernel has one element", "get_peft_model"]),
    "conv2d": (lambda: nn.Conv2d(3, 3, 3), ["Conv2d", "nn.Linear if its kernel has one element", "get_peft_model"]),
    "conv3d": (lambda: nn.Conv3d(3, 3, 3), ["Conv3d", "nn.Linear if its kernel has one element", "get_peft_model"]),
    "transposed": (lambda: nn.ConvTranspose2d(3, 3, 3), ["ConvTranspose2d", "modules_to_save"]),
    "embedding": (lambda: nn.Embedding(3, 3), ["Embedding", "get_peft_model", "modules_to_save"]),
    "bag": (lambda: nn.EmbeddingBag(3, 3), ["EmbeddingBag", "modules_to_save"]),
    "attention": (lambda: nn.MultiheadAttention(4, 2), ["MultiheadAttention", "get_peft_model"]),
    "norm": (lambda: nn.LayerNorm(3), ["LayerNorm", "modules_to_save"]),
    "recurrent": (lambda: nn.LSTM(3, 3), ["LSTM", "modules_to_save"]),
    "no weight": (nn.ReLU, ["ReLU", "It has no weight"]),
    "container": (lambda: nn.ModuleDict({"up": nn.Linear(3, 3)}), ["ModuleDict", "within it, by their names: 'up'"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_linear_layer_is_left_alone_with_advice_that_fits(name: str) -> None:
    make, words = OTHERS[name]
    alone = nn.Sequential(nn.ModuleDict({"it": make()}))
    refused(alone, replacing(target_modules=["it"]), InvalidTypeError, "linear layers only", *words)
    beside = nn.Sequential(nn.ModuleDict({"it": make(), "linear": nn.Linear(3, 3)}))
    (skipped,) = replace_linear(beside, LoRAConfig(r=2, target_modules=["it", "linear"])).skipped
    for word in (*words, "exclude it", "linear layers only"):
        assert word in skipped.reason, skipped.reason
    assert "plain" not in skipped.reason


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


def doubled(layer: nn.Module, name: str) -> None:
    class Doubled(nn.Module):
        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            return 2 * tensor

    torch.nn.utils.parametrize.register_parametrization(layer, name, Doubled())


def pruned_part(layer: nn.Module, name: str) -> None:
    torch.nn.utils.prune.random_unstructured(layer, name, amount=1)


def left_plain(layer: nn.Module, name: str) -> None:
    """As ``remove_parametrizations`` leaves a frozen weight that came of several tensors."""
    values = getattr(layer, name).detach()
    delattr(layer, name)
    setattr(layer, name, values)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (doubled, "weight"),
        (doubled, "bias"),
        (pruned_part, "weight"),
        (pruned_part, "bias"),
        (pruned_part, "lora_B"),
        (left_plain, "weight"),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_a_plain_layer_cannot_hold_is_not_restored(kind: str, change: Any, name: str) -> None:
    if kind == "conv1d":
        model = nn.ModuleDict({"up": pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)})
    else:
        model = nn.ModuleDict({"up": nn.Linear(8, 6)})
    replace_linear(model, UP)
    change(model["up"], name)
    refused(
        model, restore_linear, LoRAStateError, f"restore_linear was called on a layer ('up') whose {name} is", "Call"
    )
    refused(model["up"], lambda layer: layer.to_plain(), LoRAStateError, f"whose {name} is")


def test_a_parametrized_adapter_is_dropped_as_any_other() -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 6)})
    replace_linear(model, UP)
    doubled(model["up"], "lora_A")
    with pytest.warns(lora_kernels.errors.LoRAKernelsWarning, match="drops the adapters"):
        restore_linear(model)
    assert type(model["up"]) is nn.Linear
    assert model["up"](torch.ones(8)).shape == (6,)
