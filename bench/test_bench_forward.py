"""Benchmarks of the forward alone, no graph recorded; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from lora_kernels.benchmark.providers import Provider
from lora_kernels.benchmark.workloads import Workload

DIRECTIONS = ("forward",)


def test_bench_forward(bench: Callable[[Workload, Provider], None], workload: Workload, provider: Provider) -> None:
    bench(workload, provider)
