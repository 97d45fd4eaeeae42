"""Fixtures, and the one switch to set before Triton is imported: without a GPU its kernels are interpreted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

if TYPE_CHECKING:
    from stand_in import StandIn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-problems",
        default="1000",
        metavar="N",
        help="how many random problems to solve, or FIRST:END (default: 1000; see tests/test_random_problems.py)",
    )


@pytest.fixture(scope="session")
def random_problems(request: pytest.FixtureRequest) -> range:
    """The numbers of the random problems to solve."""
    first, colon, end = request.config.getoption("--random-problems").partition(":")
    return range(int(first), int(end)) if colon else range(int(first))


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton kernels run: on the GPU, or on the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fixed_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU too, the blocks and plans that Triton's interpreter gets: which kernels are launched is then known."""
    from lora_kernels.backends.triton import configs, launch

    monkeypatch.setattr(configs, "machine_of", lambda device: configs.INTERPRETER)
    launch.forget()
    yield
    launch.forget()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A tiny native library in the place of the real one, with sources, a compiler and a cache of its own."""
    import stand_in

    stand_in.needs_a_compiler()
    return stand_in.StandIn(tmp_path, monkeypatch)
