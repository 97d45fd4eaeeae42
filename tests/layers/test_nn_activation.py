"""An activation between A and B, s B σ(A x): the layer beside the formula, and what such a layer cannot do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels
from architectures import made
from lora_kernels import FusedLoRALinear, LoRAConfig, lora_linear, lora_state_dict, replace_linear
from lora_kernels.activations import ACTIVATIONS
from lora_kernels.errors import InvalidArgumentError, LoRAStateError
from lora_kernels.models.model import lora_layers
from made_models import Net, acting, disturb, refused
from numerics import check, check_all, same_bits

BENT = [name for name in ACTIVATIONS if name != "identity"]
every_activation = pytest.mark.parametrize("activation", BENT)
SIGMA: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def by_the_layer(layer: FusedLoRALinear, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    return torch.func.functional_call(layer, values, (x,))


def by_formula(layer: FusedLoRALinear, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    h = SIGMA[layer.activation](F.linear(x, values["lora_A"]))
    return F.linear(x, values["weight"], values.get("bias")) + layer.scaling * F.linear(
        h, values["lora_B"], values.get("lora_bias")
    )


def results(call: Callable[..., Tensor], layer: FusedLoRALinear, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and every gradient; by the formula in ``dtype``, of values that are rounded to the base's dtype first."""
    drawn = torch.Generator().manual_seed(3)
    base = layer.weight.dtype
    x, dy = (torch.randn(3, 7, n, generator=drawn).to(base) for n in (layer.in_features, layer.out_features))
    names = [name for name, _ in layer.named_parameters()]
    own = [parameter.detach() for parameter in layer.parameters()]
    tensors = [(t if dtype is None else t.to(base).to(dtype)).requires_grad_() for t in (x, *own)]
    y = call(layer, tensors[0], dict(zip(names, tensors[1:], strict=True)))
    gradients = torch.autograd.grad(y, tensors, dy.to(y.dtype))
    return dict(zip(["y", "dx", *names], [y.detach(), *gradients], strict=True))


@every_activation
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.float16), (torch.float64, None)],
    ids=str,
)
def test_output_and_gradients(dtype: torch.dtype, adapter_dtype: torch.dtype | None, activation: str) -> None:
    biases = {"bias": activation != "gelu", "lora_bias": activation != "relu"}
    made_of = {"dtype": dtype, "adapter_dtype": adapter_dtype, "activation": activation, **biases}
    layer = disturb(acting(24, 16, r=5, lora_alpha=6, **made_of))
    exact = partial(results, by_formula, layer, torch.float64)
    actual = results(by_the_layer, layer)
    check_all(actual, exact, results(by_formula, layer, dtype), dtype)
    assert {n: g.dtype for n, g in actual.items() if "lora" in n} == {n: p.dtype for n, p in layer.adapter.items()}


@every_activation
def test_dropout_acts_on_its_input_while_training(activation: str) -> None:
    layer, x = acting(24, 16, lora_dropout=0.4, activation=activation), torch.randn(5, 24)
    parameters = layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling
    outputs = []
    for call in (layer, lambda x: lora_linear(x, *parameters, 0.4, training=True, activation=activation)):
        torch.manual_seed(0)
        outputs.append(call(x).detach())
    assert same_bits(*outputs)
    plain = lora_linear(x, *parameters, activation=activation)
    assert same_bits(layer.eval()(x), plain)
    assert not torch.equal(outputs[0], plain)


def test_it_runs_under_autocast_and_compiles_in_one_graph() -> None:
    layer, x = acting(24, 16, activation="gelu"), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    pairs = [torch.autograd.grad(call(x).sum(), [layer.lora_A, layer.lora_B]) for call in (layer, compiled)]
    assert all(same_bits(left, right) for left, right in zip(*pairs, strict=True))


def test_a_conv1d_has_the_same() -> None:
    model = made("gpt2")
    replace_linear(model, LoRAConfig(r=2, target_modules=["c_fc"], init_lora_weights=False, activation="silu"))
    layer, x = model.transformer.h[0].mlp.c_fc, torch.randn(3, 16)
    parameters = layer.weight.t().contiguous(), layer.lora_A, layer.lora_B, layer.bias, layer.scaling
    wide = [t.double() for t in (x, *parameters[:4])]
    exact = partial(lora_linear, *wide, layer.scaling, activation="silu")
    check("y", layer(x), exact, lora_linear(x, *parameters, activation="silu"), torch.float32)
    assert "activation='silu'" in repr(layer)


