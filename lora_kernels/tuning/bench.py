"""The device: random inputs in memory that no cache holds, plans compiled side by side, checked, and timed.

A plan is admitted if it runs, if y passes the policy of ``accuracy`` against float64 (on up to 256 rows, all columns)
and h its ceiling, and if a second run, into memory that was poisoned with NaN, gives the same bits. What has no room
on the device or does not compile is stepped over.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import accuracy, reference
from ..backends.triton import configs
from ..backends.triton.configs import Machine, machine_of
from ..backends.triton.plan_kinds import Cell, Plan
from ..backends.triton.tuned import identify
from ..backends.triton.tuned_table import DeviceName, running_versions
from ..benchmark.providers import Setup, make_setups
from ..benchmark.timing import Candidate, Timing, measure
from ..benchmark.workloads import Workload
from ..errors import LoRAKernelsError
from .search import NothingToStoreError, Refusal

__all__ = ["DeviceBench", "DeviceLostError"]

DROPOUT = 0.1
_ROWS = 256
_CACHE_TURNS = 2  # the input sets together are this many times the L2 cache
_MAX_SETS = 32
_SEED = (0x5EED, 7)
_FLOOR = "floor"

Result = tuple[Tensor, Tensor]
RunPlan = Callable[..., Result]


class DeviceLostError(LoRAKernelsError, RuntimeError):
    """A plan has broken the device's context, in which nothing runs any more."""


