"""One cell: every provider is built around one weight and gated; those that passed are timed. One preset: its cells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..accuracy import tf32_allowed
from ..backends.triton.choose import plans
from ..backends.triton.choose.blocks import machine_of, next_power_of_2
from ..backends.triton.choose.ranking import plan_for
from ..console import Progress
from ..errors import InvalidArgumentError
from . import gate, memory, rebuilt, roofline
from .device import DeviceLostError, first_line, gpu_state, must_live, release_memory
from .models import elements, make_model_setups
from .prediction import predict
from .preset import Preset
from .providers import FLOOR, PROVIDERS, Layer, Provider, Setup, make_setups
from .results import Cell, Entry, Result, environment
from .timing import Candidate, Timing, first_call, measure
from .workloads import LAYER, LAYERS, Workload

__all__ = ["admit", "candidate", "expand_peers", "providers_of", "run_cell", "run_preset"]

_MICRO = 1e6
_CACHE_TURNS = 3  # the input sets together are this many times the L2 cache
_MAX_SETS = 16
_ONE_CALL = "One call"  # begins the sentence on a cell that was left out because it takes too long


def expand_peers(names: Iterable[str]) -> tuple[Provider, ...]:
    """The providers of these names, the floor first; "ours" is the automatic choice and every backend.

    Raises:
        InvalidArgumentError: a name that no provider has, or a rival whose kernels are not here.
    """
    absent = rebuilt.absent()
    wanted = [FLOOR]
    for name in names:
        wanted += ["auto", *dispatch.ORDER] if name == "ours" else [name]
    if unknown := [name for name in wanted if name not in PROVIDERS]:
        raise InvalidArgumentError(
            f"peers {', '.join(map(repr, unknown))} are not known: name some of "
            f"{', '.join(name for name in PROVIDERS if name not in absent)}, or 'ours'."
        )
    if sentence := next((absent[name] for name in wanted if name in absent), None):
        raise InvalidArgumentError(sentence)
    return tuple(PROVIDERS[name] for name in dict.fromkeys(wanted))


def providers_of(preset: Preset, peers: Sequence[str] | None) -> tuple[Provider, ...]:
    """The providers that ``peers`` names; or else the preset's, less the rivals whose kernels are not here.

    Raises:
        InvalidArgumentError: as of ``expand_peers``.
    """
    absent = rebuilt.absent()
    return expand_peers([name for name in preset.peers if name not in absent] if peers is None else peers)


def run_preset(
    preset: Preset,
    date: str,
    device: str,
    peers: Sequence[str] | None = None,
    budget: float | None = None,
    seed: int = 0,
    progress: Progress = lambda label, done, total: None,
    keep: Callable[[Result], None] = lambda result: None,
    earlier: Sequence[Cell] = (),
    limit: float = math.inf,
) -> Result:
    """Runs the cells of ``preset`` on ``device``; ``date`` goes into the result as it is.

    The budget, in seconds, is for the whole preset and shared out evenly among the cells that are left; each has its
    minimum of rounds anyway. ``keep`` is given what there is after each cell, so that a run that is cut off loses one
    cell only.

    Args:
        earlier: cells of this preset that an earlier part of the run has measured; they are kept and not run again.
        limit: seconds after which no further cell is begun.
    """
    providers = providers_of(preset, peers)
    left_out = rebuilt.left_out(preset.peers if peers is None else ())
    began = time.perf_counter()
    there = {cell.workload: cell for cell in earlier}
    left = [w for w in preset.workloads if w not in there]
    seconds = (preset.budget if budget is None else budget) * len(left) / max(len(preset.workloads), 1)
    machine = roofline.measure_machine(device, tuple(dict.fromkeys(w.dtype for w in preset.workloads)))
    result = Result(
        preset=preset.name,
        date=date,
        seed=seed,
        floor=FLOOR,
        titles={p.name: p.title for p in providers},
        ours=[p.name for p in providers if p.ours],
        environment={**environment(device), **left_out},
        machine=machine.to_json(),
        cells=[there[w] for w in preset.workloads if w in there],
        planned=len(preset.workloads),
    )
    keep(result)
    for i, workload in enumerate(left):
        progress(f"bench {preset.name}", len(result.cells), len(preset.workloads))
        passed = time.perf_counter() - began
        if passed >= limit:
            return result
        share = max(seconds - passed, 0.0) / (len(left) - i)
        rules = (preset.min_rounds, preset.max_call)
        if smaller := next((c for c in result.cells if _is_slow(c) and c.workload.is_within(workload)), None):
            sentence = f"{_ONE_CALL} of less work took too long ({smaller.workload}). No provider was run."
            result.cells.append(Cell(workload, {}, left_out=sentence))
            keep(result)
            continue
        try:
            result.cells.append(run_cell(workload, providers, device, share, *rules, seed, machine))
        except DeviceLostError as error:
            result.cells.append(Cell(workload, {}, left_out=str(error)))  # or a resumed run would break here again
            keep(result)
            raise
        keep(result)
    progress(f"bench {preset.name}", len(preset.workloads), len(preset.workloads))
    return result


def run_cell(
    workload: Workload,
    providers: Sequence[Provider],
    device: str,
    budget: float,
    min_rounds: int = 7,
    max_call: float = math.inf,
    seed: int = 0,
    machine: roofline.Machine | None = None,
) -> Cell:
    """One cell within about ``budget`` seconds, building and gating included; see ``Preset`` for the rules."""
    began = time.perf_counter()
    release_memory(device)
    setups = _make(workload, device, _sets(workload, device), seed)
    if max_call < math.inf:
        floor = candidate(FLOOR, [PROVIDERS[FLOOR].build(setups[0])], setups[:1])
        if (seconds := first_call(floor, device)) > max_call:
            sentence = f"{_ONE_CALL} of the floor took {seconds:.1f} s, more than the {max_call:g} s that are allowed."
            return Cell(workload, {}, left_out=f"{sentence} No provider was run.")
    entries: dict[str, Entry] = {}
    layers: dict[str, list[Layer]] = {}
    for provider in providers:
        entries[provider.name], layers[provider.name] = admit(provider, setups)
    layers = {name: built for name, built in layers.items() if built}
    before = gpu_state() if device == "cuda" else {}
    if workload.direction == "memory":
        status, numbers = "measured", {name: _memory(built[0], setups[0]) for name, built in layers.items()}
    else:
        candidates = [candidate(name, built, setups) for name, built in layers.items()]
        if device == "cuda":  # where memory may run out, and a capture is no time to compile
            broken = {c.name: failed for c in candidates if (failed := _runs_on_every_set(c, setups))}
            entries |= broken
            candidates = [c for c in candidates if c.name not in broken]
        left = max(budget - (time.perf_counter() - began), 0.0)
        status, numbers = "timed", _time(candidates, setups, left, min_rounds)
    for name, values in numbers.items():
        predicted = predict(PROVIDERS[name], workload, machine, _automatic(setups[0]))
        entries[name] = Entry(status, values.pop("note", "") or None, values, entries[name].errors, predicted)
    state: dict[str, Any] = {"seconds": time.perf_counter() - began}
    if device == "cuda":
        state |= {"before": before, "after": gpu_state(), "sets": len(setups), "plan": _plan(setups[0])}
    return Cell(workload, entries, state=state)


def _is_slow(cell: Cell) -> bool:
    return cell.left_out is not None and cell.left_out.startswith(_ONE_CALL)


def admit(provider: Provider, setups: list[Setup]) -> tuple[Entry, list[Layer]]:
    """Builds a layer on every set and gates the first; the entry says why there is none."""
    setup = setups[0]
    if reason := provider.why_not_subject(setup.workload.subject):
        return Entry("unavailable", reason), []
    if reason := provider.why_not(setup):
        return Entry("unavailable", reason), []
    if provider.backend is not None and provider.backend == _automatic(setup):
        return Entry("same", f"It is what 'auto' runs: {provider.backend}."), []
    try:
        layers = [provider.build(s) for s in setups]
        verdict = gate.check(provider, layers[0], setup)
    except Exception as error:  # noqa: BLE001 (whatever a provider raises, the others are still to be measured)
        return _raised(provider.name, error, setup), []
    if verdict.failure:
        return Entry("failed", verdict.failure, errors=verdict.errors), []
    return Entry("checked", errors=verdict.errors), layers


def _raised(name: str, error: Exception, setup: Setup) -> Entry:
    must_live(setup.device.type, f"{setup.workload}, {PROVIDERS[name].title if name in PROVIDERS else name}", error)
    return Entry("failed", f"It raised {type(error).__name__}: {first_line(error)}")


def _make(workload: Workload, device: str, count: int, seed: int) -> list[Setup]:
    if workload.subject in LAYERS:
        return make_setups(workload, device, count, seed)
    return [*make_model_setups(workload, device, count, seed)]


def _automatic(setup: Setup) -> str:
    return dispatch.select(setup.device.type, setup.dtype)


def _runs_on_every_set(work: Candidate, setups: list[Setup]) -> Entry | None:
    """Runs it once on each set, which compiles what is to be compiled; what became of it, if it raised."""
    try:
        with work.context():
            if work.prepare is not None:
                work.prepare()
            for i in range(len(setups)):
                work.run(i)
        if setups[0].device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 (as above)
        return _raised(work.name, error, setups[0])
    return None


def _time(
    candidates: list[Candidate], setups: list[Setup], budget: float, min_rounds: int
) -> dict[str, dict[str, Any]]:
    host = setups[0].workload.direction.startswith("overhead")
    timings = measure(candidates, FLOOR, budget, min_rounds, setups[0].device.type, len(setups), host)
    return {name: _numbers(timing) for name, timing in timings.items()}


def candidate(name: str, layers: list[Layer], setups: list[Setup]) -> Candidate:
    """What the clock runs for this provider in the setups' direction; for "memory" a step."""
    calls, context = [layer.call for layer in layers], layers[0].context
    # Its own leaves on the shared memory: autograd ties a leaf to the stream that first used it, and a capture has one.
    xs = [s.x.detach().requires_grad_(s.x.requires_grad) for s in setups]
    dys = [s.dys for s in setups]
    inputs = [[x, *layer.trainable] for x, layer in zip(xs, layers, strict=True)]
    direction = setups[0].workload.direction
    if direction in ("forward", "overhead"):

        def forward(i: int) -> Any:
            with torch.no_grad():
                return calls[i](xs[i])

        return Candidate(name, forward, context)
    if direction == "overhead-grad":
        return Candidate(name, lambda i: calls[i](xs[i]), context)
    if direction in ("step", "memory"):
        return Candidate(name, lambda i: torch.autograd.grad(calls[i](xs[i]), inputs[i], dys[i]), context)
    if direction == "dx":
        inputs = [[x] for x in xs]
    ys: list[Tensor] = []

    def prepare() -> None:
        ys.clear()
        ys.extend(call(x) for call, x in zip(calls, xs, strict=True))

    def backward(i: int) -> Any:
        return torch.autograd.grad(ys[i], inputs[i], dys[i], retain_graph=True)

    return Candidate(name, backward, context, prepare)


