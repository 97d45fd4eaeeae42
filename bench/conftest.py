"""The same cells and providers as ``lora-kernels bench``, on pytest-benchmark: one group for each cell.

``pytest bench`` runs the preset ``smoke``; ``pytest bench --bench-preset quick`` another one. The numbers to publish
are those of ``lora-kernels bench``: pytest-benchmark times one provider after the other, so what slows the machine for
a while falls on one of them. ``extra_info`` carries the interleaved ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lora_kernels.benchmark.presets import preset
from lora_kernels.benchmark.providers import PROVIDERS, Layer, Provider, Setup, make_setups
from lora_kernels.benchmark.results import Cell
from lora_kernels.benchmark.runner import admit, candidate, expand_peers, providers_of, run_cell
from lora_kernels.benchmark.workloads import Workload

_CELL_SECONDS = 0.5

Bench = Callable[[Workload, Provider], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-preset", default="smoke", help="the preset whose cells are measured (default: smoke)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A file measures the directions that it names; each of the preset's cells, with each provider."""
    directions: tuple[str, ...] = getattr(metafunc.module, "DIRECTIONS", ())
    if "workload" not in metafunc.fixturenames:
        return
    chosen = preset(metafunc.config.getoption("--bench-preset"))
    pairs = [(w, p) for w in chosen.workloads if w.direction in directions for p in providers_of(chosen, None)]
    metafunc.parametrize(("workload", "provider"), pairs, ids=[f"{w}-{p.name}".replace(" ", "-") for w, p in pairs])


@pytest.fixture
def bench(benchmark: BenchmarkFixture) -> Bench:
    """Gates a provider on a cell, then times it and notes its interleaved ratio, or its bytes."""

    def run(workload: Workload, provider: Provider) -> None:
        setup, layer = _layer(workload, provider.name)
        benchmark.group = str(workload)
        work = candidate(provider.name, [layer], [setup])

        def once() -> None:
            work.run(0)
            if setup.device.type == "cuda":
                torch.cuda.synchronize()

        with layer.context():
            if work.prepare is not None:
                work.prepare()
            benchmark(once)
        if benchmark.enabled or workload.direction == "memory":
            benchmark.extra_info.update(_cell(workload).providers[provider.name].numbers)

    return run


def _layer(workload: Workload, name: str) -> tuple[Setup, Layer]:
    setups = _setups(workload)
    entry, layers = admit(PROVIDERS[name], setups)
    if not layers:
        assert entry.status in ("unavailable", "same"), entry.reason
        pytest.skip(entry.reason or entry.status)
    return setups[0], layers[0]


@cache
def _setups(workload: Workload) -> list[Setup]:
    return make_setups(workload, _device())


@cache
def _cell(workload: Workload) -> Cell:
    """The cell's interleaved measurement, once for all of its providers."""
    providers = expand_peers(["peft", "peft16", "addmm", "lora_first", "ours"])
    return run_cell(workload, providers, _device(), _CELL_SECONDS, min_rounds=3)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
