"""``SharedInput``: layers that read one x run together, at the first one's call; the others find their outputs there.

Nothing of the model changes for it: each layer is called as ever, with its hooks. A layer that is called with another
tensor than the first one (told by identity), or in another state, runs by itself.

Checkpoints. What runs in a checkpointed region runs again in backward, there alone: it has to draw and to save the same
again. So nothing passes a region's border. A region without reentry saves by hooks of its own: the first call under
other hooks begins a pass, whatever was computed before. A reentrant region saves nothing in its first run, and sees
another x, or another mode of recording, in its second. Random numbers are drawn at each layer's own call, as
:mod:`.foreseen` says, wherever the border is.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from .branches import Branch
from .dispatch import requested
from .foreseen import Foreseen, foresee
from .gate import device_type_of, group_fault, is_autocast_enabled, run_branches
from .tensors import is_plain

__all__ = [
    "NO_OTHERS",
    "Member",
    "SharedInput",
    "attach",
    "detach",
    "is_shared",
    "known_forward",
    "mark",
    "shared_inputs",
    "why_called",
]

Forward = TypeVar("Forward", bound=Callable[..., Tensor])
Others: TypeAlias = tuple[tuple[int, int], ...]  # N and rank of the further members
NO_OTHERS: Others = ()
_AT_MEMBER, _AT_HOLDER = "_shared", "_shared_inputs"
_KNOWN_FORWARDS: list[Any] = []
# Asked on each call: to look them up takes as long as to call them.
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_transforming = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
# Numbers of x from which layers on a CPU run in common: with fewer that takes longer than one by one, as
# ``bench/shared_inputs.py`` measures. Tests have 0.
FROM_ON_CPUS = 1 << 19
_MISSES = 3  # passes in a row whose outputs nobody took, before a warning, or the end of a guessed group


class Member(Protocol):
    """What a layer answers, to run with others."""

    def shared_branch(self, x: Tensor) -> tuple[Branch, float] | None:
        """Its part in a pass over ``x``, and its p; None where it has to run by itself now: not in training mode, or
        nothing but its base acts."""

    def sharing_state(self) -> tuple[Any, ...]:
        """All that its output depends on besides x and the random numbers, to be compared; asked where its part in a
        pass holds tensors that were computed for it, which are others each time."""


class _Waiting(NamedTuple):
    """A member's output that waits for its call."""

    y: Tensor
    state: tuple[Any, ...]  # of when it was computed: that of ``branch``, else the member's
    branch: Branch | None  # its part in the pass, where that tells all its output depends on
    draw: Foreseen | None


@dataclass
class _Pending:
    """The outputs that wait for their layers' calls with x, and what they were computed under."""

    x: Tensor
    version: int
    hooks: Any
    modes: tuple[Any, ...]
    outputs: dict[int, _Waiting]
    lost: bool = False  # whether one was thrown away


