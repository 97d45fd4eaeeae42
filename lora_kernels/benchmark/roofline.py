"""What a step must cost: bytes, flops and launches of each provider, and the time that a machine model gives them.

Each tensor moves once per kernel that touches it. A kernel takes the longer of its flops over the rate and its bytes
over the bandwidth, plus a launch. So the terms that hide behind the large product (the accumulator that it reads, the
additional K step) cost nothing where it is bound by arithmetic, and show where it is bound by memory.

On a GPU there is one model for all: the large product, the share of the bandwidth and the launch are those by which the
Triton backend ranks its plans (``backends/triton/choose``), and each of our passes takes what
the best of its plans does.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from .. import traffic
from ..backends.triton.choose import candidates, hardware
from ..backends.triton.choose.blocks import Machine as Gpu
from ..backends.triton.choose.blocks import gemm_configs, machine_of, persistent_configs, shrink_config
from ..backends.triton.choose.cost import BackwardModel, Model
from ..backends.triton.choose.hopper_cost import HopperModel
from ..backends.triton.choose.plans import GLUON_PLANS, Cell, DxFused, Fused
from .workloads import Workload

__all__ = ["MACHINES", "Cost", "Kernel", "Machine", "cost", "gpu_machine", "kernels", "measure_machine"]


@dataclass(frozen=True)
class Kernel:
    """One launch: bytes moved and flops done.

    Attributes:
        product: (M, K, N) of the library's large product, which a GPU's model knows in tiles and waves.
        accumulates: whether that product adds onto what is there.
    """

    name: str
    bytes: float
    flops: float = 0.0
    product: tuple[int, int, int] | None = None
    accumulates: bool = False


@dataclass(frozen=True)
class Machine:
    """What predictions rest on.

    Attributes:
        bandwidth: bytes/s.
        rates: flop/s of a large product by dtype.
        launch: seconds that a launch costs by itself.
        gpu: the same device as the Triton backend's model knows it; None for a CPU.
    """

    name: str
    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)
    launch: float = 2e-6
    gpu: Gpu | None = None

    def seconds(self, kernel: Kernel, dtype: str) -> float:
        if self.gpu is not None and kernel.product is not None:
            m, k, n = kernel.product
            cell = Cell("forward", m, k, n, 1, dtype, False)
            return Model(self.gpu, cell).library(kernel.accumulates)
        return max(kernel.bytes / self.bandwidth, kernel.flops / self.rates[dtype]) + self.launch

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Cost:
    bytes: float
    flops: float
    launches: int
    seconds: float


def gpu_machine(name: str, gpu: Gpu) -> Machine:
    """``gpu`` under the assumptions of the Triton backend's model."""
    dtypes = ("bfloat16", "float16", "float32")
    rates = {d: Model(gpu, Cell("forward", 1, 1, 1, 1, d, False)).rate for d in dtypes}
    return Machine(name, hardware.ASSUMED.memory * gpu.bandwidth, rates, hardware.ASSUMED.launch, gpu)


def _hopper(bandwidth: float) -> Gpu:
    """SXM: 132 multiprocessors at up to 1.98 GHz, 227 KiB of shared memory a block; NVIDIA's data sheets."""
    return Gpu(capability=90, sm_count=132, shared_memory=232448, clock=1.98e9, bandwidth=bandwidth)


# Bandwidths by the data sheets: 4.8 TB/s of HBM3e, 3.35 TB/s of HBM3.
MACHINES = {
    "h200": gpu_machine("NVIDIA H200 (assumed)", _hopper(4.8e12)),
    "h100": gpu_machine("NVIDIA H100 (assumed)", _hopper(3.35e12)),
}


def cost(provider: str, workload: Workload, machine: Machine) -> Cost | None:
    """The sum over the provider's kernels; None for a provider without a model, and for host overheads."""
    work = kernels(provider, workload)
    if work is None:
        return None
    bytes_, flops = sum(k.bytes for k in work), sum(k.flops for k in work)
    forward = kernels(provider, replace(workload, direction="forward")) or [] if workload.has_forward else []
    launches, seconds = 0, 0.0
    for own, planned in ((forward, _FORWARD), (work[len(forward) :], _BACKWARD)):
        if own and machine.gpu is not None and provider in planned:
            count, taken = planned[provider](machine, workload)
        else:
            count, taken = len(own), sum(machine.seconds(k, workload.dtype) for k in own)
        launches, seconds = launches + count, seconds + taken
    return Cost(bytes_, flops, launches, seconds)


def _our_forward(machine: Machine, workload: Workload) -> tuple[int, float]:
    """Launches and seconds of our forward: the plan that the Triton backend takes where nobody has tuned."""
    assert machine.gpu is not None
    cell = _cell(workload, dropout=workload.p > 0)
    plan = candidates.candidates(machine.gpu, cell)[0]
    return plan.launches, candidates.predicted_seconds(machine.gpu, cell, plan)


