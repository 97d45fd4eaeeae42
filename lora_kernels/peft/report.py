"""What ``fuse_peft`` and ``unfuse_peft`` report, and how many calls went which way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..errors import InvalidTypeError, LoRAStateError
from ..models.report import SkippedLayer, count, group_lines, skipped_lines, some

__all__ = ["BASE", "FUSED", "Calls", "FuseReport", "FusedLayer", "UnfuseReport", "calls", "counter"]

FUSED, BASE = "fused", "base"
_ATTRIBUTE = "_lora_kernels_calls"


def counter(layer: nn.Module) -> Counter[str]:
    """``layer``'s counts: FUSED, BASE, or the reason why PEFT's own forward ran."""
    counts: Counter[str] | None = layer.__dict__.get(_ATTRIBUTE)
    if counts is None:
        counts = layer.__dict__[_ATTRIBUTE] = Counter()
    return counts


def drop_counter(layer: nn.Module) -> Counter[str]:
    """Takes the counts off ``layer``."""
    counts: Counter[str] = layer.__dict__.pop(_ATTRIBUTE, None) or Counter()
    return counts


@dataclass(frozen=True)
class Calls:
    """How many calls of the fused layers went which way. Calls inside of ``torch.compile`` are not counted.

    Attributes:
        fused: one fused product for base and adapters.
        base: no adapter acted (disabled, merged, or none active on the layer): the base layer alone.
        own: calls that PEFT's own forward ran, by reason.
    """

    fused: int = 0
    base: int = 0
    own: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The fused part of the calls on which an adapter acted, 0 to 1; 1 where there was none."""
        acted = self.fused + sum(self.own.values())
        return self.fused / acted if acted else 1.0

    def __str__(self) -> str:
        lines = [f"calls: {self.fused} fused, {sum(self.own.values())} by PEFT's own forward, {self.base} base alone"]
        by_count = sorted(self.own.items(), key=lambda item: -item[1])
        return "\n".join([*lines, *(f"  {number} by PEFT: {reason}" for reason, number in by_count)])


def total(counters: Iterator[Counter[str]]) -> Calls:
    """The sum of some layers' counts."""
    counts: Counter[str] = Counter()
    for one in counters:
        counts.update(one)
    return Calls(counts.pop(FUSED, 0), counts.pop(BASE, 0), dict(counts))


def calls(model: nn.Module) -> Calls:
    """How many calls of ``model``'s fused layers were fused, and why the others were not.

    Counted since :func:`~lora_kernels.fuse_peft`; a copy of a model goes on from the counts of the original.

    Raises:
        InvalidTypeError: ``model`` is no module.
        LoRAStateError: no layer of it is fused.

    Example:
        >>> import torch, lora_kernels
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        >>> report = lora_kernels.fuse_peft(model)
        >>> with torch.no_grad():
        ...     y = model(torch.ones(2, 4))
        >>> print(lora_kernels.peft.calls(model))
        calls: 1 fused, 0 by PEFT's own forward, 0 base alone
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"a model of type {type(model).__name__} was given: it must be a torch.nn.Module.")
    counters = [counter(module) for module in model.modules() if _ATTRIBUTE in vars(module)]
    if not counters:
        raise LoRAStateError(
            f"calls was asked of {type(model).__name__}, none of whose layers is fused. Call fuse_peft(model) first."
        )
    return total(iter(counters))


@dataclass(frozen=True)
class FusedLayer:
    """A layer that became a ``FusedLoraLinear``.

    Attributes:
        name: its dotted name.
        in_features, out_features: K and N.
        adapters: the rank of each adapter on it, by name.
    """

    name: str
    in_features: int
    out_features: int
    adapters: dict[str, int]

    def __str__(self) -> str:
        ranks = ", ".join(f"{adapter} r={r}" for adapter, r in self.adapters.items())
        return f"{self.name} ({self.in_features} -> {self.out_features}), {ranks or 'no adapter'}"


@dataclass(frozen=True)
class FuseReport:
    """What :func:`lora_kernels.fuse_peft` did. ``len`` and iteration go over the layers that it fused.

    Attributes:
        layers: the layers that were fused.
        already: names of those that had been before.
        skipped: PEFT's LoRA layers that stay its own, each with the reason.
        notes: sentences about fused layers that PEFT's own forward will run as things stand.
        groups: the names of layers that read one x and run together in training; see
            :func:`lora_kernels.share_inputs`.
    """

    layers: tuple[FusedLayer, ...]
    already: tuple[str, ...]
    skipped: tuple[SkippedLayer, ...]
    notes: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    _counters: tuple[Counter[str], ...] = field(default=(), repr=False, compare=False)

    @property
    def calls(self) -> Calls:
        """How the calls of all these layers went until now, those that were fused before included."""
        return total(iter(self._counters))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[FusedLayer]:
        return iter(self.layers)

    def __str__(self) -> str:
        lines = [f"fused {count(len(self.layers), 'layer')}:", *(f"  {layer}" for layer in self.layers)]
        if not self.layers:
            lines = ["fused no layer"]
        if self.already:
            lines.append(f"fused before: {some(self.already)}")
        if self.skipped:
            lines.append(f"PEFT's own stay {count(len(self.skipped), 'layer')}:")
            lines += skipped_lines(self.skipped)
        lines += group_lines(self.groups)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), str(self.calls)])


@dataclass(frozen=True)
class UnfuseReport:
    """What :func:`lora_kernels.unfuse_peft` did. ``len`` and iteration go over the layers' names.

    Attributes:
        names: of the layers that are PEFT's ``lora.Linear`` again.
        calls: how their calls went while they were fused.
    """

    names: tuple[str, ...]
    calls: Calls

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __str__(self) -> str:
        return f"unfused {count(len(self.names), 'layer')}: {some(self.names)}\n{self.calls}"
