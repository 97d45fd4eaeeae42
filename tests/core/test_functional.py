"""``lora_linear``: bad input gets a sentence; autocast; what the arguments mean."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from cases import BACKENDS, Case, make, measures
from lora_kernels import FusedLoRAGroup, FusedLoRALinear, FusedLoRAMLP, LoRAKernelsError, gate, lora_linear, use_backend
from lora_kernels.accuracy import sum_error
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError
from numerics import check, same_bits


def _tensors(**changed: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    plain = {
        "x": torch.randn(5, 6),
        "weight": torch.randn(4, 6),
        "lora_a": torch.randn(2, 6),
        "lora_b": torch.randn(4, 2),
        "bias": torch.randn(4),
    }
    return plain | changed


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.randn(5, 7)},
        {"x": torch.tensor(1.0)},
        {"weight": torch.randn(6, 4)},
        {"weight": torch.randn(4)},
        {"lora_a": torch.randn(3, 6)},
        {"lora_a": torch.randn(2, 5)},
        {"lora_a": torch.empty(0, 6), "lora_b": torch.empty(4, 0)},
        {"lora_b": torch.randn(2, 4)},
        {"bias": torch.randn(5)},
        {"bias": torch.randn(4, 1)},
    ],
    ids=lambda wrong: ",".join(f"{name}{list(t.shape)}" for name, t in wrong.items()),
)
def test_shapes_that_do_not_fit_are_all_told(wrong: dict[str, torch.Tensor]) -> None:
    tensors = _tensors(**wrong)
    with pytest.raises(InvalidArgumentError) as caught:
        lora_linear(**tensors)
    for name, tensor in tensors.items():
        assert f"{name} {tuple(tensor.shape)}" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.ones(5, 6, dtype=torch.int64)},
        {"x": torch.ones(5, 6, dtype=torch.complex64)},
        {"x": torch.ones(5, 6, dtype=torch.bfloat16)},
        {"weight": torch.ones(4, 6, dtype=torch.float16)},
        {"weight": torch.ones(4, 6, dtype=torch.int8)},
        {"lora_a": torch.ones(2, 6, dtype=torch.int32)},
        {"lora_b": torch.ones(4, 2, dtype=torch.complex64)},
        {"bias": torch.ones(4, dtype=torch.int64)},
        {"lora_a": torch.ones(2, 6).to(torch.float8_e4m3fn)},
        {"bias": torch.ones(4).to(torch.float8_e5m2)},
        {"x": torch.ones(5, 6).to(torch.float8_e4m3fn), "weight": torch.ones(4, 6).to(torch.float8_e4m3fn)},
    ],
    ids=lambda wrong: ",".join(f"{name}:{t.dtype}" for name, t in wrong.items()),
)
def test_dtypes_that_cannot_run_are_told(wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InvalidTypeError, match=r"x torch\..*weight torch\.") as caught:
        lora_linear(**_tensors(**wrong))
    assert isinstance(caught.value, TypeError)


def test_tensors_on_different_devices_are_told() -> None:
    with pytest.raises(InvalidTypeError, match="lora_b on meta"):
        lora_linear(**_tensors(lora_b=torch.empty(4, 2, device="meta")))


@pytest.mark.parametrize(
    "wrong",
    [{"x": [1.0]}, {"weight": np.ones((4, 6))}, {"lora_a": None}, {"bias": 1.0}],
    ids=lambda wrong: str([*wrong]),
)
def test_what_is_no_tensor_is_named_with_its_type(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(InvalidTypeError, match=f"^{name} of type {type(value).__name__} was given"):
        lora_linear(**_tensors(**wrong))


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_an_input_that_is_no_tensor_is_told_wherever_it_goes(autocast: bool, activation: str) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(InvalidTypeError, match=r"^x of type list was given"),
    ):
        lora_linear(**_tensors(x=[1.0]), activation=activation)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("scaling", [None, "2", 1j, torch.tensor(2.0, requires_grad=True), torch.ones(2)], ids=repr)
def test_a_scaling_that_is_no_number_is_told(scaling: Any, activation: str) -> None:
    """One that wants a gradient too: it would get none. And one that a layer's was set to."""
    layer = FusedLoRALinear(6, 4, r=2, activation=activation)
    layer.scaling = scaling
    for call in (layer, lambda x: lora_linear(**_tensors(x=x), scaling=scaling, activation=activation)):
        with pytest.raises(InvalidTypeError, match=r"scaling=.* must be a number"):
            call(torch.ones(5, 6))


