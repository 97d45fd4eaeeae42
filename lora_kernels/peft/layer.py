"""``FusedLoraLinear``: PEFT's ``lora.Linear`` with its forward on the fused operators."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, dispatch_default
from torch import Tensor, nn

from .. import storage, switching
from ..branches import Branch, PackedBranch
from ..dispatch import Problem
from ..explaining.report import IN_PARTS, of_packed
from ..gate import device_type_of, is_autocast_enabled, run_branch, run_plain
from ..reference import adapter_dtype
from ..shared_input import NO_OTHERS, SharedInput, known_forward, mark
from ..tensors import PLAIN_TENSORS
from ..weights import known
from ..weights.by_codes import number_of
from . import dora as peft_dora
from .conditions import is_transposed, own_parameter, plain_parts, why_adapter, why_base, why_call, why_dtypes
from .experts import FusedParamWrapper, ParamWrapper, why_not_fusable_experts
from .report import BASE, FUSED, counter
from .scalings import as_one

__all__ = [
    "FUSED_CLASSES",
    "FusedForward",
    "FusedLoraLinear",
    "become_fused",
    "build_layer",
    "create_fused",
    "why_not_fusable",
]

_Behind: Any = Linear if TYPE_CHECKING else object

_BASE_ROWS = "__base__"  # PEFT's name, in adapter_names, for rows without an adapter


class FusedForward(_Behind):  # type: ignore[misc]
    """What fused layers have in common. An object changes its class only for one whose first base is its own class.

    So PEFT's class is the first base, and ``OVER_PEFTS`` stands in the fused class itself.
    """

    _pefts: ClassVar[Any]  # PEFT's class

    _shared: tuple[SharedInput, int] | None = None  # the pass in common with layers that read the same x; and the place
    _disable_adapters: bool
    _asks: bool = False  # whether PEFT's flag alone does not tell if adapters act; see switching.py

    @known_forward
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (..., N) for x (..., K), in the base layer's output dtype; arguments as PEFT's forward."""
        if self._shared is not None and self.training and not args and not kwargs:
            y = self._shared[0].take(self._shared[1], x)
            if y is not None:
                self._count(FUSED)
                return y
        if not args and not kwargs and (parts := self._plain_parts(x)) is not None:
            self._count(FUSED)
            return run_plain(x, *parts, None)
        rows = kwargs.get("adapter_names")
        if rows is not None:
            self._check_forward_args(x, *args, **kwargs)
        adapters = self._acting_adapters(rows)
        if not adapters:
            return self._by_peft(BASE, x, args, kwargs)
        reason = self._why_own(x, adapters, rows, args, kwargs)
        if reason is not None:
            return self._by_peft(reason, x, args, kwargs)
        self._count(FUSED)
        return self._fused(x, adapters) if rows is None else self._fused_rows(x, rows, adapters)

    def shared_branch(self, x: Tensor) -> tuple[Branch, float] | None:
        """See :class:`~lora_kernels.shared_input.Member`."""
        if self.training and (parts := self._plain_parts(x)) is not None:
            *of_branch, p = parts
            return Branch(*of_branch), p
        if self.why_alone(x) is not None:
            return None
        adapters = self._acting_adapters(None)
        return self._branch(adapters), self._p(adapters[0])

    def _plain_parts(self, x: Any) -> tuple[Any, Any, Any, Any, float, float] | None:
        """As ``conditions.plain_parts``, of the one adapter that acts."""
        active = self._active_adapter
        name = active[0] if type(active) is list and len(active) == 1 else active
        if self._disable_adapters or self._asks or self.merged_adapters or self.lora_variant or type(name) is not str:
            return None
        return plain_parts(self, name, x)

    def why_alone(self, x: Tensor | None) -> str | None:
        """Why it cannot run in a pass with other layers now, in a clause; None: it can."""
        if not self.training:
            return "it is in evaluation"
        adapters = self._acting_adapters(None)
        if not adapters:
            return "no adapter acts"
        given = x if x is not None else self.weight.detach()
        if (reason := self._why_own(given, adapters, None, (), {})) is not None:
            return reason
        matrices = [self.get_base_layer(), *(of[name] for of in (self.lora_A, self.lora_B) for name in adapters)]
        if not all(storage.is_here(module, own_parameter(module, "weight")) for module in matrices):
            return "its values are elsewhere"
        if self._p(adapters[0]) == 0.0:
            return None
        if adapters[0] in self.lora_variant:
            return "DoRA with dropout takes two products"
        packed = known.packed(self.get_base_layer())
        if x is None or packed is None:
            return None
        # Dropout's state is drawn for x as it is multiplied.
        return "x is multiplied in another dtype" if packed.dtype not in (None, x.dtype) else None

    def note_pass(self) -> None:
        """Counts a call that ran in a pass with others."""
        self._count(FUSED)

    def sharing_state(self) -> tuple[Any, ...]:
        adapters = self._acting_adapters(None)
        dropouts = tuple(self._p(adapter) for adapter in adapters)
        scalings = tuple(self.scaling[adapter] for adapter in adapters)
        held = [s for s in scalings if isinstance(s, Tensor)] + list(self.parameters())
        numbers = tuple(s for s in scalings if not isinstance(s, Tensor))
        return (self.training, *adapters, *dropouts, *numbers, *map(mark, held))

    def _acting_adapters(self, rows: Sequence[str] | None) -> list[str]:
        """The adapters that this call adds to the base: none where they are disabled or merged."""
        if self._is_off() or (self.merged_adapters and rows is None):
            return []
        there = self._modules["lora_A"]._modules
        if rows is not None:
            return [name for name in dict.fromkeys(rows) if name in there and name != _BASE_ROWS]
        active = self._active_adapter
        return [name for name in ([active] if isinstance(active, str) else active) if name in there]

    def _is_off(self) -> bool:
        """Whether adapters are disabled, in this call."""
        flag = self._disable_adapters
        return flag if not flag and not self._asks else not switching.is_on(self, not flag)

    def _why_own(self, x: Any, adapters: list[str], rows: Any, args: Any, kwargs: Any) -> str | None:
        base = self._modules["base_layer"]
        reason = why_call(x, args, kwargs) or why_base(base)
        for adapter in adapters:
            reason = reason or why_adapter(self, adapter)
        reason = reason or why_dtypes(self, x, own_parameter(base, "weight"), adapters)
        if reason is not None or rows is not None or (len(adapters) == 1 and not self.lora_variant):
            return reason
        dropout = any(self._p(name) > 0.0 for name in adapters)
        reason = peft_dora.why_together(self, x, adapters, dropout) if self.lora_variant else None
        if reason is None and dropout and len(adapters) > 1:
            return "dropout acts on several active adapters, each with a mask of its own"
        return reason

    def _by_peft(self, path: str, x: Any, args: Any, kwargs: Any) -> Tensor:
        self._count(path)
        flag = self._disable_adapters
        off = self._is_off()
        if off == flag:
            y: Tensor = self._pefts.forward(self, x, *args, **kwargs)
            return y
        self._disable_adapters = off  # PEFT's forward reads it, and a checkpoint runs this call again as it was
        try:
            return self._pefts.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            self._disable_adapters = flag

    def _count(self, path: str) -> None:
        if not torch.compiler.is_compiling():
            counter(self)[path] += 1

    def _fused(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        return run_branch(x, self._branch(adapters), self._p(adapters[0]))

    def _branch(self, adapters: Sequence[str]) -> Branch:
        base = self._modules["base_layer"]
        weight, bias = own_parameter(base, "weight"), own_parameter(base, "bias")
        kind: type[Branch] = Branch
        if type(base) is not nn.Linear or type(weight) not in PLAIN_TENSORS:
            if (packed := known.packed(base)) is not None:
                weight, kind = packed, PackedBranch
            elif is_transposed(base):
                weight = weight.t()
        lora_a, lora_b, scaling = self._factors(adapters)
        for name in adapters:
            lora_bias = own_parameter(self._modules["lora_B"]._modules[name], "bias")
            if lora_bias is not None:
                term = lora_bias * self.scaling[name]
                bias = term if bias is None else bias + term
        gains = None
        if self.lora_variant and peft_dora.is_dora(self, last := adapters[-1]):
            own = (lora_a, lora_b, scaling) if len(adapters) == 1 else self._factors([last])
            gains = peft_dora.gains(self, last, weight, *own)
        return kind(weight, lora_a, lora_b, bias, scaling, gains)

    def _fused_rows(self, x: Tensor, rows: Sequence[str], adapters: list[str]) -> Tensor:
        """A mixed batch: the i-th entry of x's first dimension takes the adapter ``rows[i]``, or none."""
        if len(adapters) == 1 and all(name == adapters[0] for name in rows):
            return self._fused(x, adapters)
        b_modules = self._modules["lora_B"]._modules
        ranks = [own_parameter(b_modules[name], "weight").shape[1] for name in adapters]
        plain = all(self._p(name) == 0.0 and own_parameter(b_modules[name], "bias") is None for name in adapters)
        if plain and 2 * sum(ranks) * (self.in_features + self.out_features) <= self.in_features * self.out_features:
            return self._rows_in_one_pass(x, rows, adapters, ranks)
        return self._rows_by_group(x, rows, adapters)

    def _rows_in_one_pass(self, x: Tensor, rows: Sequence[str], adapters: list[str], ranks: list[int]) -> Tensor:
        """x and W are read once for all rows; h is zero where a rank is not of the row's adapter.

        It costs M (K + N) times the sum of all ranks, so it is for ranks that are small beside the base product.
        """
        y = self.base_layer(x)
        lora_a, lora_b, scaling = self._factors(adapters)
        number = {name: i for i, name in enumerate(adapters)}
        of_row = torch.tensor([number.get(name, -1) for name in rows], device=x.device)
        of_rank = torch.tensor([i for i, r in enumerate(ranks) for _ in range(r)], device=x.device)
        others = of_row.unsqueeze(1) != of_rank  # (rows, R)
        wide = adapter_dtype(y.dtype)
        device_type = device_type_of(x)
        with torch.autocast(device_type, enabled=False) if is_autocast_enabled(device_type) else nullcontext():
            h = F.linear(x.to(wide), lora_a.to(wide))  # (rows, ..., R)
            # Set to zero, not multiplied by it: an overflow in another adapter's h would be NaN in this row.
            h = h.masked_fill(others.view(len(rows), *[1] * (x.dim() - 2), -1), 0.0).flatten(0, -2)
            add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
            return add(y.flatten(0, -2).to(wide), h, lora_b.to(wide).t(), alpha=scaling).to(y.dtype).view_as(y)

    def _rows_by_group(self, x: Tensor, rows: Sequence[str], adapters: list[str]) -> Tensor:
        """One fused product for the rows of each adapter."""
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(rows):
            groups.setdefault(name if name in adapters else _BASE_ROWS, []).append(row)
        parts = []
        for name, group in groups.items():
            part = x[group]
            parts.append(self.base_layer(part) if name == _BASE_ROWS else self._fused(part, [name]))
        order = [row for group in groups.values() for row in group]
        places = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(parts)[places]

    def _factors(self, adapters: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """A (R, K), B (N, R) and s, R being the sum of the ranks; scalings that differ, or are tensors, go into B."""
        a_modules, b_modules = self._modules["lora_A"]._modules, self._modules["lora_B"]._modules
        scaling = self.scaling[adapters[0]]
        if len(adapters) == 1 and not isinstance(scaling, Tensor):
            name = adapters[0]
            return own_parameter(a_modules[name], "weight"), own_parameter(b_modules[name], "weight"), scaling
        bs = [own_parameter(b_modules[name], "weight") for name in adapters]
        bs, scaling = as_one(bs, [self.scaling[name] for name in adapters])
        return torch.cat([own_parameter(a_modules[name], "weight") for name in adapters]), torch.cat(bs, 1), scaling

    def _p(self, adapter: str) -> float:
        """The dropout probability that acts now: PEFT's module knows it, and its mode."""
        dropout = self._modules["lora_dropout"]._modules[adapter]
        if type(dropout) is not nn.Dropout or not dropout.training:
            return 0.0
        return dropout.p if self.training or adapter not in self.lora_variant else 0.0  # DoRA asks the layer's mode too

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_shared", None)  # who holds the layers that run together copies them, and joins them again
        return state

    @property
    def problem(self) -> Problem:
        """What :func:`lora_kernels.explain` is asked about."""
        adapters = self._acting_adapters(None)
        r = sum(own_parameter(self.lora_A[name], "weight").shape[0] for name in adapters) or None
        base = self.get_base_layer()
        weight, p = own_parameter(base, "weight"), max((self._p(name) for name in adapters), default=0.0)
        sizes = self.in_features, self.out_features, r
        if (packed := known.packed(base)) is not None:
            dtype = packed.dtype or next(self.lora_A.parameters()).dtype
            aside, codes = f"{IN_PARTS} {of_packed(packed.kernels)}", number_of(packed.layout)
            return Problem(weight.device.type, dtype, *sizes, p, False, aside, codes=codes)
        aside, others = IN_PARTS if any(name in self.lora_variant for name in adapters) else "", NO_OTHERS
        if not aside and self._shared is not None:
            shared, index = self._shared
            aside, others = shared.told(index)
        return Problem(weight.device.type, weight.dtype, *sizes, p, is_transposed(self.base_layer), aside, others)

    def __repr__(self) -> str:
        text: str = self._pefts.__repr__(self)
        return text.replace(f"lora.{type(self).__name__}", f"lora.{self._pefts.__name__}[fused]", 1)


OVER_PEFTS = {name: vars(FusedForward)[name] for name in ("forward", "__getstate__", "__repr__")}


class FusedLoraLinear(Linear, FusedForward):  # type: ignore[misc]
    r"""PEFT's ``lora.Linear`` whose forward is one fused product for all active adapters.

    .. math:: y = x W^\top + b + \sum_i s_i\,(\mathrm{drop}_i(x) A_i^\top) B_i^\top

    With PEFT's DoRA as the last of them, its rows are scaled: :mod:`lora_kernels.peft.dora`.

    Everything but ``forward`` is PEFT's: names, Parameters, saving, merging, adding and switching adapters. Adapters,
    scalings and ranks are read on each call. The ranks of several active adapters are concatenated into one pass; a
    mixed batch (``adapter_names``) takes one base product and one low-rank product for all adapters in it, or one fused
    product for the rows of each. What the operators cannot take goes through PEFT's own forward, call by call, and is
    counted with its reason: see :func:`lora_kernels.peft.calls`.

    Instances come from :func:`~lora_kernels.fuse_peft`, or from :func:`~lora_kernels.peft.with_fused_layers`.
    """

    _pefts = Linear
    forward, __getstate__, __repr__ = OVER_PEFTS.values()


_CLASSES: dict[type, type] = {
    Linear: FusedLoraLinear,
    ParamWrapper: FusedParamWrapper,
}  # by PEFT's class, the fused one

_QUANTIZED = (
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
)


def _fused_class(kind: type) -> type | None:
    """The fused class for a class of PEFT's; None where there is none. Nothing is imported for it."""
    if kind not in _CLASSES and kind in (getattr(sys.modules.get(place), name, None) for place, name in _QUANTIZED):
        name = f"FusedLora{kind.__name__}"
        own = {"__module__": __name__, "_pefts": kind, **OVER_PEFTS}
        globals()[name] = _CLASSES[kind] = type(name, (kind, FusedForward), own)  # where a pickle looks
    return _CLASSES.get(kind)


FUSED_CLASSES = (
    FusedForward,
    FusedParamWrapper,
)  # a fused class has one of them, and ``_pefts``


def why_not_fusable(module: Any) -> str | None:
    """Why one of PEFT's LoRA layers stays PEFT's own for good, or None if it can become a ``FusedLoraLinear``."""
    kind = type(module)
    if kind is ParamWrapper:
        return why_not_fusable_experts(module)
    if _fused_class(kind) is None:
        return f"it is a {kind.__module__.rpartition('.')[2]}.{kind.__name__}; only lora.Linear itself is fused"
    if "forward" in vars(module):
        return "it has a forward of its own on the instance (accelerate's offloading and X-LoRA do that)"
    if (holder := storage.owner(module.base_layer)) in (storage.FSDP1, storage.ZERO3):
        return f"{holder} holds the values of its base weight; call fuse_peft before the model is distributed"
    return why_base(module.base_layer)


def become_fused(module: Any) -> None:
    """Makes ``module`` the fused class of its kind; nothing else of it changes."""
    module.__class__ = _fused_class(type(module))
    counter(module)


def build_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> FusedLoraLinear | None:
    """What PEFT calls, for a config of ``with_fused_layers``, to put a layer around ``target``.

    None where no fused layer is possible: PEFT then asks its own dispatchers.
    """
    if kwargs.get("parameter_name") is not None or why_base(target) is not None:
        return None
    layer: FusedLoraLinear = dispatch_default(target, adapter_name, config=config, **kwargs)
    become_fused(layer)
    return layer


def create_fused(tuner: Any, config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
    """``tuner._create_new_module`` for the class ``tuner``, its ``lora.Linear`` layers fused."""
    layer = tuner._create_new_module(config, adapter_name, target, **kwargs)
    if why_not_fusable(layer) is None:
        become_fused(layer)
    return layer
