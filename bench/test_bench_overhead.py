"""Benchmarks of the host time of a call at one token; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from lora_kernels.benchmark.providers import Provider
from lora_kernels.benchmark.workloads import Workload

DIRECTIONS = ("overhead", "overhead-grad")


def test_bench_overhead(bench: Callable[[Workload, Provider], None], workload: Workload, provider: Provider) -> None:
    bench(workload, provider)
