"""The Gluon kernels' calls that ``compile_report`` compiles for sm_90: every configuration, of layers and of groups.

As in ``compile_jobs`` the launch code itself runs, on meta tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ....kept import row_words
from ..choose import hopper_blocks
from ..choose import hopper_group_blocks as group_blocks
from ..choose.gluon import why_not
from ..choose.hidden_operand import RANKS
from .compile_jobs import ARCHITECTURES, Case, Job, recording

__all__ = ["GLUON_KERNELS", "hopper_jobs"]

_ARCH = 90
_QUICK_RANK = 64
_SIZES = (8192, 4096, 4096)  # tokens, in_features, out_features
GLUON_KERNELS = (
    "hopper_product_kernel",
    "hopper_product_h_kernel",
    "hopper_shrink_kernel",
    "hopper_dh_db_kernel",
    "hopper_outer_kernel",
    "hopper_group_product_kernel",
    "hopper_group_dx_kernel",
    "hopper_group_shrink_kernel",
    "hopper_group_dh_db_kernel",
    "hopper_group_da_kernel",
)


def hopper_jobs(architectures: tuple[int, ...], extent: str = "some") -> Iterator[Job]:
    """The calls of one extent.

    "all": every configuration of rank 8 and of each padded rank, over bf16 and fp16. "some": those of rank 16 over
    bf16, and the first of each other rank and of fp16. "quick": the first of one rank. Of groups likewise.
    """
    if _ARCH not in architectures or why_not(_ARCH) is not None:
        return
    if extent == "quick":
        yield from _jobs_of(_QUICK_RANK, 1, torch.bfloat16)
        yield from _group_jobs_of((16, 16, 16), 1, torch.bfloat16)
        return
    most = None if extent == "all" else 1
    yield from _group_jobs_of((16, 16, 16), None, torch.bfloat16)
    yield from _group_jobs_of((64, 16), most, torch.bfloat16)
    yield from _group_jobs_of((16, 16, 16), most, torch.float16)
    if extent == "all":
        for ranks in ((8, 8), (16, 16, 16, 16), (32, 32, 32), (64, 64, 64), (128, 128), (128, 16, 17)):
            yield from _group_jobs_of(ranks, None, torch.bfloat16)
            yield from _group_jobs_of(ranks, None, torch.float16)
    for r in (8, *RANKS):
        yield from _jobs_of(r, None if extent == "all" or r == 16 else 1, torch.bfloat16)
        if extent == "all" or r == _QUICK_RANK:
            yield from _jobs_of(r, None if extent == "all" else 1, torch.float16)


def _jobs_of(r: int, most: int | None, dtype: torch.dtype) -> list[Job]:
    """Those of one rank, of the first ``most`` configurations of each kernel."""
    from .. import operators
    from ..run import hopper
    from ..run.hopper_call import HopperCall

    m, k, n = _SIZES
    calls: list[Job] = []
    device = torch.device("meta")
    c = HopperCall(ARCHITECTURES[_ARCH], device, dtype, m, n, k, r, 0.1, True)
    plain = HopperCall(ARCHITECTURES[_ARCH], device, dtype, m, n, k, r)
    rank, wide = c.operand.rank, c.wide

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    x, dy, weight, vector = (meta(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n, k), (n,)))
    words, zeros = meta(m, row_words(k), dtype=torch.int32), meta(1, dtype=torch.int32)
    state, hidden = meta(2, dtype=torch.int64), meta(m, c.operand.columns, dtype=torch.bfloat16)
    with recording(operators, Case(dtype, r=r, p=0.1), _ARCH, calls):
        a, b, _ = hopper.pack_step(c)(None, meta(r, k), meta(n, r))
        hopper.pack_step(c, ((2 * k, 2), (1, n)), 300)(None, meta(r, k, dtype=torch.bfloat16), meta(n, r))
        for shrink in hopper_blocks.shrink_configs(rank, wide)[:most]:
            hopper.shrink_step(shrink, c)(None, x, a, zeros, state, 2.0)
            hopper.shrink_step(shrink, plain)(None, x, a, zeros, None, 2.0)
            hopper.dh_step(shrink, c)(None, dy, b, zeros, 2.0)
        for product in hopper_blocks.forward_configs()[:most]:
            hopper.product_step(product, c)(None, x, weight, hidden, b)
            hopper.product_step(product, c)(None, x, weight, hidden, b, None, vector)
            hopper.product_step(product, c)(None, x, weight, hidden, b, vector, vector)
        for masked in (False, True):
            for product in hopper_blocks.dx_configs(masked)[:most]:
                hopper.dx_step(product, c)(None, dy, weight, hidden, a, words if masked else None)
            for outer in hopper_blocks.outer_configs(rank, masked, wide)[:most]:
                hopper.da_step(outer, c)(None, x, hidden, words if masked else None)
        for joint in hopper_blocks.dh_db_configs(rank, wide)[:most]:
            hopper.dh_db_step(joint, c)(None, dy, b, hidden, 2.0)
        for p in () if wide else hopper_blocks.plain_shrink_configs(rank)[:most]:
            hopper.plain_shrink_step(p, plain, k)(None, x, a, 2.0)
            hopper.plain_shrink_step(p, plain, 2 * k)(None, x, a, 2.0)
        for fused in () if wide else hopper_blocks.product_h_configs(rank):
            hopper.product_h_step(fused, plain)(None, x, weight, a, b, zeros, 2.0)
            hopper.product_h_step(fused, plain)(None, x, weight, a, b, zeros, 2.0, None, vector)
            hopper.product_h_step(fused, plain)(None, x, weight, a, b, zeros, 2.0, vector, vector)
            hopper.dx_h_step(fused, plain)(None, dy, weight, b, a, zeros, 2.0, hopper.halves(fused, plain))
        parts = meta(3, k, rank), meta(4, n, rank)
        hopper.reduce_grads_step(c, torch.float32, torch.float32)(None, *parts)
        hopper.reduce_grads_step(c, torch.bfloat16, None)(None, parts[0], None)
    return calls


def _group_jobs_of(rs: tuple[int, ...], most: int | None, dtype: torch.dtype) -> list[Job]:
    """Those of a group of one layer a rank, of the first ``most`` configurations of each kernel."""
    from .. import operators
    from ..run import hopper_groups as groups
    from ..run.hopper_call import HopperCall

    m, k, n = _SIZES
    calls: list[Job] = []
    device = torch.device("meta")
    machine = ARCHITECTURES[_ARCH]
    ns = [n, *[n // 4] * (len(rs) - 1)]

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def group_of(*dropout: Any) -> groups.Group:
        return tuple(HopperCall(machine, device, dtype, m, n, k, r, *dropout) for n, r in zip(ns, rs, strict=True))

    c, plain = group_of(0.1, True), group_of()
    ranks, wide = tuple(one.operand.rank for one in c), c[0].wide
    x, dys = meta(m, k, dtype=dtype), [meta(m, n, dtype=dtype) for n in ns]
    weights, biases = [meta(n, k, dtype=dtype) for n in ns], [meta(n, dtype=dtype) for n in ns]
    words, zeros = [meta(m, row_words(k), dtype=torch.int32) for _ in rs], meta(1, dtype=torch.int32)
    hs, scales = [meta(m, 2 * rank, dtype=torch.bfloat16) for rank in ranks], [2.0 for _ in rs]
    states = [meta(2, dtype=torch.int64) for _ in rs]
    with recording(operators, Case(dtype, r=rs[0], p=0.1), _ARCH, calls):
        a, b, _ = groups.group_pack_step(c, 300)(
            None, [meta(r, k) for r in rs], [meta(n, r) for n, r in zip(ns, rs, strict=True)]
        )
        for masked, group in ((True, c), (False, plain)):
            for shrink in group_blocks.group_shrink_configs(ranks, masked, wide)[:most]:
                groups.group_shrink_step(shrink, group)(None, x, a, zeros, states if masked else None, scales)
            for dx in group_blocks.group_dx_configs(len(rs), masked)[:most]:
                groups.group_dx_step(dx, group)(None, dys, weights, hs, a, words if masked else None)
            for da in group_blocks.group_da_configs(ranks, masked, wide)[:most]:
                groups.group_da_step(da, group)(None, x, hs, words if masked else None)
        for product in group_blocks.group_forward_configs()[:most]:
            groups.group_product_step(product, c)(None, x, weights, hs, b, [None] * len(rs))
            groups.group_product_step(product, c)(None, x, weights, hs, b, [biases[0], None, *biases[2:]])
        for joint in group_blocks.group_dh_db_configs(ranks, wide)[:most]:
            groups.group_dh_db_step(joint, c)(None, dys, b, hs, scales)
        parts = [meta(3, k, rank) for rank in ranks], [meta(4, n, rank) for n, rank in zip(ns, ranks, strict=True)]
        groups.group_reduce_grads_step(c, torch.float32, torch.float32)(None, *parts)
    return calls
