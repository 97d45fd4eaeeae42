"""Which backend runs a problem, and why not each other one.

The choice is: the call's ``backend=`` argument, else the innermost ``use_backend``, else the environment variable
``LORA_KERNELS_BACKEND``, else automatic: the first backend of ``ORDER`` that can run the problem. A choice that was
named never falls back: it raises with every backend's reasons. The automatic choice never fails on a valid problem.
The choice rests on facts that a compiled graph holds fixed (device type and dtype); what depends on sizes is decided
inside the operators.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from importlib import import_module
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from . import env, telling
from .errors import BackendUnavailableError, InvalidArgumentError, InvalidTypeError
from .explaining.report import PassPlan
from .rerun import Blocks

__all__ = ["ORDER", "Backend", "Explanation", "Problem", "backend", "explain", "select", "use_backend"]

ORDER = ("triton", "native", "eager")
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIZE_LIMIT = 2**31  # of a plan that is told

_environment = env.backend_from_environment()  # read once: os.environ costs microseconds a call
_loaded: dict[str, Backend] = {}
_requested: ContextVar[tuple[str, int] | None] = ContextVar("lora_kernels_backend", default=None)  # and graph task
_blocks: Blocks[str] = Blocks()


@dataclass(frozen=True, slots=True)
class Problem:
    """What a backend is asked to run. ``device_type`` and ``dtype`` (the compute dtype) decide; the rest informs.

    ``transposed``: W is stored (K, N). ``aside``: a sentence where a layer's forward is not the plain one of its sizes.
    ``others``: out_features and rank of each further layer that runs with it by the kernels of a group, in training.
    ``experts``: of how many experts both stacked projections are meant, which have no plan; 0: a linear layer is.
    ``codes``: what a quantised W is stored as ("nf4", "e4m3"), where there are kernels that read it so.

    Example:
        >>> import torch
        >>> from lora_kernels.dispatch import Problem
        >>> Problem("cpu", torch.float32, in_features=64, out_features=32, r=4).dtype
        torch.float32
    """

    device_type: str
    dtype: torch.dtype
    in_features: int | None = None
    out_features: int | None = None
    r: int | None = None
    dropout_p: float = 0.0
    transposed: bool = False
    aside: str = ""
    others: tuple[tuple[int, int], ...] = ()
    experts: int = 0
    codes: str = ""

    @property
    def problem(self) -> Problem:
        """Itself: ``explain`` takes a layer or a problem, and both answer to this name."""
        return self


class Backend(Protocol):
    """One way to run the operators of ``ops.py``. A backend is a module-level object; it holds no state."""

    name: str

    def why_not(self, problem: Problem) -> list[str]:
        """Sentences that say why this backend cannot run ``problem`` here, each with a remedy; empty if it can."""

    def why_not_automatic(self, problem: Problem) -> list[str]:
        """Reasons why it can run ``problem`` but is not to be chosen unless it is named; mostly empty."""

    def describe(self, problem: Problem) -> str:
        """One sentence: how it runs ``problem``, and what a user should know of it."""

    def plan(self, problem: Problem, tokens: int) -> tuple[PassPlan, ...]:
        """How it runs each pass of ``problem``, whose sizes are known, for so many tokens; nothing is compiled for it.

        What it tells is taken from what chooses, so that it is what runs.
        """

    def register(self, device_type: str) -> None:
        """Imports the operators and registers them (``ops.register``); ``ops.operators(name)`` then has them.

        ``device_type``: where they will run; "meta": only shapes are to be had, nothing is compiled or loaded for them.

        Raises:
            BackendUnavailableError: it cannot run there, which only shows now (a compile has failed); ``why_not`` then
                tells the same reason.
        """

    def dropout_state(self, x: Tensor, p: float) -> Tensor:
        """Draws, from torch's generator of x's device, what regenerates the (M, K) mask of x: see ``ops.py``."""


def backend(name: str, source: str = "") -> Backend:
    """The backend called ``name``, which ``source`` has named.

    Raises:
        InvalidArgumentError: there is no backend of that name.
    """
    found = _loaded.get(name)
    if found is None:
        if name not in ORDER:
            named = source and f", named by {source},"
            raise InvalidArgumentError(
                f"backend {name!r}{named} is not known: the backends are {', '.join(map(repr, ORDER))}. Name one of "
                "them, or leave the choice automatic with use_backend(None)."
            )
        found = _loaded[name] = import_module(f"{__package__}.backends.{name}").BACKEND
    return found


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the ``with`` block, run ``name`` wherever a call does not name a backend itself; None means automatic.

    Holds for the current thread or asyncio task (a ``ContextVar``). A graph that ``torch.compile`` has captured keeps
    the backend that it was captured with. What a checkpoint runs again in backward takes the backend of its forward,
    in whatever block backward is called; a checkpoint within that takes the one that holds outside of any block.

    Raises:
        InvalidArgumentError: there is no backend of that name.

    Example:
        >>> import torch, lora_kernels
        >>> layer = lora_kernels.FusedLoRALinear(4, 3, r=2)
        >>> with lora_kernels.use_backend("eager"):
        ...     layer(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """
    if name is not None:
        backend(name)
    block = _blocks.begin(name or "automatic")
    token = _requested.set((block.value, block.task))
    try:
        yield
    finally:
        _requested.reset(token)
        _blocks.end(block)


