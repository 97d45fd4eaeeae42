"""What the operators do not take runs by PEFT's own forward, bit for bit, and is counted with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from numerics import same_bits

peft = pytest.importorskip("peft")
from lora_kernels import explain  # noqa: E402
from lora_kernels.peft import calls  # noqa: E402
from peft_models import DORA, TWO, fused, lora_layers, make  # noqa: E402

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def _hook(part: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        for layer in lora_layers(model):
            part(layer).register_forward_hook(lambda module, args, y: 1.5 * y)

    return prepare


def _no_casting(model: Any) -> None:
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False


class _Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def _wrap(model: Any) -> None:
    for layer in lora_layers(model):
        layer.lora_A["a0"].__class__ = _Doubling


def _by_vmap(model: Any, x: Tensor) -> Tensor:
    return torch.vmap(model)(x)


def _by_dual(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def _by_trace(model: Any, x: Tensor) -> Tensor:
    return torch.jit.trace(model.base_model.model.lin0, x, check_trace=False)(x)


def _by_export(model: Any, x: Tensor) -> Tensor:
    program = torch.export.export(model.base_model.model.lin0, (x,))
    assert not [node for node in program.graph.nodes if "lora_kernels" in str(node.target)]
    return program.module()(x)


def _with_global_hook(model: Any, x: Tensor) -> Tensor:
    handle = torch_module.register_module_forward_hook(lambda module, args, y: 1.5 * y)
    try:
        return model(x)
    finally:
        handle.remove()


def _under_autocast(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def _active(*names: str) -> Callable[[Any], None]:
    return lambda model: model.base_model.set_adapter(list(names))


def _hook_magnitudes(model: Any) -> None:
    for layer in lora_layers(model):
        layer.lora_magnitude_vector["a0"].register_forward_hook(lambda module, args, y: 1.5 * y)


def _derive_variant(model: Any) -> None:
    for layer in lora_layers(model):
        kind = type(layer.lora_variant["a0"])
        layer.lora_variant["a0"] = type("OwnDora", (kind,), {})()


def _derive_magnitudes(model: Any) -> None:
    for layer in lora_layers(model):
        module = layer.lora_magnitude_vector["a0"]
        module.__class__ = type("OwnMagnitudes", (type(module),), {})


@dataclass(frozen=True)
class OwnPath:
    """A use of PEFT's that stays its own; ``reason``: words of what is counted, "" where nothing can be."""

    name: str
    reason: str
    adapters: tuple[dict[str, Any], ...] = ({},)
    prepare: Callable[[Any], None] = lambda model: None
    call: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name


DROPPING_DORA = {"lora_dropout": 0.3, **DORA}
DROPPING = ({"lora_dropout": 0.5}, {"r": 3, "lora_dropout": 0.2})
OWN_PATHS = [
    OwnPath("alora", "ALoraLinearVariant", ({"alora_invocation_tokens": [1]},)),
    OwnPath("two dropouts", "dropout acts on several", DROPPING, _active("a0", "a1")),
    OwnPath("dropout of 1", "p in [0, 1)", ({"lora_dropout": 1.0},)),
    OwnPath("hook on lora_A", "hooks", prepare=_hook(lambda layer: layer.lora_A["a0"])),
    OwnPath("hook on lora_B", "hooks", prepare=_hook(lambda layer: layer.lora_B["a0"])),
    OwnPath("hook on the base", "hooks", prepare=_hook(lambda layer: layer.base_layer)),
    OwnPath("hook on dropout", "hooks", prepare=_hook(lambda layer: layer.lora_dropout["a0"])),
    OwnPath("hook on all modules", "hooks on all modules", call=_with_global_hook),
    OwnPath("wrapped lora_A", "wrapped", prepare=_wrap),
    OwnPath("no casting", "casting", prepare=_no_casting, call=_under_autocast, dtype=torch.bfloat16),
    OwnPath("vmap", "vmap", call=_by_vmap),
    OwnPath("forward mode", "forward-mode", call=_by_dual),
    OwnPath("jit.trace", "jit.trace", call=_by_trace),
    OwnPath("export", "", call=_by_export),
    OwnPath("dora, then lora", "before other", ({}, {"r": 3, **DORA}), _active("a1", "a0")),
    OwnPath("dora, two doras", "before other", (DORA, {"r": 3, **DORA}), _active("a0", "a1")),
    OwnPath("dora, together, dropout", "together", ({"lora_dropout": 0.5}, {"r": 3, **DORA}), _active("a0", "a1")),
    OwnPath("dora, together, dropout of dora", "together", ({}, {"r": 3, **DROPPING_DORA}), _active("a0", "a1")),
    OwnPath("dora, together, lora_bias", "together", ({"lora_bias": True}, {"r": 3, **DORA}), _active("a0", "a1")),
    OwnPath("dora, hook on the magnitudes", "hooks", (DORA,), _hook_magnitudes),
    OwnPath("dora, derived variant", "OwnDora is a variant", (DORA,), _derive_variant),
    OwnPath("dora, derived magnitudes", "magnitudes", (DORA,), _derive_magnitudes),
    OwnPath(
        "dora, one vector",
        "one vector",
        ({"target_modules": ["lin0"], **DORA},),
        call=lambda model, x: model.base_model.model.lin0(x[0]),
    ),
]


