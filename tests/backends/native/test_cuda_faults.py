"""Faults seeded into the CUDA kernels' sources: the host run of ``test_cuda_kernels.py`` catches each of them."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

from cases import Case
from native_host.emulation import ROOT, Emulation, compile_host
from native_host.seeded import put_in_force, seed
from numerics import same_bits
from test_cuda_kernels import judged, judged_hidden, results

CASE = Case(m=270, k=344, n=150, r=21, p=0.1, dtype=torch.float16)
SMALL = Case(m=270, k=150, n=344, r=13, p=0.1, dtype=torch.float16)

# What stands between « and » goes; see ``seeded.Fault``.
FAULTS = {
    "a's fragment has its k halves exchanged": ("product.h", "return «8 * (lane / 16)»;", "8 - 8 * (lane / 16)"),
    "b's fragment repeats its first columns": ("product.h", "return «lane % 8»;", "lane % 4"),
    "sums are stored transposed within a thread": ("product.h", "2 * (lane % 4) + «i % 2»", "1 - i % 2"),
    "the last slice is left out": ("plan.h", "return {«count > 0 ? count : 1»", "count > 1 ? count - 1 : 1"),
    "slices overlap": ("plan.h", "return slice * «slices.length»;", "slices.length - 16"),
    "the mask is one row off": ("stage.h", "row = «first_row» + i / ACROSS", "first_row + 1"),
    "the mask has the words of another tile": ("stage.h", "word = first_column / «DROPOUT_WORD» +", "64"),
    "the mask is one unit off": ("stage.h", "% DROPOUT_WORD) + «group» * UNIT;", "(group + 1) % 4"),
    "the mask is drawn too late": ("shrink.h", "«if (dropping) warp.barrier();»", ""),
    "the mask of a step before": ("gradient.h", "kept[«step % 2»].draw(", "0"),
    "a digit too few": ("stage.h", "i < «4»; ++i) { const uint32_t digit", "3"),
    "columns beyond the last are read": ("stage.h", "row < end_row && «column + j < matrix.columns» ?", "true"),
    "the rest of h is forgotten": ("stage.h", "narrowed<T>(«is_finite(rest) ? rest : Sum(0)»);", "Sum(0) * rest"),
    "a wait is too short": ("gradient.h", "«warp.template wait<0>();»", "warp.template wait<1>();"),
    "no barrier before the products": ("shrink.h", "«warp.barrier();» LORA_UNROLL_STEPS", ""),
    "no barrier after the products": ("gradient.h", "«warp.barrier();» } Sum*", ""),
    "no barrier before the tile is written": ("expand.h", "«warp.barrier();» write", ""),
    "the scale is forgotten": ("expand.h", "«static_cast<Sum>(args.scale)» * sums", "Sum(1)"),
    "the first slice is added twice": ("elementwise.h", "Sum sum = «0»; for (int64_t slice", "*parts"),
    "dh of the wrong tile": ("dh_db.h", "«tile» * args.dy.rows * args.b.rows", "tile / 2 * 2"),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """With every fault in it, none of them in force."""
    folder = tmp_path_factory.mktemp("faults")
    for name in ("csrc", "tests/native_host"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    flags = seed(folder / "csrc" / "cuda", list(FAULTS.values()))
    return ctypes.CDLL(str(compile_host(folder, folder, ("-Og", "-DLORA_ONLY_HALF", *flags))))


def caught(library: ctypes.CDLL) -> bool:
    """Whether the policy, or the order of warps, tells that something is wrong."""
    for case in (CASE, SMALL):
        up = results(case, Emulation(library))
        try:
            judged(case, up)
            judged_hidden(Emulation(library))
        except AssertionError:
            return True
        down = results(case, Emulation(library, downwards=True))
        if not all(same_bits(up[name], down[name]) for name in up):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *FAULTS], ids=str)
def test_a_seeded_fault_is_caught(fault: str | None, library: ctypes.CDLL) -> None:
    put_in_force(library, [None, *FAULTS].index(fault))
    assert caught(library) == (fault is not None)