def _of_forward() -> tuple[str, int] | None:
    """The innermost block; while backward runs a region of a checkpoint again, that of the region's forward."""
    found = _requested.get()
    around = _blocks.of_forward(found and found[1])
    return found if around is None else next(((name, -1) for name in around), None)


def requested(argument: str | None = None) -> tuple[str | None, str]:
    """The name that was asked for (None: automatic) and where: argument, context, environment or nowhere."""
    if argument is not None:
        return argument, f"the argument backend={argument!r}"
    found = _of_forward() if _blocks else _requested.get()
    if found is not None:
        context = found[0]
        return (None, "use_backend(None)") if context == "automatic" else (context, f"use_backend({context!r})")
    if _environment is not None:
        return _environment, f"the environment variable {env.BACKEND_VARIABLE}={_environment}"
    return None, "the automatic choice"


REGISTERING = RLock()  # threads' first calls may come at once, and an operator is defined once
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=REGISTERING._at_fork_reinit)  # type: ignore[attr-defined]  # as logging's
_choices: dict[tuple[str, torch.dtype, str | None], str] = {}


def select(device_type: str, dtype: torch.dtype, argument: str | None = None) -> str:
    """The name of the backend that runs such a problem; the answer is remembered per device type, dtype and request.

    An automatic choice that turns out not to run (a library does not compile) warns once and goes on to the next. So
    does one that comes to ``eager`` because no library can be compiled, or a variable has an unknown word. Under
    a ``FakeTensorMode`` of the caller's, outside of any compiler, the backend is asked for shapes only.

    Raises:
        BackendUnavailableError: a backend was named that cannot run it; the message holds every backend's reasons.
        InvalidArgumentError: a backend was named that does not exist.
        InvalidTypeError: the dtype is not one of fp16, bf16, fp32, fp64.
    """
    key = (device_type, dtype, requested(argument)[0])
    choice = _choices.get(key)
    if choice is None:
        problem = Problem(device_type, dtype)
        with REGISTERING:
            if _only_shapes_matter():
                choice = _choose(problem, argument)
                backend(choice).register("meta")
                return choice
            choice = _choices[key] = _register(problem, argument)
    return choice


def _register(problem: Problem, argument: str | None) -> str:
    """Chooses and registers; each turn of the loop that an automatic choice fails leaves one backend less to choose."""
    while True:
        choice = _choose(problem, argument)
        try:
            backend(choice).register(problem.device_type)
        except BackendUnavailableError as error:
            if requested(argument)[0] is not None or not backend(choice).why_not(problem):
                raise _unavailable(choice, problem, argument, [str(error)]) from error
            warnings.warn(f"backend {choice!r} is passed over: {error}", RuntimeWarning, stacklevel=2)
        else:
            _tell_of_loss(choice, problem, argument)
            return choice


def _tell_of_loss(choice: str, problem: Problem, argument: str | None) -> None:
    """Warns once where ``eager`` was chosen for want of a native library, and no one said that this is meant."""
    if choice != "eager" or requested(argument)[0] is not None:
        return
    lost: Callable[[Problem], list[str]] | None = getattr(backend("native"), "lost", None)
    if lost is not None and (reasons := " ".join(lost(problem))):
        telling.once(
            reasons,
            f"backend 'eager' runs, which is slower, for 'native' cannot: {reasons} Where this is meant, "
            f"{env.BACKEND_VARIABLE}=eager says so.",
            stacklevel=4,
        )


def _only_shapes_matter() -> bool:
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return fake is not None and not torch.compiler.is_compiling()


def _choose(problem: Problem, argument: str | None) -> str:
    if problem.dtype not in COMPUTE_DTYPES:
        raise InvalidTypeError(
            f"dtype {problem.dtype} was given: LoRA runs in torch.float16, torch.bfloat16, torch.float32 or "
            "torch.float64. Convert the tensors to one of them."
        )
    name, source = requested(argument)
    if name is None:
        return next(n for n in ORDER if not _automatic_reasons(backend(n), problem))
    if reasons := backend(name, source).why_not(problem):
        raise _unavailable(name, problem, argument, reasons)
    return name


def _unavailable(name: str, problem: Problem, argument: str | None, reasons: list[str]) -> BackendUnavailableError:
    others = [f"{n!r}: {' '.join(backend(n).why_not(problem)) or 'available.'}" for n in ORDER if n != name]
    source = requested(argument)[1]
    return BackendUnavailableError(
        f"backend {name!r}, named by {source}, cannot run here: {' '.join(reasons)} The others: {' '.join(others)}"
    )


def _automatic_reasons(candidate: Backend, problem: Problem) -> list[str]:
    return candidate.why_not(problem) or candidate.why_not_automatic(problem)