@pytest.mark.parametrize("scaling", [2, np.float32(2.0), torch.tensor(2.0)], ids=repr)
def test_other_kinds_of_numbers_are_a_scaling(scaling: Any) -> None:
    t = _tensors()
    assert same_bits(lora_linear(**t, scaling=scaling), lora_linear(**t, scaling=2.0))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, "0.1", None])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_outside_its_range(p: Any, training: bool) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\[0, 1\)"):
        lora_linear(**_tensors(), dropout_p=p, training=training)


def test_a_backend_that_is_not_there() -> None:
    with pytest.raises(InvalidArgumentError, match="'eager'"):
        lora_linear(**_tensors(), backend="cutlass")


def test_every_error_is_of_one_family() -> None:
    with pytest.raises(LoRAKernelsError):
        lora_linear(**_tensors(bias=torch.randn(5)))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(backend: str, device: str, x_dtype: torch.dtype) -> None:
    """y in autocast's dtype, gradients in the parameters'; equal to casting by hand; W's cast is not kept."""
    i = make(Case(), device)
    x = i.x.detach().to(x_dtype).requires_grad_()
    saved: list[torch.dtype] = []
    with (
        torch.autocast(device, torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.shape, t.dtype)) or t, lambda t: t),
    ):
        y = lora_linear(x, i.weight, i.lora_a, i.lora_b, i.bias, 0.5, backend=backend)
    assert y.dtype == torch.bfloat16
    assert (i.weight.shape, torch.float32) in saved
    assert (i.weight.shape, torch.bfloat16) not in saved
    gradients = torch.autograd.grad(y, (x, i.lora_a, i.lora_b, i.bias), i.dy.bfloat16())
    assert [g.dtype for g in gradients] == [x_dtype, torch.float32, torch.float32, torch.float32]

    x16 = x.detach().bfloat16().requires_grad_()
    by_hand = lora_linear(x16, i.weight.bfloat16(), i.lora_a, i.lora_b, i.bias, 0.5, backend=backend)
    assert same_bits(y.detach(), by_hand.detach())
    expected_gradients = torch.autograd.grad(by_hand, (x16, i.lora_a, i.lora_b, i.bias), i.dy.bfloat16())
    for ours, other in zip(gradients, expected_gradients, strict=True):
        assert same_bits(ours, other.to(ours.dtype))


def test_autocast_leaves_float64_and_disabled_regions_alone() -> None:
    i = make(Case(dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(i.x, i.weight, i.lora_a, i.lora_b).dtype == torch.float64
    i = make(Case())
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert lora_linear(i.x, i.weight, i.lora_a, i.lora_b).dtype == torch.float32


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_autocast_makes_nothing_floating_that_is_not(dtype: torch.dtype, activation: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InvalidTypeError, match=f"x {dtype}"):
        lora_linear(**_tensors(x=torch.ones(5, 6, dtype=dtype)), activation=activation)


def test_autocast_casts_mixed_base_dtypes() -> None:
    i = make(Case())
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(i.x.detach().half(), i.weight, i.lora_a, i.lora_b)
        assert y.dtype == F.linear(i.x.detach().half(), i.weight).dtype == torch.bfloat16


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_bias_of_another_dtype(backend: str, device: str) -> None:
    case = Case(dtype=torch.bfloat16)
    i = make(case, device)
    bias = i.bias.detach().float().requires_grad_()
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, bias, case.scaling, backend=backend)
    (dbias,) = torch.autograd.grad(y, bias, i.dy)
    exact, yardstick, errors = measures(case, i, None)
    check("y", y, exact["y"], yardstick["y"], case.dtype, expected=errors["y"])
    assert dbias.dtype == torch.float32
    expected = sum_error(torch.ones(1, case.m, device=device), i.dy).flatten()
    check("dbias", dbias, exact["dbias"], i.dy.float().sum(0), torch.float32, expected=expected)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_scaling_zero_is_the_base_layer(backend: str, device: str) -> None:
    t = {name: tensor.to(device) for name, tensor in _tensors().items()}
    exact = partial(F.linear, t["x"].double(), t["weight"].double(), t["bias"].double())
    y = lora_linear(**t, scaling=0.0, backend=backend)
    check("y", y, exact, F.linear(t["x"], t["weight"], t["bias"]), torch.float32)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("k", "n"), [(0, 4), (6, 0)])
