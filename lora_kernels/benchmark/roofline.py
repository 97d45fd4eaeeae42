"""What a step must cost: bytes, flops and launches of each provider, and the time that a machine model gives them.

Each tensor moves once per kernel that touches it. A kernel takes the longer of its flops over the rate and its bytes
over the bandwidth, plus a launch. So the terms that hide behind the large product (the accumulator that it reads, the
additional K step) cost nothing where it is bound by arithmetic, and show where it is bound by memory.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from .workloads import Workload

__all__ = ["MACHINES", "Cost", "Kernel", "Machine", "cost", "kernels", "measure_machine"]


@dataclass(frozen=True)
class Kernel:
    """One launch: bytes moved and flops done."""

    name: str
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes/s. rates: flop/s of a large product by dtype. launch: seconds that a launch costs by itself."""

    name: str
    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)
    launch: float = 2e-6

    def seconds(self, kernel: Kernel, dtype: str) -> float:
        return max(kernel.bytes / self.bandwidth, kernel.flops / self.rates[dtype]) + self.launch

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Cost:
    bytes: float
    flops: float
    launches: int
    seconds: float


MACHINES = {
    "h200": Machine("NVIDIA H200 (assumed)", 4.3e12, {"bfloat16": 760e12, "float16": 760e12, "float32": 50e12}),
    "h100": Machine("NVIDIA H100 (assumed)", 3.0e12, {"bfloat16": 740e12, "float16": 740e12, "float32": 50e12}),
}


def cost(provider: str, workload: Workload, machine: Machine) -> Cost | None:
    """The sum over the provider's kernels; None for a provider without a model, and for host overheads."""
    work = kernels(provider, workload)
    if work is None:
        return None
    seconds = sum(machine.seconds(k, workload.dtype) for k in work)
    return Cost(sum(k.bytes for k in work), sum(k.flops for k in work), len(work), seconds)


def kernels(provider: str, workload: Workload) -> list[Kernel] | None:
    """The kernels that ``provider`` launches for this cell; see ``cost``."""
    models = {
        "linear": _linear,
        "peft": _peft,
        "peft16": _peft,
        "compile": _peft_compiled,
        "addmm": _base_first,
        "lora_first": _lora_first,
        "triton": _split,
        "native": _split,
    }
    if provider not in models or workload.direction in ("overhead", "overhead-grad", "memory"):
        return None
    sizes = _Sizes.of(workload, same_dtype=provider == "peft16")
    forward, backward = models[provider](sizes)
    if workload.direction == "dx":
        backward = [k for k in backward if k.name not in ("da", "db")]
    return {"forward": forward, "step": forward + backward}.get(workload.direction, backward)


@dataclass(frozen=True)
class _Sizes:
    """Elements of x, y, W, and bytes of an element: c of the compute dtype, a of the adapters'."""

    m: int
    k: int
    n: int
    r: int
    c: int
    a: int
    p: float

    @staticmethod
    def of(w: Workload, same_dtype: bool) -> _Sizes:
        c = 4 if w.dtype == "float32" else 2
        a = c if same_dtype else (4 if w.adapters == "float32" else 2)
        return _Sizes(w.tokens, w.in_features, w.out_features, w.r, c, a, w.p)

    @property
    def x(self) -> int:
        return self.m * self.k

    @property
    def y(self) -> int:
        return self.m * self.n

    def base(self, extra_bytes: float = 0.0, extra_flops: float = 0.0) -> Kernel:
        """x Wᵀ or dy W: the same bytes and flops."""
        moved = (self.x + self.y + self.n * self.k) * self.c
        return Kernel("base", moved + extra_bytes, 2 * self.m * self.n * self.k + extra_flops)

    def skinny(self, name: str, elements: int, size: int, more: float = 0.0) -> Kernel:
        """A product with R on one side: it reads or writes ``elements`` of x or y, and little else."""
        return Kernel(name, elements * size + more, 2 * elements * self.r)


_Both = tuple[list[Kernel], list[Kernel]]


def _linear(s: _Sizes) -> _Both:
    return [s.base()], [s.base()]


