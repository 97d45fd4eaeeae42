"""What a long training run meets: many threads, memory that runs out, thousands of steps."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cases import BACKENDS
from lora_kernels import FusedLoRALinear, lora_linear, use_backend
from lora_kernels.accuracy import sum_error
from lora_kernels.console import one_thread
from made_models import acting
from numerics import check, same_bits

ON_CPU = [name for name, device in BACKENDS if device == "cpu" and name != "triton"]
in_linux = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc, which only Linux has")


@pytest.mark.parametrize("workers", [8])
def test_threads_share_layers_and_each_gets_its_own_results(workers: int) -> None:
    """Every thread runs all layers on inputs of its own, forward and backward, by one backend or the other."""
    layers = [
        acting(48, 32),
        acting(48, 40, dtype=torch.bfloat16),
        acting(48, 24, use_dora=True),
        acting(48, 24, lora_bias=True, adapter_dtype=torch.bfloat16),
    ]

    def solve(number: int) -> list[Tensor]:
        results = []
        generator = torch.Generator().manual_seed(number)
        with use_backend(ON_CPU[number % len(ON_CPU)]):
            for layer in layers:
                x = torch.randn(3, 7 + number % 5, 48, generator=generator).to(layer.weight.dtype).requires_grad_()
                y = layer(x)
                trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
                results += [y.detach(), *torch.autograd.grad(y.square().sum(), trained)]
        return results

    numbers = range(20 * workers)
    with one_thread():
        alone = [solve(number) for number in numbers]
        with ThreadPoolExecutor(workers) as pool:
            together = list(pool.map(solve, numbers))
    for left, right in zip(together, alone, strict=True):
        assert all(same_bits(a, b) for a, b in zip(left, right, strict=True))


FIRST_CALLS = """
import threading, torch
from lora_kernels import FusedLoRALinear, use_backend
layer, all_there, failed = FusedLoRALinear(8, 8, r=2), threading.Barrier(8), []
def call():
    all_there.wait()
    try:
        with use_backend("eager"):
            layer(torch.ones(3, 8)).sum().backward()
    except Exception as error:
        failed.append(error)
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""


def test_the_first_calls_of_a_process_may_come_at_once() -> None:
    found = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("backend", ON_CPU)
def test_threads_draw_masks_that_their_own_backward_knows(backend: str) -> None:
    """With W = 0 and B = 1, y of a row is the sum of its kept x A, and dx tells what was kept."""
    weight, a, b = torch.zeros(1, 40), torch.ones(1, 40), torch.ones(1, 1)

    def solve(number: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.rand(16, 40, generator=torch.Generator().manual_seed(number)).add_(0.5).requires_grad_()
        y = lora_linear(x, weight, a, b, dropout_p=0.5, training=True, backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), x)
        return x.detach(), y.detach(), dx

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(solve, range(100)))
    for x, y, dx in found:
        assert set(dx.unique().tolist()) == {0.0, 2.0}
        exact = (x.double() * dx.double()).sum(1)
        expected = sum_error(x * dx, a.t()).squeeze(1)
        check("y", y.squeeze(1), exact, exact.float(), torch.float32, expected=expected)
    assert len({tuple(dx.flatten().tolist()) for _, _, dx in found}) == len(found)


def own_bytes() -> int:
    """Of address space, now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Within the block this process may map ``size`` bytes more, and no more.

    What earlier tests freed lies in the allocator's heap, still mapped, and serves without a mapping: free pieces of
    twice ``size`` are taken first and held. There are no more of them than this process has mapped.

    OpenMP's threads are there before: where libgomp cannot create one it ends the process (``gomp_fatal``), whoever
    opened the region. A region of fewer threads ends the others; MKL opens such where it chooses their number itself.
    """
    torch.set_num_threads(torch.get_num_threads())  # which makes MKL take as many as PyTorch
    torch.ones(2**20).add_(1.0)  # a region of all threads
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = own_bytes()
    held: list[Tensor] = []
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, hard))
    try:
        with suppress(RuntimeError):
            held.extend(torch.empty(2 * size, dtype=torch.uint8) for _ in range(mapped // (2 * size)))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@in_linux
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ON_CPU)
def test_memory_that_runs_out_in_backward_leaves_the_layer_usable(backend: str, p: float) -> None:
    """dx would take 64 MB where 16 are left; then there is room again, and the same step gives the same bits."""
    layer = acting(4096, 16, r=2, lora_dropout=p)
    x = torch.randn(4096, 4096).requires_grad_()

    def step(short: bool) -> list[Tensor]:
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        y = layer(x)
        if short:
            with memory_left(2**24), pytest.raises((RuntimeError, MemoryError)):
                y.sum().backward()
            return []
        y.sum().backward()
        return [y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad]

    with use_backend(backend):
        before = step(False)
        state = [parameter.detach().clone() for parameter in layer.parameters()]
        step(True)
        assert all(same_bits(now, then) for now, then in zip(layer.parameters(), state, strict=True))
        after = step(False)
    assert all(same_bits(left, right) for left, right in zip(after, before, strict=True))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@in_linux
def test_a_thousand_steps_take_no_more_memory_than_some() -> None:
    """Neither Python's objects (tracemalloc, after 300 steps) nor the process (its resident pages) grow: an x or h that
    was kept at each step would be 6 MB in the end, a seed with its tensor 0.3."""
    model = nn.Sequential(
        FusedLoRALinear(32, 48, r=4, lora_dropout=0.1), nn.ReLU(), FusedLoRALinear(48, 8, r=4, use_dora=True)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = torch.randn(64, 32)

    def steps(count: int) -> None:
        for _ in range(count):
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        gc.collect()

    with one_thread():
        # Traced from the first step on: an object from before would not count, and the one in its place later would.
        tracemalloc.start()
        try:
            steps(300)
            python, pages = tracemalloc.get_traced_memory()[0], resident()
            steps(700)
            grown = tracemalloc.get_traced_memory()[0] - python
        finally:
            tracemalloc.stop()
    assert grown < 2**16
    assert resident() - pages < 2**22