def test_no_features_are_allowed_as_in_a_linear_layer(k: int, n: int, p: float, backend: str, device: str) -> None:
    for leading in ((), (5,), (2, 3)):
        shapes = {"x": (*leading, k), "weight": (n, k), "lora_a": (2, k), "lora_b": (n, 2), "bias": (n,)}
        t = {name: torch.randn(shape, device=device, requires_grad=True) for name, shape in shapes.items()}
        y = lora_linear(**t, dropout_p=p, training=True, backend=backend)
        assert same_bits(y.detach(), t["bias"].detach().expand(y.shape))
        gradients = torch.autograd.grad(y.sum(), tuple(t.values()))
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in t.values()]
        assert not any(gradient.any() for gradient in gradients[:4])


def test_a_nested_tensor_is_told() -> None:
    t = _tensors()
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged)
    with pytest.raises(InvalidTypeError, match="to_padded_tensor"):
        lora_linear(**(t | {"x": nested}))


def test_a_sparse_input_is_told() -> None:
    with pytest.raises(InvalidTypeError, match=r"x.to_dense\(\)"):
        lora_linear(**(_tensors() | {"x": torch.eye(5, 6).to_sparse()}))


def _changed(tensor: torch.Tensor) -> list[torch.Tensor]:
    """``tensor`` in other shapes, dtypes and layouts, and on another device."""
    sizes = tensor.shape
    shapes = [(), *((*sizes[:i], other, *sizes[i + 1 :]) for i in range(len(sizes)) for other in (0, 1, 3, 9))]
    shapes += [sizes[1:], (*sizes, 1), (1, *sizes), sizes[::-1]]
    dtypes = torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn
    return [
        *(torch.randn(shape) for shape in shapes),
        *(tensor.to(dtype) for dtype in dtypes),
        tensor.to("meta"),
        tensor.to_sparse(),
    ]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_what_an_operator_refuses_itself_is_told_as_what_is_looked_for_before_it(
    name: str, backend: str, grad: bool
) -> None:
    own = _tensors()
    for wrong in _changed(own[name]):
        tensors = own | {name: wrong}
        with torch.set_grad_enabled(grad):
            if grad:
                tensors["lora_a"] = tensors["lora_a"].clone()
                if tensors["lora_a"].is_floating_point():
                    tensors["lora_a"].requires_grad_()
            try:
                gate.check(*tensors.values(), autocast=False)
            except LoRAKernelsError as refusal:
                with pytest.raises(type(refusal), match=f"^{re.escape(str(refusal))}$"):
                    lora_linear(**tensors, backend=backend)
            else:
                y = lora_linear(**tensors, backend=backend)
                assert y.shape == (*tensors["x"].shape[:-1], 4)
                assert y.dtype is tensors["x"].dtype
                assert y.requires_grad is grad


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, whose memory holds them with the other sign."""
    made = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert made.is_neg()
    return made


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_the_imaginary_part_of_a_conjugate_keeps_its_sign(backend: str, device: str) -> None:
    t = {own: tensor.to(device) for own, tensor in _tensors().items()}

    def run(changed: dict[str, torch.Tensor], activation: str) -> list[torch.Tensor]:
        leaves = {own: tensor.detach().requires_grad_() for own, tensor in (t | changed).items()}
        y = lora_linear(**leaves, activation=activation, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), tuple(leaves.values()))]

    for activation in ("identity", "relu"):
        expected = run({}, activation)
        for name in t:
            for found, plain in zip(run({name: _negated(t[name])}, activation), expected, strict=True):
                torch.testing.assert_close(found, plain)


class _Negated(torch.nn.Module):
    """A parametrization that changes no value."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return _negated(tensor)