def _our_backward(machine: Machine, workload: Workload) -> tuple[int, float]:
    """The same of our backward; with dx alone due, of dh and dx."""
    assert machine.gpu is not None
    cell = replace(_cell(workload, dropout=workload.p > 0), direction="backward")
    plan = candidates.candidates(machine.gpu, cell)[0]
    if workload.direction == "dx":
        if isinstance(plan, GLUON_PLANS):
            return HopperModel(machine.gpu, cell).dx_alone(plan)
        model = BackwardModel(machine.gpu, cell)
        seconds = model.of_dy.summed(plan.hidden.shrink) + model.dx(plan)
        return plan.hidden.dh_launches + plan.dx_launches, seconds
    return plan.launches, candidates.predicted_seconds(machine.gpu, cell, plan)


def _split_kernels(machine: Machine, workload: Workload) -> tuple[int, float]:
    """LoRAFusion's forward: a kernel that drops, h, and the product that begins with the low-rank term."""
    assert machine.gpu is not None
    cell = _cell(workload, dropout=False)
    sizes = (cell.tokens, cell.n, cell.r, cell.itemsize, cell.tf32)
    shrink = shrink_config(machine.gpu, cell.tokens, cell.r, cell.itemsize, cell.tf32)
    fused = [Fused(shrink, g, "persistent") for g in persistent_configs(machine.gpu, *sizes)]
    fused += [Fused(shrink, g) for g in gemm_configs(machine.gpu, *sizes)]
    seconds = min(candidates.predicted_seconds(machine.gpu, cell, plan) for plan in fused)
    drop = _drop(_Sizes.of(workload, same_dtype=True))
    return 2 + len(drop), seconds + sum(machine.seconds(k, workload.dtype) for k in drop)


def _split_backward(machine: Machine, workload: Workload) -> tuple[int, float]:
    """LoRAFusion's: zeros and one kernel with atomics, da by the library, the product that begins with dh A."""
    assert machine.gpu is not None
    cell = replace(_cell(workload, dropout=False), direction="backward")
    model = BackwardModel(machine.gpu, cell)
    fused = [plan for plan in candidates.candidates(machine.gpu, cell) if isinstance(plan, DxFused)]
    work = kernels("lorafusion", replace(workload, direction="backward")) or []
    others = [k for k in work if k.product is None and (workload.direction != "dx" or k.name != "da")]
    return 1 + len(others), min(map(model.dx, fused)) + sum(machine.seconds(k, workload.dtype) for k in others)


_FORWARD = {"triton": _our_forward, "lorafusion": _split_kernels}
_BACKWARD = {"triton": _our_backward, "lorafusion": _split_backward}


def _cell(w: Workload, dropout: bool) -> Cell:
    return Cell("forward", w.tokens, w.in_features, w.out_features, w.r, w.dtype, dropout)


