"""``init_lora_weights``: PEFT's initialisations, the residual weight of PiSSA and OLoRA, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import FusedLoRALinear, LoRAConfig, lora_state_dict, merge_lora, replace_linear, restore_linear
from lora_kernels.errors import InvalidArgumentError, LoRAKernelsWarning, LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import Net, disturb, formula, layer_refused, refused, same_state, tied
from numerics import check, same_bits

SPLITTING = ("pissa", "pissa_niter_3", "olora")
QUIET = (True, "zero", "gaussian", "orthogonal")  # those that start with B A = 0
K, N, R = 24, 16, 4


def base(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(K, N).to(dtype)


def layer_of(init: bool | str, linear: nn.Linear | None = None, **arguments: Any) -> FusedLoRALinear:
    linear = base() if linear is None else linear
    torch.manual_seed(7)
    arguments = {"r": R, "lora_alpha": 6, **arguments}
    return FusedLoRALinear.from_linear(linear, init_lora_weights=init, **arguments)


def product(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return scaling * (b.detach().to(dtype) @ a.detach().to(dtype))


def same_weight(name: str, actual: Tensor, linear: nn.Linear, layer: FusedLoRALinear) -> None:
    """``actual`` is ``linear``'s weight, as nearly as taking the initial product away and putting it back gives it."""
    part = product(layer.lora_initial_A, layer.lora_initial_B, 1.5, torch.float32)
    there_and_back = ((linear.weight.float() - part).to(linear.weight.dtype).float() + part).to(linear.weight.dtype)
    check(name, actual, linear.weight.double(), there_and_back, linear.weight.dtype)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init", [*SPLITTING, "orthogonal"])
def test_product_and_residual_are_pefts(init: str, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base(dtype)), config).base_model.model[0]
    torch.manual_seed(7)
    initialise = getattr(theirs, f"{init.partition('_')[0]}_init")
    initialise("default", *([init] if init.startswith("pissa") else []))
    ours = layer_of(init, base(dtype))
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    exact = product(a, b, 1.5)
    if init != "orthogonal":  # whose product is nothing but rounding
        actual = product(ours.lora_A, ours.lora_B, 1.5, torch.float32)
        check("product", actual, exact, product(a, b, 1.5, torch.float32), torch.float32)
        exact_weight = base(dtype).weight.double() - exact
        check("weight", ours.weight, exact_weight, theirs.base_layer.weight, dtype)
    check("A", ours.lora_A.to(a.dtype), a.double(), a.float(), dtype)
    check("B", ours.lora_B.to(b.dtype), b.double(), b.float(), dtype)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rank pattern": {"rank_pattern": {"0.up": 6}, "alpha_pattern": {"1.up": 3}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", [*SPLITTING, *QUIET])
def test_the_output_is_unchanged_at_the_start(init: bool | str, variant: str) -> None:
    plain = Net()
    model, tokens = copy.deepcopy(plain), torch.arange(10).reshape(2, 5)
    replace_linear(
        model, LoRAConfig(**{"r": 2, "target_modules": ["up"], "init_lora_weights": init, **VARIANTS[variant]})
    )
    eager = copy.deepcopy(plain)
    for name, layer in lora_layers(model):
        eager.get_submodule(name).weight = nn.Parameter(formula(layer, torch.float32))
    check("logits", model(tokens), partial(copy.deepcopy(plain).double(), tokens), eager(tokens), torch.float32)
    assert all((layer.lora_A != 0).any() for _, layer in lora_layers(model))
    assert all((layer.lora_B != 0).any() == (init not in (True, "zero", "gaussian")) for _, layer in lora_layers(model))


@pytest.mark.parametrize("init", SPLITTING)
def test_the_callers_weight_and_modules_tied_to_it_keep_their_values(init: str) -> None:
    model, untouched = tied().requires_grad_(False), tied()
    untouched.load_state_dict(model.state_dict())
    weight = model.head.weight
    replace_linear(model, LoRAConfig(r=2, target_modules=["head"], init_lora_weights=init))
    assert model.embed.weight is weight
    assert same_bits(weight, untouched.head.weight)
    assert not model.head.weight.requires_grad
    assert not torch.equal(model.head.weight, weight)


