"""Benchmarks of forward and backward; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from lora_kernels.benchmark.providers import Provider
from lora_kernels.benchmark.workloads import Workload

DIRECTIONS = ("step",)


def test_bench_step(bench: Callable[[Workload, Provider], None], workload: Workload, provider: Provider) -> None:
    bench(workload, provider)
