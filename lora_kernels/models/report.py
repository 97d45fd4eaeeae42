"""What the functions of ``models`` report: dataclasses to read in programs, and ``print`` for people.

Printed, a report is a screen long whatever the size of the model, and true at that moment: what may have changed since
it was made is asked of the model, or told as of then. ``details()`` names every layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from .summary import MOST, Kind, arrow, count, in_a_line, kind_lines, kinds, some, span
from .watch import Watch

__all__ = [
    "LoadReport",
    "MergeReport",
    "ReplaceReport",
    "ReplacedLayer",
    "Report",
    "RestoreReport",
    "RestoredLayer",
    "ShareReport",
    "SkippedLayer",
    "note_lines",
    "skipped_lines",
]

_SENTENCES = 3  # lines of reasons, and of notes
_NUMBER = re.compile(r"\d+")

R = TypeVar("R", bound="Report")


class Report:
    """What reports have in common: their text, and the model that it is asked of, which they do not keep alive."""

    _watch = Watch()

    def of(self: R, model: nn.Module, names: Iterable[str]) -> R:
        """This report, with ``model`` and its layers ``names`` to ask for what changes."""
        object.__setattr__(self, "_watch", Watch(model, names))
        return self

    def details(self) -> str:
        """The whole text: one line for each layer."""
        return "\n".join(self._lines(True))

    def __str__(self) -> str:
        return "\n".join(self._lines(False))

    def __repr__(self) -> str:
        return str(self)

    def __deepcopy__(self: R, memo: Any) -> R:
        return copy.copy(self)

    def _lines(self, full: bool) -> Iterator[str]:
        raise NotImplementedError

    def _since(self, layers: Sequence[Any], settings: Callable[[Any], object], gone_by: str) -> Iterator[str]:
        """What became of ``layers``: rows whose ``settings`` are compared with their layers', None of one that left."""
        if self._watch.model is None or not layers:
            return
        here = self._watch.layers()
        now = [(row, settings(here[row.name]) if row.name in here else None) for row in layers]
        gone = sum(found is None for _, found in now)
        changed = sum(found not in (None, settings(row)) for row, found in now)
        for number, what in ((gone, gone_by), (changed, "given other adapters, ranks or alphas")):
            if number:
                which = "all" if number == len(layers) else f"{number} of the"
                yield f"since then {which} {count(len(layers), 'layer')} {_was(number)} {what}"

    def _group_lines(self, groups: Sequence[Sequence[str]], full: bool) -> Iterator[str]:
        """The groups that run together, in a line."""
        if groups:
            names = [" + ".join(group) for group in groups]
            yield f"{self._groups(groups)}: {some(names) if full else ', '.join(map(str, _group_kinds(groups)))}"

    def _mlp_lines(self, mlps: Sequence[str], plain: Sequence[SkippedLayer], full: bool) -> Iterator[str]:
        """The gated MLPs that are one pass, in a line; and those that are not, with the reasons."""
        if mlps:
            here = {} if self._watch.model is None else self._watch.layers()
            now = sum(hasattr(here.get(name), "why_plain") for name in mlps)
            still = "" if now == len(mlps) or not here else f", of which {now or 'none'} {_is(now)} so now"
            names = some(mlps) if full else ", ".join(_group_kinds([(name,) for name in mlps]))
            yield f"{count(len(mlps), 'gated MLP')} in one pass{still}: {names}"
        if plain:
            yield f"layer by layer {count(len(plain), 'gated MLP')}:"
            yield from skipped_lines(plain, full)

    def _groups(self, groups: Sequence[Sequence[str]]) -> str:
        now = self._watch.together(groups)
        still = "" if now in (None, len(groups)) else f", of which {now or 'none'} {_runs(now)} together now"
        return f"{count(len(groups), 'group')} of layers with one input{still}"


def _was(number: int | None) -> str:
    return "was" if number == 1 else "were"