class HasProblem(Protocol):
    """A layer or a :class:`Problem`."""

    @property
    def problem(self) -> Problem: ...


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns: ``print`` it for people, read its fields in programs.

    Attributes:
        problem: what was asked about.
        backend: the name of the backend that runs it.
        source: where the choice came from.
        description: how that backend runs it.
        reasons: for each other backend, the sentences that say why it does not run; empty: it could, if it were named.
        tokens, plans: with ``tokens``, the plan of each pass for so many, forward and backward.
    """

    problem: Problem
    backend: str
    source: str
    description: str
    reasons: dict[str, list[str]]
    tokens: int | None = None
    plans: tuple[PassPlan, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        problem = {**asdict(self.problem), "dtype": str(self.problem.dtype).removeprefix("torch.")}
        told = {name: getattr(self, name) for name in ("backend", "source", "description", "reasons", "tokens")}
        return {"problem": problem, **told, "plans": [plan.to_json() for plan in self.plans]}

    def __str__(self) -> str:
        lines = [f"{self.backend}: runs, by {self.source}. {self.description}"]
        for name, reasons in self.reasons.items():
            lines.append(f"{name}: {' '.join(reasons) or f'could run; {self.backend} comes first.'}")
        if self.tokens is not None:
            lines += [_heading(self.problem, self.tokens), *map(str, self.plans)]
        return "\n".join(lines)


def _heading(problem: Problem, tokens: int) -> str:
    p = problem
    dropout = f", dropout {p.dropout_p:g}" if p.dropout_p else ""
    sizes = f"M = {tokens}, K = {p.in_features}, N = {p.out_features}, r = {p.r}"
    dtype = str(p.dtype).removeprefix("torch.")
    return f"{sizes}, {dtype}{dropout}, with dx, dA and dB due.{p.aside and f' {p.aside}'}"


def explain(layer_or_problem: HasProblem, tokens: int | None = None) -> Explanation:
    """Which backend runs this layer or :class:`Problem` under the current choice, and why each other one does not.

    Args:
        tokens: M, the product of the batch dimensions. With it ``plans`` tells how each pass runs for so many tokens:
            the plan, whether it was measured (where, when) or predicted, its launches and bytes, and the ways that were
            passed over. Adapters are taken to be fp32, dropout to act, and dx, dA and dB to be due; a GPU is the
            current one.

    Raises:
        InvalidTypeError: it was given something else, such as a whole model.
        InvalidArgumentError: ``tokens`` is no whole number above 0, or the problem has no sizes.
        BackendUnavailableError: the named backend cannot run it, as the call itself would raise.

    Example:
        >>> import lora_kernels
        >>> with lora_kernels.use_backend("eager"):
        ...     lora_kernels.explain(lora_kernels.FusedLoRALinear(8, 8, r=2)).backend
        'eager'
        >>> with lora_kernels.use_backend("eager"):
        ...     forward, backward = lora_kernels.explain(lora_kernels.FusedLoRALinear(8, 8, r=2), tokens=128).plans
        >>> print(*[launch.what for launch in forward.launches], sep="\\n")
        h = x Aᵀ
        bias + s h Bᵀ
        x Wᵀ onto it
    """
    problem = getattr(layer_or_problem, "problem", None)
    if not isinstance(problem, Problem):
        raise InvalidTypeError(
            f"explain was given a {type(layer_or_problem).__name__}: it takes one layer, a FusedLoRALinear, a "
            "FusedLoRAExperts or a layer that fuse_peft has fused (model.get_submodule(name) gives a model's layer by "
            "its name in the report), or a lora_kernels.dispatch.Problem."
        )
    if tokens is not None:
        check_sizes(problem, tokens)
    name = _choose(problem, None)
    chosen: Callable[[str], Backend] = backend
    return Explanation(
        problem=problem,
        backend=name,
        source=requested()[1],
        description=chosen(name).describe(problem),
        reasons={other: _automatic_reasons(chosen(other), problem) for other in ORDER if other != name},
        tokens=tokens,
        plans=() if tokens is None else chosen(name).plan(problem, tokens),
    )


def check_sizes(problem: Problem, tokens: int) -> None:
    """Raises InvalidArgumentError unless a plan can be told for ``problem`` and so many tokens."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 < tokens < _SIZE_LIMIT:
        raise InvalidArgumentError(
            f"tokens={tokens!r} was given: it must be a whole number above 0 and below 2^31, the product of x's batch "
            "dimensions."
        )
    if problem.experts:
        raise InvalidArgumentError(
            f"tokens={tokens} was given for stacked experts, which have no plan of their own sizes. Leave it out."
        )
    sizes = {"in_features": problem.in_features, "out_features": problem.out_features, "r": problem.r}
    if missing := [name for name, value in sizes.items() if value is None or value < 1]:
        raise InvalidArgumentError(
            f"the problem tells no {' and no '.join(missing)}, or one below 1: a plan is for sizes above 0. Name them; "
            "of a PEFT layer, set an active adapter."
        )
    if large := [f"{name}={value}" for name, value in sizes.items() if value is not None and value >= _SIZE_LIMIT]:
        raise InvalidArgumentError(f"{', '.join(large)} was given: a plan is for sizes below 2^31. Name smaller ones.")
