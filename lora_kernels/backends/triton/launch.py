"""The operators of ``ops.py``, and the parts of ``backward``, on top of the kernels.

Launches: ``forward`` as its plan says, 1 to 3; ``dh_db`` 2; ``dx``, ``da``, ``dh`` and ``mask`` 1 each. Empty results
launch nothing. All outputs come from ``torch.empty`` and are written in full. What depends on sizes, strides, dtypes
and alignments alone is made ready once for each of them and kept (``prepared``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...reference import dropout_threshold
from .configs import da_config, dh_db_config, gemm_config, machine_of, next_power_of_2, shrink_config
from .forward_plans import Call, Run, blocks, ready, shrink_launch
from .kernels.backward import da_kernel, dh_db_kernel, dx_kernel, reduce_kernel
from .kernels.philox import mask_kernel
from .plans import Plan, candidates, plan_for
from .prepared import Cache, Launch, alignment, current_stream

__all__ = ["backward", "da", "dh", "dh_db", "dx", "forget", "forward", "mask", "run_plan"]

_REDUCE_BLOCK = 512
_MASK_BLOCK_M, _MASK_BLOCK_K = 32, 128

_runs: Cache[Run] = Cache()
_launches: Cache[Any] = Cache()


def forget() -> None:
    """Forget what was made ready and which plans were chosen: for after a device was tuned, and for tests."""
    _runs.clear()
    _launches.clear()
    plan_for.cache_clear()


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    key = _forward_key(x, weight, lora_a, lora_b, bias, p, state)
    scaling = float(scaling)  # an int of 1 would be compiled in
    run = _runs.get(key)
    if run is None:
        return _first_forward(key, x, weight, lora_a, lora_b, bias, scaling, p, state)
    index: int = key[0]
    if index < 0 or index == torch.cuda.current_device():
        return run(current_stream(index), x, weight, lora_a, lora_b, bias, scaling, state)
    with torch.cuda.device(index):
        return run(current_stream(index), x, weight, lora_a, lora_b, bias, scaling, state)


def run_plan(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``forward`` by ``plan``. Where x or weight is no operand for TMA, the variant that loads by pointers runs.

    Raises:
        InvalidArgumentError: the plan does not cover so many tokens or so large a rank.
    """
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return forward(x, weight, lora_a, lora_b, bias, scaling, p, state)
    key = (*_forward_key(x, weight, lora_a, lora_b, bias, p, state), plan)
    run, scaling = _runs.get(key), float(scaling)
    with _on(x.device):
        if run is None:
            call = Call.of(machine_of(x.device), x, weight, lora_a, lora_b, bias, p, state, _precision(x.dtype))
            run = _runs.keep(key, ready(plan, call))
        return run(current_stream(key[0]), x, weight, lora_a, lora_b, bias, scaling, state)


def _forward_key(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, p: float, state: Tensor | None
) -> tuple[Any, ...]:
    """All that a run depends on; the device's index comes first.

    Contiguous parameters need no strides: those of sizes above 1 follow from the shapes, and no other is used.
    """
    if weight.is_contiguous() and lora_a.is_contiguous() and lora_b.is_contiguous():
        strides: Any = bias is None or bias.stride()
    else:
        strides = (weight.stride(), lora_a.stride(), lora_b.stride(), bias is None or bias.stride())
    dtype = x.dtype
    return (
        x.get_device(),
        dtype,
        x.shape,
        x.stride(),
        weight.shape,
        lora_a.shape,
        lora_a.dtype,
        lora_b.dtype,
        None if bias is None else bias.dtype,
        strides,
        p,
        state is None,
        alignment(x, weight, lora_a, lora_b, bias, state),
        dtype is not torch.float32 or _precision(dtype),
    )


