"""Runs a layer's both passes by the Gluon kernels' steps three times for a described GPU, with a driver that records.

As ``recorded_launches``: a program, without ``TRITON_INTERPRET``, that prints JSON. Triton binds, types and compiles
the kernels as on a GPU, descriptors too; so what the first and the third call hand to the device can be compared.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.runtime import driver

import recorded_launches
from lora_kernels.backends.triton.choose import hopper_blocks as blocks
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES
from lora_kernels.backends.triton.run import hopper
from lora_kernels.backends.triton.run.hopper_call import HopperCall

M, K, N, R = 200, 320, 264, 16


def main() -> None:
    recorded_launches._told = told
    driver.set_active(recorded_launches.Driver())
    c = HopperCall(ARCHITECTURES[90], torch.device("cpu"), torch.bfloat16, M, N, K, R, 0.1, True)
    x, dy, weight = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((M, K), (M, N), (N, K)))
    lora_a, lora_b, state = torch.randn(R, K), torch.randn(N, R), torch.tensor([1, 2])
    shrink, masked = blocks.shrink_configs(R)[0], True
    count = hopper.shrink_counters(shrink, c, K)
    pack, h_step = hopper.pack_step(c, None, count), hopper.shrink_step(shrink, c)
    y_step, dx_step = (
        hopper.product_step(blocks.forward_configs()[1], c),
        hopper.dx_step(blocks.dx_configs(masked)[0], c),
    )
    dh_step = hopper.dh_db_step(blocks.dh_db_configs(R)[0], c)
    da_step = hopper.da_step(blocks.outer_configs(R, masked)[0], c)
    fused_step = hopper.product_h_step(blocks.product_h_configs(R)[0], c)
    reduce = hopper.reduce_grads_step(c, torch.float32, torch.float32)
    flags = torch.zeros(hopper.product_h_counters(blocks.product_h_configs(R)[0], c), dtype=torch.int32)
    calls: list[list[dict[str, Any]]] = []
    for _ in range(3):
        recorded_launches.launched.clear()
        a, b, counters = pack(77, lora_a, lora_b)
        h, words = h_step(77, x, a, counters, state, 0.5)
        y_step(77, x, weight, h, b)
        fused_step(77, x, weight, a, b, flags, 0.5)
        dh, db_parts = dh_step(77, dy, b, h, 0.5)
        dx_step(77, dy, weight, dh, a, words)
        reduce(77, da_step(77, x, dh, words), db_parts)
        calls.append(list(recorded_launches.launched))
    print(json.dumps({"first": calls[0], "third": calls[2]}))


def told(value: Any) -> Any:
    """Descriptors as all that they say but the address, tensors as ``recorded_launches`` tells them."""
    if hasattr(value, "block_shape"):
        described = [list(value.shape), list(value.strides), list(value.block_shape), repr(value.layout)]
        return [str(value.base.dtype), value.base.data_ptr() % 16, *described]
    return [str(value.dtype), list(value.shape), value.data_ptr() % 16] if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    main()
