"""Faults seeded into the CUDA kernels' sources: the host run of ``test_cuda_kernels.py`` catches each of them."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from cases import Case
from native_host.emulation import ROOT, Emulation, compile_host
from numerics import same_bits
from test_cuda_kernels import judged, judged_hidden, results

CASE = Case(m=270, k=344, n=150, r=21, p=0.1, dtype=torch.float16)
SMALL = Case(m=270, k=150, n=344, r=13, p=0.1, dtype=torch.float16)

# file, what stands there (spaces aside), what the fault puts in its place
FAULTS = {
    "a's fragment has its k halves exchanged": ("product.h", "return 8 * (lane / 16);", "return 8 - 8 * (lane / 16);"),
    "b's fragment repeats its first columns": ("product.h", "return lane % 8;", "return lane % 4;"),
    "sums are stored transposed within a thread": ("product.h", "2 * (lane % 4) + i % 2", "2 * (lane % 4) + 1 - i % 2"),
    "the last slice is left out": ("plan.h", "return {count > 0 ? count : 1", "return {count > 1 ? count - 1 : 1"),
    "slices overlap": ("plan.h", "return slice * slices.length;", "return slice * (slices.length - 16);"),
    "the mask is one row off": ("stage.h", "row = first_row + i / ACROSS", "row = first_row + 1 + i / ACROSS"),
    "the mask has the words of another tile": ("stage.h", "first_column / DROPOUT_WORD +", "first_column / 64 +"),
    "the mask is one unit off": ("stage.h", "+ group * UNIT;", "+ (group + 1) % 4 * UNIT;"),
    "the mask is drawn too late": ("shrink.h", "if (dropping) warp.barrier();", ""),
    "the mask of a step before": ("gradient.h", "kept[step % 2].draw(", "kept[0].draw("),
    "a digit too few": ("stage.h", "i < 4; ++i) { const uint32_t digit", "i < 3; ++i) { const uint32_t digit"),
    "columns beyond the last are read": (
        "stage.h",
        "row < end_row && column + j < matrix.columns",
        "row < end_row",
    ),
    "the rest of h is forgotten": (
        "stage.h",
        "lower.at[j] = narrowed<T>(is_finite(rest) ? rest : Sum(0));",
        "lower.at[j] = narrowed<T>(Sum(0) * rest);",
    ),
    "a wait is too short": ("gradient.h", "warp.template wait<0>();", "warp.template wait<1>();"),
    "no barrier before the products": (
        "shrink.h",
        "warp.barrier(); LORA_UNROLL_STEPS",
        "LORA_UNROLL_STEPS",
    ),
    "no barrier after the products": ("gradient.h", "warp.barrier(); } Sum*", "} Sum*"),
    "no barrier before the tile is written": ("expand.h", "warp.barrier(); write", "write"),
    "the scale is forgotten": ("expand.h", "static_cast<Sum>(args.scale) * sums", "sums"),
    "the first slice is added twice": (
        "elementwise.h",
        "Sum sum = 0; for (int64_t slice",
        "Sum sum = *parts; for (int64_t slice",
    ),
    "dh of the wrong tile": (
        "dh_db.h",
        "tile * args.dy.rows * args.b.rows",
        "(tile / 2 * 2) * args.dy.rows * args.b.rows",
    ),
}


def caught(library: Path) -> bool:
    """Whether the policy, or the order of warps, tells that something is wrong."""
    loaded = ctypes.CDLL(str(library))
    for case in (CASE, SMALL):
        up, down = (results(case, Emulation(loaded, downwards=downwards)) for downwards in (False, True))
        try:
            judged(case, up)
            judged_hidden(Emulation(loaded))
        except AssertionError:
            return True
        if not all(same_bits(up[name], down[name]) for name in up):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *FAULTS], ids=str)
def test_a_seeded_fault_is_caught(fault: str | None, tmp_path: Path) -> None:
    for folder in ("csrc", "tests/native_host"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    if fault is not None:
        name, text, wrong = FAULTS[fault]
        file = tmp_path / "csrc" / "cuda" / name
        pattern = r"\s+".join(re.escape(word) for word in text.split())
        source, seeded = re.subn(pattern, wrong.replace("\\", r"\\"), file.read_text())
        assert seeded, f"{name} has no {text!r}: the fault has to be seeded elsewhere."
        file.write_text(source)
    assert caught(compile_host(tmp_path, tmp_path, ("-Og", "-DLORA_ONLY_HALF"))) == (fault is not None)
