"""``Packed``: a frozen weight that has to be dequantised to be multiplied; and what its form must answer.

The values are made once for each pass, in a buffer of PyTorch's allocator, and nobody keeps them: a backward pass makes
them again. A compiler sees one operator, ``lora_kernels::dequantize``. ``after`` is a tensor that the values wait for:
with dy there, no compiler can join a backward's values with a forward's and keep them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import MissingExtraError
from ..ops import dequantize, reads_codes

__all__ = ["Form", "Layout", "Packed", "package", "values_of"]


def package(name: str) -> Any:
    """A form's package, or a module of it: a saved program has a weight's tensors alone, and has imported nothing.

    Raises:
        MissingExtraError: it is not installed.
    """
    found = sys.modules.get(name)
    if found is None:
        try:
            found = import_module(name)
        except ImportError as error:
            raise MissingExtraError(
                f"a quantised weight has values that {name} makes, and it cannot be imported: {error}. Install it: "
                "pip install 'lora-kernels[quant]'."
            ) from error
    return found


class Layout(NamedTuple):
    """What is told of a packed weight besides its tensors; a compiled graph holds it fixed.

    Attributes:
        form: the form's name.
        spec: what the form reads the tensors by: a quantisation type, a size of blocks.
        rows, columns: N and K.
        tensors: how many tensors there are.
    """

    form: str
    spec: str
    rows: int
    columns: int
    tensors: int


@dataclass(frozen=True)
class Packed:
    """A frozen weight (N, K) in another form than its values.

    Attributes:
        layout: see :class:`Layout`.
        parts: the tensors that hold it, none of which is copied.
        dtype: the dtype that it is multiplied in; None is the input's.
    """

    layout: Layout
    parts: tuple[Tensor, ...]
    dtype: torch.dtype | None = None

    requires_grad = False  # it never trains
    stands_for_a_tensor = True  # ``checks`` lies below, and knows it by this

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return torch.Size((self.layout.rows, self.layout.columns))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors take."""
        return sum(part.nbytes for part in self.parts)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The backends that multiply few tokens with it as it is stored; all else is done with its values."""
        form, spec, rows, columns, _ = self.layout
        return ("native",) if reads_codes(list(self.parts), form, spec, rows, columns) else ()

    def dequantize(
        self, dtype: torch.dtype | None = None, out: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        """The values (N, K) in ``dtype`` (None: the compute dtype, else fp32), written to ``out`` where it is given."""
        wanted = out.dtype if out is not None else dtype or self.dtype or torch.float32
        values = values_of(self.layout, self.parts, wanted, after)
        return values if out is None else out.copy_(values)


def values_of(layout: Layout, parts: Sequence[Tensor], dtype: torch.dtype, after: Tensor | None) -> Tensor:
    """The values (N, K) of a packed weight in ``dtype``, in memory of their own."""
    return dequantize(list(parts), layout.form, layout.spec, layout.rows, layout.columns, dtype, after)


class Form(Protocol):
    """What each form answers. A module here is the package's linear layer, or a LoRA layer that stands for one."""

    name: str
    package: str  # what has to be installed

    def knows(self, module: nn.Module) -> bool:
        """Whether ``module`` computes what the package's own linear layer does, with its weight in this form."""

    def stands_in(self, module: nn.Module) -> bool:
        """Whether ``module`` is the package's linear layer, or a LoRA layer that stands for one."""

    def recover(self, module: Any, weight: Any) -> nn.Parameter:
        """The weight of such a module as the package's own class, of a plain Parameter with its data."""

    def why_not(self, module: nn.Module) -> str | None:
        """Why such a module cannot have an adapter now, in a sentence; None where it can.

        Raises:
            LoRAStateError: the weight's values are lost, and the package's own layer would not tell.
        """

    def read(self, module: Any, weight: Tensor) -> Packed:
        """``weight``, of ``module``, as it is now; nothing is copied."""

    def prepare(self, module: Any) -> None:
        """Brings a module that is about to be replaced into the form's usual state."""

    def quantize(self, module: Any, weight: Any, values: Tensor) -> nn.Parameter:
        """``values`` (N, K) in fp32 in this form, with the settings of ``weight``; that stays as it is."""

    def settle(self, module: Any) -> None:
        """Brings what a package's layer holds into line with the weight that a LoRA layer has just left to it."""

    def load(self, module: Any, weight: Tensor, state_dict: Mapping[str, Any], prefix: str) -> set[str]:
        """Takes what ``state_dict`` has of the weight besides its own tensor; returns the keys."""
