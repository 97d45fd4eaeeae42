"""``FusedLoRAExperts`` by itself, against W + s B A made for each expert in float64."""

from __future__ import annotations

import copy
import itertools
import pickle
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import mixtures
from lora_kernels import dispatch, explain, use_backend
from lora_kernels.accuracy import judge
from lora_kernels.config import AdapterOptions
from lora_kernels.drawn import drawn_errors
from lora_kernels.errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from lora_kernels.experts import autograd, routing, run
from lora_kernels.experts.layer import FusedLoRAExperts, around_experts
from lora_kernels.models.disabling import adapters_disabled
from lora_kernels.reference import adapter_dtype
from numerics import same_bits

pytest.importorskip("transformers")

OPTIONS = AdapterOptions(3, 6.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def names_of(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def adapted(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> FusedLoRAExperts:
    module = mixtures.experts(kind, dtype)
    of = AdapterOptions(3, 6.0, **options)
    layer = around_experts(module, dict.fromkeys(names_of(module), of))
    mixtures.move(p for p in layer.parameters() if p.requires_grad)
    return layer


def inputs(
    layer: Any, dtype: torch.dtype, k: int = 2, seed: int = 2, tokens: int = 40
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(tokens, 16).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(layer.num_experts)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k).to(dtype).requires_grad_()
    return x, index, weights, torch.randn(tokens, 16).to(dtype)


def results(layer: FusedLoRAExperts, x: Tensor, index: Tensor, weights: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """What the layer gives, and each gradient, those of the adapters with a row for each expert's."""
    y = layer(x, index, weights)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    found |= {f"{n} a": a.grad.flatten(0, 1) for n, a in layer.lora_A.items()}
    return found | {f"{n} b": b.grad.flatten(0, 1) for n, b in layer.lora_B.items()}


def made_whole(
    layer: FusedLoRAExperts,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    dy: Tensor,
    dtype: torch.dtype,
    merged: bool = True,
) -> dict[str, Tensor]:
    """The same in ``dtype``, expert by expert, written out: in float64 by the weight W + s B A, which is made.

    In another dtype, as a yardstick, or where not ``merged``, by the plain composition x Wᵀ + s (x Aᵀ) Bᵀ.
    """
    own: Any = copy.deepcopy(layer.to_plain()).to(dtype)
    x, weights = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, weights))
    factors = {
        name: [_leaf(layer, factor[name], dtype) for factor in (layer.lora_A, layer.lora_B)] for name in layer.options
    }

    def project(rows: Tensor, name: str, e: int) -> Tensor:
        a, b = (factor[e] for factor in factors[name])
        stored, s = getattr(own, name)[e], layer.scaling(name)
        weight = stored.t() if own.is_transposed else stored
        exact = merged and dtype is torch.float64
        y = rows @ (weight + s * (b @ a)).t() if exact else rows @ weight.t() + s * ((rows @ a.t()) @ b.t())
        return y + getattr(own, f"{name}_bias")[e] if own.has_bias else y

    up, down = names_of(own)
    y = torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32))
    for e in range(own.num_experts):
        token, slot = torch.where(index == e)
        rows = project(x[token], up, e)
        rows = project(own._apply_gate(rows) if own.has_gate else own.act_fn(rows), down, e)
        rows = own.post_expert_norm(rows) if getattr(own, "has_post_expert_norm", False) else rows
        y = y.index_add(0, token, (rows * weights[token, slot, None]).to(y.dtype))
    y = y.to(dtype)
    y.backward(dy.to(dtype))
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    found |= {f"{name} a": a.grad.flatten(0, 1) for name, (a, _) in factors.items()}
    return found | {f"{name} b": b.grad.flatten(0, 1) for name, (_, b) in factors.items()}