class DeviceBench:
    """``session.Bench`` on a CUDA device; on a CPU with Triton's interpreter, for tests.

    Args:
        device: where.
        workers: how many plans are compiled at once; by default one a core, up to 16.
        clock: ``benchmark.timing.measure``, or what stands in for it.
    """

    def __init__(
        self, device: torch.device, workers: int | None = None, clock: Callable[..., dict[str, Timing]] = measure
    ) -> None:
        self.device = device
        self.machine: Machine = machine_of(device)
        self.name = identify(device) or DeviceName("interpreter", self.machine.capability, self.machine.sm_count)
        self.versions = {**running_versions(), "kernels": _digest_of_kernels()}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = 1 if device.type == "cpu" else workers or min(cores, 16)
        self.clock = clock

    @contextmanager
    def open(self, cell: Cell) -> Iterator[DeviceTrial]:
        """See ``session.Bench``."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, torch.no_grad(), _precision(cell):
            try:
                trial = DeviceTrial(self, cell)
            except torch.OutOfMemoryError as error:
                raise NothingToStoreError(
                    f"{cell} is not tuned: {_first_line(error)} Free the device's memory, or leave the cell out."
                ) from error
            try:
                yield trial
            finally:
                trial.close()


class DeviceTrial:
    """``search.Trial``: a cell's tensors on the device."""

    def __init__(self, bench: DeviceBench, cell: Cell) -> None:
        from ..backends.triton.launch import mask, run_plan

        self._bench, self._cell = bench, cell
        self._run_plan: RunPlan = run_plan
        self._p = DROPOUT if cell.dropout else 0.0
        dtype = "float32" if cell.tf32 else cell.dtype
        work = Workload("forward", cell.tokens, cell.k, cell.n, cell.r, dtype, p=self._p)
        setups = make_setups(work, bench.device.type, _sets(cell, bench.device))
        self._sets = [_Inputs.of(setup) for setup in setups]
        self._scaling = setups[0].scaling
        self._state = torch.tensor(_SEED, device=bench.device) if cell.dropout else None
        rows = torch.linspace(0, cell.tokens - 1, min(cell.tokens, _ROWS), device=bench.device).long()
        self._rows = rows
        kept = None if self._state is None else mask(self._state, cell.tokens, cell.k, self._p)[rows]
        self._mask = kept

    def close(self) -> None:
        """Gives the memory back."""
        self._sets = []
        self.__dict__.pop("_expected", None)
        if self._bench.device.type == "cuda":
            torch.cuda.empty_cache()

    def admit(self, plans: Sequence[Plan]) -> dict[Plan, Refusal]:
        """See ``search.Trial``."""
        if self._bench.workers == 1:  # Triton's interpreter takes no threads
            first = [self._compiled(plan) for plan in plans]
        else:
            with ThreadPoolExecutor(self._bench.workers) as pool:
                first = list(pool.map(self._compiled, plans))
            # Two plans that share a kernel may meet while Triton loads it: who failed runs once more, alone.
            first = [refusal and self._compiled(plan) for plan, refusal in zip(plans, first, strict=True)]
        refused = {}
        for plan, refusal in zip(plans, first, strict=True):
            if found := refusal or self._check(plan):
                refused[plan] = found
        return refused

    def time(self, plans: Sequence[Plan], rounds: int) -> Mapping[Plan | None, Timing]:
        """See ``search.Trial``."""
        names: dict[str, Plan | None] = {_FLOOR: None} | {str(i): plan for i, plan in enumerate(plans)}
        runs = [Candidate(_FLOOR, self._floor)]
        runs += [Candidate(name, self._runner(plan)) for name, plan in names.items() if plan is not None]
        device, sets = self._bench.device.type, len(self._sets)
        try:
            timings = self._bench.clock(runs, _FLOOR, 0.0, rounds, device, sets)
        except Exception as error:
            self._must_live(error)
            left = [plan for plan in plans if self._compiled(plan) is None]
            if len(left) == len(plans):
                raise
            return self.time(left, rounds)
        graphed = not timings[_FLOOR].note  # beside graphs, a plan that none could be taken of has launches in its time
        return {names[name]: timing for name, timing in timings.items() if not (graphed and timing.note)}

    def _runner(self, plan: Plan) -> Callable[[int], Result]:
        return lambda i: self._run(plan, i)

    def _floor(self, i: int) -> Tensor:
        return torch.nn.functional.linear(self._sets[i].x, self._sets[i].weight)

    def _run(self, plan: Plan, i: int = 0) -> Result:
        s = self._sets[i]
        return self._run_plan(plan, s.x, s.weight, s.lora_a, s.lora_b, None, self._scaling, self._p, self._state)

    def _compiled(self, plan: Plan) -> Refusal | None:
        """Runs it once, which compiles it; from any thread."""
        try:
            with torch.no_grad():
                self._run(plan)
            if self._bench.device.type == "cuda":
                torch.cuda.synchronize(self._bench.device)
        except Exception as error:  # noqa: BLE001 (what a compiler, a launcher or an allocator raises is not ours to know)
            self._must_live(error)
            return Refusal("does not run", f"It raised {type(error).__name__}: {_first_line(error)}")
        return None

    def _check(self, plan: Plan) -> Refusal | None:
        try:
            first = self._run(plan)
            for result in first:
                torch.full_like(result, float("nan"))  # freed at once: the next result of this size lies there
            second = self._run(plan)
            verdict = self._wrong(*first)
        except Exception as error:  # noqa: BLE001 (as above)
            self._must_live(error)
            return Refusal("does not run", f"It raised {type(error).__name__}: {_first_line(error)}")
        if verdict:
            return Refusal("is wrong", verdict)
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True)):
            return Refusal("is not deterministic", "Two runs on the same inputs gave different bits.")
        return None

    def _wrong(self, y: Tensor, h: Tensor) -> str | None:
        """What the policy has against the results, or None."""
        (exact_y, exact_h), (yard_y, yard_h) = self._expected
        dtype, tf32 = self._sets[0].x.dtype, self._cell.tf32
        found = accuracy.judge("y", y[self._rows], exact_y, yard_y, dtype, tf32)
        hidden = accuracy.judge("h", h[self._rows], exact_h, yard_h, dtype, tf32)
        ceiling = accuracy.TF32_CEILING if tf32 else accuracy.CEILINGS[dtype]
        if not found.passed:
            return str(found)
        if not bool(torch.isfinite(y).all()):
            return "y has values that are not finite."
        if not hidden.finite or hidden.error > ceiling:
            return f"h is off by {hidden.error:.3e}, more than {ceiling:g}."
        return None

    @cached_property
    def _expected(self) -> tuple[Result, Result]:
        """(y, h) of the chosen rows in float64 and, as the yardstick, in the compute dtype."""
        s = self._sets[0]

        def run(dtype: torch.dtype) -> Result:
            x, weight, a, b = (t.to(dtype) for t in (s.x[self._rows], s.weight, s.lora_a, s.lora_b))
            return reference.forward(x, weight, a, b, None, self._scaling, self._mask, self._p)

        return run(torch.float64), run(s.x.dtype)

    def _must_live(self, error: Exception) -> None:
        """Raises DeviceLostError if the device answers no more."""
        if self._bench.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._bench.device)
        except RuntimeError as lost:
            raise DeviceLostError(
                f"{self._cell}: a plan has broken the device's context ({_first_line(error)}), and nothing runs in "
                "this process any more. What was tuned before is stored; leave this cell out, and report it."
            ) from lost


@dataclass(frozen=True)
class _Inputs:
    """x (M, K), weight (N, K), lora_a (R, K) and lora_b (N, R), of the package's default dtype for adapters."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor

    @staticmethod
    def of(setup: Setup) -> _Inputs:
        adapters = (t.detach().to(setup.adapter_dtype) for t in (setup.lora_a, setup.lora_b))
        return _Inputs(setup.x.detach(), setup.linear.weight.detach(), *adapters)


def _digest_of_kernels() -> str:
    """Of the backend's sources: a row that was measured with other kernels is measured anew."""
    folder = Path(configs.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _sets(cell: Cell, device: torch.device) -> int:
    """As many as exceed the L2 cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    one = (cell.tokens * cell.k + cell.tokens * cell.n + cell.n * cell.k) * cell.itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_MAX_SETS, -(-_CACHE_TURNS * cache // one)))


@contextmanager
def _precision(cell: Cell) -> Iterator[None]:
    """fp32 products round to TF32 where the cell says so, the floor's and the composition's too."""
    if cell.itemsize != 4:
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision  # type: ignore[attr-defined]
    settings.fp32_precision = "tf32" if cell.tf32 else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        settings.fp32_precision = before  # type: ignore[attr-defined]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "-").splitlines()[0]
