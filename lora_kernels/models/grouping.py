"""Which layers read one x: ``FusedLoRAGroup`` and ``share_inputs`` say it; self-attention and gated MLPs show it.

What they then do together is in ``shared_input.py``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import called
from ..errors import InvalidArgumentError, InvalidTypeError, LoRAStateError
from ..shared_input import attach, detach, is_shared, shared_inputs, why_called
from .gated import fuse_mlps, mlps_of, unfuse_mlps
from .matching import listed
from .names import joined, plain_modules
from .report import ShareReport

__all__ = ["FusedLoRAGroup", "share_found", "share_inputs", "unshare_inputs"]

# Siblings that read one x where their parent's forward takes one activation: transformers' self-attention (Llama, Qwen,
# Mistral and their kin; BERT's, ViT's) and gated MLPs.
_KNOWN: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
# Parameters of a forward that takes a second activation, as in cross-attention; in the second line, what it may call
# one activation where it takes no other of these.
_SECOND = re.compile(
    r"query|key|value|queries|keys|values|[qkv]|kv|context|memory|latents?|key_value_states|.*(encoder|cross).*"
    r"|(query|key|value)_(states?|layer|tensor|hidden_states?)|object_queries|(spatial|query|key)_position_embeddings"
)
_ACTIVATION = re.compile(r"(.*_)?(hidden_states?|tensor)|inputs")
# DETR's kind adds it to what q and k read, and not to what v reads. Rotary embeddings, which are turned into q and k
# after their products, are a pair, or one tensor that must be given.
_ADDED = "position_embeddings"


class FusedLoRAGroup(nn.Module):
    r"""Layers that read one x, as one module: ``y_1, ..., y_n = group(x)``.

    .. math:: y_i = x W_i^\top + b_i + s_i\,(\mathrm{drop}_i(x) A_i^\top) B_i^\top

    In training one read of x gives all h, and another one gives all da. dx is accumulated in one place instead of
    summed from n. Each adapter keeps its own rank, scaling and dropout mask. Layers that
    :func:`~lora_kernels.share_inputs` has joined run the same way, and stay where they are in the model.

    Args:
        layers: the members by name, or in a list, where their names are "0", "1", ... Each is a ``FusedLoRALinear``, or
            a layer that will be replaced by one. They are the group's children, so a state dict has
            ``group.name.…``.

    Raises:
        InvalidArgumentError: there are fewer than two members, or their in_features differ.
        InvalidTypeError: a member is no linear layer.
        LoRAStateError: a member runs together with others already.

    Example:
        >>> import torch
        >>> from lora_kernels import FusedLoRAGroup, FusedLoRALinear
        >>> group = FusedLoRAGroup({"q": FusedLoRALinear(16, 16, r=4), "v": FusedLoRALinear(16, 8, r=2)})
        >>> q, v = group(torch.ones(2, 5, 16))
        >>> q.shape, v.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 8]))
    """

    def __init__(self, layers: Mapping[str, nn.Module] | Sequence[nn.Module]) -> None:
        super().__init__()
        named = layers if isinstance(layers, Mapping) else {str(i): layer for i, layer in enumerate(layers)}
        for name, layer in named.items():
            if not isinstance(layer, nn.Module) or not hasattr(layer, "in_features"):
                raise InvalidTypeError(
                    f"{name!r} of a FusedLoRAGroup is a {type(layer).__name__}: it must be a linear layer, such as a "
                    "FusedLoRALinear."
                )
        _check_sizes(named)
        _refuse_shared(named)
        for name, layer in named.items():
            self.add_module(name, layer)
        share_found(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each member's output (..., N_i) for x (..., K), in the members' order."""
        common = self._outputs_while_compiling(x) if torch.compiler.is_compiling() else {}
        return tuple(common[i] if i in common else member(x) for i, member in enumerate(self.children()))

    def _outputs_while_compiling(self, x: Tensor) -> dict[int, Tensor]:
        """What members give in common, by their places, where outputs cannot wait from call to call; see there."""
        members: list[Any] = list(self.children())
        if self.training:
            called.note_compiled()
        for shared in shared_inputs(self) if self.training else ():
            if not any(why_called(member) for member in shared.members):
                places = [members.index(member) for member in shared.members]
                return {places[i]: y for i, y in shared.outputs(x).items()}
        return {}


