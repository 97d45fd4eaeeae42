"""transformers' expert parallelism: experts that it has split over processes are refused in a sentence, never wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import mixtures
from lora_kernels import LoRAConfig, replace_linear, use_backend
from lora_kernels.errors import InvalidTypeError, LoRAStateError

pytest.importorskip("transformers")
parallel = pytest.importorskip(
    "transformers.distributed.expert_parallel", reason="this transformers has no expert parallelism of its own"
)

NAMES = ["experts.gate_up_proj", "experts.down_proj"]
PLAN = {**dict.fromkeys(NAMES, "grouped_gemm"), "experts": "ep_dispatch_experts"}


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Two processes, of which this is the second; the other is not there, and what is exchanged stays as it is."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield torch.distributed.init_device_mesh("cpu", (2,))
    finally:
        torch.distributed.destroy_process_group()


def split(model: nn.Module, mesh: Any) -> None:
    parallel.apply_expert_parallelism(model, mesh, mesh, PLAN, "all_reduce")


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_experts_that_are_split_after_they_were_adapted(backend: str, mesh: Any) -> None:
    """Their fifth expert would get the first one's adapter."""
    model: Any = nn.ModuleDict({"experts": mixtures.experts("qwen3_moe")})
    replace_linear(model, LoRAConfig(r=2, target_parameters=NAMES))
    split(model, mesh)
    index = torch.tensor([[0, 1], [6, 7]])
    with use_backend(backend), pytest.raises(LoRAStateError, match=r"weights of 4 experts here and adapters of 8"):
        model.experts(torch.randn(2, 16), index, torch.ones(2, 2))


def test_experts_that_are_split_already(mesh: Any) -> None:
    model = nn.ModuleDict({"experts": mixtures.experts("qwen3_moe")})
    split(model, mesh)
    with pytest.raises(InvalidTypeError, match=r"experts split over processes by transformers"):
        replace_linear(model, LoRAConfig(r=2, target_parameters=NAMES))