def _peft(s: _Sizes) -> _Both:
    mixed, dropout = s.a != s.c, s.p > 0
    forward = [s.base()]
    forward += [Kernel("cast x", s.x * (s.c + s.a))] * mixed
    forward += [Kernel("dropout", s.x * (2 * s.a + 1))] * dropout
    forward += [s.skinny("h", s.x, s.a), s.skinny("expand", s.y, s.a), Kernel("scale", s.y * 2 * s.a)]
    forward += [Kernel("add", s.y * (s.c + 2 * s.a))]
    forward += [Kernel("cast y", s.y * (s.a + s.c))] * mixed
    backward = [Kernel("cast dy", s.y * (s.c + s.a)), Kernel("cast dy back", s.y * (s.a + s.c))] if mixed else []
    backward += [s.base(), Kernel("scale", s.y * 2 * s.a), s.skinny("dh", s.y, s.a), s.skinny("db", s.y, s.a)]
    backward += [s.skinny("dx low rank", s.x, s.a), s.skinny("da", s.x, s.a)]
    backward += [Kernel("dropout", s.x * (2 * s.a + 1))] * dropout
    backward += [Kernel("cast dx", s.x * (s.a + s.c))] * mixed
    return forward, [*backward, Kernel("add dx", s.x * 3 * s.c)]


def _peft_compiled(s: _Sizes) -> _Both:
    """Casts, dropout, scale and add fuse with their neighbours; the products do not."""
    prepare = s.a != s.c or s.p > 0
    forward = [s.base()]
    forward += [Kernel("cast and drop x", s.x * (s.c + s.a + (s.p > 0)))] * prepare
    forward += [s.skinny("h", s.x, s.a), s.skinny("expand", s.y, s.a), Kernel("scale, add", s.y * (2 * s.c + s.a))]
    backward = [s.base(), Kernel("scale", s.y * (s.c + s.a)), s.skinny("dh", s.y, s.a), s.skinny("db", s.y, s.a)]
    backward += [s.skinny("dx low rank", s.x, s.a), s.skinny("da", s.x, s.a)]
    return forward, [*backward, Kernel("add dx", s.x * (2 * s.c + s.a + (s.p > 0)))]


def _base_first(s: _Sizes) -> _Both:
    drop = [Kernel("dropout", s.x * (2 * s.c + 1))] * (s.p > 0)
    forward = [*drop, s.skinny("h", s.x, s.c), s.base(), s.skinny("addmm_", 2 * s.y, s.c)]
    backward = [s.skinny("dh", s.y, s.c), s.skinny("db", s.y, s.c), *drop]
    return forward, [*backward, s.base(), s.skinny("addmm_ dx", 2 * s.x, s.c), s.skinny("da", s.x, s.c)]


def _lora_first(s: _Sizes) -> _Both:
    """The low-rank term is written, and the large product reads it as its accumulator (beta = 1)."""
    drop = [Kernel("dropout", s.x * (2 * s.c + 1))] * (s.p > 0)
    forward = [*drop, s.skinny("h", s.x, s.c), s.skinny("expand", s.y, s.c), s.base(extra_bytes=s.y * s.c)]
    backward = [s.skinny("dh", s.y, s.c), s.skinny("db", s.y, s.c), s.skinny("dx low rank", s.x, s.c), *drop]
    return forward, [*backward, s.base(extra_bytes=s.x * s.c), s.skinny("da", s.x, s.c)]


def _split(s: _Sizes) -> _Both:
    """Shrink, then one product whose accumulator takes the low-rank term; for few tokens one launch does both."""
    if s.m <= 16:
        forward = [s.base(extra_flops=2 * s.r * (s.x + s.y))]
    else:
        forward = [s.skinny("h", s.x, s.c), s.base(extra_flops=2 * s.y * s.r)]
    dh_db = Kernel("dh, db", s.y * s.c, 4 * s.y * s.r)
    return forward, [dh_db, s.base(extra_flops=2 * s.x * s.r), s.skinny("da", s.x, s.c)]


def measure_machine(device: str, dtypes: tuple[str, ...]) -> Machine:
    """A quick look at what this machine gives: a large copy, a large product in each dtype, a tiny call."""
    on_gpu = device == "cuda"
    elements = 2**28 if on_gpu else 2**24
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), on_gpu)
    rates = {}
    for dtype in dtypes:
        m, n, k = (8192, 8192, 8192) if on_gpu else (256, 2048, 2048)
        a = torch.randn(m, k, device=device).to(getattr(torch, dtype))
        b = torch.randn(n, k, device=device).to(getattr(torch, dtype))
        rates[dtype] = 2 * m * n * k / _best(partial(torch.mm, a, b.t()), on_gpu)
    tiny, weight = torch.ones(1, 8), torch.ones(8, 8)
    launch = 2e-6 if on_gpu else _best(lambda: [torch.mm(tiny, weight) for _ in range(100)], False) / 100
    return Machine("measured", bandwidth, rates, launch)


def _best(run: Any, on_gpu: bool, repeats: int = 4) -> float:
    run()
    times = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
