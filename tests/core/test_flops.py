"""PyTorch's ``FlopCounterMode`` counts the operators, as it counts the same formulas in plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from cases import BACKENDS, Case, make
from lora_kernels import FusedLoRALinear, dispatch, fuse_peft, lora_linear, ops, share_inputs, use_backend
from lora_kernels.backends import eager
from lora_kernels.flops import FORMULAS

M, K, N, R = 7, 24, 16, 4
BASE, LOW = 2 * M * K * N, 2 * M * R * (K + N)
NAMES = ("x", "lora_a", "lora_b", "weight")


def count(function: Callable[[], Any], counter: FlopCounterMode | None = None) -> int:
    counter = FlopCounterMode(display=False) if counter is None else counter
    with counter:
        function()
    total: int = counter.get_total_flops()
    return total


def _plain(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return F.linear(x, weight) + 0.5 * F.linear(F.linear(x, lora_a), lora_b)


def _ours(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return lora_linear(x, weight, lora_a, lora_b, scaling=0.5)


def _tensors(device: str, due: tuple[str, ...] = ()) -> dict[str, Tensor]:
    shapes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
    return {name: torch.randn(shape, device=device, requires_grad=name in due) for name, shape in shapes.items()}


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_forward_is_the_base_product_and_the_low_rank_ones(backend: str, device: str) -> None:
    given = _tensors(device)
    with use_backend(backend):
        assert count(lambda: _ours(**given)) == count(lambda: _plain(**given)) == BASE + LOW


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("chosen", range(1, 1 << len(NAMES)))
def test_a_backward_is_what_is_due(chosen: int, backend: str, device: str) -> None:
    due = tuple(name for i, name in enumerate(NAMES) if chosen >> i & 1)
    given = _tensors(device, due)
    with use_backend(backend):
        ours = count(lambda: _ours(**given).sum().backward())
    assert ours == count(lambda: _plain(**given).sum().backward())


def _parts(device: str) -> dict[str, tuple[tuple[Any, ...], Callable[[], Any]]]:
    """Of each operator that multiplies matrices: its arguments, and the products of its formula."""
    t = _tensors(device)
    x, w, a, b = t["x"], t["weight"], t["lora_a"], t["lora_b"]
    dy, h, gain, bias = (torch.randn(size, device=device) for size in ((M, N), (M, R), (N,), (N,)))
    few = dy[:, :5], w[:5]
    return {
        "forward": ((x, w, a, b, bias, 0.5, 0.0, None), lambda: (x @ w.t(), x @ a.t() @ b.t())),
        "backward": (
            (dy, x, w, a, b, bias, h, 0.5, 0.0, None),
            lambda: (dy @ w, dy @ b @ a, h.t() @ x, dy.t() @ h),
        ),
        "shrink": ((x, a, 0.0, None), lambda: x @ a.t()),
        "product": ((x, w, b, h, bias, gain, 0.5, True), lambda: (x @ w.t(), h @ b.t())),
        "output_grads": ((dy, b, h, bias, 0.5), lambda: (dy @ b, dy.t() @ h)),
        "input_grad": (
            ([dy, few[0]], [w, few[1]], [h, h[:, :2]], [a, a[:2]], 0.0, []),
            lambda: (dy @ w, h @ a, few[0] @ few[1], h[:, :2] @ a[:2]),
        ),
        "a_grad": ((h, x, 0.0, None), lambda: h.t() @ x),
        "row_norms": ((w, a, b, 0.5), lambda: (w @ a.t(), b @ (a @ a.t()))),
    }


def _parts_of_experts() -> dict[str, tuple[tuple[Any, ...], Callable[[], Any]]]:
    """The same of two experts' operators, all of whose rows but the first are the second's."""
    t = _tensors("cpu")
    x, w, a, b = (torch.stack([t[name]] * (1 + (name != "x"))) for name in ("x", "weight", "lora_a", "lora_b"))
    x, offsets, dy, h = x[0], torch.tensor([1, M], dtype=torch.int32), torch.randn(M, N), torch.randn(M, R)
    tokens = torch.arange(M).flip(0)
    return {
        "experts_forward": (
            (x, w, a, b, offsets, tokens, 0.5, 0.0, None),
            lambda: (x @ w[0].t(), x @ a[0].t() @ b[0].t()),
        ),
        "experts_backward": (
            (dy, x, w, a, b, offsets, None, h, 0.5, 0.0, None),
            lambda: (dy @ w[0], dy @ b[0] @ a[0], h.t() @ x, dy.t() @ h),
        ),
    }


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("name", ops.EXPERTS_OPERATOR_NAMES)
def test_experts_count_as_layers(name: str, backend: str) -> None:
    dispatch.select("cpu", torch.float32, backend)
    arguments, products = _parts_of_experts()[name]
    with torch.no_grad():
        assert count(lambda: getattr(ops._registered[backend], name)(*arguments)) == count(products) > 0


@pytest.mark.parametrize("due", range(16))
def test_experts_in_one_operator_count_as_their_projections(due: int) -> None:
    dispatch.select("cpu", torch.float32, "native")
    table, t, k, h, inner = ops._registered["native"], 6, 2, 8, 5
    x, dy, weights, joined = torch.randn(t, h), torch.randn(t, h), torch.rand(t, k), torch.randn(t * k, 2 * inner)
    up = torch.randn(1, 2 * inner, h), torch.randn(1, R, h), torch.randn(1, 2 * inner, R)
    down = torch.randn(1, h, inner), torch.randn(1, R + 1, inner), torch.randn(1, h, R + 1)
    offsets, slots, a = torch.tensor([t * k], dtype=torch.int32), torch.arange(t * k), torch.randn(t * k, inner)
    given, numbers = (*up, *down, offsets, slots, weights), (0.5, 0.5, 0.0, 0.0, None, None, 0)
    rows, outer, hs = x[slots // k], dy[slots // k], (torch.randn(t * k, R), torch.randn(t * k, R + 1))
    need_x, need_weights, need_up, need_down = (bool(due >> i & 1) for i in range(4))
    parts = table.experts_forward, table.experts_backward

    def by_projections() -> None:
        (w, up_a, up_b), (v, down_a, down_b) = up, down
        inward = need_x or need_up
        parts[0](rows, *up, offsets, None, 0.5, 0.0, None)
        parts[0](a, *down, offsets, None, 0.5, 0.0, None)
        own = (a if need_down else None, v if inward or need_weights else None, down_a, down_b, offsets, None)
        parts[1](outer, *own, hs[1] if need_down else None, 0.5, 0.0, None)
        if inward:
            own = (rows if need_up else None, w if need_x else None, up_a, up_b, offsets, None)
            parts[1](joined, *own, hs[0] if need_up else None, 0.5, 0.0, None)

    def in_one() -> None:
        table.experts_mlp_forward(x, *given, *numbers, False)
        table.experts_mlp_backward(dy, x, joined, *given, *hs, *numbers, need_x, need_weights, need_up, need_down)

    with torch.no_grad():
        assert count(in_one) == count(by_projections) > 0


PACKED = ("packed_product", "packed_input_grad")
SEVERAL = (*ops.GROUP_OPERATOR_NAMES, *ops.EXPERTS_OPERATOR_NAMES, *ops.EXPERTS_MLP_OPERATOR_NAMES, *PACKED)


@pytest.mark.parametrize("name", PACKED)
def test_products_with_a_packed_weight_count_as_with_its_values(name: str) -> None:
    from lora_kernels.weights import block_fp8

    dispatch.select("cpu", torch.float32, "native")
    x, dy, h, w = torch.randn(M, K), torch.randn(M, N), torch.randn(M, R), torch.randn(N, K)
    b, a, parts = torch.randn(N, R), torch.randn(R, K), [w.to(torch.float8_e4m3fn), torch.ones(())]
    of = parts, block_fp8.BLOCK_FP8.name, "whole", N, K
    arguments, products = {
        "packed_product": ((x, *of, b, h, None, None, 0.5, False), lambda: (x @ w.t(), h @ b.t())),
        "packed_input_grad": ((dy, *of, h, a, 0.0, None), lambda: (dy @ w, h @ a)),
    }[name]
    with torch.no_grad():
        assert count(lambda: getattr(ops._registered["native"], name)(*arguments)) == count(products) > 0


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in SEVERAL])
def test_each_operator_counts_the_products_of_its_formula(name: str, backend: str, device: str) -> None:
    dispatch.select(device, torch.float32, backend)
    arguments, products = _parts(device)[name]
    with torch.no_grad():
        assert count(lambda: getattr(ops._registered[backend], name)(*arguments)) == count(products) > 0


def test_operators_without_a_formula_multiply_no_matrices() -> None:
    assert set(ops.OPERATOR_NAMES) - set(FORMULAS) == {"mask", "gain_grad", "gated", "gated_grad"}
    dispatch.select("cpu", torch.float32, "eager")
    given, implementations = make(Case(), "cpu"), eager.BACKEND.operators()
    seed, gain = torch.zeros(2, dtype=torch.int64), torch.ones(given.dy.shape[1])
    with torch.no_grad():
        assert count(lambda: implementations["mask"](seed, 5, 8, 0.5)) == 0
        dy = given.dy.detach()
        assert count(lambda: implementations["gain_grad"](dy, dy, gain, None)) == 0
        assert count(lambda: implementations["gated"](dy, dy, 0)) == 0
        assert count(lambda: implementations["gated_grad"](dy, dy, dy, 0, False)) == 0


class Attention(nn.Module):
    def __init__(self, make_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.q_proj, self.k_proj = make_layer(), make_layer()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q_proj(x) + self.k_proj(x)
        return y


def _layer(**options: Any) -> FusedLoRALinear:
    return FusedLoRALinear(K, N, r=R, init_lora_weights=False, **options)


def _step(model: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    x = torch.randn(M, K, requires_grad=True)
    return lambda: model(x).sum().backward()


STEP = 2 * (BASE + LOW) + 2 * M * R * (K + N)  # dx, da and db besides y


@pytest.mark.parametrize(("backend", "device"), BACKENDS[:1])
def test_layers_that_run_together_count_as_apart(backend: str, device: str) -> None:
    model = Attention(_layer).train()
    with use_backend(backend):
        apart = count(_step(model))
        share_inputs(model, [["q_proj", "k_proj"]])
        together = count(_step(model))
    assert together == apart == 2 * STEP


def test_dora_counts_its_norms_besides() -> None:
    norms = 2 * N * K * R + 2 * R * R * (K + N)
    assert count(_step(_layer(use_dora=True))) == STEP + norms


def test_a_layer_of_peft_counts_as_pefts_own() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    config = peft.LoraConfig(r=R, target_modules=["0"], init_lora_weights=False)
    whole = peft.get_peft_model(model, config)
    own = count(_step(whole))
    fuse_peft(whole)
    assert count(_step(whole)) == own == STEP


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_counts_its_second_forward(reentrant: bool) -> None:
    layer = _layer()
    assert count(_step(lambda x: checkpoint(layer, x, use_reentrant=reentrant))) == STEP + BASE + LOW


def test_two_counters_and_a_mapping_of_the_users_count_each_for_itself() -> None:
    layer = _layer()
    _step(layer)()
    packet = ops._packets[dispatch.select("cpu", torch.float32)]["forward"]
    outer = FlopCounterMode(display=False, custom_mapping={packet: lambda *_, out_shape=None, **__: 1})
    inner = FlopCounterMode(display=False)
    assert count(lambda: count(_step(layer), inner), outer) == STEP - BASE - LOW + 1
    assert inner.get_total_flops() == STEP


def test_a_counter_made_before_the_formulas_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer()
    _step(layer)()
    own = {packet for packets in ops._packets.values() for packet in packets.values()}
    rest: Mapping[Any, Any] = {packet: formula for packet, formula in flop_registry.items() if packet not in own}
    monkeypatch.setattr("torch.utils.flop_counter.flop_registry", dict(rest))
    early = FlopCounterMode(display=False)
    assert not own & set(early.flop_registry)
    assert count(_step(layer), early) == STEP


def test_compiled_models_are_counted() -> None:
    layer = _layer()
    layer.compile(backend="aot_eager")
    step = _step(layer)
    step()
    assert count(step) == STEP  # PyTorch runs it uncompiled there


SCRIPT = """
import sys, torch
from lora_kernels import FusedLoRALinear
layer, x = FusedLoRALinear(24, 16, r=4), torch.randn(7, 24)
layer(x)
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
if {compiled}:
    layer.compile(backend="aot_eager", fullgraph=True)
y = layer(x)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    y.sum().backward()
print(counter.get_total_flops())
"""


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_imported_for_it_and_a_late_counter_counts(compiled: bool) -> None:
    """A compiled backward runs nothing of ours but the operators."""
    command = [sys.executable, "-c", SCRIPT.format(compiled=compiled)]
    environment = {**os.environ, "LORA_KERNELS_BACKEND": "eager"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{LOW + 2 * M * N * R}\n"), done.stderr