def _first_forward(
    key: tuple[Any, ...],
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Chooses the plan, makes it ready and runs it; a plan that turns out not to fit the device is stepped over."""
    from triton.runtime.errors import OutOfResources, PTXASError

    m, n, r = x.shape[0], weight.shape[0], lora_a.shape[0]
    with _on(x.device):
        machine, precision = machine_of(x.device), _precision(x.dtype)
        if m == 0 or n == 0:
            y = torch.empty((m, n), dtype=x.dtype, device=x.device)
            h = torch.empty((m, r), dtype=torch.float32, device=x.device)
            if m:
                _shrink(x, lora_a, lora_a.stride(), h, state, 1.0 / (1.0 - p), p)
            return y, h
        call = Call.of(machine, x, weight, lora_a, lora_b, bias, p, state, precision)
        chosen = plan_for(x.device, machine, call.cell)
        ranked = dict.fromkeys([chosen, *candidates(machine, call.cell)])
        plans = [plan for plan in ranked if call.by_descriptor or getattr(plan, "variant", "pointer") == "pointer"]
        for plan in plans:
            run = ready(plan, call)
            try:
                result = run(current_stream(key[0]), x, weight, lora_a, lora_b, bias, scaling, state)
            except (OutOfResources, PTXASError, RuntimeError) as error:
                compiler = not isinstance(error, RuntimeError) or "PassManager" in str(error)
                if plan is plans[-1] or not compiler:
                    raise
            else:
                _runs.keep(key, run)
                return result
    raise AssertionError("a machine has at least two candidates")


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    scaling: float,
    p: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden: Any = None
    grad_b = lora_b.new_empty(0)
    if h is not None:
        hidden, grad_b = dh_db(dy, lora_b, h, scaling)
    elif weight is not None or x is not None:
        hidden = dh(dy, lora_b, scaling)
    return (
        dy.new_empty(0) if weight is None else dx(dy, weight, hidden, lora_a, p, state),
        lora_a.new_empty(0) if x is None else da(hidden, x, lora_a, p, state),
        grad_b,
        dy.new_empty(0) if bias is None else dy.sum(0, dtype=bias.dtype),
    )


def dh(dy: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    out = torch.empty((dy.shape[0], lora_b.shape[1]), dtype=torch.float32, device=dy.device)
    if out.shape[0]:
        with _on(dy.device):
            _shrink(dy, lora_b, (lora_b.stride(1), lora_b.stride(0)), out, None, float(scaling), 0.0)
    return out


def dh_db(dy: Tensor, lora_b: Tensor, h: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    m, n = dy.shape
    r = lora_b.shape[1]
    out_dh = torch.empty((m, r), dtype=torch.float32, device=dy.device)
    out_db = torch.empty((n, r), dtype=lora_b.dtype, device=dy.device)
    if m == 0 or n == 0:
        return out_dh.zero_(), out_db.zero_()
    h = h.contiguous()
    with _on(dy.device):
        key = ("dh_db", *_matrix(dy), *_matrix(lora_b), alignment(dy, lora_b, h), _precision(dy.dtype))
        found = _launches.get(key)
        first, second, dh_count, db_count = _launches.keep(key, _dh_db_launches(dy, lora_b)) if found is None else found
        dh_parts = torch.empty((dh_count, m, r), dtype=torch.float32, device=dy.device)
        db_parts = torch.empty((db_count, n, r), dtype=torch.float32, device=dy.device)
        stream = current_stream(dy.get_device())
        first(stream, dy, lora_b, h, dh_parts, db_parts)
        second(stream, dh_parts, db_parts, out_dh, out_db, float(scaling))
    return out_dh, out_db


def _dh_db_launches(dy: Tensor, lora_b: Tensor) -> tuple[Launch, Launch, int, int]:
    """``first(stream, dy, lora_b, h, dh_parts, db_parts)``, ``second(stream, parts ..., dh, db, scaling)``, counts."""
    m, n = dy.shape
    r = lora_b.shape[1]
    precision = _precision(dy.dtype)
    config = dh_db_config(machine_of(dy.device), next_power_of_2(m), n, r, dy.itemsize, precision == "tf32")
    dh_count, db_count = blocks(n, config.block_n), blocks(m, config.chunk_m)
    tile = (config.block_m, config.block_n, config.block_r)
    first = Launch(
        dh_db_kernel,
        (dh_count, db_count, blocks(r, config.block_r)),
        (m, n, r, config.chunk_m, *dy.stride(), *lora_b.stride(), *tile, dy.itemsize == 2, precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    second = Launch(
        reduce_kernel,
        (blocks(m * r, _REDUCE_BLOCK) + blocks(n * r, _REDUCE_BLOCK), 1, 1),
        (m * r, n * r, dh_count, db_count, _REDUCE_BLOCK),
        num_warps=4,
    )
    return first, second, dh_count, db_count


def dx(dy: Tensor, weight: Tensor, dh: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
    m, k = dy.shape[0], lora_a.shape[1]
    out = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    if m == 0 or k == 0:
        return out
    dh = dh.contiguous()
    with _on(dy.device):
        aligned = alignment(dy, weight, dh, lora_a, state)
        key = ("dx", *_matrix(dy), *_matrix(weight), *_matrix(lora_a), p, state is None, aligned, _precision(dy.dtype))
        launch = _launches.get(key)
        if launch is None:
            launch = _launches.keep(key, _dx_launch(dy, weight, lora_a, p, state is not None))
        launch(current_stream(dy.get_device()), dy, weight, dh, lora_a, state, out)
    return out


def _dx_launch(dy: Tensor, weight: Tensor, lora_a: Tensor, p: float, dropout: bool) -> Launch:
    """``launch(stream, dy, weight, dh, lora_a, state, dx)``."""
    m, n = dy.shape
    r, k = lora_a.shape
    precision = _precision(dy.dtype)
    config = gemm_config(
        machine_of(dy.device), next_power_of_2(m), k, r, dy.itemsize, precision == "tf32", dropout=dropout
    )
    sizes = (m, n, k, r, 1.0 / (1.0 - p), dropout_threshold(p))
    strides = (*dy.stride(), *weight.stride(), *lora_a.stride())
    tile = (config.block_rows, config.block_sum, config.block_columns, config.block_r, config.group_m)
    return Launch(
        dx_kernel,
        (blocks(m, config.block_rows) * blocks(k, config.block_columns), 1, 1),
        (*sizes, *strides, *tile, n % config.block_sum == 0, dy.itemsize == 2, precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def da(dh: Tensor, x: Tensor, lora_a: Tensor, p: float, state: Tensor | None) -> Tensor:
    m, k = x.shape
    out = torch.empty((lora_a.shape[0], k), dtype=lora_a.dtype, device=x.device)
    if m == 0 or k == 0:
        return out.zero_()
    dh = dh.contiguous()
    with _on(x.device):
        key = ("da", *_matrix(x), out.shape, out.dtype, p, state is None, alignment(x, dh, state), _precision(x.dtype))
        launch = _launches.get(key)
        if launch is None:
            launch = _launches.keep(key, _da_launch(x, out.shape[0], p))
        launch(current_stream(x.get_device()), dh, x, state, out)
    return out


def _da_launch(x: Tensor, r: int, p: float) -> Launch:
    """``launch(stream, dh, x, state, da)``."""
    m, k = x.shape
    precision = _precision(x.dtype)
    config = da_config(machine_of(x.device), k, r, x.itemsize, precision == "tf32")
    sizes = (m, k, r, 1.0 / (1.0 - p), dropout_threshold(p))
    tile = (config.block_m, config.block_k, config.block_r)
    return Launch(
        da_kernel,
        (blocks(k, config.block_k), blocks(r, config.block_r), 1),
        (*sizes, *x.stride(), *tile, x.itemsize == 2, precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def mask(state: Tensor, rows: int, columns: int, p: float) -> Tensor:
    out = torch.empty((rows, columns), dtype=torch.bool, device=state.device)
    if out.numel() == 0:
        return out
    with _on(state.device):
        launch = Launch(
            mask_kernel,
            (blocks(rows, _MASK_BLOCK_M), blocks(columns, _MASK_BLOCK_K), 1),
            (rows, columns, dropout_threshold(p), _MASK_BLOCK_M, _MASK_BLOCK_K),
            num_warps=4,
        )
        launch(current_stream(state.get_device()), state, out)
    return out


def _shrink(
    x: Tensor, a: Tensor, stride_a: tuple[int, ...], out: Tensor, state: Tensor | None, scale: float, p: float
) -> None:
    """``out = scale (x * keep) aᵀ`` for x (M, K), a (R, K) by its strides, out (M, R); in one part."""
    precision = _precision(x.dtype)
    key = ("shrink", *_matrix(x), a.dtype, stride_a, out.shape, p, state is None, alignment(x, a, state), precision)
    launch = _launches.get(key)
    if launch is None:
        m, k = x.shape
        r = out.shape[1]
        config = shrink_config(machine_of(x.device), next_power_of_2(m), r, x.itemsize, precision == "tf32")
        launch = _launches.keep(key, shrink_launch(config, m, k, r, x.stride(), stride_a, p, precision))
    launch(current_stream(x.get_device()), x, a, out, state, scale)


def _matrix(tensor: Tensor) -> tuple[Any, ...]:
    """What a launch depends on of a matrix, but for its alignment."""
    return tensor.get_device(), tensor.dtype, tensor.shape, tensor.stride()


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device: make it the tensors' one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _precision(dtype: torch.dtype) -> str:
    """How fp32 products are taken: "tf32" where torch allows it for its own matmuls on CUDA, else "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    # The older allow_tf32 raises where a program has used both that and this.
    setting = torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", setting)
    return "tf32" if setting == "tf32" else "ieee"