class SharedInput:
    """The members' common pass. It holds them weakly, and what waits for each thread by itself.

    Members share a pass in training mode only: there x is read once for all h and once for all da, and dx is one sum.
    In evaluation each layer's own pass is as quick, for few tokens quicker; so it is on a CPU for a small x. The mode
    decides, not whether gradients are recorded now: reentrant checkpointing runs forward without and again with them,
    and wants the same bits. Under ``torch.compile`` outputs cannot wait, and only who asks for :meth:`outputs` has them
    in common.

    A group that was ``guessed`` from a signature ends by itself where the guess was wrong: at the first outputs that
    nobody takes, if none of its passes was ever taken whole, and later after as many in a row as would be warned of.
    """

    def __init__(self, members: Sequence[nn.Module], guessed: bool = False) -> None:
        self._members = tuple(weakref.ref(member) for member in members)
        self._pending: dict[int, _Pending] = {}
        self._missed = 0
        self._guessed, self._confirmed = guessed, False
        for index, member in enumerate(members):
            vars(member)[_AT_MEMBER] = (self, index)

    @property
    def members(self) -> list[Any]:
        """Those that are still there."""
        members = [ref() for ref in self._members]
        return [member for member in members if member is not None]

    def __reduce__(self) -> tuple[Any, ...]:
        members = self.members
        return (SharedInput, (members, self._guessed)) if len(members) > 1 else (tuple, ())

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """The output of the member ``index`` for ``x``, by a common pass; None: it is to run by itself."""
        if _may_not_wait(x) or (x.is_cpu and x.numel() < FROM_ON_CPUS):
            return None
        # The hooks themselves, not their ids: a checkpointed region's die with it, and an id may return.
        hooks, thread = torch._C._autograd._top_saved_tensors_default_hooks(True), threading.get_ident()
        pending = self._pending.pop(thread, None)
        if pending is None or pending.x is not x or pending.hooks != hooks:
            if pending is not None:
                self._miss()
            return self._begin(index, x, hooks, thread)
        waiting, y = pending.outputs.pop(index, None), None
        if waiting is not None and self._is_as_it_was(index, x, pending, waiting):
            if not getattr(waiting.y.grad_fn, "has_run", False) and (waiting.draw is None or waiting.draw.comes_true()):
                y = waiting.y
            else:
                pending.lost = True
        if pending.outputs:
            self._pending[thread] = pending
        elif pending.lost:
            self._miss()
        else:
            self._missed, self._confirmed = 0, True
        return y

    def outputs(self, x: Tensor) -> dict[int, Tensor]:
        """The outputs of all members that can run in one pass over ``x`` now; empty where they are fewer than two."""
        parts = self._parts(x)
        together = _together(parts, next(iter(parts), 0))
        return _run(x, together, parts[next(iter(together))][1]) if together else {}

    def told(self, index: int) -> tuple[str, Others]:
        """For ``explain``, of the member ``index``: a sentence on its common pass, and N and rank of each other member
        where the kernels of a group run them; as they are now, in training mode."""
        member: Any = self._members[index]()
        x = member.weight.new_empty((1, member.in_features))
        parts = self._parts(x)
        together = _together(parts, index)
        if not together:
            return "In training this layer runs with those that share its x, where they can.", NO_OTHERS
        fault = group_fault(x, list(together.values()), parts[index][1])
        count = len(together) - 1
        when = f", with an x of at least {FROM_ON_CPUS} numbers," if x.is_cpu and FROM_ON_CPUS else ""
        of = f"In training{when} this layer runs with {count} other{'s' if count > 1 else ''} that share its x, "
        if fault is not None:
            return f"{of}in parts. The group kernels do not run: {fault}.", NO_OTHERS
        others = tuple((b.weight.shape[0], b.lora_a.shape[0]) for i, b in together.items() if i != index)
        return f"{of}by the group kernels, where they are faster.", others

    def _begin(self, index: int, x: Tensor, hooks: Any, thread: int) -> Tensor | None:
        """Runs the common pass at the call of the member ``index``, whose output it returns; the others' wait."""
        parts = self._parts(x)
        together = _together(parts, index)
        if not together:
            return None
        p, draws = parts[index][1], {}
        if p > 0.0:
            # Calls are taken to come in the members' order; one that runs by itself draws in its place all the same.
            order = sorted((i for i in parts if parts[i][1] > 0.0), key=lambda i: (i < index, i))
            draws = dict(zip(order, foresee(x, [parts[i][1] for i in order]), strict=False))
            if not draws:
                return None
            together = {i: replace(branch, state=draws[i].state) for i, branch in together.items()}
        outputs = _run(x, together, p)
        y = outputs.pop(index)
        waiting = {i: self._waiting(i, other, parts[i], draws.get(i)) for i, other in outputs.items()}
        self._pending[thread] = _Pending(x, x._version, hooks, _modes(x), waiting)
        return y

    def _parts(self, x: Tensor) -> dict[int, tuple[Branch, float]]:
        """By its place, the part of each member that can run in common with others over ``x`` now."""
        parts: dict[int, tuple[Branch, float]] = {}
        for i, ref in enumerate(self._members):
            member: Any = ref()
            part = None if member is None or _intercepted(member) else member.shared_branch(x)
            if part is not None:
                parts[i] = part
        return parts

    def _waiting(self, index: int, y: Tensor, part: tuple[Branch, float], draw: Foreseen | None) -> _Waiting:
        if (state := _state_of(part)) is not None:
            return _Waiting(y, state, part[0], draw)
        member: Any = self._members[index]()
        return _Waiting(y, member.sharing_state(), None, draw)

    def _is_as_it_was(self, index: int, x: Tensor, pending: _Pending, waiting: _Waiting) -> bool:
        """Whether the member would compute the same now."""
        if pending.version != x._version or pending.modes != _modes(x):
            return False
        member: Any = self._members[index]()
        if waiting.branch is None:
            return bool(waiting.state == member.sharing_state())
        part = member.shared_branch(x)
        return part is not None and waiting.state == _state_of(part)

    def _miss(self) -> None:
        """Outputs were left that nobody took."""
        self._missed += 1
        if self._guessed:
            if not self._confirmed or self._missed == _MISSES:
                self.end()
        elif self._missed == _MISSES:
            kinds = ", ".join(f"{member.in_features} -> {member.out_features}" for member in self.members)
            warnings.warn(
                f"layers ({kinds}) that were taken to read one input were called with different ones, or in different "
                f"checkpoints, {_MISSES} times, so outputs were computed that nobody used. Results are right; call "
                "lora_kernels.unshare_inputs(model) to have each layer run by itself.",
                stacklevel=5,
            )

    def end(self) -> None:
        """Lets the members run by themselves again."""
        members, self._members = self.members, ()
        self._pending.clear()
        for member in members:
            vars(member).pop(_AT_MEMBER, None)


