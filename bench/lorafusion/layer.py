"""A rival that cannot be installed beside today's Triton, rebuilt from its description: LoRAFusion's kernel split.

Forward: dropout writes x anew and a mask, h comes from the library, and the frozen product takes s h Bᵀ into its
accumulator (``kernels``). Backward: dh and db in one read of dy, summed by atomics; da by the library; and a
product for dx that begins with the masked low-rank term (``backward``). As published: adapters of the base's
16-bit dtype, ranks that are powers of 2 from 16 on, tiles of 128×256×64 for every shape, a persistent kernel with
descriptors on compute capability 9.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.benchmark.setups import Layer, Setup

__all__ = ["build", "why_not"]

_DROP_BLOCK = 1024
_SEED = 2_024_51


def why_not(setup: Setup) -> str | None:
    """A sentence that says why it cannot run this cell, or None."""
    w = setup.workload
    if setup.device.type != "cuda":
        return "LoRAFusion's kernels are for CUDA devices."
    if setup.dtype.itemsize > 2 or w.bias:
        return "LoRAFusion is rebuilt here for 16-bit layers without a bias."
    if w.r < 16 or w.r & (w.r - 1):
        return f"LoRAFusion takes ranks that are powers of 2 from 16 on, and r is {w.r}."
    return None


def build(setup: Setup) -> Layer:
    """The layer; its adapters have the base's dtype."""
    a, b = (t.contiguous().clone().requires_grad_() for t in (setup.lora_a, setup.lora_b))
    weight, p, scaling = setup.linear.weight.detach(), setup.workload.p, setup.scaling
    module, apply = nn.Module().train(), _Split.apply

    def call(x: Tensor) -> Tensor:
        y: Tensor = apply(x, weight, a, b, p if module.training else 0.0, scaling)
        return y

    return Layer(call, (a, b), module)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, p: float, scaling: float) -> Tensor:
        dropped, mask = _drop(x, p) if p else (x, None)
        h = dropped @ a.t()
        ctx.save_for_backward(dropped, mask, h, weight, a, b)
        ctx.p, ctx.scaling = p, scaling
        return _product(x, weight, h, b, scaling)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, h, weight, a, b = ctx.saved_tensors
        dy = grad_outputs[0].contiguous()
        dh, db = _hidden(dy, b, h, ctx.scaling)
        dx = _input_grad(dy, weight, dh, a, mask, 1.0 / (1.0 - ctx.p)) if ctx.needs_input_grad[0] else None
        return dx, None, dh.t() @ dropped, db, None, None


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    from .kernels import drop_kernel

    dropped, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int8, device=x.device)
    grid = (-(-x.numel() // (4 * _DROP_BLOCK)),)
    drop_kernel[grid](x, dropped, mask, x.numel(), p, _SEED, BLOCK=_DROP_BLOCK, num_warps=4, enable_fp_fusion=True)
    return dropped, mask


def _product(x: Tensor, weight: Tensor, h: Tensor, b: Tensor, scaling: float) -> Tensor:
    from .kernels import product_kernel, product_tma_kernel

    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty((m, n))
    _large(product_kernel, product_tma_kernel, (x, weight, h, b, y, m, n, k, scaling), m, n, k, b.shape[1])
    return y


def _hidden(dy: Tensor, b: Tensor, h: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    from .backward import hidden_kernel

    (m, n), r = dy.shape, b.shape[1]
    dh, db = (torch.zeros((size, r), dtype=torch.float32, device=dy.device) for size in (m, n))
    block = 64 if dy.is_cuda else 32
    grid = (-(-m // block), -(-n // (2 * block)))
    sizes = {"R": r, "BLOCK_M": block, "BLOCK_N": 2 * block, "num_warps": 4, "enable_fp_fusion": True}
    hidden_kernel[grid](dy, b, h, dh, db, m, n, scaling, **sizes)
    return dh.to(dy.dtype), db.to(b.dtype)


def _input_grad(dy: Tensor, weight: Tensor, dh: Tensor, a: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from .backward import dx_product_kernel, dx_product_tma_kernel

    (m, n), k = dy.shape, weight.shape[1]
    dx = dy.new_empty((m, k))
    arguments = (dy, weight, dh, a, mask, dx, m, n, k, scale)
    _large(dx_product_kernel, dx_product_tma_kernel, arguments, m, k, n, a.shape[0], backward=True)
    return dx


def _large(
    plain: Any,
    tma: Any,
    arguments: tuple[Any, ...],
    rows: int,
    columns: int,
    depth: int,
    r: int,
    backward: bool = False,
) -> None:
    """Launches the large product for an output (rows, columns) that sums over ``depth``."""
    x = arguments[0]
    on_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    block = (128, 256, 64) if x.is_cuda else (32, 32, 32)  # on a CPU: Triton's interpreter, for the tests
    names = ("BLOCK_M", "BLOCK_K", "BLOCK_N") if backward else ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    sizes = dict(zip(names, block, strict=True))
    options: dict[str, Any] = {"R": r, **sizes, "GROUP_M": 8, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    tiles = -(-rows // block[0]) * -(-columns // block[1])
    if on_hopper and columns % 8 == 0 and depth % 8 == 0:
        _provide_memory()
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        tma[(min(programs, tiles),)](*arguments, PROGRAMS=programs, **options)
    else:
        plain[(tiles,)](*arguments, **options)


def _provide_memory() -> None:
    """Descriptors that are made on the device want a little memory of each launch."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
