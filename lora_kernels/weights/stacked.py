"""``PackedExperts``: quantised weights of a mixture's stacked experts; one expert's values are made at a time.

Two kinds are known: bitsandbytes' 4-bit codes as ``replace_parameter_4bit`` puts them under a Parameter's name, and
the MXFP4 of transformers' gpt-oss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import LoRAStateError
from . import mxfp4
from .packed import Layout, values_of

__all__ = ["PackedExperts", "is_known", "packed_names", "read", "why_not"]

_PARAMETRIZATION = ("bitsandbytes.nn.parametrize", "Bnb4bitParametrization")
_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class PackedExperts:
    """Frozen weights (E, N, K) in another form than their values.

    Attributes:
        layout: of one expert's matrix, as it is stored.
        parts: the tensors that hold all experts, none of which is copied.
        steps: how many rows of each part (of its first dimension) an expert has; 0 where all experts share it.
        experts: E.
        transposed: whether (K, N) is stored.
        dtype: the dtype that they are multiplied in; None is the input's.
        again: reads them once more, where ``parts`` were made to be read; a backward pass calls it.
    """

    layout: Layout
    parts: tuple[Tensor, ...]
    steps: tuple[int, ...]
    experts: int
    transposed: bool
    dtype: torch.dtype | None = None
    again: Callable[[], PackedExperts] | None = None

    requires_grad = False  # they never train

    @property
    def stored_shape(self) -> torch.Size:
        """(E, N, K), or (E, K, N) where ``transposed``."""
        return torch.Size((self.experts, self.layout.rows, self.layout.columns))

    @property
    def shape(self) -> torch.Size:
        """(E, N, K)."""
        e, rows, columns = self.stored_shape
        return torch.Size((e, columns, rows) if self.transposed else (e, rows, columns))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def of(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The values (N, K) of one expert, in memory that nobody keeps."""
        own = tuple(
            part if step == 0 else part.narrow(0, expert * step, step)
            for part, step in zip(self.parts, self.steps, strict=True)
        )
        values = values_of(self.layout, own, dtype, None)
        return values.t() if self.transposed else values


def packed_names(module: nn.Module) -> list[str]:
    """The names that ``module`` reads quantised weights by, or weights that something else is made of."""
    made = vars(module)["_modules"].get("parametrizations") if parametrize.is_parametrized(module) else None
    return [*(() if made is None else made._modules), *mxfp4.names(module)]


def is_known(module: nn.Module, name: str) -> bool:
    """Whether the weight of this name is quantised in a form that is read here."""
    return name in mxfp4.names(module) or _state_of(module, name) is not None


def why_not(module: nn.Module, name: str) -> str | None:
    """Why the quantised weight of this name cannot have an adapter beside it, in a sentence."""
    try:
        read(module, name, False)
    except LoRAStateError as error:
        return str(error)
    return None


def read(module: nn.Module, name: str, transposed: bool) -> PackedExperts:
    """The quantised weight of this name, as it is now.

    Raises:
        LoRAStateError: it is not in a form that is read here.
    """
    if name in mxfp4.names(module):
        layout, parts, steps, experts = mxfp4.read(module, name)
        return PackedExperts(layout, parts, steps, experts, False, again=partial(read, module, name, transposed))
    state = _state_of(module, name)
    if state is None:
        raise LoRAStateError(
            f"{type(module).__name__}.{name} is parametrized, and not by bitsandbytes' replace_parameter_4bit alone: "
            "call torch.nn.utils.parametrize.remove_parametrizations first."
        )
    return _four_bits(module, name, state, transposed)


def _state_of(module: Any, name: str) -> Any:
    """bitsandbytes' quantisation state where that is all that stands between the codes and ``module.name``."""
    held = module._modules.get("parametrizations")
    made = None if held is None else held._modules.get(name)
    only: Any = made[0] if isinstance(made, ParametrizationList) and len(made) == 1 else None
    kind = type(only)
    return only.quant_state if (kind.__module__, kind.__qualname__) == _PARAMETRIZATION else None


def _four_bits(module: Any, name: str, state: Any, transposed: bool) -> PackedExperts:
    kind, codes = type(module).__name__, module.parametrizations[name].original
    experts, rows, columns = state.shape if len(state.shape) == 3 else (1, *state.shape)
    numbers, blocks = rows * columns, rows * columns // state.blocksize
    if len(state.shape) != 3 or numbers % state.blocksize or state.quant_type not in _TYPES:
        raise LoRAStateError(
            f"{kind}.{name} is a 4-bit weight {tuple(state.shape)}, {state.quant_type!r}, in blocks of "
            f"{state.blocksize}: it must be (experts, rows, columns) of 'nf4' or 'fp4', and each expert whole blocks. "
            "Quantize it with a smaller blocksize."
        )
    if codes.requires_grad or 2 * codes.nbytes != experts * numbers or codes.device != state.absmax.device:
        raise LoRAStateError(
            f"{kind}.{name} has 4-bit codes {tuple(codes.shape)} in {codes.dtype} on {codes.device} with statistics on "
            f"{state.absmax.device}, and has to be frozen, whole and in one place. Move the model to its device first, "
            "and quantize it there."
        )
    parts: tuple[Tensor, ...] = (codes.detach().view(torch.uint8).view(-1, 1), state.absmax)
    steps: tuple[int, ...] = (numbers // 2, blocks)
    nested = 0
    if state.nested and blocks % state.state2.blocksize == 0:
        nested = state.state2.blocksize
        parts += (state.state2.absmax, state.state2.code, state.offset)
        steps += (blocks // nested, 0, 0)
    elif state.nested:  # an expert's statistics are no whole blocks: those of all are made, a number for each block
        parts = (parts[0], _absmax(state))
    spec = f"{state.quant_type}/{state.blocksize}/{nested}/"
    return PackedExperts(
        Layout("bitsandbytes-4bit", spec, rows, columns, len(parts)), parts, steps, experts, transposed, state.dtype
    )


def _absmax(state: Any) -> Tensor:
    second = state.state2
    operator = torch.ops.bitsandbytes.dequantize_blockwise.default
    found: Tensor = operator(state.absmax, second.absmax, second.code, second.blocksize, torch.float32)
    return found.add_(state.offset)
