"""A rival that cannot be installed beside today's Triton, rebuilt from its description: LoRAFusion's kernel split.

Forward only: dropout writes x anew and a mask, h comes from the library, and the frozen product takes s h Bᵀ into its
accumulator (``lorafusion_kernels``). As published: adapters of the base's 16-bit dtype, ranks that are powers of 2 from
16 on, tiles of 128×256×64 for every shape, a persistent kernel with descriptors on compute capability 9.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .setups import Layer, Setup

__all__ = ["build", "why_not"]

_DROP_BLOCK = 1024
_SEED = 2_024_51


def why_not(setup: Setup) -> str | None:
    """A sentence that says why it cannot run this cell, or None."""
    w = setup.workload
    if setup.device.type != "cuda":
        return "LoRAFusion's kernels are for CUDA devices."
    if w.has_backward or w.records:
        return "Only LoRAFusion's forward is rebuilt here."
    if setup.dtype.itemsize > 2 or w.bias:
        return "LoRAFusion is rebuilt here for 16-bit layers without a bias."
    if w.r < 16 or w.r & (w.r - 1):
        return f"LoRAFusion takes ranks that are powers of 2 from 16 on, and r is {w.r}."
    return None


def build(setup: Setup) -> Layer:
    """The layer; its adapters have the base's dtype."""
    a, b = setup.lora_a.clone(), setup.lora_b.contiguous().clone()
    weight, p, scaling = setup.linear.weight.detach(), setup.workload.p, setup.scaling
    module = nn.Module().train()

    def call(x: Tensor) -> Tensor:
        dropped = _drop(x, p) if p and module.training else x
        return _product(x, weight, dropped @ a.t(), b, scaling)

    return Layer(call, (), module)


def _drop(x: Tensor, p: float) -> Tensor:
    from .lorafusion_kernels import drop_kernel

    dropped, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int8, device=x.device)
    grid = (-(-x.numel() // (4 * _DROP_BLOCK)),)
    drop_kernel[grid](x, dropped, mask, x.numel(), p, _SEED, BLOCK=_DROP_BLOCK, num_warps=4, enable_fp_fusion=True)
    return dropped


def _product(x: Tensor, weight: Tensor, h: Tensor, b: Tensor, scaling: float) -> Tensor:
    from .lorafusion_kernels import product_kernel, product_tma_kernel

    (m, k), n, r = x.shape, weight.shape[0], b.shape[1]
    y = x.new_empty((m, n))
    on_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    block = (128, 256, 64) if x.is_cuda else (32, 32, 32)  # on a CPU: Triton's interpreter, for the tests
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    options: dict[str, Any] = {"R": r, **sizes, "GROUP_M": 8, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    tiles = -(-m // block[0]) * -(-n // block[1])
    arguments = (x, weight, h, b, y, m, n, k, scaling)
    if on_hopper and k % 8 == 0 and n % 8 == 0:
        _provide_memory()
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        product_tma_kernel[(min(programs, tiles),)](*arguments, PROGRAMS=programs, **options)
    else:
        product_kernel[(tiles,)](*arguments, **options)
    return y


def _provide_memory() -> None:
    """Descriptors that are made on the device want a little memory of each launch."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
