"""Fixtures, and the one switch to set before Triton is imported: without a GPU its kernels are interpreted."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton kernels run: on the GPU, or on the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