def _is(number: int) -> str:
    return "is" if number < 2 else "are"


def _runs(number: int | None) -> str:
    return "run" if number and number > 1 else "runs"


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
        experts: how many experts, each with such an adapter, where ``name`` is a stacked Parameter's; else 0.
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
    experts: int = 0

    def __str__(self) -> str:
        also = f", also {', '.join(p for p in self.places if p != self.name)}" if len(self.places) > 1 else ""
        shape = f"{self.in_features} -> {self.out_features}"
        shape += f" of each of {self.experts} experts" if self.experts else ""
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


@dataclass(frozen=True, repr=False)
class ReplaceReport(Report):
    """What :func:`lora_kernels.replace_linear` did. ``len`` and iteration go over the replaced layers.

    Printed, layers whose names differ only by numbers are one line; ``details()`` has a line for each. The parameters
    that train are those of the moment of printing, as long as the model exists.

    Attributes:
        layers: the replaced layers.
        skipped: modules that the configuration names and that were left alone, each with the reason.
        notes: sentences about entries of the configuration that had no effect.
        groups: the names of layers that read one x and run together in training; see
            :func:`lora_kernels.share_inputs`.
        adapter_parameters: how many numbers the adapters hold.
        trainable, total: parameters of the model that train, and all of them, counted after the replacement.
        mlps: names of gated MLPs that run in one pass in training; see :class:`lora_kernels.FusedLoRAMLP`.
        plain_mlps: gated MLPs with adapters that do not, each with the reason.
    """

    layers: tuple[ReplacedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    notes: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    adapter_parameters: int
    trainable: int
    total: int
    mlps: tuple[str, ...] = ()
    plain_mlps: tuple[SkippedLayer, ...] = ()

    @property
    def percent(self) -> float:
        """The share of the model's parameters that train, in percent, counted after the replacement."""
        return _percent(self.trainable, self.total)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[ReplacedLayer]:
        return iter(self.layers)

    def _lines(self, full: bool) -> Iterator[str]:
        yield f"replaced {count(len(self.layers), 'layer')}:"
        yield from _layer_lines(self.layers, full)
        if self.skipped:
            yield f"left alone {count(len(self.skipped), 'module')}:"
            yield from skipped_lines(self.skipped, full)
        yield from self._group_lines(self.groups, full)
        yield from self._mlp_lines(self.mlps, self.plain_mlps, full)
        yield from note_lines("note", self.notes, full)
        yield from self._since(self.layers, _rank_and_alpha, "taken out of the model")
        yield from self._trainable_lines()

    def _trainable_lines(self) -> Iterator[str]:
        counts = self._watch.counts()
        if counts is None:
            others, when = self.trainable - self.adapter_parameters, " when the layers were replaced"
            yield _trainable_line(when, self.trainable, self.total)
            if others > 0:
                yield f"  of these {others:,} were not adapters"
            return
        yield _trainable_line("", counts.trainable, counts.total)
        if counts.freezable:
            yield (f"  of these {counts.freezable:,} are not adapters; mark_only_lora_as_trainable(model) freezes them")
        if asked_for := counts.others - counts.freezable:
            yield f"  of these {asked_for:,} are biases and whole modules that the configuration trains"


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
        return f"{self.name}: {self._outcome(self.untied_from)}"

    def _outcome(self, untied_from: Sequence[str]) -> str:
        text = "adapter merged into the weight" if self.merged else "base weight; adapter dropped"
        return f"{text}; no longer shares its weight with {', '.join(untied_from)}" if untied_from else text


@dataclass(frozen=True, repr=False)
class MergeReport(Report):
    """What :func:`lora_kernels.merge_lora` did. ``len`` and iteration go over the names of the merged layers.

    Printed, it tells the largest error; ``details()`` has a line for each layer.

    Attributes:
        errors: by name, ‖Q(W + s B A) - (W + s B A)‖ / ‖W + s B A‖ where the merged weight was quantised again, else
            None.
    """

    errors: dict[str, float | None]

    def __len__(self) -> int:
        return len(self.errors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.errors)

    def _lines(self, full: bool) -> Iterator[str]:
        made = {name: error for name, error in self.errors.items() if error is not None}
        text = f"merged {count(len(self.errors), 'layer')}"
        if made:
            worst = max(made, key=made.__getitem__)
            text += f"; {len(made)} quantized again, relative error of W + s B A at most {made[worst]:.2g} ({worst})"
        yield text
        if full:
            yield from (f"  {name}" + (f": {made[name]:.2g}" if name in made else "") for name in self.errors)


@dataclass(frozen=True, repr=False)
class RestoreReport(Report):
    """What :func:`lora_kernels.restore_linear` did. ``len`` and iteration go over the restored layers.

    Printed, layers whose names differ only by numbers are one line; ``details()`` has a line for each.
    """

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

    def _lines(self, full: bool) -> Iterator[str]:
        yield f"restored {count(len(self.layers), 'layer')}:"
        if full:
            yield from (f"  {layer}" for layer in self.layers)
        else:
            yield from kind_lines(self.layers, _name, (lambda it: (it.merged, bool(it.untied_from)),), _restored_text)
        yield f"adapters merged: {len(self.kept)}; adapters dropped: {len(self.dropped)}"


def _restored_text(kind: Kind, layers: Sequence[RestoredLayer]) -> str:
    untied = [name for layer in layers for name in layer.untied_from]
    return f"{kind}: {layers[0]._outcome([in_a_line(untied)] if untied else [])}"


@dataclass(frozen=True, repr=False)
class LoadReport(Report):
    """What :func:`lora_kernels.load_adapter` did. ``len`` and iteration go over the loaded layers.

    Printed, layers whose names differ only by numbers are one line; ``details()`` has a line for each.

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

    def _lines(self, full: bool) -> Iterator[str]:
        yield f"loaded an adapter into {count(len(self.layers), 'layer')}:"
        yield from _layer_lines(self.layers, full)
        if self.others:
            names = ", ".join(self.others) if full else in_a_line(self.others)
            yield f"loaded {count(len(self.others), 'other tensor')}: {names}"
        yield from note_lines("note", self.notes, full)
        yield from self._since(self.layers, _rank_and_alpha, "taken out of the model")


@dataclass(frozen=True, repr=False)
class ShareReport(Report):
    """What :func:`lora_kernels.share_inputs` did: which layers run together. ``len`` and iteration go over the groups.

    Printed, groups whose names differ only by numbers are one line; ``details()`` has a line for each.

    Attributes:
        groups: the dotted names of each group's layers.
        mlps: names of gated MLPs that run in one pass.
        plain_mlps: gated MLPs with adapters that do not, each with the reason.
    """

    groups: tuple[tuple[str, ...], ...]
    mlps: tuple[str, ...] = ()
    plain_mlps: tuple[SkippedLayer, ...] = ()

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self.groups)

    def _lines(self, full: bool) -> Iterator[str]:
        if not self.groups:
            yield "no group of layers with one input"
        else:
            yield f"{self._groups(self.groups)}:"
        if full:
            yield from (f"  {' + '.join(group)}" for group in self.groups)
        else:
            yield from (f"  {kind}" for kind in _group_kinds(self.groups))
        yield from self._mlp_lines(self.mlps, self.plain_mlps, full)


def _name(row: Any) -> str:
    name: str = row.name
    return name


def _rank_and_alpha(layer: Any) -> object:
    """Of a row, or of a layer; None of a layer that has no adapter."""
    r = getattr(layer, "r", None)
    return None if r is None else (r, layer.lora_alpha)


def _percent(part: int, total: int) -> float:
    return 100.0 * part / total if total else 0.0


def _trainable_line(when: str, trainable: int, total: int) -> str:
    return f"trainable parameters{when}: {trainable:,} of {total:,} ({_percent(trainable, total):.4g} %)"


def _layer_lines(layers: Sequence[ReplacedLayer], full: bool) -> list[str]:
    if full:
        return [f"  {layer}" for layer in layers]
    facts = (
        lambda it: (it.in_features, it.out_features, it.experts, it.r, it.lora_alpha, it.activation),
        lambda it: (it.in_features, it.out_features, it.experts, it.activation),
        lambda it: (bool(it.experts), it.activation),
    )
    return kind_lines(layers, _name, facts, _replaced_text)


def _replaced_text(kind: Kind, layers: Sequence[ReplacedLayer]) -> str:
    first = layers[0]
    facts = [f"{kind} {shape_text(layers)}", f"r = {span(layer.r for layer in layers)}"]
    facts.append(f"alpha = {span(layer.lora_alpha for layer in layers)}")
    if first.experts:
        facts[0] += f" of {span(layer.experts for layer in layers)} experts"
    facts += [first.activation] if first.activation != "identity" else []
    text = f"{', '.join(facts)}: {sum(layer.parameters for layer in layers):,} parameters"
    several = [layer for layer in layers if len(layer.places) > 1]
    if len(several) == 1:
        text += f"; also {', '.join(place for place in several[0].places if place != several[0].name)}"
    elif several:
        text += f"; {len(several)} of them stand at several places"
    return text


def shape_text(layers: Sequence[Any]) -> str:
    """``(4096→1024)``, K and N."""
    sides = (span(layer.in_features for layer in layers), span(layer.out_features for layer in layers))
    return f"({arrow().join(sides)})"


def _group_kinds(groups: Sequence[Sequence[str]]) -> list[str]:
    """Groups by what their layers are called, with their number; the last line is of those that are left over."""
    members = [name for group in groups for name in group]
    labels = {index: kind.label for kind in kinds(members) for index in kind.indices}
    alike: dict[str, int] = {}
    start = 0
    for group in groups:
        label = " + ".join(labels[index] for index in range(start, start + len(group)))
        alike[label] = alike.get(label, 0) + 1
        start += len(group)
    told = [str(Kind(label, [0] * number)) for label, number in alike.items()]
    rest = sum(list(alike.values())[MOST - 1 :])
    return told if len(told) <= MOST else [*told[: MOST - 1], f"{count(rest, 'group')} more; details() names them"]


def skipped_lines(skipped: Sequence[SkippedLayer], full: bool) -> Iterator[str]:
    """One line for each reason, with the first names; reasons that differ by numbers or by the layer's name are one."""
    alike: dict[str, list[SkippedLayer]] = {}
    for layer in skipped:
        alike.setdefault(layer.reason if full else _general(layer), []).append(layer)
    shown = list(alike.items()) if full or len(alike) <= _SENTENCES else list(alike.items())[: _SENTENCES - 1]
    for general, layers in shown:
        names = [layer.name for layer in layers]
        same = len({layer.reason for layer in layers}) == 1
        yield f"  {some(names) if full else in_a_line(names, 2)}: {layers[0].reason if same else general}"
    if len(shown) < len(alike):
        rest = sum(map(len, alike.values())) - sum(len(layers) for _, layers in shown)
        yield f"  {count(rest, 'more module')}, for {len(alike) - len(shown)} other reasons; details() has them"


def _general(layer: SkippedLayer) -> str:
    return _NUMBER.sub("*", layer.reason.replace(repr(layer.name), "its name"))


def note_lines(word: str, notes: Sequence[str], full: bool) -> Iterator[str]:
    """Each note; in a summary the first of them, and how many more there are."""
    shown = notes if full or len(notes) <= _SENTENCES else notes[: _SENTENCES - 1]
    yield from (f"{word}: {note}" for note in shown)
    if len(shown) < len(notes):
        yield f"{len(notes) - len(shown)} more notes; details() has them"