def share_inputs(
    model: nn.Module, names: Sequence[Sequence[str]] | None = None, recompute: bool | None = None
) -> ShareReport:
    """Lets LoRA layers that read one x run together in training: one read of x for all h, one for all da, one dx.

    The layers stay where they are, with their names, adapters and hooks, and you call them as before. The first call
    computes all of them; the other outputs wait for their calls with the same tensor. A layer runs alone if it is
    called with another tensor, or if it is merged, switched off or changed in between. A change through ``.data`` is
    not seen: nothing counts it.

    ``replace_linear`` and ``fuse_peft`` call this function. Without ``names`` it finds q, k, v and gate, up in modules
    whose ``forward`` takes one activation, as in transformers' self-attention and gated MLPs. Cross-attention takes
    two, and is left alone; so is DETR's kind, which adds positions to what q and k read. A group that was found and
    turns out to read different tensors ends by itself at its first step. Named ones stay, with a warning. Under
    ``torch.compile`` a :class:`FusedLoRAGroup` runs together, and layers that were found or named run alone.

    A gated MLP that is found, and has adapters on all of its layers, becomes a :class:`FusedLoRAMLP`: gate, up, the
    activation and down are one pass, compiled too. Where that one cannot run, its layers do as said above.

    Args:
        model: a module that holds ``FusedLoRALinear`` layers, or a PEFT model that ``fuse_peft`` was called on.
        names: for each group, the names that its layers have in their parent. Every parent that holds two or more of
            them as LoRA layers is a group. None finds the groups and the gated MLPs as said above.
        recompute: whether the model's gated MLPs compute gate's and up's outputs again in backward, rather than keep
            them. None leaves that as it is.

    Returns:
        A report of the groups and gated MLPs that were made. Earlier ones stay.

    Raises:
        InvalidTypeError: ``model`` is no module, or a group in ``names`` no list of names.
        InvalidArgumentError: ``names`` match nothing, or layers of different in_features.

    Example:
        >>> from lora_kernels import LoRAConfig, replace_linear, share_inputs
        >>> from torch import nn
        >>> model = nn.ModuleDict({"left": nn.Linear(8, 8), "right": nn.Linear(8, 4)})
        >>> report = replace_linear(model, LoRAConfig(r=2, target_modules=["left", "right"]))
        >>> print(share_inputs(model, [["left", "right"]]))
        1 group of layers with one input:
          left + right
    """
    _check_module(model, "share_inputs")
    report = share_found(model) if names is None else _share_named(model, names)
    if recompute is not None:
        for mlp in mlps_of(model):
            mlp.recompute = recompute
    return report


def _share_named(model: nn.Module, names: Sequence[Sequence[str]]) -> ShareReport:
    found, holders = [], list(plain_modules(model, shared=False))
    for siblings in names:
        if isinstance(siblings, str) or not isinstance(siblings, Iterable):
            raise InvalidTypeError(
                f"{siblings!r} was given to share_inputs as a group: each must be a list of names, such as "
                "['q_proj', 'k_proj', 'v_proj']."
            )
        of_these = [group for prefix, holder in holders if (group := _group(prefix, holder, siblings))]
        if not of_these:
            raise InvalidArgumentError(
                f"{list(siblings)} was given to share_inputs, and no module of {type(model).__name__} holds two of "
                "them as LoRA layers that run by themselves. Give the names that the layers have in their parent, "
                "after replace_linear or fuse_peft."
            )
        for _, members in of_these:
            _check_sizes(members)
        found += of_these
    return _share(model, found)


def share_found(model: nn.Module) -> ShareReport:
    """:func:`share_inputs` of what is found by itself; nothing is refused."""
    holders = ((prefix, holder) for prefix, holder in plain_modules(model, shared=False))
    groups = (_group(prefix, holder, names) for prefix, holder in holders for names in _siblings(holder))
    fitting = [group for group in groups if group is not None and len(_widths(group[1])) == 1]
    report = _share(model, fitting, guessed=True)
    mlps, left = fuse_mlps(model)
    named = [*mlps, *(name for group in report.groups for name in group)]
    return ShareReport(report.groups, tuple(mlps), tuple(left)).of(model, named)


