"""The run of a call's plan: the first that the device takes, and what a captured graph takes instead of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from ..choose.blocks import Machine
from ..choose.candidates import candidates, on_one_stream, predicted_seconds
from ..choose.launching import GRAPH, PREPARED, PYTHON, Launching
from ..choose.plans import Cell
from .launcher import KnownPasses, PassRun, index_of, library
from .prepared import first_that_runs
from .streams import make_pools

__all__ = ["EitherRun", "enter", "first_run", "launching_on"]

_WORTH = 0.02


class Chosen(Protocol):
    """What a choice is made for: a ``Call``, or a ``GroupCall``."""

    @property
    def machine(self) -> Machine: ...

    @property
    def device(self) -> torch.device: ...

    def cell(self, direction: str) -> Cell: ...


def launching_on(device: torch.device) -> Launching:
    """How ``device``'s kernels are launched outside of graphs; the first question finds, or compiles, the launcher."""
    return PREPARED if device.type == "cuda" and library() is not None else PYTHON


class EitherRun:
    """``eager``; and while the current stream is being captured ``captured``, by the plan that is best there."""

    __slots__ = ("captured", "eager")

    def __init__(self, eager: Callable[..., Any], captured: Callable[..., Any]) -> None:
        self.eager, self.captured = eager, captured

    def __call__(self, *arguments: Any) -> Any:
        run = self.captured if torch.cuda.is_current_stream_capturing() else self.eager
        return run(*arguments)


def enter(
    known: KnownPasses,
    run: Any,
    p: float,
    kind: int,
    tensors: Sequence[torch.Tensor | None],
    absent: Callable[[], Sequence[torch.Tensor]],
    of_rows: int = 1,
) -> None:
    """Has ``known`` find the pass of ``run`` from now on, once there is one: see :meth:`KnownPasses.enter`."""
    eager = run.eager if isinstance(run, EitherRun) else run
    passes = getattr(eager, "passes", eager)
    if isinstance(passes, PassRun) and passes.present:
        known.enter(passes, p, kind, tensors, absent(), eager is not run, of_rows)


def first_run(
    call: Chosen,
    direction: str,
    plans: Callable[[Launching], Sequence[Any]],
    make: Callable[[Any], Any],
    attempt: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """The run to keep, and what ``attempt`` made of it; a plan that turns out not to fit the device is stepped over.

    Where graphs take other kernels, those run once here, because a capture may compile nothing.

    Args:
        plans: those to try, by how they are launched, the best first.
        make: a plan's run.
    """
    pairs = [(plan, make(plan)) for plan in plans(launching_on(call.device))]
    (plan, run), result = first_that_runs(pairs, lambda pair: attempt(pair[1]))
    if call.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return run, result
    twin, *better = _in_graphs(call, direction, plan, plans(GRAPH))
    if not better and twin == plan:
        return run, result
    make_pools(index_of(call.device))
    captured = make(twin)
    if better:
        with suppress(torch.OutOfMemoryError):  # the results are there twice
            captured, _ = first_that_runs([*map(make, better), captured], attempt)
    return EitherRun(run, captured), result


def _in_graphs(call: Chosen, direction: str, plan: Any, order: Sequence[Any]) -> tuple[Any, ...]:
    """``plan``'s kernels on as many streams as is best in a graph; and the best plan there, if it takes others and
    that is worth their compiling: it was measured, or is predicted to be faster by ``_WORTH``."""
    machine, cell = call.machine, call.cell(direction)
    twin = next((other for other in order if on_one_stream(other) == on_one_stream(plan)), plan)
    best = order[0] if order else twin
    if on_one_stream(best) == on_one_stream(plan):
        return (twin,)
    measured = best != next(iter(candidates(machine, cell, GRAPH)), None)
    seconds = predicted_seconds(machine, cell, best)
    worth = measured or seconds < (1.0 - _WORTH) * predicted_seconds(machine, cell, twin)
    return (twin, best) if worth else (twin,)