def _numbers(timing: Timing) -> dict[str, Any]:
    numbers = asdict(timing)
    for old, new in (("median", "us"), ("p20", "us_p20"), ("p80", "us_p80"), ("difference", "over_floor_us")):
        numbers[new] = numbers.pop(old) * _MICRO
    return numbers


def _memory(layer: Layer, setup: Setup) -> dict[str, Any]:
    return {**asdict(memory.bytes_kept(layer, setup)), "peak": memory.peak_of_step(layer, setup)}


def _plan(setup: Setup) -> str | None:
    """How the Triton backend's forward runs this cell, in its own words; None where another backend is chosen."""
    w, device = setup.workload, setup.device
    if _automatic(setup) != "triton" or w.subject != LAYER:
        return None
    dtype = "tf32" if setup.dtype == torch.float32 and tf32_allowed() else w.dtype
    tokens = next_power_of_2(w.tokens)
    cell = plans.Cell("forward", tokens, w.in_features, w.out_features, w.r, dtype, w.p > 0)
    return str(plan_for(device, machine_of(device), cell))


def _sets(workload: Workload, device: str) -> int:
    """On CUDA as many layers, each with its own weight, input and gradient, as exceed the L2 cache; on the CPU one."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    one = elements(workload) * (2 if workload.dtype != "float32" else 4)
    return max(1, min(_MAX_SETS, -(-_CACHE_TURNS * cache // one)))