def kernels(provider: str, workload: Workload) -> list[Kernel] | None:
    """The kernels that ``provider`` launches for this cell; see ``cost``."""
    models = {
        "linear": _linear,
        "peft": _peft,
        "peft16": _peft,
        "compile": _peft_compiled,
        "addmm": _base_first,
        "lora_first": _lora_first,
        "lorafusion": _lorafusion,
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

    def base(self, extra_bytes: float = 0.0, extra_flops: float = 0.0, backward: bool = False) -> Kernel:
        """x Wᵀ, or dy W: the same bytes and flops."""
        moved = traffic.large(self.m, self.k, self.n, self.c)
        product = (self.m, self.n, self.k) if backward else (self.m, self.k, self.n)
        flops = 2 * self.m * self.n * self.k + extra_flops
        return Kernel("base", moved + extra_bytes, flops, product, extra_bytes > 0)

    def skinny(self, name: str, elements: int, size: int) -> Kernel:
        """A product with R on one side: it moves ``elements`` of x or y, an adapter, and h (or dh)."""
        return Kernel(name, traffic.skinny(self.m, elements, self.r, size), 2 * elements * self.r)

    def cast_adapters(self) -> list[Kernel]:
        """A and B in the compute dtype, where they have another."""
        sizes = {"cast A": self.r * self.k, "cast B": self.n * self.r}
        return [Kernel(name, size * (self.a + self.c)) for name, size in sizes.items() if self.a != self.c]


_Both = tuple[list[Kernel], list[Kernel]]


def _linear(s: _Sizes) -> _Both:
    return [s.base()], [s.base(backward=True)]


def _peft(s: _Sizes) -> _Both:
    mixed, dropout = s.a != s.c, s.p > 0
    forward = [s.base()]
    forward += [Kernel("cast x", s.x * (s.c + s.a))] * mixed
    forward += [Kernel("dropout", s.x * (2 * s.a + 1))] * dropout
    forward += [s.skinny("h", s.x, s.a), s.skinny("expand", s.y, s.a), Kernel("scale", s.y * 2 * s.a)]
    forward += [Kernel("add", s.y * (s.c + 2 * s.a))]
    forward += [Kernel("cast y", s.y * (s.a + s.c))] * mixed
    backward = [Kernel("cast dy", s.y * (s.c + s.a)), Kernel("cast dy back", s.y * (s.a + s.c))] if mixed else []
    backward += [
        s.base(backward=True),
        Kernel("scale", s.y * 2 * s.a),
        s.skinny("dh", s.y, s.a),
        s.skinny("db", s.y, s.a),
    ]
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
    backward = [
        s.base(backward=True),
        Kernel("scale", s.y * (s.c + s.a)),
        s.skinny("dh", s.y, s.a),
        s.skinny("db", s.y, s.a),
    ]
    backward += [s.skinny("dx low rank", s.x, s.a), s.skinny("da", s.x, s.a)]
    return forward, [*backward, Kernel("add dx", s.x * (2 * s.c + s.a + (s.p > 0)))]


def _base_first(s: _Sizes) -> _Both:
    drop, cast = _drop(s), s.cast_adapters()
    forward = [*cast, *drop, s.skinny("h", s.x, s.c), s.base(), s.skinny("addmm_", 2 * s.y, s.c)]
    backward = [*cast, s.skinny("dh", s.y, s.c), s.skinny("db", s.y, s.c), *drop]
    return forward, [*backward, s.base(backward=True), s.skinny("addmm_ dx", 2 * s.x, s.c), s.skinny("da", s.x, s.c)]


def _lora_first(s: _Sizes) -> _Both:
    """The low-rank term is written, and the large product reads it as its accumulator (beta = 1)."""
    drop, cast = _drop(s), s.cast_adapters()
    expand = s.skinny("expand", s.y, s.c)
    forward = [*cast, *drop, s.skinny("h", s.x, s.c), expand, s.base(extra_bytes=s.y * s.c)]
    backward = [*cast, s.skinny("dh", s.y, s.c), s.skinny("db", s.y, s.c), s.skinny("dx low rank", s.x, s.c), *drop]
    return forward, [*backward, s.base(extra_bytes=s.x * s.c, backward=True), s.skinny("da", s.x, s.c)]


def _split(s: _Sizes) -> _Both:
    """Shrink, then one product whose accumulator takes the low-rank term; for few tokens one launch does both."""
    if s.m <= 16:
        forward = [s.base(extra_flops=2 * s.r * (s.x + s.y))]
    else:
        forward = [s.skinny("h", s.x, s.c), s.base(extra_flops=2 * s.y * s.r)]
    dh_db = Kernel("dh, db", s.y * s.c, 4 * s.y * s.r)
    return forward, [dh_db, s.base(extra_flops=2 * s.x * s.r, backward=True), s.skinny("da", s.x, s.c)]


def _lorafusion(s: _Sizes) -> _Both:
    """Dropout as a kernel that writes x and the mask, h by the library, and the low-rank term within the product."""
    forward = [*_drop(s), s.skinny("h", s.x, s.c), s.base(extra_flops=2 * s.y * s.r)]
    backward = [Kernel("zero", (s.y // s.m + s.m) * s.r * 4), Kernel("dh, db", s.y * s.c, 4 * s.y * s.r)]
    mask = [Kernel("mask", s.x)] * (s.p > 0)
    return forward, [*backward, s.base(extra_flops=2 * s.x * s.r, backward=True), *mask, s.skinny("da", s.x, s.c)]


def _drop(s: _Sizes) -> list[Kernel]:
    """Reads x, writes it dropped, and a byte of mask an element; nothing where p is 0."""
    return [Kernel("dropout", s.x * (2 * s.c + 1))] * (s.p > 0)


def measure_machine(device: str, dtypes: tuple[str, ...]) -> Machine:
    """A quick look at what this machine gives: a large copy, a large product in each dtype, a tiny call.

    On a GPU it also brings the clock up, for a third of a second, before anything is timed.
    """
    on_gpu = device == "cuda"
    if on_gpu:
        _busy(0.3)
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
    return Machine("measured", bandwidth, rates, launch, machine_of(torch.device("cuda")) if on_gpu else None)


def _busy(seconds: float) -> None:
    ones = torch.randn(4096, 4096, device="cuda").to(torch.bfloat16)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for _ in range(20):
            torch.mm(ones, ones)
        torch.cuda.synchronize()


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
