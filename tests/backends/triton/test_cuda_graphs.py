"""A whole training step as one CUDA graph: forward, backward and the optimizer, with fresh dropout at each replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cases import BACKENDS
from lora_kernels import lora_linear, use_backend
from made_models import acting
from numerics import check, same_bits

ON_GPU = [name for name, device in BACKENDS if device == "cuda"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="it needs a GPU and torch sees no CUDA device"),
]
every_backend = pytest.mark.parametrize("backend", ON_GPU or ["eager"])


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """``step`` as a graph, after three calls on another stream, as PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@every_backend
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_replayed_steps_train_as_steps_do(options: dict[str, bool], backend: str) -> None:
    """Five replays on new data leave the bits that five calls leave."""
    batches = [torch.randn(64, 256, device="cuda", dtype=torch.bfloat16) for _ in range(5)]

    def trained(replayed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer = acting(256, 128, r=16, dtype=torch.bfloat16, device="cuda", **options)
        start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        leaves = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(leaves, lr=0.01)
        x = batches[0].clone()

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            layer(x).float().square().mean().backward()
            optimizer.step()

        run = captured(step).replay if replayed else step
        layer.load_state_dict(start)
        for batch in batches:
            x.copy_(batch)
            run()
        torch.cuda.synchronize()
        return [leaf.detach().clone() for leaf in leaves]

    with use_backend(backend):
        assert all(same_bits(*pair) for pair in zip(trained(True), trained(False), strict=True))


@every_backend
def test_each_replay_has_a_mask_of_its_own_and_backward_knows_it(backend: str) -> None:
    """With W = 0 and B = 1, y of a row is the sum of its kept x A, and dx tells what was kept."""
    x = torch.rand(64, 128, device="cuda").add_(0.5).requires_grad_()
    weight, b = torch.zeros(16, 128, device="cuda"), torch.ones(16, 16, device="cuda").div_(16)
    a = torch.ones(16, 128, device="cuda")
    x.grad = torch.zeros_like(x)
    y = torch.zeros(64, 16, device="cuda")

    def step() -> None:
        x.grad.zero_()
        out = lora_linear(x, weight, a, b, dropout_p=0.5, training=True, backend=backend)
        out[:, 0].sum().backward()
        y.copy_(out.detach())

    graph, masks = captured(step), []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        masks.append(x.grad != 0)
        exact = (x.detach().double() * x.grad.double()).sum(1)
        check("y", y[:, 0], exact, exact.float(), torch.float32, tf32=True)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
