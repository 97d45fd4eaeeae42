"""Each kernel gets the blocks that are meant for it, told by their names; and its grid is cut by the same ones.

Values cannot tell all of it: a larger tile in a grid for smaller ones computes the same, several times.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_kernels.backends.triton import operators, part_operators
from lora_kernels.backends.triton.choose import blocks
from lora_kernels.backends.triton.choose.plans import FewTokens, Fused
from lora_kernels.backends.triton.run import forward, steps
from lora_kernels.backends.triton.run.call import Call
from lora_kernels.backends.triton.run.prepared import Launch

M, N, K, R = 1000, 3000, 5000, 200  # many tiles of each size, and no two counts alike
GEMM = blocks.GemmConfig(16, 32, 64, 128, 2, 4, 1)
SHRINK, EXPAND = blocks.ShrinkConfig(16, 32, 64, 4, 1), blocks.ExpandConfig(16, 32, 64, 4)
FEW = blocks.FewTokensConfig(16, 32, 64, 256, 4, 1)
DH_DB, DA = blocks.DhDbConfig(16, 32, 64, 128, 4, 1), blocks.OuterConfig(16, 32, 64, 4, 1, splits=8)
NORMS, GAIN = blocks.RowNormsConfig(16, 32, 64, 4, 1), blocks.GainGradConfig(16, 32, 64, 4)


def a_call(m: int = M) -> Call:
    """Of either pass, bf16."""
    strides = {"stride_x": (K, 1), "stride_dy": (N, 1), "stride_w": (K, 1), "stride_a": (K, 1), "stride_b": (R, 1)}
    more = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "precision": "ieee", "by_descriptor": True}
    return Call(machine=blocks.INTERPRETER, m=m, k=K, n=N, r=R, **strides, **more)


def a_mask() -> None:
    operators.mask(torch.zeros(2, dtype=torch.int64), M, K, 0.5)


def norms() -> None:
    part_operators.row_norms(torch.empty(N, K), torch.empty(R, K), torch.empty(N, R), 1.0)


def gain_grad() -> None:
    dy = torch.empty(M, N)
    part_operators._gain_grad_launches(dy, dy, torch.empty(N), False)


def tiles(rows: int, row_block: int, columns: int, column_block: int) -> int:
    return steps.cdiv(rows, row_block) * steps.cdiv(columns, column_block)


# What makes the launch, the kernel, its blocks by the names that it has for them, and the grid.
Make = Callable[[], object]
LAUNCHES: dict[str, tuple[Make, dict[str, int], tuple[int, ...]]] = {
    "shrink_kernel": (
        lambda: steps.shrink_launch(SHRINK, M, K, R, (K, 1), (K, 1), "ieee", torch.bfloat16),
        {"BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_R": 64},
        (steps.cdiv(M, 16), steps.cdiv(R, 64), 1),
    ),
    "forward_kernel": (
        lambda: forward._fused(Fused(SHRINK, GEMM), a_call()),
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_R": 128},
        (tiles(M, 16, N, 32), 1, 1),
    ),
    "persistent_kernel": (
        lambda: forward._fused(Fused(SHRINK, GEMM, "persistent"), a_call()),
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_R": 128},
        (blocks.INTERPRETER.sm_count, 1, 1),
    ),
    "expand_kernel": (
        lambda: forward._expand(EXPAND, a_call(), 1, True, False),
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_R": 64},
        (tiles(M, 16, N, 32), 1, 1),
    ),
    "few_tokens_kernel": (
        lambda: forward._few_tokens(FewTokens(FEW, 2), a_call(9)),
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_R": 256},
        (steps.cdiv(N, 32), 2, 1),
    ),
    "dh_db_kernel": (
        lambda: steps.dh_db_step(DH_DB, a_call()),
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_R": 64, "chunk_m": 128},
        (steps.cdiv(N, 32), steps.cdiv(M, 128), steps.cdiv(R, 64)),
    ),
    "da_kernel": (
        lambda: steps.da_step(DA, a_call()),
        {"BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_R": 64, "chunk_m": 128},
        (steps.cdiv(K, 32), steps.cdiv(R, 64), 8),
    ),
    "dx_kernel": (
        lambda: steps._dx_fused(GEMM, "pointer", a_call()),
        {"BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_N": 64, "BLOCK_R": 128},
        (tiles(M, 16, K, 32), 1, 1),
    ),
    "dx_persistent_kernel": (
        lambda: steps._dx_fused(GEMM, "persistent", a_call()),
        {"BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_N": 64, "BLOCK_R": 128},
        (blocks.INTERPRETER.sm_count, 1, 1),
    ),
    "dx_low_rank_kernel": (
        lambda: steps.low_rank_launch(EXPAND, a_call(), (0, R)),
        {"BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_R": 64},
        (tiles(M, 16, K, 32), 1, 1),
    ),
    "gain_grad_kernel": (
        gain_grad,
        {"BLOCK_M": 16, "BLOCK_N": 32, "chunk_m": 64},
        (steps.cdiv(N, 32), steps.cdiv(M, 64), 1),
    ),
    "row_norms_kernel": (norms, {"BLOCK_N": 16, "BLOCK_K": 32, "BLOCK_R": 64}, (steps.cdiv(N, 16), 1, 1)),
    "draw_kernel": (
        lambda: steps.draw_step(M, K, 0.5),
        {"BLOCK_M": steps._DRAW_ROWS, "BLOCK_W": steps._DRAW_WORDS},
        (steps.cdiv(M, steps._DRAW_ROWS), steps.cdiv(steps.row_words(K), steps._DRAW_WORDS), 1),
    ),
    "mask_kernel": (
        a_mask,
        {"BLOCK_M": operators._MASK_BLOCK_M, "BLOCK_K": operators._MASK_BLOCK_K},
        (steps.cdiv(M, operators._MASK_BLOCK_M), steps.cdiv(K, operators._MASK_BLOCK_K), 1),
    ),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What is made ready; nothing runs."""
    made: list[Launch] = []
    begin = Launch.__init__

    def noting(self: Launch, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(Launch, "__init__", noting)
    monkeypatch.setattr(Launch, "__call__", lambda *arguments: None)
    monkeypatch.setattr(part_operators, "row_norms_config", lambda *arguments: NORMS)
    monkeypatch.setattr(part_operators, "gain_grad_config", lambda *arguments: GAIN)
    return made


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_each_kernel_gets_its_own_blocks(kernel: str, launches: list[Launch]) -> None:
    make, wanted, grid = LAUNCHES[kernel]
    part_operators.forget()
    make()
    part_operators.forget()
    launch = next(launch for launch in launches if launch.kernel.fn.__name__ == kernel)
    names = list(inspect.signature(launch.kernel.fn).parameters)
    given = dict(zip(names[-len(launch.static) :], launch.static, strict=True))
    assert {name: given[name] for name in wanted} == wanted
    assert launch.grid == grid


def test_every_kernel_that_has_blocks_is_here() -> None:
    """``reduce_kernel`` and ``sum_parts_kernel`` have one block alone, which nothing can be exchanged with."""
    modules = (operators, part_operators, forward, steps)
    named = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert named - {"reduce_kernel", "sum_parts_kernel"} == set(LAUNCHES)
