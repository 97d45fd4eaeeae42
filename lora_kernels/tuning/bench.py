"""The device: random inputs in memory that no cache holds, plans compiled side by side, checked, and timed.

A plan is admitted if it runs, if its results pass the policy of ``accuracy`` against float64 (see ``passes``), and if a
second run, into memory that was poisoned with NaN, gives the same bits. What has no room on the device or does not
compile is stepped over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..accuracy import fp32_products
from ..backends.triton.choose.blocks import Machine, machine_of
from ..backends.triton.choose.launching import PREPARED, PYTHON
from ..backends.triton.choose.plans import Cell, Plan
from ..backends.triton.choose.table import DeviceName, running_versions
from ..backends.triton.choose.tuned import identify
from ..benchmark.providers import make_setups
from ..benchmark.timing import Candidate, Timing, measure
from ..errors import LoRAKernelsError
from .group_passes import group_pass_of
from .passes import Inputs, Pass, Results, pass_of, workload_of
from .search import NothingToStoreError, Refusal

__all__ = ["DeviceBench", "DeviceLostError"]

_CACHE_TURNS = 2  # the input sets together are this many times the L2 cache
_MAX_SETS = 32
_FLOOR = "floor"
_HOST_ROUNDS = 3


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
        self.versions = running_versions()
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
        self._bench, self._cell = bench, cell
        count, where = _sets(cell, bench.device), bench.device.type
        of_members = [make_setups(workload_of(own), where, count, i) for i, own in enumerate(cell.members)]
        inputs, scaling = [[Inputs.of(setup) for setup in setups] for setups in of_members], of_members[0][0].scaling
        self._sets = inputs[0]
        self._pass: Pass | None
        self._pass = group_pass_of(cell, inputs, scaling) if cell.others else pass_of(cell, self._sets, scaling)

    def close(self) -> None:
        """Gives the memory back."""
        self._sets, self._pass = [], None
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
        runs = [Candidate(_FLOOR, self._opened.floor)]
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

    def host(self, plans: Sequence[Plan]) -> dict[Plan, dict[str, float]]:
        """See ``search.Trial``: by the launcher, where it is there, and by Python."""
        from ..backends.triton import operators
        from ..backends.triton.run.chosen import launching_on
        from ..backends.triton.run.launcher import without_library

        device, sets = self._bench.device.type, len(self._sets)
        names = {str(i): plan for i, plan in enumerate(plans)}
        runs = [Candidate(_FLOOR, self._opened.floor)]
        runs += [Candidate(name, self._runner(plan)) for name, plan in names.items()]
        found: dict[Plan, dict[str, float]] = {plan: {} for plan in plans}
        ways: dict[str, Callable[[], AbstractContextManager[None]]] = {}
        if launching_on(self._bench.device) is PREPARED:
            ways[PREPARED.name] = nullcontext
        ways[PYTHON.name] = without_library
        for way, context in ways.items():
            operators.forget()  # what is kept launches as it did
            with context():
                timings = self._bench.clock(runs, _FLOOR, 0.0, _HOST_ROUNDS, device, sets, True)
            for name, plan in names.items():
                found[plan][way] = timings[name].median
        operators.forget()
        return found

    def _runner(self, plan: Plan) -> Callable[[int], Results]:
        return lambda i: self._opened.run(plan, i)

    @property
    def _opened(self) -> Pass:
        assert self._pass is not None, "the trial was closed"
        return self._pass

    def _compiled(self, plan: Plan) -> Refusal | None:
        """Runs it once, which compiles it; from any thread."""
        try:
            with torch.no_grad():
                self._opened.run(plan, 0)
            if self._bench.device.type == "cuda":
                torch.cuda.synchronize(self._bench.device)
        except Exception as error:  # noqa: BLE001 (what a compiler, a launcher or an allocator raises is not ours to know)
            self._must_live(error)
            return Refusal("does not run", f"It raised {type(error).__name__}: {_first_line(error)}")
        return None

    def _check(self, plan: Plan) -> Refusal | None:
        try:
            first = self._opened.run(plan, 0)
            for result in first:
                torch.full_like(result, float("nan"))  # freed at once: the next result of this size lies there
            second = self._opened.run(plan, 0)
            verdict = self._opened.wrong(first)
        except Exception as error:  # noqa: BLE001 (as above)
            self._must_live(error)
            return Refusal("does not run", f"It raised {type(error).__name__}: {_first_line(error)}")
        if verdict:
            return Refusal("is wrong", verdict)
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True)):
            return Refusal("is not deterministic", "Two runs on the same inputs gave different bits.")
        return None

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


def _sets(cell: Cell, device: torch.device) -> int:
    """As many as exceed the L2 cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    columns = sum(cell.ns)
    one = (cell.tokens * cell.k + cell.tokens * columns + columns * cell.k) * cell.itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_MAX_SETS, -(-_CACHE_TURNS * cache // one)))


def _precision(cell: Cell) -> AbstractContextManager[None]:
    """fp32 products round to TF32 where the cell says so, the floor's and the composition's too."""
    return nullcontext() if cell.itemsize != 4 else fp32_products(cell.tf32)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "-").splitlines()[0]