def _layers(kind: str) -> list[FusedLoRALinear]:
    options: dict[str, Any] = {"use_dora": kind == "dora", "activation": "gelu" if kind == "activation" else "identity"}
    layers = [FusedLoRALinear(*sizes, r=3, **options) for sizes in ((6, 4), (6, 4), (4, 6))]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B)
    return layers


@pytest.mark.parametrize("kind", ["layer", "dora", "activation", "group", "mlp", "packed"])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_negated_parameter_of_a_layer_keeps_its_sign(backend: str, device: str, kind: str) -> None:
    """Given by a parametrization, or as the Parameter itself."""
    for tokens in (2, 20):
        _check_negated_parameters(backend, device, kind, tokens)


def _check_negated_parameters(backend: str, device: str, kind: str, tokens: int) -> None:
    layers = _layers(kind)
    if kind == "packed":
        quantised = pytest.importorskip("quantised")
        layers[0] = quantised.adapted("nf4", 6, 4, torch.float32)
    whole: Any = {"group": lambda: FusedLoRAGroup(layers[:2]), "mlp": lambda: FusedLoRAMLP(*layers)}
    model = whole.get(kind, lambda: layers[0])().to(device)
    x = torch.randn(tokens, 6, device=device, requires_grad=True)

    def run() -> list[torch.Tensor]:
        with use_backend(backend):
            y = model(x)
        y = torch.cat(y, 1) if isinstance(y, tuple) else y
        trained = [p for _, p in sorted(model.named_parameters(), key=lambda own: _short(own[0])) if p.requires_grad]
        return [y, *torch.autograd.grad(y.square().sum(), (x, *trained))]

    expected = run()
    for name in ["bias", "lora_A", "lora_B", *(["weight"] if kind != "packed" else [])]:
        parametrize.register_parametrization(layers[0], name, _Negated())
        for found, plain in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, plain)
        parametrize.remove_parametrizations(layers[0], name, leave_parametrized=False)
        former = getattr(layers[0], name)
        setattr(layers[0], name, torch.nn.Parameter(_negated(former.detach()), former.requires_grad))
        for found, plain in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, plain)
        setattr(layers[0], name, former)


def _short(name: str) -> str:
    return name.replace("parametrizations.", "").replace(".original", "")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_gradient_through_a_conjugate_keeps_its_sign(backend: str, device: str) -> None:
    for activation in ("identity", "relu"):
        _check_a_conjugate(activation, backend, device)


def _check_a_conjugate(activation: str, backend: str, device: str) -> None:
    t = {own: tensor.to(device).requires_grad_() for own, tensor in _tensors().items()}
    y = lora_linear(**t, activation=activation, backend=backend)
    factor = torch.randn(5, 4, dtype=torch.complex64, device=device)
    signs: list[bool] = []
    y.register_hook(lambda dy: signs.append(dy.is_neg()))
    loss = (torch.complex(torch.zeros_like(y), y).conj() * factor).real.sum()  # imag(factor) · y
    found = torch.autograd.grad(loss, tuple(t.values()), retain_graph=True)
    assert signs == [True]
    plain = torch.autograd.grad(y, tuple(t.values()), factor.imag.contiguous())
    for own, other in zip(found, plain, strict=True):
        torch.testing.assert_close(own, other)


def test_meta_tensors_give_the_shape() -> None:
    t = {name: tensor.to("meta") for name, tensor in _tensors().items()}
    assert lora_linear(**t).shape == (5, 4)
    x, a = t["x"].requires_grad_(), t["lora_a"].requires_grad_()
    y = lora_linear(**(t | {"x": x, "lora_a": a}), dropout_p=0.5, training=True)
    assert [g.shape for g in torch.autograd.grad(y.sum(), (x, a))] == [x.shape, a.shape]
