"""``Branch``: one low-rank branch beside a weight, with what the plain layer does not have: a gain, an activation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .activations import check_activation
from .errors import InvalidArgumentError
from .tensors import are_negated, resolved
from .weights.packed import Packed

__all__ = ["Branch", "PackedBranch"]


# Not frozen, though nobody writes to one: that would take microseconds more for each layer's call.
@dataclass(eq=False, slots=True)
class Branch:
    """One output y = g * (x Wᵀ + s σ(drop(x) Aᵀ) Bᵀ) + b of an x (..., K).

    Attributes:
        weight, lora_a, lora_b: W (N, K), A (R, K), B (N, R).
        bias: b (N,) or None.
        scaling: s.
        gain: g (N,), one factor for each row of W, or None.
        activation: σ's name.
        state: dropout's, where it was drawn already.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None
    scaling: float = 1.0
    gain: Tensor | None = None
    activation: str = "identity"
    state: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As ``BranchesFunction`` takes them."""
        return self.weight, self.lora_a, self.lora_b, self.bias, self.gain

    @property
    def is_plain(self) -> bool:
        """Whether it is what ``lora_linear`` computes."""
        return self.gain is None and self.activation == "identity"

    def resolved(self) -> Branch:
        """The same, its tensors' memory as ``tensors.resolved`` has it."""
        if not are_negated(*self.tensors):
            return self
        named = ("weight", "lora_a", "lora_b", "bias", "gain")
        return replace(self, **{name: resolved(getattr(self, name)) for name in named})

    def check(self, x: Tensor) -> None:
        """Raises for a gain or an activation that cannot be; the other tensors are checked with x, in ``gate``."""
        check_activation(self.activation)
        gain = self.gain
        if gain is not None and (gain.shape != self.weight.shape[:1] or gain.device != x.device):
            raise InvalidArgumentError(
                f"a gain {tuple(gain.shape)} on {gain.device} was given for a weight {tuple(self.weight.shape)} and x "
                f"on {x.device}: it must be (N,), one factor for each row of the weight, on x's device."
            )


@dataclass(eq=False, slots=True)
class PackedBranch(Branch):
    """A branch beside a weight in a quantised form: ``weight`` is a :class:`~.weights.packed.Packed`."""

    weight: Packed  # type: ignore[assignment]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return None, self.lora_a, self.lora_b, self.bias, self.gain

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def is_bare(self) -> bool:
        """Whether it is what ``lora_linear`` would compute with its values."""
        return self.gain is None and self.activation == "identity" and self.state is None

    def computing(self, dtype: torch.dtype) -> PackedBranch:
        """The same, multiplied in ``dtype``."""
        weight = self.weight
        return self if weight.dtype is dtype else replace(self, weight=replace(weight, dtype=dtype))