@pytest.mark.parametrize("init", SPLITTING)
def test_resetting_puts_the_start_back_and_takes_nothing_twice(init: str) -> None:
    layer = layer_of(init, use_dora=True)
    before, weight = {name: value.clone() for name, value in layer.state_dict().items()}, layer.weight
    disturb(layer).reset_lora_parameters()
    assert layer.weight is weight
    assert same_state(layer.state_dict(), before)
    layer.scaling *= 2
    layer.reset_lora_parameters()
    assert same_bits(layer.lora_B * 2, before["lora_B"])


@pytest.mark.parametrize("init", [*SPLITTING, *QUIET])
def test_a_seed_gives_the_same_start(init: bool | str) -> None:
    assert same_state(layer_of(init).state_dict(), layer_of(init).state_dict())


@pytest.mark.parametrize("init", SPLITTING)
def test_restoring_puts_the_weight_back(init: str) -> None:
    linear, model = base(), nn.Sequential(base())
    torch.manual_seed(7)
    replace_linear(model, LoRAConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights=init))
    layer = model[0]
    disturb(layer)
    with pytest.warns(LoRAKernelsWarning, match="drops the adapters"):
        restore_linear(model)
    same_weight("weight", model[0].weight, linear, layer)


def test_a_merged_layer_that_is_restored_keeps_what_it_learned() -> None:
    model = nn.Sequential(base())
    replace_linear(model, LoRAConfig(r=R, target_modules=["0"], init_lora_weights="pissa"))
    exact, layer = formula(disturb(model)[0], torch.float64), model[0]
    merge_lora(model)
    restore_linear(model)
    layer.unmerge()
    check("weight", model[0].weight, exact, formula(layer, torch.float32), torch.float32)


@pytest.mark.parametrize("init", SPLITTING)
def test_a_state_dict_carries_the_residual_and_the_start(init: str) -> None:
    layer, other = disturb(layer_of(init)), FusedLoRALinear(K, N, r=R, lora_alpha=6, init_lora_weights=init)
    other.load_state_dict(layer.state_dict())
    assert same_state(other.state_dict(), layer.state_dict())
    same_weight("plain weight", other.plain_weight, base(), layer)


@pytest.mark.parametrize("init", SPLITTING)
def test_a_plain_state_dict_is_split_anew(init: str) -> None:
    layer, plain = FusedLoRALinear(K, N, r=R, lora_alpha=6, init_lora_weights=init), base()
    torch.manual_seed(7)
    report = layer.load_state_dict(plain.state_dict(), strict=False)
    assert same_state(layer.state_dict(), layer_of(init).state_dict())
    assert all(key.startswith("lora_") for key in report.missing_keys)


def test_a_plain_layers_adapter_and_weight_are_loaded_as_they_are() -> None:
    layer, plain = layer_of("pissa"), disturb(layer_of(True))
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert same_bits(layer.weight, plain.weight)
    assert same_bits(layer.plain_weight, plain.weight)


def test_an_adapters_state_goes_to_a_model_that_started_at_random_otherwise() -> None:
    model, other = nn.Sequential(disturb(layer_of("pissa_niter_1"))), nn.Sequential(base())
    torch.manual_seed(8)
    other[0] = FusedLoRALinear.from_linear(other[0], r=R, lora_alpha=6, init_lora_weights="pissa_niter_1")
    other.load_state_dict(lora_state_dict(model), strict=False)
    same_weight("plain weight", other[0].plain_weight, base(), model[0])
    eager = formula(model[0], torch.float32)
    check("merged", formula(other[0], torch.float32), formula(model[0], torch.float64), eager, torch.float32)


