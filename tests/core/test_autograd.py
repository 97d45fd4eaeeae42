"""Autograd's contract: gradcheck, double backward, checkpointing, what is saved, what may be modified in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cases import BACKENDS, Case, keep_mask, make, measures
from lora_kernels import FusedLoRALinear, LoRAKernelsError, lora_linear
from lora_kernels.errors import UnsupportedTransformError
from lora_kernels.kept import row_words
from numerics import check, same_bits

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
in_float64 = pytest.mark.parametrize("backend", [b for b, device in BACKENDS if device == "cpu" and b != "triton"])


def _double(backend: str, *, with_bias: bool, p: float, m: int = 4) -> tuple[list[torch.Tensor], object]:
    i = make(Case(m=m, k=5, n=3, r=2, dtype=torch.float64, bias=with_bias))
    leaves = [i.x, i.weight.requires_grad_(), i.lora_a, i.lora_b, *([i.bias] if with_bias else [])]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)  # the same mask at each evaluation
        bias = tensors[4] if with_bias else None
        return lora_linear(*tensors[:4], bias, 0.7, p, p > 0, backend)

    return leaves, function


@in_float64
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck_and_gradgradcheck(with_bias: bool, p: float, backend: str) -> None:
    leaves, function = _double(backend, with_bias=with_bias, p=p)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@in_float64
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (1, 2), (0, 1), (0, 1, 3)])
def test_double_backward_of_every_frozen_set_is_right_or_refused(
    frozen: tuple[int, ...], p: float, backend: str
) -> None:
    leaves, function = _double(backend, with_bias=True, p=p)
    for index in frozen:
        leaves[index].requires_grad_(False)
    if set(frozen) >= {1, 2} and 0 not in frozen:  # x was not kept
        with pytest.raises(UnsupportedTransformError, match="lora_A"):
            torch.autograd.gradgradcheck(function, leaves)
    else:
        assert torch.autograd.gradgradcheck(function, leaves)


def test_the_double_backward_that_cannot_be_right_is_refused() -> None:
    leaves, function = _double("eager", with_bias=False, p=0.0)
    for index in (1, 2):
        leaves[index].requires_grad_(False)
    with pytest.raises(UnsupportedTransformError, match="lora_A is frozen"):
        torch.autograd.grad(function(*leaves).sum(), leaves[0], create_graph=True)


@every_backend
def test_double_backward_of_every_backend_uses_its_own_mask(backend: str, device: str) -> None:
    case = Case(p=0.5)
    i = make(case, device)
    torch.manual_seed(3)
    y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, None, case.scaling, case.p, True, backend)
    (once,) = torch.autograd.grad(y.square().sum(), i.x, create_graph=True, retain_graph=True)
    (plain,) = torch.autograd.grad(y.square().sum(), i.x, retain_graph=True)
    assert torch.equal(once.detach() != 0, plain != 0)
    of_square, mask = replace(i, dy=2 * y.detach()), keep_mask(case, i, backend, seed=3)
    exact, yardstick, errors = (values["dx"] for values in measures(case, of_square, mask))
    for dx in (once, plain):
        check("dx", dx, exact, yardstick, case.dtype, expected=errors)
    once.sum().backward()
    assert torch.isfinite(i.lora_a.grad).all()


def test_transforms_are_refused_with_a_sentence() -> None:
    i = make(Case())
    x, a, b = i.x.detach(), i.lora_a.detach(), i.lora_b.detach()
    with pytest.raises(UnsupportedTransformError, match=r"vmap.*leading dimensions"):
        torch.vmap(lambda row: lora_linear(row, i.weight, a, b))(x)
    with pytest.raises(LoRAKernelsError, match=r"torch\.func"):
        torch.func.grad(lambda t: lora_linear(t, i.weight, a, b).sum())(x)


@pytest.mark.parametrize("of", ["x", "lora_A", "lora_magnitude_vector"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_mode_derivative_is_refused_not_lost(of: str, grad: bool) -> None:
    layer, x = FusedLoRALinear(6, 5, r=2, use_dora=of == "lora_magnitude_vector"), torch.randn(3, 6)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        assert layer(x).shape == (3, 5)
        tensor = x if of == "x" else getattr(layer, of).detach()
        dual = {of: forward_ad.make_dual(tensor, torch.ones_like(tensor))}
        arguments = ({}, dual["x"]) if of == "x" else (dual, x)
        with pytest.raises(UnsupportedTransformError, match=r"dual tensor.*reference\.forward"):
            torch.func.functional_call(layer, *arguments)


@every_backend
def test_a_tensor_that_leaked_out_of_a_transform_is_plain_again(backend: str, device: str) -> None:
    """torch.func leaves a dead wrapper around it; forward and backward see through."""
    i = make(Case(), device)
    leaked: list[torch.Tensor] = []
    torch.func.grad(lambda t: (leaked.append(t), t.sum())[1])(i.x.detach())
    results = []
    for x in (leaked[0], i.x.detach()):
        y = lora_linear(x, i.weight, i.lora_a, i.lora_b, i.bias, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, (i.lora_a, i.lora_b), i.dy)))
    assert all(same_bits(left, right) for left, right in zip(*results, strict=True))


@every_backend
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_for_backward(backend: str, device: str, p: float) -> None:
    """x, h, the parameters as they are, and the 16-byte seed or one bit an element: no copy of x, no cast."""
    case = Case(m=32, k=64, n=48, r=4, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=p)
    i = make(case, device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(i.x, i.weight, i.lora_a, i.lora_b, i.bias, case.scaling, p, True, backend)
    y.sum().backward()
    own = {t.data_ptr() for t in (i.x, i.weight, i.lora_a, i.lora_b, i.bias)}
    extra = [t for t in saved if t.data_ptr() not in own]
    hidden = [t for t in extra if t.is_floating_point()]
    states = [t for t in extra if not t.is_floating_point()]
    assert len(hidden) == 1
    if p == 0.0:
        assert not states
    elif backend == "eager" and device == "cuda":
        assert [(t.dtype, t.numel()) for t in states] == [(torch.bool, case.m * case.k)]  # explain() says so
    elif backend == "triton":
        assert [(t.dtype, t.shape) for t in states] == [(torch.int32, (case.m, row_words(case.k)))]
    else:
        assert [t.nbytes for t in states] == [16]


def test_only_what_is_needed_is_saved() -> None:
    def saved(**needs: bool) -> set[str]:
        i = make(Case())
        tensors = {"x": i.x, "weight": i.weight, "lora_a": i.lora_a, "lora_b": i.lora_b}
        for name, tensor in tensors.items():
            tensor.requires_grad_(needs.get(name, False))
        seen: set[str] = set()
        names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.add(names.get(t.data_ptr(), "h")), lambda t: t):
            lora_linear(**tensors)
        return seen

    assert saved() == set()
    assert saved(lora_b=True) == {"h", "lora_a", "lora_b"}
    assert saved(lora_a=True) == {"x", "lora_a", "lora_b"}
    assert saved(x=True) == {"weight", "lora_a", "lora_b"}
    assert saved(x=True, lora_a=True, lora_b=True) == {"x", "h", "weight", "lora_a", "lora_b"}


@every_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(backend: str, device: str, reentrant: bool) -> None:
    i = make(Case(p=0.5), device)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, i.weight, i.lora_a, i.lora_b, i.bias, 0.5, 0.5, True, backend)

    def gradients(recompute: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(11)
        y = checkpoint(layer, i.x, use_reentrant=reentrant) if recompute else layer(i.x)
        for leaf in (i.x, i.lora_a, i.lora_b):
            leaf.grad = None
        y.backward(i.dy)
        return i.x.grad, i.lora_a.grad, i.lora_b.grad

    plain, recomputed = gradients(False), gradients(True)
    assert all(same_bits(left, right) for left, right in zip(plain, recomputed, strict=True))


@every_backend
def test_result_may_be_modified_in_place_and_used_twice(backend: str, device: str) -> None:
    i = make(Case(), device)
    x = i.x.detach().reshape(2, 12, -1).requires_grad_()
    y = lora_linear(x, i.weight, i.lora_a, i.lora_b, i.bias, backend=backend)
    y.mul_(2.0)
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * first)


@every_backend
def test_nothing_is_kept_under_no_grad(backend: str, device: str) -> None:
    i = make(Case(), device)
    with torch.no_grad():
        assert lora_linear(i.x, i.weight, i.lora_a, i.lora_b, backend=backend).grad_fn is None
    with torch.inference_mode():
        assert lora_linear(i.x, i.weight, i.lora_a, i.lora_b, backend=backend).is_inference()


@every_backend
def test_dropout_follows_torchs_generator_and_mode(backend: str, device: str) -> None:
    i = make(Case(), device)

    def y(seed: int, training: bool = True) -> torch.Tensor:
        torch.manual_seed(seed)
        return lora_linear(i.x.detach(), i.weight, i.lora_a, i.lora_b, None, 0.5, 0.5, training, backend).detach()

    assert same_bits(y(1), y(1))
    assert not torch.equal(y(1), y(2))
    assert same_bits(y(1, training=False), y(2, training=False))
    torch.manual_seed(1)
    layer = FusedLoRALinear(8, 8, r=2, lora_dropout=0.5, init_lora_weights=False, device=device)
    x = torch.ones(4, 8, device=device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert same_bits(layer(x).detach(), layer(x).detach())
