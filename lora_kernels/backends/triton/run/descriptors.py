"""TMA descriptors made on the host, by address, dtype, shape, strides and block; kept, but not their tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .prepared import Cache

__all__ = ["Address", "descriptor", "forget", "operand_fault"]

_ALIGNMENT = 16


class Address(NamedTuple):
    """What Triton asks a descriptor's tensor for: so that a descriptor that is kept keeps no memory."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


_descriptors: Cache[Any] = Cache()


def descriptor(tensor: Tensor, block: tuple[int, int]) -> Any:
    """Gluon's TensorDescriptor of ``tensor`` (rows, columns) in blocks of ``block``; see ``operand_fault``."""
    key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), block)
    found = _descriptors.get(key)
    return _make(key) if found is None else found


def _make(key: tuple[Any, ...]) -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    address, dtype, shape, strides, block = key
    if shape[0] == 1:  # no second row is ever read, but the distance has to be one that TMA takes
        per_line = _ALIGNMENT // dtype.itemsize
        strides = (-(-shape[1] // per_line) * per_line, strides[1])
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for(list(block), element)
    made = TensorDescriptor(Address(address, dtype), list(shape), list(strides), list(block), layout)
    return _descriptors.keep(key, made)


def forget() -> None:
    """Forget all descriptors: for tests."""
    _descriptors.clear()


def operand_fault(name: str, tensor: Tensor) -> str | None:
    """The end of a sentence where TMA cannot read or write ``tensor``; None where it can."""
    size = tensor.element_size()
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        return f"{name}'s rows are not in one piece"
    if tensor.data_ptr() % _ALIGNMENT:
        return f"{name} does not start on a 16-byte boundary"
    if tensor.shape[0] > 1 and (tensor.stride(0) * size % _ALIGNMENT or tensor.stride(0) < tensor.shape[1]):
        return f"{name}'s rows, {tensor.stride(0) * size} bytes apart, do not start on 16-byte boundaries of their own"
    return None
