"""What a layer keeps for backward, tensor by tensor, and how high a step's memory rises."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .providers import Layer, Setup

__all__ = ["Kept", "bytes_kept", "peak_of", "peak_of_step", "storages_kept"]


@dataclass(frozen=True)
class Kept:
    """Bytes of the storages that one forward keeps for backward, each counted once, whatever views are kept of it.

    Attributes:
        x: the input's own storage.
        parameters: weight, bias and adapters.
        rest: everything else: what the layer adds.
        tensors: the rest, one by one, as "dtype[shape]".
    """

    x: int
    parameters: int
    rest: int
    tensors: tuple[str, ...]


def bytes_kept(layer: Layer, setup: Setup) -> Kept:
    """Of one forward."""
    x = setup.x
    with layer.context():
        saved = storages_kept(lambda: layer.call(x))
    owned = [
        setup.linear.weight,
        *([] if setup.linear.bias is None else [setup.linear.bias]),
        *layer.trainable,
        *layer.owned,
    ]
    of_x = x.untyped_storage().data_ptr()
    of_parameters = {t.untyped_storage().data_ptr() for t in owned}
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in saved.items()}
    others = {a for a in sizes if a != of_x and a not in of_parameters}
    return Kept(
        x=sizes.get(of_x, 0),
        parameters=sum(sizes[a] for a in of_parameters if a in sizes),
        rest=sum(sizes[a] for a in others),
        tensors=tuple(_describe(saved[a]) for a in saved if a in others),
    )


def storages_kept(forward: Callable[[], object]) -> dict[int, Tensor]:
    """Runs ``forward`` and tells what it hands to autograd: by its address, one tensor of each storage."""
    saved: dict[int, Tensor] = {}  # the tensors are held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return saved


def peak_of_step(layer: Layer, setup: Setup) -> int:
    """The most bytes that a forward and backward hold at once beyond what was held before it, results included."""

    def step() -> None:
        with layer.context():
            y = layer.call(setup.x)
            torch.autograd.grad(y, [setup.x, *layer.trainable], setup.dy)

    step()
    return peak_of(step, setup.device.type)


def peak_of(step: Callable[[], object], device_type: str) -> int:
    """The most bytes that ``step`` holds at once beyond what was held before it.

    CUDA: the caching allocator's own maximum. CPU: the running sum of torch's allocations, from the profiler's events;
    what a library allocates by itself is not in it.
    """
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces itself on stderr
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        step()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
