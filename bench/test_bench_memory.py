"""Benchmarks of a step, with the bytes kept for backward and its peak in ``extra_info``; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from lora_kernels.benchmark.providers import Provider
from lora_kernels.benchmark.workloads import Workload

DIRECTIONS = ("memory",)


def test_bench_memory(bench: Callable[[Workload, Provider], None], workload: Workload, provider: Provider) -> None:
    bench(workload, provider)