@pytest.mark.parametrize("init", SPLITTING)
def test_a_layer_made_on_the_meta_device_is_split_when_its_weights_are_there(init: str) -> None:
    with torch.device("meta"):
        layer = FusedLoRALinear(K, N, r=R, lora_alpha=6, init_lora_weights=init)
    layer.to_empty(device="cpu")
    layer.weight = nn.Parameter(base().weight.detach().clone(), requires_grad=False)
    layer.bias = base().bias
    torch.manual_seed(7)
    layer.reset_lora_parameters()
    assert same_state(layer.state_dict(), layer_of(init).state_dict())


@pytest.mark.parametrize("init", SPLITTING)
def test_autocast_does_not_round_the_parts(init: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        layer = layer_of(init)
    assert same_state(layer.state_dict(), layer_of(init).state_dict())


def test_a_conv1d_is_split_as_a_linear_layer_is() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    linear = base()
    model = nn.Sequential(conv1d(N, K))
    model[0].weight.data = linear.weight.detach().t().contiguous()
    replace_linear(model, LoRAConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights="olora"))
    layer = layer_of("olora")
    exact = product(layer.lora_A, layer.lora_B, 1.5)
    ours, eager = (product(x.lora_A, x.lora_B, 1.5, torch.float32) for x in (model[0], layer))
    check("product", ours, exact, eager, torch.float32)
    check("weight", model[0].weight.t(), linear.weight.double() - exact, layer.weight, torch.float32)
    restore_linear(model)
    same_weight("restored", model[0].weight.t(), linear, layer)


VALUES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown": ({"init_lora_weights": "pissa_4"}, ["'pissa_4'", "pissa_niter_N", "olora"]),
    "None": ({"init_lora_weights": None}, ["None", "gaussian"]),
    "eva": ({"init_lora_weights": "eva"}, ["sample data", "fuse_peft"]),
    "corda": ({"init_lora_weights": "corda"}, ["sample data", "fuse_peft"]),
    "loftq": ({"init_lora_weights": "loftq"}, ["quantized", "fuse_peft"]),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, ["gradients", "fuse_peft"]),
    "mica": ({"init_lora_weights": "mica"}, ["frozen lora_B", "fuse_peft"]),
    "an odd rank": ({"init_lora_weights": "orthogonal", "r": 3}, ["r=3", "even"]),
    "an odd rank of one layer": ({"init_lora_weights": "orthogonal", "rank_pattern": {"x": 5}}, ["r=5", "even"]),
    "no scaling": ({"init_lora_weights": "pissa", "lora_alpha": 0}, ["lora_alpha=0", "positive"]),
}


@pytest.mark.parametrize("name", VALUES)
def test_an_initialisation_that_is_not_allowed_is_a_sentence(name: str) -> None:
    arguments, words = VALUES[name]
    refused(None, lambda _: LoRAConfig(**arguments), InvalidArgumentError, *words)


@pytest.mark.parametrize("init", SPLITTING)
def test_a_weight_that_cannot_be_split_is_a_sentence_and_nothing_changes(init: str) -> None:
    model, broken = Net(), Net()
    broken.blocks[1]["up"].weight.data[0, 0] = torch.nan
    config = LoRAConfig(r=2, target_modules=["up"], rank_pattern={"1.up": 9}, init_lora_weights=init)
    refused(model, lambda model: replace_linear(model, config), InvalidArgumentError, "r=9", "8 -> 12", "rank_pattern")
    config = LoRAConfig(r=2, target_modules=["up"], init_lora_weights=init)
    refused(broken, lambda model: replace_linear(model, config), LoRAStateError, "NaN")
    linear = base()
    refused(linear, lambda linear: layer_of(init, linear, r=17), InvalidArgumentError, "r=17")
    layer = layer_of(init)
    layer.scaling = -1.0
    layer_refused(layer, layer.reset_lora_parameters, LoRAStateError, "scaling is -1.0", "positive")
