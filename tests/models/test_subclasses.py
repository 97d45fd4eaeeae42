"""Subclasses of ``nn.Linear`` and ``Conv1D``: which are replaced, what stays of them, which are refused and why."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels
from lora_kernels import FusedLoRALinear, LoRAConfig, replace_linear, restore_linear
from lora_kernels.errors import InvalidTypeError, LoRAKernelsWarning
from lora_kernels.layer import LoRALayer
from made_models import disturb, formula, refused, replacing
from numerics import check, same_bits

ALL = LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)


class Plain(nn.Linear):
    pass


class Riches(nn.Module):
    """All that a subclass may add beside the computation."""

    unit = "metre"

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.tag = ["mine"]
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.own = nn.Parameter(torch.ones(2))
        self.inner = nn.ReLU()
        self.register_forward_hook(lambda module, args, y: y + 100.0)
        self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({prefix + "mark": self.own}))

    @property
    def area(self) -> int:
        return self.weight.numel()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)

    def extra_repr(self) -> str:
        return f"rich, {super().extra_repr()}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}old_weight" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}old_weight")
        super()._load_from_state_dict(state, prefix, *rest)


class Rich(Riches, nn.Linear):
    pass


def falcon(*sizes: int, bias: bool = True) -> nn.Module:
    module = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    return module.FalconLinear(*sizes, bias=bias)


def esm(*sizes: int, bias: bool = True) -> nn.Module:
    return pytest.importorskip("transformers.models.esm.modeling_esmfold").EsmFoldLinear(*sizes, bias=bias)


@cache
def conv1d_class(name: str) -> Any:
    """A subclass of transformers' ``Conv1D``, where a pickle finds it."""
    plain = pytest.importorskip("transformers.pytorch_utils").Conv1D
    made = type(name, (Riches, plain) if name == "RichConv1D" else (plain,), {"__module__": __name__})
    return globals().setdefault(name, made)


def conv1d(k: int, n: int, bias: bool = True) -> nn.Module:
    return conv1d_class("PlainConv1D")(n, k)  # a Conv1D always has a bias


def rich_conv1d(k: int, n: int, bias: bool = True) -> nn.Module:
    return conv1d_class("RichConv1D")(n, k)


TAKEN: dict[str, Callable[..., nn.Module]] = {
    "plain": Plain,
    "rich": Rich,
    "falcon": falcon,
    "esm": esm,
    "conv1d": conv1d,
    "rich conv1d": rich_conv1d,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return disturb(nn.Sequential(TAKEN[name](8, 6), nn.ReLU(), TAKEN[name](6, 4, bias=False)))


def own_names(module: nn.Module) -> set[str]:
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return held - vars(nn.Linear(1, 1)).keys() - {"weight", "bias", "nf", "nx"}


@pytest.mark.parametrize("name", TAKEN)
def test_a_subclass_that_computes_the_same_is_replaced_and_stays_itself(name: str) -> None:
    model, x = made(name), torch.randn(5, 8)
    kind, state, own = type(model[0]), model[0].state_dict().keys(), own_names(model[0])
    report = replace_linear(model, ALL)
    assert [layer.name for layer in report] == ["0", "2"]
    assert not report.skipped
    layer = model[0]
    assert isinstance(layer, kind)
    assert isinstance(layer, LoRALayer)
    assert isinstance(layer, FusedLoRALinear) == isinstance(layer, nn.Linear)
    assert state <= layer.state_dict().keys()
    assert own <= own_names(layer)

    def by_formula(dtype: torch.dtype) -> Tensor:
        y: Tensor = x.to(dtype) @ formula(layer, dtype).t() + layer.bias.to(dtype)
        return y + (100.0 if "rich" in name else 0.0)

    check("y", layer(x), partial(by_formula, torch.float64), by_formula(torch.float32), torch.float32)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", TAKEN)
def test_restoring_gives_the_very_class_back(name: str, merged: bool) -> None:
    model, x = made(name).eval(), torch.randn(5, 8)
    former, y = list(model), model(x)
    kinds = [type(module) for module in model]
    replace_linear(model, ALL)
    if merged:
        lora_kernels.merge_lora(model)
        y = model(x)
    model[0].added = "later"
    with nullcontext() if merged else pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
        restore_linear(model)
    assert [type(module) for module in model] == kinds
    assert own_names(model[0]) == own_names(former[0]) | {"added"}
    assert not {"weight", "bias"} & vars(model[0]).keys()  # a merged one, which would hide what moves and loads later
    assert all(getattr(model[0], own) is getattr(former[0], own) for own in own_names(former[0]))
    assert same_bits(model(x), y) or name == "falcon"  # its products are summed in another order
    if isinstance(former[0], nn.Linear):
        assert type(FusedLoRALinear.from_linear(former[0], r=2).to_linear()) is kinds[0]


@pytest.mark.parametrize("name", ["plain", "falcon", "conv1d"])
def test_it_is_copied_pickled_compiled_and_trained(name: str) -> None:
    model, x = made(name), torch.randn(5, 8)
    replace_linear(model, ALL)
    y = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0])
        assert again[0] is not model[0]
        assert same_bits(again(x), y)
        again(x).sum().backward()
        assert again[0].lora_B.grad is not None
    assert same_bits(torch.compile(model, backend="eager", fullgraph=True)(x), y)