# What it is in a model


def adapted(**options: Any) -> Net:
    model = Net()
    replace_linear(model, LoRAConfig(**{"r": 2, "target_modules": ["up"], "activation": "relu", **options}))
    return model


def test_a_model_trains_it_and_its_state_goes_into_another(tmp_path: Path) -> None:
    model, other = adapted(init_lora_weights=False), adapted()
    other.load_state_dict({**model.state_dict(), **lora_state_dict(model)})
    tokens = torch.arange(6).reshape(2, 3)
    assert same_bits(model(tokens), other(tokens))
    model(tokens).sum().backward()
    assert all(bool(p.grad.any()) for _, layer in lora_layers(model) for p in layer.adapter.values())
    report = lora_kernels.restore_linear(model)
    assert len(report.dropped) == 2
    assert type(model.blocks[0]["up"]) is nn.Linear


@pytest.mark.parametrize("init", [True, "gaussian", "zero"])
def test_it_starts_as_the_base_layer(init: bool | str) -> None:
    layer, x = FusedLoRALinear(8, 12, r=3, init_lora_weights=init, activation="gelu"), torch.randn(4, 8)
    with layer.enable_lora(False):
        base = layer(x)
    exact = partial(F.linear, x.double(), layer.weight.double(), layer.bias.double())
    check("y", layer(x), exact, base, torch.float32)
    assert layer.lora_A.any()


def test_the_report_and_the_layer_name_it() -> None:
    model = Net()
    report = replace_linear(model, LoRAConfig(r=2, target_modules=["up"], activation="relu"))
    assert [layer.activation for layer in report] == ["relu", "relu"]
    assert "r = 2, alpha = 16, relu: 40 parameters" in str(report)
    assert "r=2, alpha=16, relu, 40 parameters" in report.details()
    assert "activation='relu'" in repr(model.blocks[0]["up"])
    assert "activation" not in repr(FusedLoRALinear(4, 4, r=2))


def test_a_layer_that_was_pickled_before_there_were_activations_is_lora() -> None:
    layer, x = acting(24, 16), torch.randn(2, 24)
    del vars(layer)["activation"]
    found = pickle.loads(pickle.dumps(layer))
    assert same_bits(found(x), layer(x))
    assert copy.deepcopy(acting(24, 16, activation="relu")).activation == "relu"


# What it refuses


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "tanh"}, "activation='tanh' was given: it must be one of"),
        ({"activation": "relu", "use_dora": True}, "with use_dora=True"),
        *[({"activation": "relu", "init_lora_weights": init}, f"init_lora_weights='{init}'")
          for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "orthogonal")],
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_with_it(options: dict[str, Any], words: str) -> None:
    for make in (LoRAConfig, lambda **o: FusedLoRALinear(8, 8, r=4, **o), _from_linear):
        with pytest.raises(InvalidArgumentError, match=words):
            make(**options)


def _from_linear(**options: Any) -> FusedLoRALinear:
    return FusedLoRALinear.from_linear(nn.Linear(8, 8), r=4, **options)


def test_merging_and_pefts_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    model, lora = adapted(), adapted(activation="identity")
    no_sum = "W + s B A does not exist for an activation"
    with pytest.raises(LoRAStateError, match="W \\+ s B A does not exist"):
        model.blocks[0]["up"].merge()
    refused(model, lora_kernels.merge_lora, LoRAStateError, "blocks.0.up", no_sum, "lora_state_dict")
    refused(model, lambda m: lora_kernels.save_adapter(m, tmp_path / "a"), LoRAStateError, no_sum)
    assert not (tmp_path / "a").exists()
    lora_kernels.save_adapter(lora, tmp_path / "b")
    refused(model, lambda m: lora_kernels.load_adapter(m, tmp_path / "b"), LoRAStateError, "activation='relu'")
