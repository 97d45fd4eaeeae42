"""Forward by each plan: which kernels, on which grids, with what memory between them.

A run is made ready once for each plan and call (sizes, strides, dtypes, alignments); see ``prepared``. In all of them
whatever a kernel reads stays referenced until its launch: with ``pdl`` a kernel starts while the one before still
writes, and memory that were freed in between could be handed to it for other things.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ....errors import InvalidArgumentError
from ..choose.blocks import ExpandConfig, ShrinkConfig
from ..choose.plans import BaseFirst, FewTokens, ForwardPlan, Fused, LoraFirst, Ring
from ..kernels.few_tokens import few_tokens_kernel, sum_parts_kernel
from ..kernels.forward import expand_kernel, forward_kernel
from ..kernels.persistent import persistent_kernel
from .call import Call, cdiv
from .prepared import Launch, ScratchLaunch
from .steps import shrink_launch
from .streams import together_on

__all__ = ["Product", "Run", "ready", "ready_product"]

# run(stream, x, weight, lora_a, lora_b, bias, scaling, words) -> y, h; words: the packed mask or None
Run: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
# product(stream, x, weight, lora_b, bias, gain, h, h_sum, linear, scaling) -> y
Product: TypeAlias = Callable[..., Tensor]

_SUM_BLOCK = 512


def ready(plan: ForwardPlan, call: Call) -> Run:
    """The run of ``plan`` for ``call``; nothing is compiled before its first use.

    Raises:
        InvalidArgumentError: the plan does not cover so many tokens or so large a rank.
    """
    if isinstance(plan, FewTokens):
        return _few_tokens(plan, call)
    if isinstance(plan, Ring):
        raise AssertionError("run/ring.py makes it ready")
    shrink = _Shrink.of(plan.shrink, call, getattr(plan, "pdl", False))
    if isinstance(plan, BaseFirst):
        return _base_and_h(plan, shrink, call)
    product, in_product = ready_product(plan, call), call.operand is None

    def run(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        h, h_sum = shrink(stream, x, lora_a, scaling, words)
        y = product(stream, x, weight, lora_b, bias, None, h, h_sum, None, scaling if in_product else 1.0)
        return y, h if h_sum is None else h_sum

    return run


def _base_and_h(plan: BaseFirst, shrink: _Shrink, c: Call) -> Run:
    """Neither waits for the other."""
    together, add = together_on(c.device, plan.beside), _expand(plan.expand, c, plan.shrink.splits, True, False)
    in_product = c.operand is None

    def run(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, (h, h_sum) = together(
            stream, lambda own: torch.mm(x, weight.t()), lambda own: shrink(own, x, lora_a, scaling, words)
        )
        add(stream, lora_b, bias, None, h, h_sum, y, None, scaling if in_product else 1.0)
        return y, h if h_sum is None else h_sum

    return run


def ready_product(plan: Fused | LoraFirst | BaseFirst, call: Call) -> Product:
    """What ``plan`` does once h is there. A gain acts on the whole sum, so with one the base comes first."""
    if isinstance(plan, Fused):
        return _fused(plan, call)
    if isinstance(plan, LoraFirst) and not call.gain:
        return _lora_first(plan, call)
    return _base_first(plan, call)


@dataclass(frozen=True, slots=True)
class _Shrink:
    """The shrink of a forward plan and the memory of h: as it is, or in parts and their sum.

    Where h is kept as an operand, s is in it from here on.
    """

    launch: Launch
    parts_shape: tuple[int, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    scale: float
    parts: int
    scaled: bool

    @staticmethod
    def of(config: ShrinkConfig, c: Call, pdl: bool = False) -> _Shrink:
        strides = c.stride_x, c.stride_a
        launch = shrink_launch(config, c.m, c.k, c.r, *strides, c.precision, c.dtype, pdl, c.padded_rank)
        parts_shape, (shape, dtype) = (config.splits, c.m, c.r), _kept_hidden(c)
        own = (parts_shape, shape, dtype, c.device, c.keep_scale, config.splits, c.operand is not None)
        return _Shrink(launch, *own)

    def __call__(
        self, stream: int | None, x: Tensor, lora_a: Tensor, scaling: float, words: Tensor | None
    ) -> tuple[Tensor, Any]:
        """h, and where it comes in parts the memory that their sum is to be written to."""
        kept = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        scale = self.scale * scaling if self.scaled else self.scale
        if self.parts == 1:
            self.launch(stream, x, lora_a, kept, words, scale)
            return kept, None
        h = torch.empty(self.parts_shape, dtype=torch.float32, device=self.device)
        self.launch(stream, x, lora_a, h, words, scale)
        return h, kept


def _kept_hidden(c: Call) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of the h that is kept."""
    return ((c.m, c.r), torch.float32) if c.operand is None else ((c.m, c.operand.columns), torch.bfloat16)


def _stride_h(c: Call, parts: int) -> int:
    """Of the h that the product reads: parts are fp32 rows of R."""
    return c.stride_h if parts == 1 else c.r


