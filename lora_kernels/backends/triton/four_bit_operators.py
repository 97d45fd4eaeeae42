"""The values of 4-bit codes on top of the kernel: one launch, for nested statistics too."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InvalidArgumentError
from .choose import blocks
from .choose.blocks import four_bit_block
from .kernels.four_bits import four_bit_values_kernel
from .run.call import cdiv
from .run.launcher import PassRun
from .run.prepared import Cache, Launch, alignment, matrix
from .run.steps import Step

__all__ = ["forget", "four_bit_values"]

_TABLE = 256  # numbers that a nested absmax is one of

_runs: Cache[PassRun] = Cache()


def forget() -> None:
    """Forget what was made ready."""
    _runs.clear()


def four_bit_values(
    parts: list[Tensor], quant_type: str, blocksize: int, nested: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """W (rows, columns) in ``dtype``; ``parts`` as ``weights.four_bits.values`` takes them, the codes as uint8.

    Raises:
        InvalidArgumentError: a part has fewer numbers than the weight needs, and the kernel would read past its end.
    """
    if rows == 0 or columns == 0:
        return parts[0].new_empty((rows, columns), dtype=dtype)
    of = (quant_type, blocksize, nested, rows, columns, dtype)
    key = (*of, alignment(*parts), *(matrix(part) for part in parts))
    run = _runs.get(key)
    if run is None:
        run = _runs.keep(key, PassRun(_step(parts, *of), parts[0].device))
    values: Tensor = run(*parts)
    return values


def _step(
    parts: list[Tensor], quant_type: str, blocksize: int, nested: int, rows: int, columns: int, dtype: torch.dtype
) -> Step:
    """``step(stream, codes, absmax)``, nested also ``outer, outer_table, offset`` -> W."""
    total, device = rows * columns, parts[0].device
    _check(parts, total, blocksize, nested)
    block, num_warps = four_bit_block(blocks.machine_of(device), dtype.itemsize)
    count, absent = cdiv(total, 2), () if nested else (None, None, None)
    # A multiply-add would round the two steps to a nested absmax once.
    launch = Launch(
        four_bit_values_kernel,
        (cdiv(count, block), 1, 1),
        (count, total, quant_type == "nf4", blocksize, nested, block),
        num_warps=num_warps,
        enable_fp_fusion=False,
    )

    def step(stream: int | None, *parts: Tensor) -> Tensor:
        w = torch.empty((rows, columns), dtype=dtype, device=device)
        launch(stream, *parts, *absent, w)
        return w

    return step


def _check(parts: list[Tensor], total: int, blocksize: int, nested: int) -> None:
    count = cdiv(total, blocksize)
    needed = {"codes": cdiv(total, 2), "absmax": count}
    if nested:
        needed |= {"the absmax of absmax": cdiv(count, nested), "the table of absmax": _TABLE, "its offset": 1}
    for (name, least), part in zip(needed.items(), parts, strict=True):
        if part.numel() < least:
            raise InvalidArgumentError(
                f"a 4-bit weight of {total} numbers has {part.numel()} elements as {name}, and must have {least} or "
                "more. Give the parts of one weight, whole."
            )