def shared_inputs(holder: nn.Module) -> tuple[SharedInput, ...]:
    """The common passes among ``holder``'s children. In a copy ``()`` stands for one whose members were gone."""
    return tuple(shared for shared in vars(holder).get(_AT_HOLDER, ()) if shared and len(shared.members) > 1)


def attach(holder: nn.Module, members: Sequence[nn.Module], guessed: bool = False) -> None:
    """Lets ``members``, which ``holder`` holds, run together; copies of ``holder`` do so too."""
    vars(holder)[_AT_HOLDER] = (*shared_inputs(holder), SharedInput(members, guessed))


def is_shared(module: nn.Module) -> bool:
    """Whether ``module`` is a member of a common pass."""
    return vars(module).get(_AT_MEMBER) is not None


def detach(holder: nn.Module) -> int:
    """Lets the members of all common passes at ``holder`` run by themselves again; how many passes there were."""
    found = shared_inputs(holder)
    vars(holder).pop(_AT_HOLDER, None)
    for shared in found:
        shared.end()
    return len(found)


def _may_not_wait(x: Tensor) -> bool:
    """Whether outputs must not wait from call to call: a compiler, a tracer or a function transform records (a graph of
    a checkpointed block may not change what lies outside of it), or x does not tell whether it was written to since."""
    if is_compiling() or not is_plain(x) or x.is_inference():
        return True
    return _tracing_state() is not None or _is_transforming()


def _modes(x: Tensor) -> tuple[Any, ...]:
    """What an output depends on besides x, the layer and the random numbers."""
    autocast: Any = False
    if _is_any_autocast_enabled() and is_autocast_enabled(device_type := device_type_of(x)):
        autocast = torch.get_autocast_dtype(device_type)
    stream = torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else None
    return x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, requested(), stream


def mark(tensor: Tensor) -> tuple[int, int, bool]:
    """What tells whether ``tensor`` was exchanged or written to since, or has begun or ceased to train."""
    try:
        return id(tensor), tensor._version, tensor.requires_grad
    except RuntimeError:  # one that was made in inference mode does not count what is written to it
        return id(tensor), 0, tensor.requires_grad


def _state_of(part: tuple[Branch, float]) -> tuple[Any, ...] | None:
    """What a member's output depends on besides x and the random numbers, told by its part in a pass; None where a
    tensor of it was computed."""
    branch, p = part
    w, a, b, bias = branch.weight, branch.lora_a, branch.lora_b, branch.bias
    held = type(branch) is Branch and type(w) is type(a) is type(b) is nn.Parameter and branch.gain is None
    if not held or (bias is not None and type(bias) is not nn.Parameter):
        return None
    of_bias = None if bias is None else mark(bias)
    return p, branch.scaling, branch.activation, mark(w), mark(a), mark(b), of_bias


def _intercepted(member: nn.Module) -> bool:
    """Whether something acts before the member's own call that the common pass would miss (a sharding wrapper's hook
    gathers weights there)."""
    return bool(member._forward_pre_hooks or member._backward_hooks or member._backward_pre_hooks)


def known_forward(forward: Forward) -> Forward:
    """Marks a forward that ``shared_branch`` stands for; a subclass may have another."""
    _KNOWN_FORWARDS.append(forward)
    return forward


def why_called(member: Any) -> str | None:
    """Why ``member`` has to be called, in a clause: a pass without its call would leave out what acts there."""
    if member._forward_hooks or _intercepted(member):
        return "it has hooks"
    if torch_module._has_any_global_hook():
        return "hooks on all modules are registered"
    if "forward" in member.__dict__:
        return "it has a forward of its own on the instance"
    own = type(member).forward
    is_known = any(own is forward for forward in _KNOWN_FORWARDS)
    return None if is_known else f"{type(member).__name__} has a forward of its own"


def _fits(branch: Branch, own: Branch) -> bool:
    """Whether two branches may run in one pass."""
    alike = type(branch) is type(own) and branch.weight.dtype is own.weight.dtype
    return alike and branch.weight.device == own.weight.device


def _together(parts: dict[int, tuple[Branch, float]], needed: int) -> dict[int, Branch]:
    """Those that can run in one pass with ``needed``; empty where they are fewer than two."""
    if needed not in parts:
        return {}
    own, p = parts[needed]
    fitting = {i: b for i, (b, own_p) in parts.items() if b is own or (own_p == p and _fits(b, own))}
    return fitting if len(fitting) > 1 else {}


def _run(x: Tensor, branches: dict[int, Branch], p: float) -> dict[int, Tensor]:
    return dict(zip(branches, run_branches(x, list(branches.values()), p), strict=True))