def _fused(plan: Fused, c: Call) -> Product:
    g, shape = plan.gemm, (c.m, c.n)
    tiles = cdiv(c.m, g.block_rows) * cdiv(c.n, g.block_columns)
    tile = (g.block_rows, g.block_columns, g.block_sum, g.block_r, g.group_m, plan.shrink.splits, c.padded_rank)
    options: dict[str, Any] = {"num_warps": g.num_warps, "num_stages": g.num_stages}
    if plan.pdl and not c.machine.interpreter:
        options["launch_pdl"] = True
    strides = (*c.stride_b, c.stride_bias, c.stride_gain, _stride_h(c, plan.shrink.splits))
    static: tuple[Any, ...] = (c.m, c.n, c.k, c.r)
    if plan.variant != "pointer" and c.by_descriptor:
        static += (c.stride_x[0], c.stride_w[0], *strides, *tile)
        static += (c.split, c.precision, plan.pdl)
        grid = (min(tiles, c.machine.sm_count), 1, 1)
        launch: Launch = ScratchLaunch(persistent_kernel, grid, static, **options)
    else:
        static += (*c.stride_x, *c.stride_w, *strides, *tile)
        static += (c.k % g.block_sum == 0, c.split, c.precision, plan.pdl)
        launch = Launch(forward_kernel, (tiles, 1, 1), static, **options)

    def product(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        h: Tensor,
        h_sum: Tensor | None,
        linear: Tensor | None,
        scaling: float,
    ) -> Tensor:
        y = torch.empty(shape, dtype=c.dtype, device=c.device)
        launch(stream, x, weight, lora_b, bias, gain, h, h_sum, y, linear, scaling)
        return y

    return product


def _expand(config: ExpandConfig, c: Call, parts: int, add: bool, pdl: bool) -> Launch:
    """``launch(stream, lora_b, bias, gain, h, h_sum, y, linear, scaling)``."""
    options = {"launch_pdl": True} if pdl and not c.machine.interpreter else {}
    tile = (config.block_m, config.block_n, config.block_r, parts, c.padded_rank, add)
    strides = (*c.stride_b, c.stride_bias, c.stride_gain, _stride_h(c, parts))
    return Launch(
        expand_kernel,
        (cdiv(c.m, config.block_m) * cdiv(c.n, config.block_n), 1, 1),
        (c.m, c.n, c.r, *strides, *tile, c.split, c.precision, pdl),
        num_warps=config.num_warps,
        num_stages=1,
        **options,
    )


def _lora_first(plan: LoraFirst, c: Call) -> Product:
    expand, shape = _expand(plan.expand, c, plan.shrink.splits, False, plan.pdl), (c.m, c.n)

    def product(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        gain: None,
        h: Tensor,
        h_sum: Tensor | None,
        linear: None,
        scaling: float,
    ) -> Tensor:
        y = torch.empty(shape, dtype=c.dtype, device=c.device)
        expand(stream, lora_b, bias, None, h, h_sum, y, None, scaling)
        return y.addmm_(x, weight.t())

    return product


def _base_first(plan: LoraFirst | BaseFirst, c: Call) -> Product:
    expand = _expand(plan.expand, c, plan.shrink.splits, True, False)

    def product(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        h: Tensor,
        h_sum: Tensor | None,
        linear: Tensor | None,
        scaling: float,
    ) -> Tensor:
        y = torch.mm(x, weight.t())
        expand(stream, lora_b, bias, gain, h, h_sum, y, linear, scaling)
        return y

    return product


def _few_tokens(plan: FewTokens, c: Call) -> Run:
    config, parts = plan.config, plan.splits
    if c.m > config.block_m or c.r > config.block_r:
        raise InvalidArgumentError(
            f"the plan {plan} is for at most {config.block_m} tokens of rank {config.block_r}; got {c.m} of rank {c.r}."
        )
    if c.dtype is torch.float16 or c.dropout:  # x and A, high and low, or x twice: a deeper tile leaves no registers
        config = replace(config, block_k=min(config.block_k, 128))
    static: tuple[Any, ...] = (c.m, c.n, c.k, c.r, c.keep_scale)
    static += (*c.stride_x, *c.stride_w, *c.stride_a, *c.stride_b, c.stride_bias)
    static += (config.block_m, config.block_n, config.block_k, config.block_r, parts, c.padded_rank)
    static += (c.k % config.block_k == 0, c.split, c.precision, plan.pdl)
    grid = (cdiv(c.n, config.block_n), parts, 1)
    product = Launch(few_tokens_kernel, grid, static, num_warps=config.num_warps, num_stages=config.num_stages)
    grid = (cdiv(c.m * c.n, _SUM_BLOCK) + cdiv(c.m * max(c.r, c.padded_rank), _SUM_BLOCK), 1, 1)
    static = (c.m, c.n, c.r, c.stride_bias, _SUM_BLOCK, parts, c.padded_rank, plan.pdl)
    options = {"launch_pdl": True} if plan.pdl and not c.machine.interpreter else {}
    total = Launch(sum_parts_kernel, grid, static, num_warps=4, num_stages=1, **options)
    shape, (h_shape, h_dtype) = (c.m, c.n), _kept_hidden(c)

    def run(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        words: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty(shape, dtype=c.dtype, device=c.device)
        h = torch.empty(h_shape, dtype=h_dtype, device=c.device)
        if parts == 1:
            product(stream, x, weight, lora_a, lora_b, bias, words, h, y, scaling)
            return y, h
        y_parts = torch.empty((parts, *shape), dtype=torch.float32, device=c.device)
        h_parts = torch.empty((parts, c.m, c.r), dtype=torch.float32, device=c.device)
        product(stream, x, weight, lora_a, lora_b, bias, words, h_parts, y_parts, scaling)
        total(stream, y_parts, h_parts, bias, y, h)
        return y, h

    return run
