"""What a gated MLP's ``forward`` looks like: told by its bytecode, so nothing that it does besides can be lost.

The functions here are patterns. One that compiles to the same instructions computes the same of its own attributes,
whatever those are called. A forward that is written otherwise is not known, and its MLP runs as it is.
"""

from __future__ import annotations

import types
from functools import lru_cache
from typing import Any

import torch.nn.functional as F

__all__ = ["roles_of"]


def _stored(self: Any, x: Any) -> Any:  # transformers' Llama, Qwen, Mistral, Gemma
    y = self.down(self.act(self.gate(x)) * self.up(x))
    return y


def _returned(self: Any, x: Any) -> Any:
    return self.down(self.act(self.gate(x)) * self.up(x))


def _in_steps(self: Any, x: Any) -> Any:  # Mixtral's
    y = self.act(self.gate(x)) * self.up(x)
    y = self.down(y)
    return y


def _joined(self: Any, x: Any) -> Any:  # Phi-3's, GLM's
    up = self.gate_up(x)
    gate, up = up.chunk(2, dim=-1)
    up = up * self.act(gate)
    return self.down(up)


def _silu(self: Any, x: Any) -> Any:  # Meta's own Llama
    return self.down(F.silu(self.gate(x)) * self.up(x))


_FORMS = (_stored, _returned, _in_steps, _joined, _silu)
_ROLES = {"gate", "up", "gate_up", "down", "act"}


@lru_cache(maxsize=256)
def roles_of(forward: Any) -> dict[str, str] | None:
    """The names of the attributes that are its gate, up or gate_up, down and act (None: ``F.silu``); None: unknown."""
    if not isinstance(forward, types.FunctionType) or forward.__closure__ or forward.__kwdefaults__:
        return None
    code = forward.__code__
    for form in _FORMS:
        if _instructions(form.__code__) != _instructions(code):
            continue
        names = dict(zip(form.__code__.co_names, code.co_names, strict=True))
        found = {role: name for role, name in names.items() if role in _ROLES}
        others = {role: name for role, name in names.items() if role not in _ROLES}
        library = others.pop("F", None)
        if any(role != name for role, name in others.items()):
            continue
        if library is not None and forward.__globals__.get(library) is not F:
            continue
        if len(set(found.values())) == len(found):
            return found
    return None


def _instructions(code: types.CodeType) -> tuple[Any, ...]:
    constants = tuple(c for c in code.co_consts if c is not None and not isinstance(c, str))  # no docstring
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0x2C
    return code.co_code, constants, counts, len(code.co_names)
