"""``SharedInput``: layers that read one x run together, at the first one's call; the others find their outputs there.

Nothing of the model changes for it: each layer is called as ever, with its hooks. A layer that is called with another
tensor than the first one (told by identity), or in another state, runs by itself.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .branches import Branch, apply_branches
from .dispatch import requested
from .functional import device_type_of, is_autocast_enabled

__all__ = ["Member", "SharedInput", "attach", "detach", "shared_inputs"]

_AT_MEMBER, _AT_HOLDER = "_shared", "_shared_inputs"
_MISSES = 3  # passes in a row whose outputs nobody took, before a warning
_PLAIN_TENSORS = (Tensor, nn.Parameter)


class Member(Protocol):
    """What a layer answers, to run with others."""

    def shared_branch(self, x: Tensor) -> tuple[Branch, float] | None:
        """Its part in a pass over ``x``, and its p; None where it has to run by itself now: not in training mode, or
        nothing but its base acts."""

    def sharing_state(self) -> tuple[Any, ...]:
        """All that its output depends on besides x and the random numbers, to be compared."""


@dataclass
class _Pending:
    """The outputs that wait for their layers' calls, each with its layer's state."""

    x: Tensor
    version: int
    outputs: dict[int, tuple[Tensor, tuple[Any, ...]]]


class SharedInput:
    """The members' common pass. It holds them weakly, and what waits for each thread by itself.

    Members share a pass in training mode only: there x is read once for all h and once for all da, and dx is one sum.
    In evaluation each layer's own pass is as quick, for few tokens quicker. The mode decides, not whether gradients are
    recorded now: reentrant checkpointing runs forward without and again with them, and wants the same bits. Under
    ``torch.compile`` outputs cannot wait, and only who asks for :meth:`outputs` has them in common.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self._members = tuple(weakref.ref(member) for member in members)
        self._pending: dict[int, _Pending] = {}
        self._missed = 0
        for index, member in enumerate(members):
            vars(member)[_AT_MEMBER] = (self, index)

    @property
    def members(self) -> list[Any]:
        """Those that are still there."""
        members = [ref() for ref in self._members]
        return [member for member in members if member is not None]

    def __reduce__(self) -> tuple[Any, ...]:
        members = self.members
        return (SharedInput, (members,)) if len(members) > 1 else (tuple, ())

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """The output of the member ``index`` for ``x``, by a common pass; None: it is to run by itself."""
        if _may_not_wait(x):
            return None
        thread = threading.get_ident()
        pending = self._pending.pop(thread, None)
        if pending is None or pending.x is not x:
            if pending is not None:
                self._miss()
            outputs = self.outputs(x, needed=index)
            y = outputs.pop(index, None)
            if outputs:
                states = {i: (other, self._state(i, x)) for i, other in outputs.items()}
                self._pending[thread] = _Pending(x, x._version, states)
            return y
        y, state = pending.outputs.pop(index, (None, ()))
        if pending.outputs:
            self._pending[thread] = pending
        else:
            self._missed = 0
        return y if (pending.version, state) == (x._version, self._state(index, x)) else None

    def outputs(self, x: Tensor, needed: int | None = None) -> dict[int, Tensor]:
        """The outputs of all members that can run in one pass over ``x`` now, with ``needed`` if it is given.

        Empty where they are fewer than two, or ``needed`` is not among them.
        """
        parts: dict[int, tuple[Branch, float]] = {}
        for i, ref in enumerate(self._members):
            member: Any = ref()
            part = None if member is None or _intercepted(member) else member.shared_branch(x)
            if part is not None:
                parts[i] = part
        if not parts or (needed is not None and needed not in parts):
            return {}
        own, p = next(iter(parts.values())) if needed is None else parts[needed]
        parts = {i: part for i, part in parts.items() if part[1] == p and _fits(part[0], own)}
        if len(parts) < 2:
            return {}
        return dict(zip(parts, apply_branches(x, [branch for branch, _ in parts.values()], p), strict=True))

    def _state(self, index: int, x: Tensor) -> tuple[Any, ...]:
        member: Any = self._members[index]()
        device_type = device_type_of(x)
        autocast = is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
        return (torch.is_grad_enabled(), autocast, requested(), *member.sharing_state())

    def _miss(self) -> None:
        """Outputs were left that nobody took."""
        self._missed += 1
        if self._missed == _MISSES:
            kinds = ", ".join(f"{member.in_features} -> {member.out_features}" for member in self.members)
            warnings.warn(
                f"layers ({kinds}) that were taken to read one input were called with different ones {_MISSES} times, "
                "so outputs were computed that nobody used. Results are right; call "
                "lora_kernels.unshare_inputs(model) to have each layer run by itself.",
                stacklevel=5,
            )


def shared_inputs(holder: nn.Module) -> tuple[SharedInput, ...]:
    """The common passes among ``holder``'s children."""
    return tuple(shared for shared in vars(holder).get(_AT_HOLDER, ()) if len(shared.members) > 1)


def attach(holder: nn.Module, members: Sequence[nn.Module]) -> None:
    """Lets ``members``, which ``holder`` holds, run together; copies of ``holder`` do so too."""
    vars(holder)[_AT_HOLDER] = (*shared_inputs(holder), SharedInput(members))


def detach(holder: nn.Module) -> int:
    """Lets the members of all common passes at ``holder`` run by themselves again; how many passes there were."""
    found = vars(holder).pop(_AT_HOLDER, ())
    for shared in found:
        for member in shared.members:
            vars(member).pop(_AT_MEMBER, None)
    return len(found)


def _may_not_wait(x: Tensor) -> bool:
    """Whether outputs must not wait from call to call: a compiler, a tracer or a function transform records (a graph of
    a checkpointed block may not change what lies outside of it), or x does not tell whether it was written to since."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN_TENSORS or x.is_inference():
        return True
    return torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()


def _intercepted(member: nn.Module) -> bool:
    """Whether something acts before the member's own call that the common pass would miss (a sharding wrapper's hook
    gathers weights there)."""
    return bool(member._forward_pre_hooks or member._backward_hooks or member._backward_pre_hooks)


def _fits(branch: Branch, own: Branch) -> bool:
    """Whether two branches may run in one pass."""
    return branch.weight.dtype is own.weight.dtype and branch.weight.device == own.weight.device
