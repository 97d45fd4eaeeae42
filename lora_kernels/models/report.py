"""What the functions of ``models`` report: dataclasses to read in programs, and ``print`` for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "LoadReport",
    "ReplaceReport",
    "ReplacedLayer",
    "RestoreReport",
    "RestoredLayer",
    "ShareReport",
    "SkippedLayer",
    "count",
    "group_lines",
    "skipped_lines",
    "some",
]

_NAMES_SHOWN = 4  # of the layers that one line tells of


@dataclass(frozen=True)
class ReplacedLayer:
    """A layer that became a ``FusedLoRALinear``.

    Attributes:
        name: its dotted name, the one that matched.
        places: all of its dotted names; more than one where the module is shared.
        in_features, out_features: K and N.
        r, lora_alpha, scaling: of its adapter.
        parameters: how many numbers the adapter holds.
        activation: what stands between A and B.
    """

    name: str
    places: tuple[str, ...]
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    scaling: float
    parameters: int
    activation: str = "identity"

    def __str__(self) -> str:
        also = f", also {', '.join(p for p in self.places if p != self.name)}" if len(self.places) > 1 else ""
        shape = f"{self.in_features} -> {self.out_features}"
        activation = "" if self.activation == "identity" else f", {self.activation}"
        sizes = f"r={self.r}, alpha={self.lora_alpha:g}{activation}, {self.parameters:,} parameters"
        return f"{self.name} ({shape}), {sizes}{also}"


@dataclass(frozen=True)
class SkippedLayer:
    """A module that the configuration names and that was left alone; ``reason`` is a sentence."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class ReplaceReport:
    """What :func:`lora_kernels.replace_linear` did. ``len`` and iteration go over the replaced layers.

    Attributes:
        layers: the replaced layers.
        skipped: modules that the configuration names and that were left alone, each with the reason.
        notes: sentences about entries of the configuration that had no effect.
        groups: the names of layers that read one x and run together in training; see
            :func:`lora_kernels.share_inputs`.
        adapter_parameters: how many numbers the adapters hold.
        trainable, total: parameters of the model that train, and all of them, counted after the replacement.
    """

    layers: tuple[ReplacedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    notes: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    adapter_parameters: int
    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """The share of the model's parameters that train, in percent."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[ReplacedLayer]:
        return iter(self.layers)

    def __str__(self) -> str:
        lines = [f"replaced {count(len(self.layers), 'layer')}:", *(f"  {layer}" for layer in self.layers)]
        if self.skipped:
            lines += [f"left alone {count(len(self.skipped), 'module')}:", *skipped_lines(self.skipped)]
        lines += group_lines(self.groups)
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"trainable parameters: {self.trainable:,} of {self.total:,} ({self.percent:.4g} %)")
        if self.trainable > self.adapter_parameters:
            lines.append(
                f"  of these {self.trainable - self.adapter_parameters:,} are not adapters; "
                "mark_only_lora_as_trainable(model) freezes them"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class RestoredLayer:
    """A layer that is a plain ``nn.Linear`` again.

    Attributes:
        name: its dotted name.
        places: all of its dotted names.
        merged: True: its weight holds the adapter; False: the adapter was dropped.
        untied_from: names of parameters that shared the base weight and do not share the merged one.
    """

    name: str
    places: tuple[str, ...]
    merged: bool
    untied_from: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = "adapter merged into the weight" if self.merged else "base weight; adapter dropped"
        untied = f"; no longer shares its weight with {', '.join(self.untied_from)}" if self.untied_from else ""
        return f"{self.name}: {text}{untied}"


@dataclass(frozen=True)
class RestoreReport:
    """What :func:`lora_kernels.restore_linear` did. ``len`` and iteration go over the restored layers."""

    layers: tuple[RestoredLayer, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the layers whose weight holds the adapter."""
        return tuple(layer.name for layer in self.layers if layer.merged)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the layers whose adapter was dropped."""
        return tuple(layer.name for layer in self.layers if not layer.merged)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[RestoredLayer]:
        return iter(self.layers)

    def __str__(self) -> str:
        lines = [f"restored {count(len(self.layers), 'layer')}:", *(f"  {layer}" for layer in self.layers)]
        lines.append(f"adapters merged: {len(self.kept)}; adapters dropped: {len(self.dropped)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class LoadReport:
    """What :func:`lora_kernels.load_adapter` did. ``len`` and iteration go over the loaded layers.

    Attributes:
        layers: the layers whose adapters were loaded.
        others: names of what was loaded into the model besides: biases, modules that were saved whole.
        notes: sentences about what is not as one might expect.
    """

    layers: tuple[ReplacedLayer, ...]
    others: tuple[str, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[ReplacedLayer]:
        return iter(self.layers)

    def __str__(self) -> str:
        lines = [
            f"loaded an adapter into {count(len(self.layers), 'layer')}:",
            *(f"  {layer}" for layer in self.layers),
        ]
        if self.others:
            lines.append(f"loaded {count(len(self.others), 'other tensor')}: {', '.join(self.others)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@dataclass(frozen=True)
class ShareReport:
    """What :func:`lora_kernels.share_inputs` did: which layers run together. ``len`` and iteration go over the groups.

    Attributes:
        groups: the dotted names of each group's layers.
    """

    groups: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self.groups)

    def __str__(self) -> str:
        lines = [f"{count(len(self), 'group')} of layers with one input:", *(f"  {', '.join(group)}" for group in self)]
        return "\n".join(lines) if self.groups else "no group of layers with one input"


def skipped_lines(skipped: Sequence[SkippedLayer]) -> Iterator[str]:
    """One line for each reason, with the first names."""
    names: dict[str, list[str]] = {}
    for layer in skipped:
        names.setdefault(layer.reason, []).append(layer.name)
    for reason, alike in names.items():
        yield f"  {some(alike)}: {reason}"


def group_lines(groups: Sequence[Sequence[str]]) -> Iterator[str]:
    """One line for the groups that run together, with the first of them."""
    if groups:
        yield f"{count(len(groups), 'group')} of layers with one input: {some([' + '.join(group) for group in groups])}"


def some(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def count(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
