"""Quantised weights on top of the kernels that read them as they are stored: their values, and few tokens' forward.

Launches: ``values`` 1, of nested statistics too; ``few_tokens`` 1, and one more where K is split, always over
4-bit codes in 16-bit compute. Of dropout's seed, one more before them draws the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...codes import FOUR_BITS, UNIT, Codes
from ...errors import InvalidArgumentError
from .choose import blocks
from .choose.blocks import FEW_TOKENS, FewTokensConfig
from .choose.code_blocks import (
    CODES_RANK,
    FOUR_BITS_PROGRAMS,
    eight_bit_block,
    few_codes_config,
    few_codes_splits,
    few_four_bits_config,
    four_bit_block,
    sum_run,
)
from .kernels.codes import eight_bit_values_kernel, four_bit_values_kernel
from .kernels.few_codes import few_codes_kernel
from .kernels.few_four_bits import few_four_bits_kernel, sum_four_bits_kernel
from .kernels.few_tokens import sum_parts_kernel
from .kernels.mx import e2m1_values_kernel
from .run.call import Call, cdiv, rows_in_one_piece, told
from .run.launcher import PassRun
from .run.prepared import Cache, Launch, alignment, first_that_runs, matrix, precision_of
from .run.steps import Step, seeded

__all__ = ["few_tokens", "forget", "values"]

_TABLE = 256  # numbers that a nested absmax is one of
_SUM_BLOCK = 512
_RANKS = 16  # of h, that a program of few_four_bits_kernel makes
_LONGEST_STEP = 2**22  # numbers; 16 of them and 256 more, or 128, stay below 2^31

Found: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]

_runs: Cache[PassRun] = Cache()


def forget() -> None:
    """Forget what was made ready."""
    _runs.clear()


def values(parts: list[Tensor], codes: Codes, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W (rows, columns) in ``dtype``, fp32, bf16 or fp16; ``parts`` as ``weights.by_codes`` gives them.

    Raises:
        InvalidArgumentError: a part has fewer numbers than the weight needs, and the kernel would read past its end.
    """
    if rows == 0 or columns == 0:
        return parts[0].new_empty((rows, columns), dtype=dtype)
    of = (codes, rows, columns, dtype)
    key = ("values", *of, alignment(*parts), *(matrix(part) for part in parts))
    run = _runs.get(key)
    if run is None:
        _check(parts, codes, rows, columns)
        step = _STEPS.get(codes.number, _eight_bit_step)(*of, parts[0].device)
        run = _runs.keep(key, PassRun(step, parts[0].device))
    w: Tensor = run(*parts)
    return w


