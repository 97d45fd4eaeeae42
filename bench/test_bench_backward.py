"""Benchmarks of the backward alone, of a graph that is kept; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from lora_kernels.benchmark.providers import Provider
from lora_kernels.benchmark.workloads import Workload

DIRECTIONS = ("backward", "dx")


def test_bench_backward(bench: Callable[[Workload, Provider], None], workload: Workload, provider: Provider) -> None:
    bench(workload, provider)
