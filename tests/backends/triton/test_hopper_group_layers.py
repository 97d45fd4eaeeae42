"""Layers that share an input, by the group operators: in models, in checkpoints, compiled, explained."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import FusedLoRALinear, explain, gate, ops, share_inputs, use_backend
from lora_kernels.branches import Branch
from lora_kernels.errors import InvalidTypeError
from lora_kernels.shared_input import attach
from lora_kernels.tensors import resolved
from numerics import same_bits

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from test_hopper_group_plans import BACKWARD, FORWARD, Launches, launches, memory  # noqa: F401

M, K, NS, R = 40, 72, (64, 24, 24), 5
BF16 = torch.bfloat16


class Attention(nn.Module):
    """q, k and v of one x."""

    def __init__(self, p: float, shared: bool, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FusedLoRALinear(K, n, r=R, lora_alpha=2 * R + i, lora_dropout=p, dtype=BF16, **options)
            for i, n in enumerate(NS)
        )
        with torch.no_grad():
            for layer in self.layers:
                layer.lora_B.copy_(torch.randn_like(layer.lora_B))
        if shared:
            attach(self, list(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def made(p: float, shared: bool = True, **options: Any) -> Attention:
    torch.manual_seed(3)
    return Attention(p, shared, **options)


def step(model: nn.Module, x: Tensor, run: Any = None) -> list[Tensor]:
    """y, dx and the adapters' gradients."""
    torch.manual_seed(1)
    leaves = [x, *(own for name, own in model.named_parameters() if "lora" in name)]
    with use_backend("triton"):
        y = (model if run is None else run)(x)
        for leaf in leaves:
            leaf.grad = None
        y.backward(torch.ones_like(y))
    return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


def an_x(m: int = M) -> Tensor:
    return torch.randn(2, m // 2, K).to(BF16).requires_grad_()


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """y's bits, and gradients that differ as orders of sums do: more is the policy's, in the tests beside."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        scale = other.float().abs().max()
        assert bool(((one.float() - other.float()).abs() <= scale * 2**-5).all())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_masks_are_those_of_each_layer_by_itself(p: float, launches: Launches) -> None:  # noqa: F811
    """One seed gives one result, shared or not: the layers draw in their order."""
    x = an_x()
    together = step(made(p), x)
    assert [name for name in launches.names if name != "draw"] == FORWARD + BACKWARD
    launches.names.clear()
    apart = step(made(p, shared=False), x)
    assert not [name for name in launches.names if name.startswith("group")]
    close(together, apart)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same(reentrant: bool, launches: Launches) -> None:  # noqa: F811
    model, x = made(0.3), an_x()
    expected = step(model, x)
    launches.names.clear()
    found = step(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True))
    assert [name for name in launches.names if name != "draw"] == FORWARD + FORWARD + BACKWARD


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_the_backend_knows_is_taken_unasked(p: float, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The same bits as by the long way, which a backend that knows nothing is left to."""
    model, x = made(p), an_x()
    expected, direct, asked = step(model, x), ops._direct["triton"], list[int]()

    def known(x: Tensor, *rest: Any) -> Any:
        if x.dtype is not BF16:
            return None
        asked.append(x.dim())
        return direct.group_forward(x, *[list(each) if isinstance(each, tuple) else each for each in rest])

    monkeypatch.setitem(ops._direct, "triton", replace(direct, known_group=lambda *arguments: None))
    found = step(model, x)
    monkeypatch.setitem(ops._direct, "triton", replace(direct, known_group=known))
    with monkeypatch.context() as patch:
        patch.setattr(gate, "check", lambda *arguments: pytest.fail("it was asked"))
        found_unasked = step(model, x)
        with torch.no_grad(), use_backend("triton"):
            torch.manual_seed(1)
            y = model(x)
    assert asked == [3, 3]
    for results in (found, found_unasked, [y]):
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=False))
    assert not y.requires_grad
    with use_backend("triton"), pytest.raises(InvalidTypeError, match=r"x torch\.float32"):
        model(x.float())
    with use_backend("triton"), torch.autocast("cpu", BF16):
        model(x)
    assert asked == [3, 3]


