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
from lora_kernels.backends.triton.choose import hopper_group_blocks as group_blocks
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES
from lora_kernels.backends.triton.run import hopper
from lora_kernels.backends.triton.run import hopper_groups as groups
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
    grouped = group_calls()
    print(json.dumps({"first": calls[0], "third": calls[2], "group first": grouped[0], "group third": grouped[2]}))


def group_calls() -> list[list[dict[str, Any]]]:
    """Both passes of a group of three, three times; with and without biases and masks."""
    device, sizes = torch.device("cpu"), ((N, R), (136, 5), (72, 32))
    group, plain = (
        tuple(HopperCall(ARCHITECTURES[90], device, torch.bfloat16, M, n, K, r, *p) for n, r in sizes)
        for p in ((0.1, True), ())
    )
    ranks = tuple(one.operand.rank for one in group)
    x, dys = torch.randn(M, K, dtype=torch.bfloat16), [torch.randn(M, n, dtype=torch.bfloat16) for n, _ in sizes]
    weights, biases = [torch.randn(n, K, dtype=torch.bfloat16) for n, _ in sizes], [torch.randn(N), None, None]
    lora_as, lora_bs = [torch.randn(r, K) for _, r in sizes], [torch.randn(n, r) for n, r in sizes]
    states, scales = [torch.tensor([1, number]) for number in range(3)], [0.5, 1.0, 2.0]
    shrink = group_blocks.group_shrink_configs(ranks, True)[0]
    pack = groups.group_pack_step(group, groups.group_shrink_counters(shrink, group))
    h_step = groups.group_shrink_step(shrink, group)
    y_step = groups.group_product_step(group_blocks.group_forward_configs()[0], group)
    dh_step = groups.group_dh_db_step(group_blocks.group_dh_db_configs(ranks)[0], group)
    dx_steps = [
        groups.group_dx_step(group_blocks.group_dx_configs(3, masked)[0], of)
        for masked, of in ((True, group), (False, plain))
    ]
    da_step = groups.group_da_step(group_blocks.group_da_configs(ranks, True)[0], group)
    reduce = groups.group_reduce_grads_step(group, torch.float32, torch.bfloat16)
    calls: list[list[dict[str, Any]]] = []
    for _ in range(3):
        recorded_launches.launched.clear()
        a, b, counters = pack(77, lora_as, lora_bs)
        h, words = h_step(77, x, a, counters, states, scales)
        y_step(77, x, weights, h, b, biases)
        dh, db_parts = dh_step(77, dys, b, h, scales)
        dx_steps[0](77, dys, weights, dh, a, words)
        dx_steps[1](77, dys, weights, dh, a)
        reduce(77, da_step(77, x, dh, words), db_parts)
        calls.append(list(recorded_launches.launched))
    return calls


def told(value: Any) -> Any:
    """Descriptors as all that they say but the address, tensors as ``recorded_launches`` tells them."""
    if hasattr(value, "block_shape"):
        described = [list(value.shape), list(value.strides), list(value.block_shape), repr(value.layout)]
        return [str(value.base.dtype), value.base.data_ptr() % 16, *described]
    return [str(value.dtype), list(value.shape), value.data_ptr() % 16] if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    main()
