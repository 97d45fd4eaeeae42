"""Forward by the CUDA C++ kernel for few tokens (``csrc/cuda/few_tokens.cuh``), and its workspace.

The workspace holds flags, a count and parts of h. It begins as zeros, the launches number themselves, and it serves
one launch after the other: so there is one for each device and stream, and one for each stream of each captured graph,
which may be replayed on any stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....errors import InvalidArgumentError
from ....kept import no_words, row_words
from ..choose.plans import Ring
from ..choose.ring import CHUNK, HEADERS, RANK, WORKSPACE_BYTES
from .call import Call, cdiv
from .cuda_kernels import CudaLaunch, Source, capture_number
from .hopper_forward import as_products_take
from .launcher import PassRun, launched
from .steps import draw_step

__all__ = ["ready_ring", "ring_call_fault", "ring_launch", "workspace"]

_ENTRY, _NAME = "few_tokens_forward_entry.cuh", "few_tokens_forward"
_SIGNATURE = (*("*",) * 9, "fp32", "fp32", *("i32",) * 14)
_CAPTURES = 32  # graphs' workspaces that a device has ready; more are cleared in the graph itself
_lock = threading.Lock()
_workspaces: dict[tuple[int, ...], Tensor] = {}
_ready: dict[int, list[Tensor]] = {}


def ring_call_fault(plan: Ring, c: Call) -> str | None:
    """The end of a sentence "the plan ... does not run: ..." where it does not take the call."""
    if c.dtype is not torch.bfloat16 or c.m > 16 or c.r > RANK or c.k % CHUNK or c.n == 0:
        return f"it is for up to 16 tokens of bfloat16, rank {RANK}, and multiples of {CHUNK} in_features"
    chunks, splits = c.k // CHUNK, plan.splits
    if chunks % splits or chunks // splits < plan.config.warps or plan.producers > chunks or plan.producers % splits:
        return f"in_features {c.k} are too few for its warps, or its splits do not divide them"
    pieces = c.by_descriptor and c.stride_w == (c.k, 1)
    if not pieces or (c.r > 1 and c.stride_a[0] != c.k) or c.stride_a[1] != 1:
        return "x, W or A is not stored in rows of one piece, on 16-byte boundaries"
    if (c.n > 1 and c.stride_b[0] != c.r) or (c.r > 1 and c.stride_b[1] != 1):
        return "B is not in one piece"
    return None


def ring_launch(plan: Ring, c: Call, a_is_fp32: bool, b_is_fp32: bool) -> CudaLaunch:
    """``launch(stream, x, weight, lora_a, lora_b, bias, words, y, h, workspace, scaling)``."""
    config = plan.config
    tiles = cdiv(c.n, config.rows)
    if plan.splits > 1:
        blocks = tiles  # a cluster takes one tile
    else:
        room = max(1, c.machine.sm_count * plan.blocks_a_multiprocessor - plan.producers)
        blocks = cdiv(tiles, cdiv(tiles, room))
    static: tuple[Any, ...] = (c.keep_scale if c.dropout else 1.0, c.m, c.n, c.k, c.r)
    static += (c.stride_x[0] if c.m > 1 else c.k, row_words(c.k), c.padded_rank, int(a_is_fp32), int(b_is_fp32))
    static += (plan.producers, plan.splits, tiles, blocks, int(plan.pdl))
    return CudaLaunch(
        Source(_ENTRY, HEADERS, tuple(config.defines(c.m, c.n % config.rows != 0).items())),
        _NAME,
        _SIGNATURE,
        plan.producers + blocks * plan.splits,
        static,
        capability=c.machine.capability,
        threads=config.threads,
        shared_bytes=config.shared_memory(c.m),
        cluster=plan.splits,
        dependent=plan.pdl,
    )


class _RingRun(PassRun):
    """Its run's last argument is the workspace, which depends on the stream and so is no part of the pass."""

    __slots__ = ("_workspace",)

    def __init__(self, run: Callable[..., Any], device: torch.device, absent: tuple[Any, ...]) -> None:
        super().__init__(run, device, absent)
        self._workspace = partial(workspace, device)

    def __call__(self, *arguments: Any) -> Any:
        return PassRun.__call__(self, *arguments, launched(self._workspace, self._index))


def ready_ring(plan: Ring, c: Call) -> PassRun:
    """``run(x, weight, lora_a, lora_b, bias, scaling, state)`` -> y, h, words; compiled at its first use.

    Raises:
        InvalidArgumentError: the plan does not take the call.
    """
    if fault := ring_call_fault(plan, c):
        raise InvalidArgumentError(f"the plan {plan} does not run: {fault}.")
    return _RingRun(_run(plan, c), c.device, (None, None, no_words(c.device)))


def _run(plan: Ring, c: Call) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    draw = draw_step(c.m, c.k, c.p) if c.dropout else None
    if c.operand is None:
        h_shape, h_dtype = (c.m, c.r), torch.float32
    else:
        h_shape, h_dtype = (c.m, c.operand.columns), torch.bfloat16
    launches: dict[tuple[bool, bool], CudaLaunch] = {}

    def run(
        stream: int | None,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scaling: float,
        state: Tensor | None,
        memory: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        words = None if draw is None else draw(stream, state)
        y = torch.empty((c.m, c.n), dtype=c.dtype, device=c.device)
        h = torch.empty(h_shape, dtype=h_dtype, device=c.device)
        a, b = (_as_taken(adapter) for adapter in (lora_a, lora_b))
        kinds = a.dtype is torch.float32, b.dtype is torch.float32
        launch = launches.get(kinds)
        if launch is None:
            launch = launches.setdefault(kinds, ring_launch(plan, c, *kinds))
        launch(stream, x, weight, a, b, as_products_take(bias, c.dtype), words, y, h, memory, scaling)
        return y, h, words

    return run


def _as_taken(adapter: Tensor) -> Tensor:
    """fp32 or bf16, on a 16-byte boundary, as it nearly always is; fp32 holds all of fp16, fp64 is rounded."""
    if adapter.dtype not in (torch.bfloat16, torch.float32):
        return adapter.float()
    return adapter if adapter.data_ptr() % 16 == 0 else adapter.clone()


def workspace(device: torch.device, stream: int | None) -> Tensor:
    """Of launches on ``stream``, or of the graph that it is being captured into."""
    index, number = device.index or 0, stream or 0
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _of_capture(device, index, number)
    found = _workspaces.get((index, number))
    return _made(device, index, number) if found is None else found


def _made(device: torch.device, index: int, number: int) -> Tensor:
    with _lock:
        if index not in _ready:
            memory = torch.zeros((_CAPTURES, WORKSPACE_BYTES), dtype=torch.uint8, device=device)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # graphs of other streams will use it
            _ready[index] = list(memory)
        return _workspaces.setdefault((index, number), _zeros(device))


def _of_capture(device: torch.device, index: int, number: int) -> Tensor:
    capture = capture_number(number)
    if capture is None:
        return _zeros(device)
    with _lock:
        key = (index, number, capture)
        if key not in _workspaces and _ready.get(index):
            _workspaces[key] = _ready[index].pop()
        found = _workspaces.get(key)
    return _zeros(device) if found is None else found


def _zeros(device: torch.device) -> Tensor:
    """On the current stream; while it is captured the graph clears it at each replay."""
    with torch.inference_mode(False):
        return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
