"""``FusedParamWrapper``: PEFT's ``ParamWrapper`` around stacked experts, without building W + s B A for each expert.

PEFT nests a wrapper for each adapted Parameter of a module. The outermost one computes for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn

from .. import switching
from ..dispatch import COMPUTE_DTYPES
from ..experts.peft_form import from_peft
from ..experts.problem import Adapter
from ..experts.run import run, stacked
from ..experts.suitable import targets, why_not_experts
from ..tensors import is_plain
from .conditions import hooked, own_parameter, why_call
from .report import BASE, FUSED, counter
from .scalings import as_one

__all__ = ["FusedParamWrapper", "ParamWrapper", "why_not_fusable_experts"]

ParamWrapper: Any = getattr(peft_layers, "ParamWrapper", type("NoParamWrapper", (nn.Module,), {}))  # since PEFT 0.17


class FusedParamWrapper(ParamWrapper):  # type: ignore[misc]
    r"""PEFT's ``ParamWrapper`` of a mixture's stacked experts: of each expert e's rows

    .. math:: y_e = x_e W_e^\top + b_e + \sum_i s_i (x_e A_{i,e}^\top) B_{i,e}^\top

    Everything but ``forward`` is PEFT's: names, Parameters, saving, merging, adding and switching adapters.
    """

    _pefts: ClassVar[Any] = ParamWrapper
    _disable_adapters: bool
    _asks: bool = False  # whether PEFT's flag alone does not tell if adapters act; see switching.py

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(T, H) of tokens (T, H), their experts (T, k) and weights (T, k); arguments as the experts module's."""
        chain = list(wrappers(self))
        acting = [wrapper for wrapper in chain if wrapper._acting()]
        if not acting:
            return self._by_peft(BASE, x, args, kwargs)
        if reason := why_own(chain, acting, x, args, kwargs):
            return self._by_peft(reason, x, args, kwargs)
        self._count(FUSED)
        adapters = {wrapper.parameter_name: wrapper._adapter() for wrapper in acting}
        return run(chain[-1].base_layer, x, args[0], args[1], adapters, {})

    def _acting(self) -> list[str]:
        """The adapters that this call adds: none where they are disabled or merged."""
        if self._is_off() or self.merged_adapters:
            return []
        there = self._modules["lora_A"]._modules
        return [name for name in self.active_adapters if name in there]

    def _is_off(self) -> bool:
        flag: bool = self._disable_adapters
        return flag if not flag and not self._asks else not switching.is_on(self, not flag)

    def _adapter(self) -> Adapter:
        """A (E, R, K), B (E, N, R) and s; of several adapters R is the sum of the ranks."""
        acting = self._acting()
        pairs = [from_peft(*self._weights(name), self.num_experts) for name in acting]
        bs, scaling = as_one([b for _, b in pairs], [self.scaling[name] for name in acting])
        if len(pairs) == 1:
            return Adapter(pairs[0][0], bs[0], scaling)
        return Adapter(torch.cat([a for a, _ in pairs], 1), torch.cat(bs, 2), scaling)

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = self._modules["lora_A"]._modules[name], self._modules["lora_B"]._modules[name]
        return own_parameter(a, "weight"), own_parameter(b, "weight")

    def _by_peft(self, path: str, x: Any, args: Any, kwargs: Any) -> Tensor:
        self._count(path)
        flag, off = self._disable_adapters, self._is_off()
        self._disable_adapters = off  # PEFT's forward reads it, and a checkpoint runs this call again as it was
        try:
            return ParamWrapper.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            self._disable_adapters = flag

    def _count(self, path: str) -> None:
        if not torch.compiler.is_compiling():
            counter(self)[path] += 1


FusedParamWrapper.__name__ = ParamWrapper.__name__  # by which PEFT knows it, when another adapter is added


def wrappers(outermost: Any) -> Iterator[Any]:
    """The wrappers of one module, from the outermost one."""
    while isinstance(outermost, ParamWrapper):
        yield outermost
        outermost = outermost.base_layer


def why_own(
    chain: Sequence[Any], acting: Sequence[Any], x: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Why this call is PEFT's own matter; None if it is not."""
    if kwargs or len(args) != 2:
        return "the call has arguments that only the experts module knows"
    if not all(isinstance(wrapper, FusedParamWrapper) for wrapper in chain):
        return "a wrapper within it is not fused"
    if any(hooked(wrapper) for wrapper in chain[1:]) or hooked(chain[-1].base_layer):
        return "a module within it has hooks"
    if len({wrapper._is_off() for wrapper in chain}) > 1:
        return "adapters are disabled in a part of its wrappers"
    base = chain[-1].base_layer
    reason = why_call(x, (), {}) or why_not_experts(base)
    if reason is None and any(getattr(base, name).requires_grad for name in targets(base)):
        return "a weight of its experts trains"
    for wrapper in acting:
        reason = reason or next(filter(None, (_why_adapter(wrapper, name) for name in wrapper._acting())), None)
    return reason


def _why_adapter(wrapper: Any, name: str) -> str | None:
    lora_a, lora_b = (wrapper._modules[f]._modules[name] for f in ("lora_A", "lora_B"))
    if type(lora_a).forward is not nn.Linear.forward or type(lora_b).forward is not nn.Linear.forward:
        return "lora_A or lora_B is wrapped"
    if hooked(lora_a) or hooked(lora_b):
        return "a module within it has hooks"
    a, b = wrapper._weights(name)
    if not is_plain(a) or not is_plain(b) or a.dtype not in COMPUTE_DTYPES or b.dtype not in COMPUTE_DTYPES:
        return "lora_A or lora_B is not a plain matrix"
    e, n, k = stacked(wrapper.get_base_layer(), wrapper.parameter_name).shape
    r = wrapper.r[name]
    if tuple(a.shape) != (e * r, k) or tuple(b.shape) != (n, r * e):
        return "its matrices are laid out as those of an older PEFT"
    return None


def why_not_fusable_experts(wrapper: Any) -> str | None:
    """Why one of PEFT's ``ParamWrapper`` layers stays PEFT's own for good, or None."""
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    if reason := why_not_experts(base):
        return f"it is a lora.ParamWrapper, and {reason.rstrip('.')}"
    if name not in targets(base):
        return f"it is a lora.ParamWrapper of {name!r}, and only {' and '.join(targets(base))} are fused"
    return None