@pytest.mark.parametrize("name", ["rich", "rich conv1d"])
def test_what_a_rich_class_does_beside_computing_still_works(name: str) -> None:
    model = made(name)
    replace_linear(model, ALL)
    layer: Any = model[0]
    assert (layer.unit, layer.area, layer.tag) == ("metre", 48, ["mine"])
    assert "rich, " in repr(layer)
    assert "r=2, lora_alpha=16" in repr(layer)
    assert "passing" not in layer.state_dict()
    assert "mark" in layer.state_dict()
    layer.load_state_dict({"old_weight": torch.ones_like(layer.weight)}, strict=False)
    assert bool((layer.weight == 1).all())


@pytest.mark.parametrize("name", ["falcon", "conv1d"])
def test_a_model_with_subclasses_is_saved_and_loaded(name: str, tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    model, other, x = made(name), made(name), torch.randn(5, 8)
    replace_linear(model, ALL)
    lora_kernels.save_adapter(model, tmp_path)
    lora_kernels.load_adapter(other, tmp_path)
    assert same_bits(other(x), model(x))


@pytest.mark.parametrize("name", ["falcon", "conv1d"])
def test_pefts_layer_around_a_subclass_runs_fused(name: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, "fan_in_fan_out": name == "conv1d"}
    model = peft.get_peft_model(made(name), peft.LoraConfig(**options))
    x = torch.randn(5, 8)
    theirs, exact = model(x), partial(copy.deepcopy(model).double(), x.double())
    report = lora_kernels.fuse_peft(model)
    y = model(x)
    assert report.calls.fused == 1
    check("y", y, exact, theirs, torch.float32)


def bound() -> nn.Module:
    class Bound(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_forward_hook(self.count)

        def count(self, *_: Any) -> None:
            self.calls = getattr(self, "calls", 0) + 1

    return Bound(4, 4)


def of(**names: Any) -> Callable[[], nn.Module]:
    return lambda: type("Own", (nn.Linear,), names)(4, 4)


def holding(name: str) -> nn.Module:
    module = Plain(4, 4)
    setattr(module, name, 3)
    return module


def doubled(self: nn.Linear, x: Tensor) -> Tensor:
    return 2 * x


class Quantizable(nn.modules.linear.NonDynamicallyQuantizableLinear):
    pass


def of_conv1d(**names: Any) -> Callable[[], nn.Module]:
    return lambda: type("Own", (type(conv1d(4, 4)),), names)(4, 4)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv1d's forward": (of_conv1d(forward=doubled), "not a plain Conv1D, and its own behaviour would be lost"),
    "conv1d's call": (of_conv1d(__call__=doubled), "its own behaviour would be lost"),
    "conv1d's call's inside": (of_conv1d(_call_impl=doubled), "its own behaviour would be lost"),
    "conv1d pickled its way": (of_conv1d(__getstate__=lambda self: vars(self)), "not a plain Conv1D: it has a __get"),
    "conv1d's rank": (of_conv1d(r=3), "has a 'r' of its own"),
    "conv1d's features": (of_conv1d(in_features=property(lambda self: self.nx)), "has a 'in_features' of its own"),
    "forward": (of(forward=doubled), "its own behaviour would be lost"),
    "call": (of(__call__=doubled), "its own behaviour would be lost"),
    "call's inside": (of(_call_impl=doubled), "its own behaviour would be lost"),
    "getattr": (
        of(__getattr__=lambda self, name: nn.Linear.__getattr__(self, name)),
        "its own behaviour would be lost",
    ),
    "attention's": (lambda: Quantizable(4, 4), "its weight is read"),
    "pickled its way": (of(__getstate__=lambda self: vars(self)), "has a __getstate__ of its own"),
    "made its way": (of(__init_subclass__=classmethod(lambda cls: None)), "has a __init_subclass__ of its own"),
    "a rank": (lambda: holding("r"), "has a 'r' of its own"),
    "a method": (of(merge=lambda self: None), "has a 'merge' of its own"),
    "an adapter": (of(lora_A=None), "has a 'lora_A' of its own"),
    "hooked": (bound, "hook that is bound to the module itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_subclass_whose_behaviour_would_be_lost_is_refused(name: str) -> None:
    make, words = REFUSED[name]
    refused(nn.Sequential(make()), replacing(target_modules=["0"]), InvalidTypeError, words)


def test_a_weight_that_is_computed_is_refused() -> None:
    module = Plain(4, 4)
    module.__class__ = type("Computed", (Plain,), {"weight": property(lambda self: 2 * self._parameters["weight"])})
    refused(nn.Sequential(module), replacing(target_modules=["0"]), InvalidTypeError, "own behaviour")
