"""What ``fuse_peft`` and ``unfuse_peft`` report, and how many calls went which way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import InvalidTypeError, LoRAStateError
from ..models.report import Report, SkippedLayer, note_lines, shape_text, skipped_lines
from ..models.summary import Kind, count, in_a_line, kind_lines, some, span

__all__ = ["BASE", "FUSED", "Calls", "FuseReport", "FusedLayer", "UnfuseReport", "calls", "counter"]

FUSED, BASE = "fused", "base"
_ATTRIBUTE = "_lora_kernels_calls"
_REASONS = 5  # lines of a summary


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


@dataclass(frozen=True, repr=False)
class Calls:
    """How many calls of the fused layers went which way, until they were counted; ``torch.compile``'s are not.

    Printed, the most frequent reasons have a line; ``details()`` has one for each.

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

    def details(self) -> str:
        """The whole text: one line for each reason."""
        return "\n".join(self._lines("when counted", True))

    def __str__(self) -> str:
        return "\n".join(self._lines("when counted", False))

    def __repr__(self) -> str:
        return str(self)

    def _lines(self, when: str, full: bool) -> Iterator[str]:
        own = sum(self.own.values())
        yield f"calls {when}: {self.fused} fused, {own} by PEFT's own forward, {self.base} base alone"
        by_count = sorted(self.own.items(), key=lambda item: -item[1])
        shown = by_count if full or len(by_count) <= _REASONS else by_count[: _REASONS - 1]
        yield from (f"  {number} by PEFT: {reason}" for reason, number in shown)
        if len(shown) < len(by_count):
            rest = sum(number for _, number in by_count[len(shown) :])
            yield f"  {rest} by PEFT: {len(by_count) - len(shown)} other reasons; details() has them"


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
        calls when counted: 1 fused, 0 by PEFT's own forward, 0 base alone
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


@dataclass(frozen=True, repr=False)
class FuseReport(Report):
    """What :func:`lora_kernels.fuse_peft` did. ``len`` and iteration go over the layers that it fused.

    Printed, layers whose names differ only by numbers are one line; ``details()`` has a line for each. The calls are
    those until the moment of printing.

    Attributes:
        layers: the layers that were fused.
        already: names of those that had been before.
        skipped: PEFT's LoRA layers that stay its own, each with the reason.
        notes: sentences about fused layers that PEFT's own forward will run as things stand, or that nobody calls.
        groups: the names of layers that read one x and run together in training; see
            :func:`lora_kernels.share_inputs`.
        mlps: names of gated MLPs that run in one pass in training; see :class:`lora_kernels.FusedLoRAMLP`.
        plain_mlps: gated MLPs with adapters that do not, each with the reason.
    """

    layers: tuple[FusedLayer, ...]
    already: tuple[str, ...]
    skipped: tuple[SkippedLayer, ...]
    notes: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    mlps: tuple[str, ...] = ()
    plain_mlps: tuple[SkippedLayer, ...] = ()
    _counters: tuple[Counter[str], ...] = field(default=(), repr=False, compare=False)

    @property
    def calls(self) -> Calls:
        """How the calls of all these layers went until now, those that were fused before included."""
        return total(iter(self._counters))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[FusedLayer]:
        return iter(self.layers)

    def _lines(self, full: bool) -> Iterator[str]:
        yield f"fused {count(len(self.layers), 'layer')}:" if self.layers else "fused no layer"
        if full:
            yield from (f"  {layer}" for layer in self.layers)
        else:
            yield from kind_lines(self.layers, lambda layer: layer.name, _FACTS, _text)
        if self.already:
            yield f"fused before: {some(self.already) if full else in_a_line(self.already)}"
        if self.skipped:
            yield f"left as PEFT's own {count(len(self.skipped), 'layer')}:"
            yield from skipped_lines(self.skipped, full)
        yield from self._group_lines(self.groups, full)
        yield from self._mlp_lines(self.mlps, self.plain_mlps, full)
        yield from note_lines("note when fused", self.notes, full)
        yield from self._since(self.layers, _adapters, "unfused or taken out of the model")
        yield from self.calls._lines("so far" if self._watch.begun else "when counted", full)


def _adapters(layer: Any) -> dict[str, int] | None:
    """The ranks of a row, or of a layer; None of one that is not fused."""
    if isinstance(layer, FusedLayer):
        return layer.adapters
    return {name: a.weight.shape[0] for name, a in layer.lora_A.items()} if _ATTRIBUTE in vars(layer) else None


_FACTS = (
    lambda layer: (layer.in_features, layer.out_features, tuple(layer.adapters.items())),
    lambda layer: (layer.in_features, layer.out_features, tuple(layer.adapters)),
    lambda layer: None,
)


def _text(kind: Kind, layers: Sequence[FusedLayer]) -> str:
    names = list(dict.fromkeys(name for layer in layers for name in layer.adapters))
    ranks = {name: span(layer.adapters[name] for layer in layers if name in layer.adapters) for name in names}
    told = some([f"{name} r = {rank}" for name, rank in ranks.items()])
    return f"{kind} {shape_text(layers)}, {told or 'no adapter'}"


@dataclass(frozen=True, repr=False)
class UnfuseReport(Report):
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

    def _lines(self, full: bool) -> Iterator[str]:
        names = ", ".join(self.names) if full else in_a_line(self.names)
        yield f"unfused {count(len(self.names), 'layer')}: {names}"
        yield from self.calls._lines("while fused", full)