def unshare_inputs(model: nn.Module) -> int:
    """Makes every layer run alone again, those of gated MLPs too; returns how many groups there were.

    Raises:
        InvalidTypeError: ``model`` is no module.

    Example:
        >>> from lora_kernels import FusedLoRAGroup, FusedLoRALinear, unshare_inputs
        >>> unshare_inputs(FusedLoRAGroup([FusedLoRALinear(4, 4, r=2), FusedLoRALinear(4, 4, r=2)]))
        1
    """
    _check_module(model, "unshare_inputs")
    unfuse_mlps(model)
    return sum(detach(holder) for holder in model.modules())


def _group(prefix: str, holder: nn.Module, siblings: Sequence[str]) -> tuple[nn.Module, dict[str, Any]] | None:
    """``holder`` and those of its children called ``siblings`` that can run together and do not yet; None if few."""
    named = {joined(prefix, name): holder._modules.get(name) for name in siblings}
    members = {name: m for name, m in named.items() if m is not None and _can_share(m) and not is_shared(m)}
    return (holder, members) if len(set(members.values())) > 1 else None


def _share(model: nn.Module, found: list[tuple[nn.Module, dict[str, Any]]], guessed: bool = False) -> ShareReport:
    groups = []
    for holder, members in found:
        if not any(is_shared(member) for member in members.values()):  # a holder may stand at several places
            named = isinstance(holder, FusedLoRAGroup)
            attach(holder, list(dict.fromkeys(members.values())), guessed and not named)
            groups.append(tuple(members))
    return ShareReport(tuple(groups)).of(model, [name for group in groups for name in group])


def _siblings(holder: nn.Module) -> list[tuple[str, ...]]:
    """The names of ``holder``'s children that read one x."""
    if isinstance(holder, FusedLoRAGroup):
        return [tuple(holder._modules)]
    here = holder._modules
    known = [names for names in _KNOWN if names[0] in here and sum(name in here for name in names) > 1]
    return known if known and _takes_one_activation(holder) else []


def _takes_one_activation(holder: nn.Module) -> bool:
    """Whether ``holder.forward`` is declared to take one activation to project, and not a second one.

    Names and annotations tell; no source is read. Where they are wrong, the group ends at its first step.
    """
    try:
        parameters = list(inspect.signature(type(holder).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not named or any(_SECOND.fullmatch(name) for name in named):
        return False
    if sum(_ACTIVATION.fullmatch(name) is not None for name in named) > 1:
        return False
    return _ADDED not in named or not _is_optional_tensor(named[_ADDED])


def _is_optional_tensor(parameter: inspect.Parameter) -> bool:
    """Whether ``parameter`` is annotated as one tensor or None."""
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else str(annotation)
    return "Tensor" in text and ("None" in text or "Optional" in text) and "tuple" not in text.lower()


def _can_share(module: nn.Module) -> bool:
    return hasattr(module, "shared_branch")


def _widths(members: Mapping[str, Any]) -> set[int]:
    return {member.in_features for member in members.values()}


def _check_sizes(members: Mapping[str, Any]) -> None:
    if len(members) < 2:
        raise InvalidArgumentError(f"{len(members)} layer was given as a group: two or more can share an input.")
    if len(_widths(members)) > 1:
        sizes = ", ".join(f"{name} {member.in_features}" for name, member in members.items())
        raise InvalidArgumentError(
            f"layers of different in_features were given as one group: {sizes}. Layers that read one x have one."
        )


def _refuse_shared(members: Mapping[str, nn.Module]) -> None:
    if shared := [name for name, member in members.items() if is_shared(member)]:
        raise LoRAStateError(
            f"{listed(shared)} runs in common with other layers already. Call unshare_inputs on the model that holds "
            "it first."
        )


def _check_module(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"{function} was given a {type(model).__name__}: it must be a torch.nn.Module.")