def _four_bit_step(codes: Codes, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Step:
    """``step(stream, codes, absmax)``, nested also ``outer, outer_table, offset`` -> W."""
    total = rows * columns
    block, num_warps = four_bit_block(blocks.machine_of(device), dtype.itemsize)
    count, absent = cdiv(total, 2), () if codes.nested else (None, None, None)
    launch = Launch(
        four_bit_values_kernel,
        (cdiv(count, block), 1, 1),
        (count, total, codes.number, codes.wide, codes.nested, block),
        num_warps=num_warps,
        **_in_two_roundings(codes),
    )

    def step(stream: int | None, *parts: Tensor) -> Tensor:
        w = torch.empty((rows, columns), dtype=dtype, device=device)
        launch(stream, *parts, *absent, w)
        return w

    return step


def _e2m1_step(codes: Codes, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Step:
    """``step(stream, codes, scales)``, with a factor of all W that one too -> W."""
    block, num_warps = four_bit_block(blocks.machine_of(device), dtype.itemsize)
    count = rows * columns // 2
    static = (count, codes.scales, codes.wide, block)
    launch = Launch(e2m1_values_kernel, (cdiv(count, block), 1, 1), static, num_warps=num_warps)

    def step(stream: int | None, data: Tensor, scales: Tensor, whole: Tensor | None = None) -> Tensor:
        w = torch.empty((rows, columns), dtype=dtype, device=device)
        launch(stream, data, scales, whole, w)
        return w

    return step


_STEPS = {"e2m1": _e2m1_step, **dict.fromkeys(FOUR_BITS, _four_bit_step)}


def _in_two_roundings(codes: Codes) -> dict[str, bool]:
    """A multiply-add would round the two steps to a nested absmax once."""
    return {"enable_fp_fusion": False} if codes.nested else {}


def _eight_bit_step(codes: Codes, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Step:
    """``step(stream, data, scales)``, with zeros also those -> W."""
    block_n, block_k, num_warps = eight_bit_block(blocks.machine_of(device))
    launch = Launch(
        eight_bit_values_kernel,
        (cdiv(rows, block_n) * cdiv(columns, block_k), 1, 1),
        (rows, columns, codes.number, codes.high, codes.wide, codes.per, _unit(codes), block_n, block_k),
        num_warps=num_warps,
    )
    absent = () if codes.zeros else (None,)

    def step(stream: int | None, *parts: Tensor) -> Tensor:
        w = torch.empty((rows, columns), dtype=dtype, device=device)
        launch(stream, *parts, *absent, w)
        return w

    return step


def _unit(codes: Codes) -> int:
    """How many columns, from a multiple of them on, share a factor."""
    return UNIT if codes.wide % UNIT == 0 else 1


def few_tokens(
    x: Tensor,
    parts: list[Tensor],
    codes: Codes,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    h: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
    with_linear: bool,
) -> Found | None:
    """y (M, N), h (M, R) fp32 and l (M, N), where it is asked for, in one pass over the codes; W is never written.

    y = g * l + bias with l = x Wᵀ + s h Bᵀ; with ``lora_a`` also h = (x * D) Aᵀ, else h is given. Without ``lora_b``
    there is no adapter. None where no kernel takes such a call: more than 16 tokens, nothing, e2m1 codes, 4-bit rows
    that are no whole units, h to be formed at a rank above 64 or beside a gain, or no adapter beside others than 4-bit
    codes in 16-bit compute.

    Raises:
        InvalidArgumentError: a part has fewer numbers than the weight needs.
    """
    (m, k), four_bits = x.shape, codes.number in FOUR_BITS
    if codes.number == "e2m1" or not 0 < m <= FEW_TOKENS or k == 0 or (four_bits and k % UNIT):
        return None
    n, r = (parts[0].numel() * (1 + four_bits) // k, 0) if lora_b is None else lora_b.shape
    if n == 0 or (r == 0 and lora_b is not None):
        return None
    if lora_a is not None and (r > CODES_RANK or gain is not None):
        return None
    h = None if h is None else rows_in_one_piece(h)
    vectors = tuple(None if t is None else (t.dtype, t.stride()) for t in (bias, gain))
    given = (x, *parts, *(t for t in (lora_b, lora_a, h) if t is not None))
    aligned = alignment(*given, bias, gain, state)
    of = (codes, lora_a is None, lora_b is None, with_linear, p, told(state), precision_of(x.dtype))
    key = ("few", *of, *(fact for t in given for fact in matrix(t)), *vectors, aligned)
    arguments = (x, parts, lora_a, lora_b, h, bias, gain, float(scaling), state)
    run = _runs.get(key)
    if run is not None:
        return _found(run(*arguments), h)
    _check(parts, codes, n, k)
    call = _call_of(x, n, lora_a, lora_b, h, bias, gain, p, state)
    with_a = lora_a is not None
    steps = [_few_step(config, call, codes, with_a, with_linear) for config in _configs(call, with_a) if r]
    if _looked_up(call, codes, parts[0]):
        steps.insert(0, _four_bits_step(_four_bits_config(call, codes), call, codes, with_a, with_linear))
    if not steps:
        return None
    runs = [PassRun(seeded(step, state, m, k, p), x.device) for step in steps]
    chosen, results = first_that_runs(runs, lambda run: run(*arguments))
    _runs.keep(key, chosen)
    return _found(results, h)


def _found(results: tuple[Tensor, Tensor | None, Tensor | None], h: Tensor | None) -> Found:
    """With the h that was given, where none was formed."""
    y, formed, linear = results
    return y, h if formed is None else formed, linear


def _call_of(
    x: Tensor,
    n: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    h: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    p: float,
    state: Tensor | None,
) -> Call:
    r = 0 if lora_b is None else lora_b.shape[1]
    return Call.over(
        x,
        k=x.shape[1],
        n=n,
        r=r,
        stride_x=x.stride(),
        stride_a=(0, 0) if lora_a is None else lora_a.stride(),
        stride_b=(0, 0) if lora_b is None else lora_b.stride(),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_gain=0 if gain is None else gain.stride(0),
        stride_h=r if h is None else h.stride(0),
        p=p,
        dropout=state is not None,
        gain=gain is not None,
    )


def _configs(c: Call, with_a: bool) -> list[FewTokensConfig]:
    """The configuration, and a smaller one where that does not compile."""
    exact = c.dtype is torch.float32 and c.precision != "tf32"
    config = few_codes_config(c.machine, c.r, c.dtype.itemsize, exact, with_a)
    if with_a and (c.dtype is torch.float16 or c.dropout):  # x and A, high and low, or x twice
        config = replace(config, block_k=min(config.block_k, 64))
    return [config, replace(config, block_k=max(config.block_k // 2, UNIT), num_stages=1)]


def _few_step(config: FewTokensConfig, c: Call, codes: Codes, with_a: bool, with_linear: bool) -> Step:
    """``step(stream, x, parts, lora_a, lora_b, h, bias, gain, scaling, words)`` -> y, h or None, l or None."""
    parts = few_codes_splits(c.machine, c.k, c.n, config) if with_a else 1
    pdl = parts > 1 and c.machine.capability >= 90
    static: tuple[Any, ...] = (c.m, c.n, c.k, c.r, c.keep_scale, *c.stride_x, *c.stride_a, *c.stride_b)
    static += (c.stride_bias, c.stride_gain, c.stride_h, *codes[:3], codes.nested, codes.per, _unit(codes))
    static += (config.block_m, config.block_n, config.block_k, config.block_r, parts)
    static += (c.k % config.block_k == 0, c.split, c.precision, pdl)
    grid, options = (cdiv(c.n, config.block_n), parts, 1), dict[str, Any](_in_two_roundings(codes))
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    product, total = Launch(few_codes_kernel, grid, static, **options), _sum_launch(c, parts, pdl)
    shape = (c.m, c.n)
    before, after = (3, 0) if codes.zeros else (0, 1 if codes.nested else 4)  # of what such a weight does not have

    def step(
        stream: int | None,
        x: Tensor,
        weight: list[Tensor],
        lora_a: Tensor | None,
        lora_b: Tensor,
        h: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y = torch.empty(shape, dtype=c.dtype, device=c.device)
        linear = torch.empty(shape, dtype=c.dtype, device=c.device) if with_linear else None
        formed = torch.empty((c.m, c.r), dtype=torch.float32, device=c.device) if with_a else None
        of = (x, *weight[:2], *[None] * before, *weight[2:], *[None] * after, lora_a, lora_b, bias, gain, words)
        if parts == 1:
            product(stream, *of, formed if with_a else h, y, linear, scaling)
            return y, formed, linear
        y_parts = torch.empty((parts, *shape), dtype=torch.float32, device=c.device)
        h_parts = torch.empty((parts, c.m, c.r), dtype=torch.float32, device=c.device)
        product(stream, *of, h_parts, y_parts, None, scaling)
        total(stream, y_parts, h_parts, bias, y, formed)
        return y, formed, linear

    return step


def _looked_up(c: Call, codes: Codes, data: Tensor) -> bool:
    """Whether ``few_four_bits_kernel`` takes a call: 16-bit compute, codes from a 16-byte boundary on.

    It takes no step of x or of W's rows that 32 bits do not count, and no rank that is no tile of the second stage.
    """
    if codes.number not in FOUR_BITS or c.dtype.itemsize != 2 or data.data_ptr() % 16 or c.r > CODES_RANK:
        return False
    able = c.machine.interpreter or c.machine.capability >= 80
    return able and max(*c.stride_x, c.k) < _LONGEST_STEP


def _four_bits_config(c: Call, codes: Codes) -> FewTokensConfig:
    """Units are of 64 columns where neither a block nor a row ends within one."""
    return few_four_bits_config(c.machine, c.m, c.k, c.n, c.r, UNIT if (codes.wide | c.k) % (2 * UNIT) else 2 * UNIT)


def _four_bits_step(
    config: FewTokensConfig, c: Call, codes: Codes, with_a: bool, with_linear: bool, splits: int | None = None
) -> Step:
    """``few_four_bits_kernel`` as a ``_few_step``; ``splits``: of K, in the place of the chosen number."""
    parts = few_codes_splits(c.machine, c.k, c.n, config, FOUR_BITS_PROGRAMS) if splits is None else splits
    pdl, strip = c.machine.capability >= 90, 32
    static: tuple[Any, ...] = (c.m, c.n, c.k, c.r, c.keep_scale, *c.stride_x, *c.stride_a)
    run = sum_run(c.machine, config, codes.nested > 0)
    static += (codes.number, codes.wide, codes.nested, config.block_k // 4, run)
    static += (config.block_m, config.block_n, config.block_k, parts)
    static += (c.k % (parts * config.block_k) == 0, c.precision, pdl)
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    of_h = cdiv(c.r, _RANKS) if with_a else 0
    grid = (of_h + cdiv(c.n, config.block_n), parts, 1)
    product = Launch(few_four_bits_kernel, grid, static, **options, **_in_two_roundings(codes))
    static = (c.m, c.n, c.r, *c.stride_b, c.stride_bias, c.stride_gain, c.r if with_a else c.stride_h)
    static += (FEW_TOKENS, strip, config.block_r, parts, parts if with_a else 1)
    options = {"launch_pdl": True} if pdl and not c.machine.interpreter else {}
    total = Launch(
        sum_four_bits_kernel,
        (cdiv(c.n, strip), 1, 1),
        (*static, c.split, c.precision, pdl),
        num_warps=4,
        num_stages=1,
        **options,
    )
    absent = () if codes.nested else (None,) * 3

    def step(
        stream: int | None,
        x: Tensor,
        weight: list[Tensor],
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        h: Tensor | None,
        bias: Tensor | None,
        gain: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y = torch.empty((c.m, c.n), dtype=c.dtype, device=c.device)
        linear = torch.empty((c.m, c.n), dtype=c.dtype, device=c.device) if with_linear else None
        formed = torch.empty((c.m, c.r), dtype=torch.float32, device=c.device) if with_a else None
        y_parts = torch.empty((parts, c.m, c.n), dtype=torch.float32, device=c.device)
        h_parts = torch.empty((parts, c.m, c.r), dtype=torch.float32, device=c.device) if with_a else None
        product(stream, x, *weight, *absent, lora_a, words, h_parts, y_parts)
        total(stream, y_parts, h_parts if with_a else h, lora_b, bias, gain, y, formed, linear, scaling)
        return y, formed, linear

    return step


def _sum_launch(c: Call, parts: int, pdl: bool) -> Callable[..., None]:
    """``launch(stream, y_parts, h_parts, bias, y, h)``."""
    grid = (cdiv(c.m * c.n, _SUM_BLOCK) + cdiv(c.m * c.r, _SUM_BLOCK), 1, 1)
    options = {"launch_pdl": True} if pdl and not c.machine.interpreter else {}
    static = (c.m, c.n, c.r, c.stride_bias, _SUM_BLOCK, parts, 0, pdl)
    return Launch(sum_parts_kernel, grid, static, num_warps=4, num_stages=1, **options)


def _check(parts: list[Tensor], codes: Codes, rows: int, columns: int) -> None:
    """Raises for parts that a kernel would read past their end."""
    total = rows * columns
    if codes.number == "e2m1":
        needed = {"codes": total // 2, "scales": total // codes.wide} | ({"its factor": 1} if len(parts) > 2 else {})
    elif codes.number in FOUR_BITS:
        count = cdiv(total, codes.wide)
        needed = {"codes": cdiv(total, 2), "absmax": count}
    else:
        high, wide = codes.high or rows, codes.wide or columns
        count = cdiv(rows, high) * cdiv(columns, wide)
        needed = {"numbers": total, "scales": count} | ({"zeros": count} if codes.zeros else {})
    if codes.nested:
        needed |= {"the absmax of absmax": cdiv(count, codes.nested), "the table of absmax": _TABLE, "its offset": 1}
    for (name, least), part in zip(needed.items(), parts, strict=True):
        if part.numel() < least:
            bits = 4 if codes.number in ("e2m1", *FOUR_BITS) else 8
            raise InvalidArgumentError(
                f"a {bits}-bit weight of {total} numbers has {part.numel()} elements as {name}, and must have {least} "
                "or more. Give the parts of one weight, whole."
            )