def _leaf(layer: FusedLoRAExperts, factor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A or B in ``dtype``, first rounded as it is at the product."""
    return nn.Parameter(factor.detach().to(adapter_dtype(layer.get_parameter("down_proj").dtype)).to(dtype))


def compare(layer: FusedLoRAExperts, given: Any, dtype: torch.dtype) -> None:
    found = results(layer, *given)
    exact = made_whole(layer, *given, torch.float64)
    yardstick = made_whole(layer, *given, dtype)
    expected = drawn_errors(dtype, lambda: made_whole(layer, *given, torch.float64, merged=False), exact)
    verdicts = [judge(n, found[n], exact[n], yardstick[n], dtype, depth=2, expected=expected[n]) for n in found]
    failed = [str(verdict) for verdict in verdicts if not verdict.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_as_if_each_experts_weight_were_made(kind: str, dtype: torch.dtype) -> None:
    layer = adapted(kind, dtype)
    compare(layer, inputs(layer, dtype), dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is interpreted")
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_as_if_each_experts_weight_were_made_by_triton(kind: str) -> None:
    """Interpreted: projections, the gate, and the sum over a token's experts."""
    layer = adapted(kind)
    layer._is_expert_parallel = True
    given = inputs(layer, torch.float32)
    given[1][::2, 1] = layer.num_experts
    with use_backend("triton"):
        compare(layer, given, torch.float32)
        y = layer(*given[:3])
    assert type(y.grad_fn).__name__ == "_CombineInOnePassBackward"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU and torch sees no CUDA device")
def test_as_if_each_experts_weight_were_made_on_a_gpu() -> None:
    """By the kernels, both ways, and by ``grouped_mm`` or expert by expert. A run repeats the bits of the run before.

    There are more rows than blocks have, an expert without a token, and sentinels.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    plain: Any = nullcontext
    cases = [("gpt_oss", dtype, "triton", plain) for dtype in (bf16, fp16, fp32)]
    cases += [(*each, "eager", plain) for each in itertools.product(["qwen3_moe", "gpt_oss"], [bf16, fp32])]
    for kind, dtype, name, way in cases:
        layer = adapted(kind, dtype, lora_dropout=0.5).cuda().eval()
        layer._is_expert_parallel = True
        of_cpu = inputs(layer, dtype, tokens=700)
        given = tuple(tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in of_cpu)
        given[1][given[1] == 1] = layer.num_experts
        with use_backend(name), way():
            compare(layer, given, dtype)
            layer.train()
            torch.manual_seed(1)
            first = layer(*given[:3])
            torch.manual_seed(1)
            assert same_bits(first, layer(*given[:3]))


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "backend", "words"),
    [
        (False, torch.float32, "eager", "expert after expert"),
        (False, torch.float32, "native", "One operator a pass"),
        (True, torch.bfloat16, "eager", "grouped_mm for each product"),
        (True, torch.float32, "eager", "The host waits"),
        (True, torch.bfloat16, "native", "for CPUs only"),
        (True, torch.bfloat16, "triton", "the low-rank term inside"),
        (True, torch.float16, "triton", "the low-rank term inside"),
    ],
    ids=str,
)
def test_how_they_run_is_told(on_gpu: bool, dtype: torch.dtype, backend: str, words: str) -> None:
    problem = replace(adapted("mixtral", dtype, lora_dropout=0.1).problem, device_type="cuda" if on_gpu else "cpu")
    assert words in dispatch.backend(backend).describe(problem)


def test_explain_takes_them() -> None:
    with use_backend("eager"):
        found = explain(adapted("mixtral"))
        with pytest.raises(InvalidArgumentError, match="no plan of their own sizes"):
            explain(adapted("mixtral"), tokens=8)
    assert (found.backend, found.problem.experts) == ("eager", mixtures.experts("mixtral").num_experts)


def _forget_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_ones(weights: Tensor, slots: Tensor, present: Tensor | None) -> Tensor:
        return torch.ones_like(weights).reshape(-1, 1)

    monkeypatch.setattr(routing, "_sorted", of_ones)


def _skip_the_last_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = routing.Routing.__init__

    def without_last(self: Any, *arguments: Any) -> None:
        whole(self, *arguments)
        self.offsets[-1] = self.offsets[-2]

    monkeypatch.setattr(routing.Routing, "__init__", without_last)


def _exchange(monkeypatch: pytest.MonkeyPatch, factor: str) -> None:
    """Two experts' A or B are exchanged."""
    plain = run.project

    def exchanged(x: Tensor, weight: Tensor, adapter: Any, *arguments: Any) -> Tensor:
        order = torch.tensor([1, 0, *range(2, weight.shape[0])])
        other = adapter._replace(**{factor: getattr(adapter, factor)[order]})
        return plain(x, weight, other, *arguments)

    monkeypatch.setattr(run, "project", exchanged)


def _take_another_tokens_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = autograd.spread_grad
    monkeypatch.setattr(autograd, "spread_grad", lambda rows, places, *rest: plain(rows, places.roll(1), *rest))


FAULTS = {
    "a token's weight forgotten": (_forget_weights, "y"),
    "the last expert skipped": (_skip_the_last_expert, "y"),
    "two experts' A exchanged": (lambda patch: _exchange(patch, "a"), "y"),
    "two experts' B exchanged": (lambda patch: _exchange(patch, "b"), "y"),
    "another token's gradient": (_take_another_tokens_gradient, "dx"),
}


@pytest.mark.parametrize(("backend", "kind"), [("eager", "qwen3_moe"), ("native", "gpt_oss")])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, backend: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what runs projection by projection; test_mlp.py has those of both in one."""
    inject, seen_in = FAULTS[fault]
    layer = adapted(kind)
    with use_backend(backend):
        compare(layer, inputs(layer, torch.float32), torch.float32)
        layer.zero_grad()
        inject(monkeypatch)
        with pytest.raises(AssertionError, match=rf"(?m)^{seen_in}\b"):
            compare(layer, inputs(layer, torch.float32), torch.float32)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_one_projection_alone(kind: str) -> None:
    for name in ("gate_up_proj", "down_proj"):
        layer = around_experts(mixtures.experts(kind), {name: OPTIONS})
        mixtures.move(p for p in layer.parameters() if p.requires_grad)
        given = inputs(layer, torch.float32)
        with use_backend("eager"):  # else the base's product of an adapted projection is the library's own
            y = layer(given[0], *given[1:3])
        both = adapted(kind)
        other = ({"gate_up_proj", "down_proj"} - {name}).pop()
        with torch.no_grad():
            both.lora_A[name].copy_(layer.lora_A[name])
            both.lora_B[name].copy_(layer.lora_B[name])
            both.lora_B[other].zero_()
        with use_backend("eager"):
            assert torch.equal(y, both(given[0], *given[1:3]))


@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_sentinels_add_nothing(kind: str) -> None:
    layer = adapted(kind, torch.float64)
    layer._is_expert_parallel = True
    x, index, weights, dy = inputs(layer, torch.float64)
    index[::2, 1] = layer.num_experts
    index[3] = layer.num_experts + 2
    compare(layer, (x, index, weights, dy), torch.float64)
    assert not weights.grad[index >= layer.num_experts].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32], ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_integers_of_any_width_name_the_experts(kind: str, dtype: torch.dtype) -> None:
    layer = adapted(kind)
    x, index, weights, _ = inputs(layer, torch.float32)
    assert same_bits(layer(x, index.to(dtype), weights), layer(x, index, weights))
    for experts in (256, 300):  # more than a byte counts
        expected, found = (routing.Routing(given, experts, True) for given in (index, index.to(dtype)))
        for name in ("tokens", "slots", "places", "experts", "offsets", "present"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_an_index_that_is_no_integer_is_refused() -> None:
    layer = adapted("mixtral")
    x, index, weights, _ = inputs(layer, torch.float32)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(InvalidTypeError, match=rf"top_k_index of {dtype} was given"):
            layer(x, index.to(dtype), weights)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "without gate"])
def test_off_it_is_the_module_that_it_was(kind: str) -> None:
    layer, plain = adapted(kind), mixtures.experts(kind)
    x, index, weights, _ = inputs(layer, torch.float32)
    plain.config._experts_implementation = layer.config._experts_implementation = "eager"
    with adapters_disabled(layer):
        off = layer(x, index, weights)
    assert same_bits(off, plain(x, index, weights))
    assert not torch.allclose(layer(x, index, weights), off)
    back = layer.to_plain()
    assert type(back) is type(plain)
    assert list(back.state_dict()) == list(plain.state_dict())
    assert same_bits(back(x, index, weights), off)


def test_dropout_acts_in_training_alone_and_is_drawn_again_by_checkpoints() -> None:
    layer = adapted("qwen3_moe", lora_dropout=0.5)
    given = inputs(layer, torch.float32)
    torch.manual_seed(1)
    kept = results(layer, *given)
    layer.zero_grad()
    x, _, weights, _ = inputs(layer, torch.float32)
    torch.manual_seed(1)
    y = torch.utils.checkpoint.checkpoint(layer, x, given[1], weights, use_reentrant=False)
    y.backward(given[3])
    assert same_bits(kept["y"], y.detach())
    assert same_bits(kept["dx"], x.grad)
    assert same_bits(kept["down_proj a"], layer.lora_A["down_proj"].grad.flatten(0, 1))
    layer.eval()
    assert same_bits(layer(x, given[1], weights), layer(x, given[1], weights))


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_hooks_on_all_modules_act_on_the_activation(backend: str) -> None:
    layer = adapted("qwen3_moe")
    x, index, weights, _ = inputs(layer, torch.float32)

    def doubled(module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        return 2.0 * y if module is layer.act_fn else None

    found = []
    for register in (layer.act_fn.register_forward_hook, torch_module.register_module_forward_hook):
        hook = register(doubled)
        with use_backend(backend):
            found.append(layer(x, index, weights))
        hook.remove()
    assert same_bits(*found)
    assert not same_bits(found[0], layer(x, index, weights))


def test_autocast_runs_in_its_dtype() -> None:
    layer = adapted("qwen3_moe")
    x, index, weights, dy = inputs(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, index, weights)
    low = adapted("qwen3_moe", torch.bfloat16)
    with torch.no_grad():
        for name in layer.options:
            low.lora_A[name].copy_(layer.lora_A[name])
            low.lora_B[name].copy_(layer.lora_B[name])
    assert y.dtype is torch.float32
    exact = made_whole(layer, x, index, weights, dy, torch.float64)["y"]
    yardstick = made_whole(layer, x, index, weights, dy, torch.bfloat16)["y"]
    verdict = judge("y", y.detach(), exact, yardstick.float(), torch.bfloat16, depth=2)
    assert verdict.passed, str(verdict)
    y.backward(dy)
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same(way: Any) -> None:
    layer = adapted("mixtral")
    x, index, weights, _ = inputs(layer, torch.float32)
    other = way(layer)
    assert type(other) is type(layer)
    assert isinstance(other, type(mixtures.experts("mixtral")))
    assert same_bits(other(x, index, weights), layer(x, index, weights))
    assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in layer.parameters())


def test_the_same_bits_at_every_run() -> None:
    layer = adapted("qwen3_moe")
    first = results(layer, *inputs(layer, torch.float32))
    layer.zero_grad()
    second = results(layer, *inputs(layer, torch.float32))
    assert all(same_bits(first[name], second[name]) for name in first)


def test_a_new_adapter_adds_nothing_and_trains_alone() -> None:
    module = mixtures.experts("mixtral").requires_grad_(True)
    plain = copy.deepcopy(module)
    layer = around_experts(module, dict.fromkeys(names_of(module), OPTIONS))
    x, index, weights, _ = inputs(layer, torch.float32)
    wide = copy.deepcopy(plain).double()
    plain.config._experts_implementation = "grouped_mm"
    wide.config = copy.deepcopy(plain.config)
    wide.config._experts_implementation = "eager"  # grouped_mm has no fp64
    exact = wide(x.double(), index, weights.double())
    verdict = judge("y", layer(x, index, weights), exact, plain(x, index, weights), torch.float32, depth=2)
    assert verdict.passed, str(verdict)
    assert all(a.any(dim=-1).all() for a in layer.lora_A.values())
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == [f"{m}.{p}" for m in ("lora_A", "lora_B") for p in names_of(module)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_experts_cannot_have(options: dict[str, Any], words: str) -> None:
    module = mixtures.experts("mixtral").requires_grad_(True)
    with pytest.raises(InvalidArgumentError, match=words):
        around_experts(module, {"down_proj": AdapterOptions(4, 6.0, **options)})
    assert all(p.requires_grad for p in module.parameters())


def test_modules_that_cannot_be_adapted() -> None:
    module = mixtures.experts("mixtral")
    with pytest.raises(InvalidArgumentError, match=r"only .*gate_up_proj"):
        around_experts(module, {"router": OPTIONS})
    with pytest.raises(LoRAStateError, match="no experts module"):
        around_experts(nn.Linear(2, 2), {"weight": OPTIONS})
    with pytest.raises(LoRAStateError, match="has an adapter already"):
        around_experts(adapted("mixtral"), {"down_proj": OPTIONS})
    module.down_proj.data = module.down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(LoRAStateError, match="float8_e4m3fn"):
        around_experts(module, {"gate_up_proj": OPTIONS})
    other = mixtures.experts("mixtral")
    other.forward = other.forward
    with pytest.raises(LoRAStateError, match="forward of its own"):
        around_experts(other, {"down_proj": OPTIONS})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_tokens_of_no_floating_dtype_are_refused(dtype: torch.dtype, autocast: bool) -> None:
    layer = adapted("mixtral")
    _, index, weights, _ = inputs(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(InvalidTypeError, match=str(dtype)):
        layer(torch.ones(40, 16).to(dtype), index, weights)


def test_routing_weights_of_no_floating_dtype_are_refused() -> None:
    layer = adapted("mixtral")
    x, index, weights, _ = inputs(layer, torch.float32)
    with pytest.raises(InvalidTypeError, match=r"top_k_weights of torch\.int64 was given"):
        layer(x, index, weights.long())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_tokens_of_another_width_are_refused(kind: str) -> None:
    layer = adapted(kind)
    x, index, weights, _ = inputs(layer, torch.float32)
    with pytest.raises(InvalidArgumentError, match=rf"numbers: its weights take {x.shape[1]}\. Pass hidden_states"):
        layer(x[:, :-2], index, weights)


def test_shapes_that_do_not_fit() -> None:
    layer = adapted("mixtral")
    x, index, weights, _ = inputs(layer, torch.float32)
    with pytest.raises(InvalidArgumentError, match="top_k_weights"):
        layer(x, index, weights[:, :1])