def test_negated_memory_is_known_for_what_it_is(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The dispatcher has it resolved before C++ looks for a pass; what backward is given is as it was."""
    model, x = made(0.0), an_x()
    plain = [Branch(own.weight, own.lora_A, own.lora_B, scaling=0.5) for own in model.layers]
    with torch.no_grad():
        negated = [
            replace(b, **{name: torch._neg_view(-getattr(b, name)) for name in ("weight", "lora_a", "lora_b")})
            for b in plain
        ]
    assert negated[0].weight.is_neg()
    for branch in negated:
        branch.lora_a.requires_grad_(), branch.lora_b.requires_grad_()
    with use_backend("triton"):
        expected = gate.run_branches(x, plain, 0.0)
        direct = ops._direct["triton"]

        def known(x: Tensor, *rest: Any) -> Any:
            return direct.group_forward(x, *[[resolved(t) for t in each] for each in rest[:4]], *rest[4:])

        monkeypatch.setitem(ops._direct, "triton", replace(direct, known_group=known))
        found = gate.run_branches(x, negated, 0.0)
    dys = [torch.randn_like(y) for y in expected]
    (dx,), (own_dx,) = torch.autograd.grad(expected, x, dys), torch.autograd.grad(found, x, dys)
    assert all(same_bits(a, b) for a, b in zip([*found, own_dx], [*expected, dx], strict=True))


def test_in_eval_each_runs_by_itself(launches: Launches) -> None:  # noqa: F811
    model = made(0.3).eval()
    with use_backend("triton"):
        model(an_x())
    assert not [name for name in launches.names if name.startswith("group")]


def test_under_autocast_over_fp32_weights(launches: Launches) -> None:  # noqa: F811
    model, x = made(0.0).float(), an_x().detach().float().requires_grad_()
    with use_backend("triton"), torch.autocast("cpu", BF16):
        y = model(x)
    y.backward(torch.ones_like(y))
    assert [name for name in launches.names if name != "draw"] == FORWARD + BACKWARD
    assert y.dtype is BF16
    assert x.grad is not None and x.grad.dtype is torch.float32  # noqa: PT018


class Together(nn.Module):
    """As a compiled model has them: outputs cannot wait, so who holds the layers asks for all."""

    def __init__(self, model: Attention) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        from lora_kernels.shared_input import shared_inputs

        (shared,) = shared_inputs(self.model)
        return torch.cat(list(shared.outputs(x).values()), -1)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled(p: float, launches: Launches) -> None:  # noqa: F811
    """One graph, for another number of tokens the same one; other scalings compile nothing new after the second."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    torch._dynamo.reset()
    forwards: list[int] = []

    def noted(graph: Any, inputs: Any) -> Any:
        forwards.append(sum("triton_group" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=noted, bw_compiler=noted, partition_fn=min_cut_rematerialization_partition)
    model = Together(made(p))
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for m in (M, 2 * M, 3 * M):
        x = an_x(m)
        launches.names.clear()
        found = step(model, x, compiled)
        assert [name for name in launches.names if name != "draw"] == FORWARD + BACKWARD
        close(found, step(model, x))
    assert forwards == [1, 1]


def test_explained(launches: Launches) -> None:  # noqa: F811
    with use_backend("triton"):
        model, with_dora = made(0.1), made(0.0, use_dora=True)
        first = model.layers[0]
        told = explain(first)
        assert told.problem.others == ((24, R), (24, R))
        assert "2 others that share its x, by the group kernels" in told.problem.aside
        assert with_dora.layers[0].problem.others == ()
    with use_backend("eager"):
        assert "in parts. The group kernels do not run: this backend has none." in first.problem.aside


def test_share_inputs_finds_them(launches: Launches) -> None:  # noqa: F811
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = made(0.0, shared=False).layers

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    model = Block()
    share_inputs(model)
    step(model, an_x())
    assert [name for name in launches.names if name != "draw"] == FORWARD + BACKWARD