@pytest.mark.parametrize("own", OWN_PATHS, ids=str)
def test_the_bits_are_pefts_and_the_reason_is_counted(own: OwnPath) -> None:
    stock = make(*own.adapters, dtype=own.dtype)
    own.prepare(stock)
    model = fused(stock)
    outputs = []
    for m in (model, stock):
        torch.manual_seed(0)
        outputs.append(own.call(m, X.to(own.dtype)).detach())
    assert same_bits(*outputs)
    counted = calls(model)
    assert counted.fused == 0
    assert all(own.reason in reason for reason in counted.own)
    assert bool(counted.own) == bool(own.reason)


def test_a_reason_that_goes_away_leaves_the_fast_path() -> None:
    model = fused(make(*DROPPING))
    _active("a0", "a1")(model)
    model(X)
    model.eval()(X)
    assert (calls(model).fused, sum(calls(model).own.values())) == (2, 2)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_explain_takes_a_fused_layer(p: float) -> None:
    model = fused(make({"lora_dropout": p}, *TWO[1:]))
    explanation = explain(lora_layers(model)[0])
    assert (explanation.problem.r, explanation.problem.dropout_p) == (4, p)
    assert [plan.direction for plan in explain(lora_layers(model)[0], tokens=8).plans] == ["forward", "backward"]
    assert repr(lora_layers(model)[0]).startswith("lora.Linear[fused](")


def test_a_data_parallel_replica_finds_its_tensors() -> None:
    """Replicas hold plain tensors where the module has Parameters."""
    model = fused(make())
    layer = lora_layers(model)[0]
    expected = layer(X).detach()
    for part in (layer.base_layer, layer.lora_A["a0"], layer.lora_B["a0"]):
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            setattr(part, name, None if parameter is None else parameter.detach())
    assert same_bits(layer(X).detach(), expected)


def test_compiled_transforms_take_pefts_own_path_too() -> None:
    model = fused(make())
    (expected,) = torch.autograd.grad(model(x := X.clone().requires_grad_()).sum(), x)

    def transformed(x: Tensor) -> Tensor:
        return torch.func.grad(lambda of: model(of).sum())(x)

    found = torch.compile(transformed, backend="aot_eager")(X)
    assert same_bits(found, transformed(X))
    torch.testing.assert_close(found, expected)


def test_compiled_they_run_hooks_on_all_modules_too() -> None:
    model = fused(make())
    found = _with_global_hook(torch.compile(model.base_model.model.lin0.forward, backend="eager"), X)
    assert same_bits(found, _with_global_hook(model.base_model.model.lin0.forward, X))


def test_a_compiled_forward_mode_takes_pefts_own_path_too() -> None:
    model = fused(make())
    assert same_bits(_by_dual(torch.compile(model, backend="aot_eager"), X), _by_dual(model, X))
